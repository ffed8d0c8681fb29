// Matrix products of the linear layers, by cuBLASLt. All matrices row-major, W as stored: (N,K).
//   forward    y (M,N)  = x (M,K) w^T            X in, X out
//   residual   y (M,N)  = residual + x w^T       X in, float in and out: the residual stream is never rounded to X
//   dgrad      dx (M,K) (+)= dy (M,N) w          X in, X out
//   wgrad      dw (N,K) += dy^T x                X in, float in and out: micro-steps accumulate in fp32
// X = floatX. Products accumulate in fp32 (CUBLAS_COMPUTE_32F: no TF32 when X is float). 2 M N K flops each; the floor is the
// tensor cores' peak except where K or N is small (x_proj, dt_proj), which are bound by memory.
//
// cuBLASLt thinks in columns: a row-major (r,c) matrix with row stride ld is its column-major (c,r) with the same ld. Hence
//   forward    y^T (N,M)  =        A = w (K,N) transposed,  B = x (K,M)                      "TN"
//   dgrad      dx^T (K,M) =        A = w (K,N),             B = dy (N,M)                     "NN"
//   wgrad      dw^T (K,N) =        A = x (K,M),             B = dy (N,M) transposed          "NT"
//
// Everything cuBLASLt needs for a call (descriptors, layouts, algorithm) is a Plan, made at the first call of a shape and found by
// hashing after that. The heuristic's first answer is taken, never a timing, and split sums that would be rounded to X on the
// way are forbidden, so two runs give the same bits on the same GPU and library.
#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>

#include <cublasLt.h>

#include "device.cuh"

namespace gpu {

inline void cublas_check(cublasStatus_t status, const char* what, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) fail("%s:%d: cuBLASLt: %s: %s", file, line, what, cublasLtGetStatusString(status));
}
#define CUBLAS_CHECK(call) ::gpu::cublas_check((call), #call, __FILE__, __LINE__)

template <class T> constexpr cudaDataType_t CUDA_TYPE = sizeof(T) == 2 ? CUDA_R_16BF : CUDA_R_32F;

// D (m,n) = op(A) op(B) + beta C, column-major, sum over k: all that decides which algorithm is right
struct MatmulShape {
    bool transpose_a, transpose_b, accumulate, float_out;
    int align_a, align_b, align_c, align_d;   // bytes, a power of two up to 256
    int64_t m, n, k, lda, ldb, ldc;           // C and D share ldc
    bool operator==(const MatmulShape&) const = default;
};

struct MatmulShapeHash {
    size_t operator()(const MatmulShape& s) const {
        uint64_t h = s.transpose_a | s.transpose_b << 1 | s.accumulate << 2 | s.float_out << 3;
        for (int64_t x : {(int64_t)s.align_a, (int64_t)s.align_b, (int64_t)s.align_c, (int64_t)s.align_d, s.m, s.n, s.k, s.lda, s.ldb, s.ldc}) {
            h = (h ^ (uint64_t)x) * 0x9e3779b97f4a7c15ull;
            h ^= h >> 29;
        }
        return h;
    }
};

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
    std::unordered_map<MatmulShape, MatmulPlan, MatmulShapeHash> plans;

    Matmul() {
        CUBLAS_CHECK(cublasLtCreate(&handle));
        workspace = device_alloc(WORKSPACE_BYTES, "the cuBLASLt workspace");
    }
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;
    ~Matmul() {
        for (auto& [shape, plan] : plans) {
            cublasLtMatrixLayoutDestroy(plan.a);
            cublasLtMatrixLayoutDestroy(plan.b);
            cublasLtMatrixLayoutDestroy(plan.c);
            cublasLtMatmulDescDestroy(plan.operation);
        }
        cudaFree(workspace);   // no check: a destructor must not throw
        if (handle) cublasLtDestroy(handle);
    }
};

inline int pointer_alignment(const void* p) {
    const uintptr_t bits = (uintptr_t)p | 256;
    return (int)(bits & -bits);
}

// Candidates for a shape, the heuristic's best first. Returns how many.
inline int matmul_candidates(const Matmul& matmul, const MatmulPlan& plan, const MatmulShape& shape, bool relaxed, cublasLtMatmulHeuristicResult_t* results, int count) {
    cublasLtMatmulPreference_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    // Partial sums over k stay fp32: reduced from the workspace, or in place where the output itself is fp32.
    const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | (shape.float_out ? CUBLASLT_REDUCTION_SCHEME_INPLACE : 0);
    const int in_bytes = sizeof(floatX), out_bytes = shape.float_out ? sizeof(float) : sizeof(floatX);
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)Matmul::WORKSPACE_BYTES);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, relaxed ? (uint32_t)CUBLASLT_REDUCTION_SCHEME_MASK : reductions);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)(relaxed ? in_bytes : shape.align_a));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)(relaxed ? in_bytes : shape.align_b));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)(relaxed ? out_bytes : shape.align_c));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)(relaxed ? out_bytes : shape.align_d));
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(matmul.handle, plan.operation, plan.a, plan.b, plan.c, plan.c, preference, count, results, &found);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);   // not supported: nothing found
    return status == CUBLAS_STATUS_SUCCESS ? found : 0;
}

inline MatmulPlan make_matmul_plan(const Matmul& matmul, const MatmulShape& s) {
    MatmulPlan plan;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t op_a = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.a, CUDA_TYPE<floatX>, s.transpose_a ? s.k : s.m, s.transpose_a ? s.m : s.k, s.lda));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.b, CUDA_TYPE<floatX>, s.transpose_b ? s.n : s.k, s.transpose_b ? s.k : s.n, s.ldb));
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&plan.c, s.float_out ? CUDA_R_32F : CUDA_TYPE<floatX>, s.m, s.n, s.ldc));

    constexpr int CANDIDATES = 8;
    cublasLtMatmulHeuristicResult_t results[CANDIDATES];
    int found = matmul_candidates(matmul, plan, s, false, results, CANDIDATES);
    if (!found) found = matmul_candidates(matmul, plan, s, true, results, CANDIDATES);
    // To time the candidates instead: do it here, once, and keep the winner in a file named after GPU and library version. A choice
    // that is timed anew in every run would change the order of additions, and with it the bits, from run to run.
    for (int i = 0; i < found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) {
            plan.algorithm = results[i].algo;
            return plan;
        }
    fail("cuBLASLt has no algorithm for m=%lld n=%lld k=%lld lda=%lld ldb=%lld ldc=%lld %c%c (column-major) on this GPU; choose sizes that are multiples of 8",
         (long long)s.m, (long long)s.n, (long long)s.k, (long long)s.lda, (long long)s.ldb, (long long)s.ldc, s.transpose_a ? 'T' : 'N', s.transpose_b ? 'T' : 'N');
}

// D = op(A) op(B) + C (accumulate) or op(A) op(B), column-major. C may be D.
template <class Out>
inline void run_matmul(Matmul& matmul, Out* d, const Out* c, int64_t ldc, const floatX* a, int64_t lda, bool transpose_a, const floatX* b, int64_t ldb, bool transpose_b,
                       int64_t m, int64_t n, int64_t k, bool accumulate, Stream stream) {
    const MatmulShape shape = {transpose_a, transpose_b, accumulate, sizeof(Out) == 4, pointer_alignment(a), pointer_alignment(b), pointer_alignment(c), pointer_alignment(d),
                               m, n, k, lda, ldb, ldc};
    auto found = matmul.plans.find(shape);
    if (found == matmul.plans.end()) found = matmul.plans.emplace(shape, make_matmul_plan(matmul, shape)).first;
    const MatmulPlan& plan = found->second;
    const float alpha = 1, beta = accumulate ? 1 : 0;
    CUBLAS_CHECK(cublasLtMatmul(matmul.handle, plan.operation, &alpha, a, plan.a, b, plan.b, &beta, c, plan.c, d, plan.c, &plan.algorithm,
                                matmul.workspace, Matmul::WORKSPACE_BYTES, stream));
}

inline void matmul_forward(Matmul& matmul, floatX* y /*(M,N) row stride ldy*/, int64_t ldy, const floatX* x /*(M,K) row stride ldx*/, int64_t ldx,
                           const floatX* w /*(N,K)*/, int64_t M, int N, int K, Stream stream) {
    run_matmul<floatX>(matmul, y, y, ldy, w, K, true, x, ldx, false, N, M, K, false, stream);
}

inline void matmul_residual(Matmul& matmul, float* y /*(M,N)*/, const float* residual /*(M,N), may equal y*/, const floatX* x /*(M,K)*/,
                            const floatX* w /*(N,K)*/, int64_t M, int N, int K, Stream stream) {
    run_matmul<float>(matmul, y, residual, N, w, K, true, x, K, false, N, M, K, true, stream);
}

inline void matmul_dgrad(Matmul& matmul, floatX* dx /*(M,K) row stride lddx*/, int64_t lddx, const floatX* dy /*(M,N) row stride lddy*/, int64_t lddy,
                         const floatX* w /*(N,K)*/, int64_t M, int N, int K, bool accumulate, Stream stream) {
    run_matmul<floatX>(matmul, dx, dx, lddx, w, K, false, dy, lddy, false, K, M, N, accumulate, stream);
}

inline void matmul_wgrad(Matmul& matmul, float* dw /*(N,K) +=*/, const floatX* dy /*(M,N) row stride lddy*/, int64_t lddy,
                         const floatX* x /*(M,K) row stride ldx*/, int64_t ldx, int64_t M, int N, int K, Stream stream) {
    run_matmul<float>(matmul, dw, dw, K, x, ldx, false, dy, lddy, true, K, N, M, true, stream);
}

} // namespace gpu
