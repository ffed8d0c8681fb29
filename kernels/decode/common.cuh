// What the kernels of a decode step share: launches that overlap (decode.cuh says why), and loads.
#pragma once
#include <algorithm>

#include "../device.cuh"

namespace gpu {
namespace decode {

constexpr int MAX_BATCH = 16;
constexpr int THREADS = 256, WARPS = THREADS / WARP;

struct Gpu {
    int sms, shared, major;                // multiprocessors; bytes of shared memory that a block may have; compute capability
    bool dependent_launch;                 // kernels start before the one in front of them has ended
    int64_t l2_ahead = 24 << 20;           // bytes of weights that a kernel asks L2 for before its input is there
};
inline Gpu& gpu() {                        // may be changed by a benchmark
    static Gpu g = [] {
        int device = 0, shared = 0, major = 0;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        return Gpu{multiprocessors(), shared, major, major >= 9};
    }();
    return g;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dependent launches and loads

__device__ inline void wait_for_input() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline uint4 load_weights(const void* p) {          // read once: past L1
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ inline void prefetch_l2(const void* p, unsigned bytes /*of 16*/) {
#if __CUDA_ARCH__ >= 900
    if (bytes) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }
__device__ inline float load_fresh(const __nv_bfloat16* p) {
    const unsigned short bits = __ldcg((const unsigned short*)p);
    return __bfloat162float(__ushort_as_bfloat16(bits));
}
template <class X> __device__ inline float round_to(float v) { return to_float(from_float<X>(v)); }

// The sum over LANES neighbouring lanes, in each of them. mask: the lanes that come here
template <int LANES> __device__ inline float lanes_sum(float x, unsigned mask = 0xffffffffu) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(mask, x, o);
    return x;
}

// A launch that may begin before the kernel in front of it has ended. cluster: blocks that run together
template <class Kernel, class... Args>
inline void launch_clusters(Kernel kernel, dim3 grid, int cluster, int threads, size_t shared, Stream stream, Args... args) {
    if (shared > 48 * 1024) CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attributes[2]{};
    config.attrs = attributes;
    if (gpu().dependent_launch) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {(unsigned)cluster, 1, 1};
    }
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}
template <class Kernel, class... Args> inline void launch(Kernel kernel, dim3 grid, int threads, size_t shared, Stream stream, Args... args) {
    launch_clusters(kernel, grid, 1, threads, shared, stream, args...);
}

} // namespace decode
} // namespace gpu
