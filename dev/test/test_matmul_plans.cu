// The file of matrix products' algorithms: what is written is read; what is broken, of another GPU or not writable is said and left.
#include "../../data/matmul_plans.h"
#include "test_files.h"
#include "test_util.h"

namespace {

const MatmulPlanKey KEY = {"NVIDIA H100 80GB HBM3", 130100, "gpu-bf16"};

MatmulChoices some_choices() {
    MatmulChoices choices;
    choices["TN 6144x32768x1536 ld 1536 1536 6144 align 256 256 256 256"] = {{1, 2, 3, 4, 5, 6, 7, 0xfedcba9876543210ull}, 0.79, 0.83};
    choices["NT 1536x6144x32768 ld 1536 6144 1536 align 256 256 256 256 f32+C"] = {{8, 7, 6, 5, 4, 3, 2, 1}, 0.5, 0.5};
    return choices;
}

void expect_equal(const MatmulChoices& a, const MatmulChoices& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, choice] : a) {
        ASSERT_TRUE(b.count(name)) << name;
        EXPECT_EQ(choice.algorithm, b.at(name).algorithm);
        EXPECT_EQ(choice.ms, b.at(name).ms);
        EXPECT_EQ(choice.first_ms, b.at(name).first_ms);
    }
}

TEST(MatmulPlans, AreReadAsWritten) {
    TempFolder folder;
    EXPECT_EQ(folder_defect(folder.path("deep")), "");
    const std::string path = folder.path("deep/" + plan_file_name(KEY));
    EXPECT_EQ(plan_file_name(KEY), "matmul_NVIDIA_H100_80GB_HBM3_cublaslt130100_gpu-bf16.json");
    EXPECT_TRUE(load_matmul_plans(path, KEY).empty()) << "no file: nothing, and no error";
    save_matmul_plans(path, KEY, some_choices());
    expect_equal(some_choices(), load_matmul_plans(path, KEY));
}

// What another run wrote meanwhile stays: the same products must not change their algorithm from run to run.
TEST(MatmulPlans, AddToTheFile) {
    TempFolder folder;
    const std::string path = folder.path("plans.json");
    save_matmul_plans(path, KEY, some_choices());
    MatmulChoices other;
    other[some_choices().begin()->first] = {{}, 0.1, 0.2};
    other["a new one"] = {{9, 9, 9, 9, 9, 9, 9, 9}, 1, 2};
    save_matmul_plans(path, KEY, other);
    MatmulChoices expected = some_choices();
    expected["a new one"] = other["a new one"];
    expect_equal(expected, load_matmul_plans(path, KEY));
}

TEST(MatmulPlans, BrokenFilesAreNotUsed) {
    const std::string good = matmul_plans_text(KEY, some_choices());
    const auto defect = [&](const std::string& text) {
        MatmulChoices choices;
        const std::string problem = parse_matmul_plans(text, KEY, choices);
        EXPECT_TRUE(choices.empty());
        return problem;
    };
    MatmulChoices choices;
    EXPECT_EQ(parse_matmul_plans(good, KEY, choices), "");
    EXPECT_EQ(defect(""), "it is not JSON");
    EXPECT_EQ(defect(good.substr(0, good.size() / 2)), "it is not JSON");
    for (const char* text : {"[]", "3", "null", "{}", "{\"gpu\": 3}"}) EXPECT_NE(defect(text), "") << text;
    MatmulPlanKey other = KEY;
    other.library = 130200;
    EXPECT_EQ(defect(matmul_plans_text(other, some_choices())), "it was made for another GPU, library or build");
    std::string changed = good;
    changed[changed.find("fedcba98")] = 'e';
    EXPECT_EQ(defect(changed), "its checksum is not that of its plans");
    // every single byte changed: refused, or the same choices (a space within the JSON)
    for (size_t i = 0; i < good.size(); i++) {
        std::string text = good;
        text[i] ^= 1;
        MatmulChoices read;
        if (parse_matmul_plans(text, KEY, read).empty()) expect_equal(some_choices(), read);
        else EXPECT_TRUE(read.empty());
    }
}

TEST(MatmulPlans, AFileThatCannotBeUsedIsSaidInOneLine) {
    TempFolder folder;
    const std::string path = folder.path("plans.json");
    write_text(path, "rubbish");
    testing::internal::CaptureStderr();
    EXPECT_TRUE(load_matmul_plans(path, KEY).empty());
    EXPECT_EQ(testing::internal::GetCapturedStderr(), path + ": it is not JSON; timing matrix products again\n");
    save_matmul_plans(path, KEY, some_choices());          // and it is replaced
    expect_equal(some_choices(), load_matmul_plans(path, KEY));
    EXPECT_EQ(folder_defect(folder.path("a/b")), "");
    EXPECT_NE(folder_defect("").find("home"), std::string::npos);
    EXPECT_NE(folder_defect(path + "/below").find(path), std::string::npos);
    testing::internal::CaptureStderr();
    save_matmul_plans(path + "/below/plans.json", KEY, some_choices());
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_NE(said.find("--plans DIR names another folder"), std::string::npos) << said;
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
}

} // namespace
