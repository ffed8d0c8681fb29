// Before the first step: every matrix product gets its algorithm (data/matmul_plans.h says what is kept where).
#pragma once
#include "../data/matmul_plans.h"
#include "../data/run_log.h"
#include "../kernels/comm.cuh"
#include "common.h"

constexpr const char* PLANS_HELP =
    "Folder that remembers which algorithm each matrix product is fastest with; default: samba.cu in the user's cache folder";

// Every product's algorithm from the file of --plans, or timed now and written there: by the main process, for all.
inline void plan_matmuls(Model& m, const Comm& comm, const std::string& folder, int B, int64_t T, bool several_micro_batches) {
    if (!ON_GPU) return;
    const double start = now_seconds();
    const MatmulPlanKey key = {device_info().name, m.matmul.library(), BUILD_NAME};
    const std::string directory = plan_directory(folder), path = directory.empty() ? "" : directory + "/" + plan_file_name(key);
    size_t known = 0;
    if (comm.main()) {
        if (!path.empty()) m.matmul.choices = load_matmul_plans(path, key);
        known = m.matmul.choices.size();
        rehearse(m, B, T, several_micro_batches);
        if (m.matmul.choices.size() > known && !path.empty()) save_matmul_plans(path, key, m.matmul.choices);
        printf("  products algorithms of %zu, %zu timed now, in %.1f s%s\n", m.matmul.choices.size(), m.matmul.choices.size() - known,
               now_seconds() - start, path.empty() ? "" : ("; " + path).c_str());
        fflush(stdout);
    }
    if (comm.world == 1) return;
    const std::string text = comm.broadcast(comm.main() ? matmul_plans_text(key, m.matmul.choices) : "");
    if (comm.main()) return;
    parse_matmul_plans(text, key, m.matmul.choices);       // of another kind of GPU: this rank times its own
    rehearse(m, B, T, several_micro_batches);
}
