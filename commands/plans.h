// Before the first step: every matrix product gets its algorithm (data/matmul_plans.h says what is kept where).
#pragma once
#include "../data/matmul_plans.h"
#include "../data/run_log.h"
#include "../kernels/comm.cuh"
#include "common.h"

constexpr const char* PLANS_HELP =
    "Folder that remembers which algorithm each matrix product is fastest with; default: samba.cu in the user's cache folder";

// Every product's algorithm from the file of --plans, or timed now and written there: by the main process, for all. Where no file can be
// kept nothing is timed: the heuristic's answers are the same in every run, and timings are not.
inline void plan_matmuls(Model& m, const Comm& comm, const std::string& given, int B, int64_t T, bool several_micro_batches) {
    if (!ON_GPU) return;
    const double start = now_seconds();
    const auto progress = [&] { comm.tick(); };
    const MatmulPlanKey key = {device_info().name, m.matmul.library(), BUILD_NAME};
    const std::string folder = plan_directory(given), path = folder + "/" + plan_file_name(key);
    if (comm.main()) {
        const std::string defect = folder_defect(folder);
        if (!defect.empty())
            fprintf(stderr, "%s; matrix products are not timed without a place for the result, which --plans DIR can name\n", defect.c_str());
        if (!folder.empty()) m.matmul.choices = load_matmul_plans(path, key);
        const size_t known = m.matmul.choices.size();
        rehearse(m, B, T, several_micro_batches, defect.empty(), progress);
        const size_t timed = m.matmul.choices.size() - known;
        if (timed > 0) {
            save_matmul_plans(path, key, m.matmul.choices);
            m.matmul.choices = load_matmul_plans(path, key);       // what later runs will find, if another wrote it meanwhile
            m.matmul.forget_plans();
        }
        printf("  products algorithms of %zu, %zu timed now, in %.1f s; %s\n", m.matmul.choices.size(), timed, now_seconds() - start, path.c_str());
        fflush(stdout);
    }
    if (comm.world == 1) return;
    const std::string text = comm.broadcast(comm.main() ? matmul_plans_text(key, m.matmul.choices) : "");
    if (comm.main()) return;
    parse_matmul_plans(text, key, m.matmul.choices);       // not those of another kind of GPU
    rehearse(m, B, T, several_micro_batches, false, progress);
}
