// Matrix products of the linear layers, by cuBLASLt. All matrices row-major, W as stored: (N,K).
//   forward    y (M,N)  = x (M,K) w^T            X in, X out
//   residual   y (M,N)  = residual + x w^T       X in, float in and out: the residual stream is never rounded to X
//   dgrad      dx (M,K) (+)= dy (M,N) w          X in, X out
//   wgrad      dw (N,K) (+)= dy^T x              X in, float in and out: micro-steps accumulate in fp32
// X = floatX. Products accumulate in fp32 (CUBLAS_COMPUTE_32F: no TF32 when X is float). 2 M N K flops each; the floor is the
// tensor cores' peak except where K or N is small (x_proj, dt_proj), which are bound by memory.
//
// cuBLASLt thinks in columns: a row-major (r,c) matrix with row stride ld is its column-major (c,r) with the same ld. Hence
//   forward    y^T (N,M)  =        A = w (K,N) transposed,  B = x (K,M)                      "TN"
//   dgrad      dx^T (K,M) =        A = w (K,N),             B = dy (N,M)                     "NN"
//   wgrad      dw^T (K,N) =        A = x (K,M),             B = dy (N,M) transposed          "NT"
//
// fp8: where Weights have quantised copies, forward, residual and dgrad quantise x or dy to rows of e4m3 (fp8.cuh) and multiply those with the
// copies, sums times both rows' scales. Hopper's tensor cores want both factors with the sum's index along rows: all three are "TN", dgrad with
// the transposed copy. wgrad stays in floatX: it sums over tokens, so both factors would have to be transposed, which costs what fp8 gains.
// Forward adds up within the tensor cores, whose sums are shorter than fp32: on an H200 0.07% to 0.14% (relative L2) off where k is 1536 to 4096
// and signs are mixed, 2.3% to 6.8% too small where all terms have one sign; rounding the factors makes 4%. dgrad, whose sums are the longest and
// whose results are added up from layer to layer, moves its sums to fp32 registers every few steps: 0.015%, and 0.06% too small.
//
// Everything cuBLASLt needs for a call (descriptors, layouts, algorithm) is a Plan, made at the first call of a shape and found by
// hashing after that. Its algorithm is, in this order: a choice made earlier (data/matmul_plans.h keeps those in a file), the fastest
// of the heuristic's candidates where this is a rehearsal, and else the heuristic's first answer. Split sums that would be rounded
// to X on the way are forbidden. So two runs with the same file give the same bits on the same GPU and library.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include <cublasLt.h>

#include "device.cuh"
#include "fp8.cuh"
#include "matmul/choice.h"
#include "measure.cuh"
#include "quantised.h"

namespace gpu {

inline void cublas_check(cublasStatus_t status, const char* what, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) fail("%s:%d: cuBLASLt: %s: %s", file, line, what, cublasLtGetStatusString(status));
}
#define CUBLAS_CHECK(call) ::gpu::cublas_check((call), #call, __FILE__, __LINE__)

template <class T> constexpr cudaDataType_t CUDA_TYPE = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;

enum class Factors { floatX, fp8, fp8_fast_sums };   // of a product
inline const char* factors_name(Factors f) { return f == Factors::fp8 ? " e4m3" : f == Factors::fp8_fast_sums ? " e4m3 fast" : ""; }

// D (m,n) = op(A) op(B) + beta C, column-major, sum over k: all that decides which algorithm is right
struct MatmulShape {
    bool transpose_a, transpose_b, accumulate, float_out;
    Factors factors;
    int align_a, align_b, align_c, align_d;   // bytes, a power of two up to 256
    int64_t m, n, k, lda, ldb, ldc;           // C and D share ldc
    bool operator==(const MatmulShape&) const = default;
};

struct MatmulShapeHash {
    size_t operator()(const MatmulShape& s) const {
        uint64_t h = s.transpose_a | s.transpose_b << 1 | s.accumulate << 2 | s.float_out << 3 | (uint64_t)s.factors << 4;
        for (int64_t x : {(int64_t)s.align_a, (int64_t)s.align_b, (int64_t)s.align_c, (int64_t)s.align_d, s.m, s.n, s.k, s.lda, s.ldb, s.ldc}) {
            h = (h ^ (uint64_t)x) * 0x9e3779b97f4a7c15ull;
            h ^= h >> 29;
        }
        return h;
    }
};

// "TN 6144x32768x1536 ld 1536 1536 6144 align 256 256 256 256 e4m3 f32+C": op(A) op(B), m x n x k, factors in fp8, an fp32 result, added to C
inline std::string matmul_name(const MatmulShape& s) {
    char name[256];
    snprintf(name, sizeof name, "%c%c %lldx%lldx%lld ld %lld %lld %lld align %d %d %d %d%s%s%s", s.transpose_a ? 'T' : 'N',
             s.transpose_b ? 'T' : 'N', (long long)s.m, (long long)s.n, (long long)s.k, (long long)s.lda, (long long)s.ldb, (long long)s.ldc,
             s.align_a, s.align_b, s.align_c, s.align_d, factors_name(s.factors), s.float_out ? " f32" : "", s.accumulate ? "+C" : "");
    return name;
}

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(MatmulChoice::algorithm));
inline MatmulChoice to_choice(const cublasLtMatmulAlgo_t& algorithm) {
    MatmulChoice choice;
    memcpy(choice.algorithm.data(), &algorithm, sizeof algorithm);
    return choice;
}
inline cublasLtMatmulAlgo_t to_algorithm(const MatmulChoice& choice) {
    cublasLtMatmulAlgo_t algorithm;
    memcpy(&algorithm, choice.algorithm.data(), sizeof algorithm);
    return algorithm;
}

struct MatmulPlan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;   // c describes C and D
    cublasLtMatmulAlgo_t algorithm;
};

// One per stream: calls that share a workspace must be in one stream's order. Not for several threads at once.
struct Matmul {
    static constexpr size_t WORKSPACE_BYTES = 64 << 20;
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    bool rehearsal = false;                       // results do not matter: the candidates of a new shape are timed on its operands
    MatmulChoices choices;
    std::unordered_map<MatmulShape, MatmulPlan, MatmulShapeHash> plans;

    Matmul() {
        CUBLAS_CHECK(cublasLtCreate(&handle));
        workspace = device_alloc(WORKSPACE_BYTES, "the cuBLASLt workspace");
    }
    static int64_t library() { return (int64_t)cublasLtGetVersion(); }
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;
    void forget_plans() {                         // they are made anew from the choices
        for (auto& [shape, plan] : plans) {
            cublasLtMatrixLayoutDestroy(plan.a);
            cublasLtMatrixLayoutDestroy(plan.b);
            cublasLtMatrixLayoutDestroy(plan.c);
            cublasLtMatmulDescDestroy(plan.operation);
        }
        plans.clear();
    }
    ~Matmul() {
        forget_plans();
        cudaFree(workspace);   // no check: a destructor must not throw
        if (handle) cublasLtDestroy(handle);
    }
};

inline int pointer_alignment(const void* p) {
    const uintptr_t bits = (uintptr_t)p | 256;
    return (int)(bits & -bits);
}

// Candidates for a shape, the heuristic's best first. Returns how many.
inline int matmul_candidates(const Matmul& matmul, const MatmulPlan& plan, const MatmulShape& shape, bool relaxed,
                             cublasLtMatmulHeuristicResult_t* results, int count) {
    cublasLtMatmulPreference_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    // Partial sums over k stay fp32: reduced from the workspace, or in place where the output itself is fp32.
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | (shape.float_out ? CUBLASLT_REDUCTION_SCHEME_INPLACE : 0);
    const int in_bytes = shape.factors == Factors::floatX ? sizeof(floatX) : 16, out_bytes = shape.float_out ? sizeof(float) : sizeof(floatX);
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)Matmul::WORKSPACE_BYTES);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, relaxed ? (uint32_t)CUBLASLT_REDUCTION_SCHEME_MASK : reductions);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)(relaxed ? in_bytes : shape.align_a));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)(relaxed ? in_bytes : shape.align_b));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)(relaxed ? out_bytes : shape.align_c));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)(relaxed ? out_bytes : shape.align_d));
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(matmul.handle, plan.operation, plan.a, plan.b, plan.c, plan.c, preference,
                                                                 count, results, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);   // not supported: nothing found
    return status == CUBLAS_STATUS_SUCCESS ? found : 0;
}

inline MatmulPlan describe_matmul(const MatmulShape& s) {
    MatmulPlan plan;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t op_a = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    const bool fp8 = s.factors != Factors::floatX;
    const cudaDataType_t in = fp8 ? CUDA_R_8F_E4M3 : CUDA_TYPE<floatX>;
    if (fp8) {
        const int8_t fast = s.factors == Factors::fp8_fast_sums;
        const int32_t a_scale_a_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &a_scale_a_row, sizeof a_scale_a_row));
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &a_scale_a_row, sizeof a_scale_a_row));
    }
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.a, in, s.transpose_a ? s.k : s.m, s.transpose_a ? s.m : s.k, s.lda));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.b, in, s.transpose_b ? s.n : s.k, s.transpose_b ? s.k : s.n, s.ldb));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.c, s.float_out ? CUDA_R_32F : CUDA_TYPE<floatX>, s.m, s.n, s.ldc));
    return plan;
}

struct MatmulOperands {
    const void *a, *b, *c;
    void* d;
    Stream stream;
    const float *a_scale = nullptr, *b_scale = nullptr;       // fp8
};
// cuBLASLt keeps these addresses in the description
inline void set_scales(const MatmulPlan& plan, const MatmulOperands& o) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &o.a_scale, sizeof o.a_scale));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &o.b_scale, sizeof o.b_scale));
}

inline cublasStatus_t start_matmul(const Matmul& matmul, const MatmulPlan& plan, const cublasLtMatmulAlgo_t& algorithm, bool accumulate,
                                   const MatmulOperands& o) {
    const float alpha = 1, beta = accumulate ? 1 : 0;
    if (o.a_scale) set_scales(plan, o);
    return cublasLtMatmul(matmul.handle, plan.operation, &alpha, o.a, plan.a, o.b, plan.b, &beta, o.c, plan.c, o.d, plan.c, &algorithm,
                          matmul.workspace, Matmul::WORKSPACE_BYTES, o.stream);
}

// ms a call, the mean of `repeats` in a row after one that is not counted; infinity where the algorithm refuses
inline double time_matmul(const Matmul& matmul, const MatmulPlan& plan, const MatmulChoice& choice, bool accumulate, const MatmulOperands& o,
                          int repeats) {
    const cublasLtMatmulAlgo_t algorithm = to_algorithm(choice);
    if (start_matmul(matmul, plan, algorithm, accumulate, o) != CUBLAS_STATUS_SUCCESS) return INFINITY;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CUDA_CHECK(cudaEventRecord(begin, o.stream));
    for (int i = 0; i < repeats; i++) CUBLAS_CHECK(start_matmul(matmul, plan, algorithm, accumulate, o));
    CUDA_CHECK(cudaEventRecord(end, o.stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return ms / repeats;
}

// Every candidate three times; then the best three and the heuristic's first in turns, so that a clock that drifts is fair to all, and each for
// long enough that the GPU's power limit has its say, as in a step: there the frugal one wins. Another than the first must gain half a hundredth.
inline MatmulChoice fastest_matmul(const Matmul& matmul, const MatmulPlan& plan, bool accumulate, const std::vector<MatmulChoice>& candidates,
                                   const MatmulOperands& o) {
    constexpr size_t FINALISTS = 4;
    constexpr int ROUNDS = 3, MOST_CALLS = 40;               // of a product so short, power is no matter
    constexpr double TURN_MS = 8;
    std::vector<std::pair<double, size_t>> order;            // ms, candidate
    for (size_t i = 0; i < candidates.size(); i++) order.push_back({i == 0 ? 0 : time_matmul(matmul, plan, candidates[i], accumulate, o, 3), i});
    std::sort(order.begin(), order.end());
    order.resize(std::min(order.size(), FINALISTS));
    order[0].first = time_matmul(matmul, plan, candidates[0], accumulate, o, 3);
    std::vector<double> means(order.size());
    for (int round = 0; round < ROUNDS; round++)
        for (size_t j = 0; j < order.size(); j++) {
            const auto [ms, i] = order[j];
            if (!std::isfinite(ms)) { means[j] = ms; continue; }                                 // infinity: refused
            const int calls = std::clamp((int)(TURN_MS / ms), 4, MOST_CALLS);
            means[j] += time_matmul(matmul, plan, candidates[i], accumulate, o, calls) / ROUNDS;
        }
    for (size_t j = 0; j < order.size(); j++) order[j].first = means[j];
    const double first_ms = order[0].first;                  // of candidate 0
    const auto best = std::min_element(order.begin(), order.end());
    const auto& chosen = best->first < 0.995 * first_ms ? *best : order[0];
    MatmulChoice choice = candidates[chosen.second];
    choice.ms = chosen.first;
    choice.first_ms = first_ms;
    return choice;
}

inline MatmulPlan make_matmul_plan(Matmul& matmul, const MatmulShape& s, const MatmulOperands& operands) {
    MatmulPlan plan = describe_matmul(s);
    if (operands.a_scale) set_scales(plan, operands);
    const std::string name = matmul_name(s);
    if (const auto made = matmul.choices.find(name); made != matmul.choices.end()) {
        cublasLtMatmulHeuristicResult_t check;
        const cublasLtMatmulAlgo_t algorithm = to_algorithm(made->second);
        const cublasStatus_t status = cublasLtMatmulAlgoCheck(matmul.handle, plan.operation, plan.a, plan.b, plan.c, plan.c, &algorithm, &check);
        if (status == CUBLAS_STATUS_SUCCESS && check.workspaceSize <= Matmul::WORKSPACE_BYTES) {
            plan.algorithm = algorithm;
            return plan;
        }
        fprintf(stderr, "the stored matmul plan for %s does not run here: choosing again\n", name.c_str());
        matmul.choices.erase(made);
    }
    constexpr int CANDIDATES = 32;
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int found = matmul_candidates(matmul, plan, s, false, results, CANDIDATES);
    if (!found) found = matmul_candidates(matmul, plan, s, true, results, CANDIDATES);
    std::vector<MatmulChoice> candidates;                    // the heuristic's best first
    for (int i = 0; i < found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) candidates.push_back(to_choice(results[i].algo));
    if (candidates.empty())
        fail("cuBLASLt has no algorithm for m=%lld n=%lld k=%lld lda=%lld ldb=%lld ldc=%lld %c%c (column-major) on this GPU; "
             "choose sizes that are multiples of 8",
             (long long)s.m, (long long)s.n, (long long)s.k, (long long)s.lda, (long long)s.ldb, (long long)s.ldc,
             s.transpose_a ? 'T' : 'N', s.transpose_b ? 'T' : 'N');
    plan.algorithm = to_algorithm(candidates[0]);
    if (matmul.rehearsal) {
        const MatmulChoice choice = fastest_matmul(matmul, plan, s.accumulate, candidates, operands);
        if (std::isfinite(choice.ms)) {
            plan.algorithm = to_algorithm(choice);
            matmul.choices[name] = choice;
        }
    }
    return plan;
}

inline void run_matmul(Matmul& matmul, const MatmulShape& shape, const MatmulOperands& operands) {
    auto found = matmul.plans.find(shape);
    if (found == matmul.plans.end()) found = matmul.plans.emplace(shape, make_matmul_plan(matmul, shape, operands)).first;
    CUBLAS_CHECK(start_matmul(matmul, found->second, found->second.algorithm, shape.accumulate, operands));
}

// D = op(A) op(B) + C (accumulate) or op(A) op(B), column-major. C may be D.
template <class Out>
inline void run_matmul(Matmul& matmul, Out* d, const Out* c, int64_t ldc, const floatX* a, int64_t lda, bool transpose_a,
                       const floatX* b, int64_t ldb, bool transpose_b, int64_t m, int64_t n, int64_t k, bool accumulate, Stream stream) {
    const MatmulShape shape = {transpose_a, transpose_b, accumulate, sizeof(Out) == 4, Factors::floatX, pointer_alignment(a), pointer_alignment(b),
                               pointer_alignment(c), pointer_alignment(d), m, n, k, lda, ldb, ldc};
    run_matmul(matmul, shape, {a, b, c, d, stream});
}

constexpr double BYTES = sizeof(floatX);

// "wgrad 6144x1536": which product of the weights (N,K)
inline Operation matmul_operation(const char* pass, int64_t M, int N, int K, double bytes, Stream stream) {
    return Operation(std::string(pass) + " " + std::to_string(N) + "x" + std::to_string(K), bytes, 2.0 * M * N * K, stream);
}

// By fp8, with weights (N,K): y (M,N) = [y0 +] x (M,K) w^T, or transposed y (M,K) = x (M,N) w. Rows are contiguous.
template <class Out>
inline void run_fp8(const char* pass, Matmul& matmul, Out* y, const Out* y0 /*null: y =*/, const floatX* x, const Weights& weights, bool transposed,
                    int64_t M, int N, int K, Stream stream) {
    const Quantised &q = weights.input, &w = transposed ? weights.columns : weights.rows;
    const int width = transposed ? K : N, depth = transposed ? N : K;
    if (!weights.input_made) quantise_rows(q, x, M, depth, stream);
    const Operation op = matmul_operation(pass, M, N, K, (double)M * depth + (double)N * K + (y0 ? 2.0 : 1.0) * sizeof(Out) * M * width, stream);
    const Out* c = y0 ? y0 : y;
    const Factors factors = transposed ? Factors::fp8 : Factors::fp8_fast_sums;
    const MatmulShape shape = {true, false, y0 != nullptr, sizeof(Out) == 4, factors, pointer_alignment(w.q), pointer_alignment(q.q),
                               pointer_alignment(c), pointer_alignment(y), width, M, depth, depth, depth, width};
    run_matmul(matmul, shape, {w.q, q.q, c, y, stream, w.scale, q.scale});
}

inline void matmul_forward(Matmul& matmul, floatX* y /*(M,N) row stride ldy*/, int64_t ldy, const floatX* x /*(M,K) row stride ldx*/, int64_t ldx,
                           const Weights& w /*(N,K)*/, int64_t M, int N, int K, Stream stream) {
    if (w.fp8() && ldx == K && ldy == N) return run_fp8<floatX>("forward-fp8", matmul, y, nullptr, x, w, false, M, N, K, stream);
    const Operation op = matmul_operation("forward", M, N, K, BYTES * ((double)M * K + (double)N * K + (double)M * N), stream);
    run_matmul<floatX>(matmul, y, y, ldy, w, K, true, x, ldx, false, N, M, K, false, stream);
}

inline void matmul_residual(Matmul& matmul, float* y /*(M,N)*/, const float* residual /*(M,N), may equal y*/, const floatX* x /*(M,K)*/,
                            const Weights& w /*(N,K)*/, int64_t M, int N, int K, Stream stream) {
    if (w.fp8()) return run_fp8<float>("residual-fp8", matmul, y, residual, x, w, false, M, N, K, stream);
    const Operation op = matmul_operation("residual", M, N, K, BYTES * ((double)M * K + (double)N * K) + 8.0 * M * N, stream);
    run_matmul<float>(matmul, y, residual, N, w, K, true, x, K, false, N, M, K, true, stream);
}

inline void matmul_dgrad(Matmul& matmul, floatX* dx /*(M,K) row stride lddx*/, int64_t lddx, const floatX* dy /*(M,N) row stride lddy*/, int64_t lddy,
                         const Weights& w /*(N,K)*/, int64_t M, int N, int K, bool accumulate, Stream stream) {
    if (w.fp8() && lddx == K && lddy == N && !accumulate) return run_fp8<floatX>("dgrad-fp8", matmul, dx, nullptr, dy, w, true, M, N, K, stream);
    const double bytes = BYTES * ((double)M * N + (double)N * K + (accumulate ? 2.0 : 1.0) * M * K);
    const Operation op = matmul_operation("dgrad", M, N, K, bytes, stream);
    run_matmul<floatX>(matmul, dx, dx, lddx, w, K, false, dy, lddy, false, K, M, N, accumulate, stream);
}

inline void matmul_wgrad(Matmul& matmul, float* dw /*(N,K)*/, const floatX* dy /*(M,N) row stride lddy*/, int64_t lddy,
                         const floatX* x /*(M,K) row stride ldx*/, int64_t ldx, int64_t M, int N, int K, bool accumulate /*dw += or dw =*/,
                         Stream stream) {
    const Operation op = matmul_operation("wgrad", M, N, K, BYTES * ((double)M * N + (double)M * K) + (accumulate ? 8.0 : 4.0) * N * K, stream);
    run_matmul<float>(matmul, dw, dw, K, x, ldx, false, dy, lddy, true, K, N, M, accumulate, stream);
}

} // namespace gpu
