// What differs between a GPU and a CPU build, and nothing else: memory, streams, error checks, the working precision
// `floatX`, and (GPU only) what many kernels use: vector loads, copies, reductions, the sigmoid. Because of this file samba.cuh and
// train_samba.cu contain no #ifdef.
//
//   build                  macro         floatX           Stream
//   make                   -             __nv_bfloat16    cudaStream_t
//   make PRECISION=FP32    SAMBA_FP32    float            cudaStream_t
//   make CPU=1             SAMBA_CPU     float            an empty struct: every call is synchronous
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#ifndef SAMBA_CPU
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Errors. Everything a user can get wrong ends here: one line that names the file, the value and what to do. main()
// prints it and exits with status 1; tests catch it.

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    throw Error(line);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {                                     // [begin, end) of a flat array
    int64_t begin = 0, end = 0;
    int64_t size() const { return std::max<int64_t>(0, end - begin); }
    Range operator&(Range o) const { return {std::max(begin, o.begin), std::max(std::max(begin, o.begin), std::min(end, o.end))}; }
};

struct DeviceInfo {
    std::string name;          // "NVIDIA H100 80GB HBM3" or "CPU, 8 threads"
    int sm_count = 0;          // multiprocessors; threads on a CPU
    int compute_major = 0, compute_minor = 0;
    int64_t total_bytes = 0;   // memory of the device; 0 where unknown
    double peak_bf16 = 0;      // dense bf16 FLOP/s of the data sheet; 0 where unknown, then no % of peak is printed
    double bandwidth = 0;      // memory bytes/s, width times clock; 0 where unknown
    double special_rate = 0;   // exp and its like, evaluations/s; 0 where unknown
};

#ifdef SAMBA_CPU
// =====================================================================================================================
// CPU

using floatX = float;
struct Stream {};
constexpr const char* BUILD_NAME = "cpu-fp32";
constexpr bool ON_GPU = false;

inline void* device_alloc(size_t bytes, const char* what) {
    void* p = std::aligned_alloc(256, (size_t)round_up(bytes ? bytes : 1, 256));
    if (!p) fail("out of memory: %s needs %.2f GiB; use a smaller --micro-batch or --seq-len", what, bytes / 1073741824.0);
    return p;
}
inline void device_free(void* p) { std::free(p); }
inline void* pinned_alloc(size_t bytes) { return device_alloc(bytes, "a host buffer"); }
inline void pinned_free(void* p) { std::free(p); }
inline Stream stream_create() { return {}; }
inline void stream_destroy(Stream) {}
inline void stream_sync(Stream) {}
inline void copy_to_device(void* dst, const void* src, size_t bytes, Stream) { if (bytes) memcpy(dst, src, bytes); }
inline void copy_to_host(void* dst, const void* src, size_t bytes, Stream) { if (bytes) memcpy(dst, src, bytes); }
inline void copy_on_device(void* dst, const void* src, size_t bytes, Stream) { if (bytes) memmove(dst, src, bytes); }
inline void device_zero(void* dst, size_t bytes, Stream) { if (bytes) memset(dst, 0, bytes); }
struct Event {};
inline Event event_create() { return {}; }
inline void event_destroy(Event) {}
inline void event_record(Event, Stream) {}
inline void event_sync(Event) {}
inline void stream_wait(Stream, Event) {}
inline void stream_delay(Stream, int) {}
struct Timer { std::chrono::steady_clock::time_point at; };
inline Timer timer_create() { return {}; }
inline void timer_destroy(Timer) {}
inline void timer_record(Timer& timer, Stream) { timer.at = std::chrono::steady_clock::now(); }
inline double timer_ms(const Timer& from, const Timer& to) { return std::chrono::duration<double, std::milli>(to.at - from.at).count(); }
using Graph = std::function<void()>;
template <class Work> Graph graph_capture(Stream, const Work& work) { return work; }          // nothing to save on a CPU: the work itself
inline void graph_launch(const Graph& graph, Stream) { graph(); }
inline void graph_destroy(Graph&) {}
inline void device_fill(void* dst, int byte, size_t bytes, Stream) { if (bytes) memset(dst, byte, bytes); }
inline std::string device_identity() { return ""; }
inline void device_select(int) {}
inline int device_count() { return 0; }
inline size_t device_free_bytes() { return SIZE_MAX; }
inline DeviceInfo device_info() {
    DeviceInfo info;
    info.sm_count = (int)std::thread::hardware_concurrency();
    info.name = "CPU, " + std::to_string(info.sm_count) + " threads";
    return info;
}

#else
// =====================================================================================================================
// GPU

#ifdef SAMBA_FP32
using floatX = float;
constexpr const char* BUILD_NAME = "gpu-fp32";
#else
using floatX = __nv_bfloat16;
constexpr const char* BUILD_NAME = "gpu-bf16";
#endif
using Stream = cudaStream_t;
constexpr bool ON_GPU = true;

inline void cuda_check(cudaError_t status, const char* file, int line) {
    if (status != cudaSuccess) fail("%s:%d: CUDA: %s", file, line, cudaGetErrorString(status));
}
#define CUDA_CHECK(call) cuda_check((call), __FILE__, __LINE__)
#define LAUNCH_CHECK() cuda_check(cudaGetLastError(), __FILE__, __LINE__)   // after every <<<>>>

inline int multiprocessors() {             // of this GPU
    int device = 0, count = 1;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

inline void* device_alloc(size_t bytes, const char* what) {
    void* p = nullptr;
    if (cudaMalloc(&p, bytes ? bytes : 1) != cudaSuccess) {
        size_t free_bytes = 0, total = 0;
        cudaGetLastError();
        cudaMemGetInfo(&free_bytes, &total);
        fail("out of GPU memory: %s needs %.2f GiB and %.2f of %.2f GiB are free; use a smaller --micro-batch or --seq-len, or --recompute full",
             what, bytes / 1073741824.0, free_bytes / 1073741824.0, total / 1073741824.0);
    }
    return p;
}
inline void device_free(void* p) { CUDA_CHECK(cudaFree(p)); }
inline void* pinned_alloc(size_t bytes) { void* p = nullptr; CUDA_CHECK(cudaMallocHost(&p, bytes ? bytes : 1)); return p; }
inline void pinned_free(void* p) { CUDA_CHECK(cudaFreeHost(p)); }
inline Stream stream_create() { Stream s; CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); return s; }
inline void stream_destroy(Stream s) { CUDA_CHECK(cudaStreamDestroy(s)); }
inline void stream_sync(Stream s) { CUDA_CHECK(cudaStreamSynchronize(s)); }
inline void copy_bytes(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind, Stream s) {
    CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, kind, s));
}
inline void copy_to_device(void* dst, const void* src, size_t bytes, Stream s) { copy_bytes(dst, src, bytes, cudaMemcpyHostToDevice, s); }
inline void copy_to_host(void* dst, const void* src, size_t bytes, Stream s) { copy_bytes(dst, src, bytes, cudaMemcpyDeviceToHost, s); }
inline void copy_on_device(void* dst, const void* src, size_t bytes, Stream s) { copy_bytes(dst, src, bytes, cudaMemcpyDeviceToDevice, s); }
inline void device_zero(void* dst, size_t bytes, Stream s) { CUDA_CHECK(cudaMemsetAsync(dst, 0, bytes, s)); }
using Event = cudaEvent_t;
inline Event event_create() { Event e; CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming)); return e; }
inline void event_destroy(Event e) { CUDA_CHECK(cudaEventDestroy(e)); }
inline void event_record(Event e, Stream s) { CUDA_CHECK(cudaEventRecord(e, s)); }
inline void event_sync(Event e) { CUDA_CHECK(cudaEventSynchronize(e)); }
inline void stream_wait(Stream s, Event e) { CUDA_CHECK(cudaStreamWaitEvent(s, e, 0)); }       // what the stream does next waits for the event
inline void stream_delay(Stream s, int microseconds) {                                         // for tests of the order between streams
    const auto wait = [](void* us) { std::this_thread::sleep_for(std::chrono::microseconds((intptr_t)us)); };
    CUDA_CHECK(cudaLaunchHostFunc(s, wait, (void*)(intptr_t)microseconds));
}
struct Timer { cudaEvent_t event; };                                                           // a mark in a stream, with the time it was passed at
inline Timer timer_create() { Timer t; CUDA_CHECK(cudaEventCreate(&t.event)); return t; }
inline void timer_destroy(Timer t) { cudaEventDestroy(t.event); }
inline void timer_record(Timer& t, Stream s) { CUDA_CHECK(cudaEventRecord(t.event, s)); }
inline double timer_ms(const Timer& from, const Timer& to) {                                   // waits for `to`
    float ms = 0;
    CUDA_CHECK(cudaEventSynchronize(to.event));
    CUDA_CHECK(cudaEventElapsedTime(&ms, from.event, to.event));
    return ms;
}

// Everything that work() enqueues on the stream, without running it. One launch then replays it all.
using Graph = cudaGraphExec_t;
template <class Work> Graph graph_capture(Stream s, const Work& work) {
    cudaGraph_t graph = nullptr;
    Graph exec = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));                   // other threads may do as they like
    try {
        work();
    } catch (...) {
        cudaStreamEndCapture(s, &graph);
        if (graph) cudaGraphDestroy(graph);
        throw;
    }
    CUDA_CHECK(cudaStreamEndCapture(s, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    return exec;
}
inline void graph_launch(Graph graph, Stream s) { CUDA_CHECK(cudaGraphLaunch(graph, s)); }
inline void graph_destroy(Graph& graph) { cudaGraphExecDestroy(graph); }
inline void device_fill(void* dst, int byte, size_t bytes, Stream s) { CUDA_CHECK(cudaMemsetAsync(dst, byte, bytes, s)); }
inline std::string device_identity() {                                                         // of the GPU in use, different for each in a machine
    int index = 0;
    char bus[64] = "";
    CUDA_CHECK(cudaGetDevice(&index));
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, index));
    return bus;
}
inline void device_select(int index) { CUDA_CHECK(cudaSetDevice(index)); }
inline int device_count() { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0; }
inline size_t device_free_bytes() { size_t f = 0, t = 0; CUDA_CHECK(cudaMemGetInfo(&f, &t)); return f; }

inline DeviceInfo device_info() {
    int index = 0;
    CUDA_CHECK(cudaGetDevice(&index));
    cudaDeviceProp p;
    CUDA_CHECK(cudaGetDeviceProperties(&p, index));
    DeviceInfo info;
    info.name = p.name;
    info.sm_count = p.multiProcessorCount;
    info.compute_major = p.major;
    info.compute_minor = p.minor;
    info.total_bytes = (int64_t)p.totalGlobalMem;
    int khz = 0, memory_khz = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, index));
    CUDA_CHECK(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, index));
    info.bandwidth = 2.0 * memory_khz * 1e3 * p.memoryBusWidth / 8;                            // two transfers a clock
    info.special_rate = 16.0 * p.multiProcessorCount * khz * 1e3;
    // Dense bf16 tensor-core peaks of NVIDIA's data sheets. The first name that occurs in the device's name counts.
    static const struct { const char* name; double flops; } PEAKS[] = {
        {"H100 PCIe", 756.5e12}, {"H100 NVL", 835e12}, {"H100", 989.4e12}, {"H200", 989.4e12}, {"GH200", 989.4e12},
        {"B200", 2250e12}, {"A100", 312e12}, {"A800", 312e12}, {"A10G", 70e12}, {"A10", 125e12}, {"L40S", 362e12},
        {"L4", 121e12}, {"RTX 4090", 165.2e12}, {"RTX 3090", 71e12}, {"RTX 5090", 209.5e12}};
    for (auto& peak : PEAKS)
        if (info.name.find(peak.name) != std::string::npos) { info.peak_bf16 = peak.flops; break; }
    return info;
}

#ifdef __CUDACC__
// ---------------------------------------------------------------------------------------------------------------------
// Device code shared by the kernels

constexpr int WARP = 32;

// N values of T moved as one aligned load or store of sizeof(T) * N <= 16 bytes
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    T v[N];
    __device__ T& operator[](int i) { return v[i]; }
    __device__ const T& operator[](int i) const { return v[i]; }
};
template <int N, class T> __device__ inline Vec<T, N> load_vec(const T* p) { return *reinterpret_cast<const Vec<T, N>*>(p); }
template <int N, class T> __device__ inline void store_vec(T* p, const Vec<T, N>& v) { *reinterpret_cast<Vec<T, N>*>(p) = v; }

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Copies into shared memory in the background: BYTES (4, 8 or 16) of them; zeros if not live. 16 pass the L1 cache by. A thread's copies since its
// last commit are a group; it waits until no more than PENDING groups are under way.
template <int BYTES> __device__ inline void copy_async(uint32_t to, const void* from, bool live = true) {
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(live ? 16 : 0) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(live ? BYTES : 0), "n"(BYTES) : "memory");
}
template <int BYTES> __device__ inline void copy_async(void* to, const void* from, bool live = true) {
    copy_async<BYTES>(shared_address(to), from, live);
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING = 0> __device__ inline void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __host__ __device__ inline T from_float(float x);
template <> __host__ __device__ inline float from_float<float>(float x) { return x; }
template <> __host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Special-function instructions: 2^x to 2 ulp, 1/x to 1 ulp. Of the ends: exp2_fast(-inf) = 0, reciprocal_fast(inf) = 0.
constexpr float LOG2E = 1.4426950408889634f;
__device__ inline float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ inline float reciprocal_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

// sigma(x) = 1 / (1 + e^-x), in fp32 as exactly as a gate of X values needs it.
//   bf16    4 instructions; relative error at most about 4e-7, and 6e-8 |x| more where x < 0, because x log2(e) is rounded: little beside
//           the 2e-3 of the bf16 that is stored in the end. The library's expf and division are several times as many instructions.
//   float   the library's functions, 3e-7. Decoding takes these for bf16 too: a step makes few gates.
// One function for all kernels, so that what two of them make of the same values has the same bits.
template <class X> __device__ inline float sigmoid(float x) {
    if constexpr (sizeof(X) == 2) return reciprocal_fast(1.f + exp2_fast(-x * LOG2E));
    else return 1.f / (1.f + expf(-x));
}

// Sum over the 32 lanes by a butterfly: every lane gets the same bits.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int o = WARP / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}
// Sum over a block of up to 1024 threads in a fixed order; every thread gets the result. All threads must call it.
__device__ inline float block_sum(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_sum(x);
    __syncthreads();                                   // a previous call's readers are done
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? partial[lane] : 0.f);
}
__device__ inline float block_max(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? partial[lane] : -INFINITY);
}
#endif // __CUDACC__
#endif // SAMBA_CPU
