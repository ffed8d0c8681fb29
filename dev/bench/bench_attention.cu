// Attention: the portable tensor-core path and the Hopper path, forward and backward, checked against each other and (at a
// small size) against the twin in double. TFLOP/s count visible pairs only: 4 hd a pair forward, 10 hd backward.
//
//   nvcc -x cu -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Xcompiler -fopenmp dev/bench/bench_attention.cu -lcublasLt
#include "../../kernels/attention_sm90.cuh"
#include "bench.cuh"

namespace {

using bf16 = __nv_bfloat16;

struct Shape {
    const char* name;
    int B;
    int64_t T;
    int H, G, hd;
    int64_t window;
    int64_t qkv() const { return B * T * (H + 2 * G) * hd; }
    int64_t out() const { return B * T * H * hd; }
    int64_t lse() const { return B * T * H; }
    double pairs() const {
        double sum = 0;
        for (int64_t i = 0; i < T; i++) sum += (double)(window > 0 ? std::min(i + 1, window) : i + 1);
        return sum * B * H;
    }
};

const Shape SMALL = {"small", 2, 333, 4, 2, 128, 150};
const Shape SHAPES[] = {
    {"T 4096 window 2048", 8, 4096, 12, 12, 128, 2048}, {"T 16384 window 2048", 2, 16384, 12, 12, 128, 2048},
    {"T 4096 window 512", 8, 4096, 12, 12, 128, 512},   {"T 4096 full", 8, 4096, 12, 12, 128, 0},
    {"T 4096 window 2048 hd 64", 8, 4096, 24, 24, 64, 2048}, {"T 4096 window 2048 MQA", 8, 4096, 12, 1, 128, 2048},
};

gpu::attn::Args<bf16> portable_args(const Shape& c, bf16* out, float* lse, const bf16* qkv) {
    gpu::attn::Args<bf16> a{};
    a.out = out, a.lse = lse, a.qkv = qkv, a.B = c.B, a.T = (int)c.T, a.H = c.H, a.G = c.G, a.hd = c.hd;
    a.window = (int)(c.window <= 0 ? c.T : std::min(c.window, c.T));
    return a;
}
struct Buffers { bf16 *dqkv, *out; float* lse; const bf16 *qkv, *dout; void* workspace; };
void portable_forward(const Shape& c, const Buffers& p) { gpu::attn::forward_on_tensor_cores(portable_args(c, p.out, p.lse, p.qkv), 0); }
void portable_backward(const Shape& c, const Buffers& p) {
    gpu::attn::Args<bf16> a = portable_args(c, p.out, p.lse, p.qkv);
    a.dqkv = p.dqkv, a.dout = p.dout, a.saved_out = p.out, a.lse2 = (float*)p.workspace, a.delta = a.lse2 + c.lse();
    gpu::attn::backward_statistics<bf16><<<(unsigned)ceil_div(c.lse() * 8, 256), 256>>>(a);
    gpu::attn::backward_on_tensor_cores(a, 0);
}
void hopper_forward(const Shape& c, const Buffers& p) { gpu::sm90::attention_forward(p.out, p.lse, p.qkv, c.B, c.T, c.H, c.G, c.hd, c.window); }
void hopper_backward(const Shape& c, const Buffers& p) {
    gpu::sm90::attention_backward(p.dqkv, p.dout, p.out, p.qkv, p.lse, p.workspace, c.B, c.T, c.H, c.G, c.hd, c.window);
}
struct Path { const char* name; void (*forward)(const Shape&, const Buffers&); void (*backward)(const Shape&, const Buffers&); };
const Path PORTABLE = {"portable", portable_forward, portable_backward}, HOPPER = {"sm90", hopper_forward, hopper_backward};

template <class T> std::vector<T> host(const T* p, int64_t n) {
    std::vector<T> v((size_t)n);
    CUDA_CHECK(cudaMemcpy(v.data(), p, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
template <class A, class R> double difference(const std::vector<A>& got, const std::vector<R>& want) {
    double d = 0, n = 0;
    for (size_t i = 0; i < got.size(); i++) {
        double x, y;
        if constexpr (std::is_same_v<A, bf16>) x = to_float(got[i]); else x = got[i];
        if constexpr (std::is_same_v<R, bf16>) y = to_float(want[i]); else y = want[i];
        d += (x - y) * (x - y), n += y * y;
    }
    return std::sqrt(d / n);
}

template <class T> struct Poisoned : bench::Rotating<T> {                // every byte 0xFF: a NaN that nobody wrote shows
    Poisoned(int64_t n, int copies) : bench::Rotating<T>(n, copies) {
        for (int i = 0; i < copies; i++) CUDA_CHECK(cudaMemset((*this)[i], 0xFF, (size_t)n * sizeof(T)));
    }
};

template <class T> std::vector<double> to_double(const std::vector<T>& x) {
    std::vector<double> y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = to_float(x[i]);
    return y;
}

// Inputs and outputs of `copies` turns
struct Data {
    bench::Rotating<bf16> qkv, dout;
    Poisoned<bf16> out, dqkv;
    Poisoned<float> lse;
    bench::Rotating<float> workspace;
    Data(const Shape& c, int copies) : qkv(c.qkv(), copies, 2.f), dout(c.out(), copies), out(c.out(), copies), dqkv(c.qkv(), copies), lse(c.lse(), copies),
          workspace((int64_t)gpu::sm90::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd) / 4, 1) {}
    Buffers operator[](int i) const { return {dqkv[i], out[i], lse[i], qkv[i], dout[i], workspace[0]}; }
};

void check_small(const Path& path, const Shape& c) {
    const Data data(c, 1);
    path.forward(c, data[0]);
    path.backward(c, data[0]);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<double> x = to_double(host(data.qkv[0], c.qkv())), dout = to_double(host(data.dout[0], c.out()));
    std::vector<double> out((size_t)c.out()), lse((size_t)c.lse()), dqkv((size_t)c.qkv()), workspace(cpu::attention_backward_workspace(c.B, c.T, c.H, c.G, c.hd) / 8 + 1);
    cpu::attention_forward(out.data(), lse.data(), x.data(), nullptr, 0, 0, c.B, c.T, c.H, c.G, c.hd, c.window);
    cpu::attention_backward(dqkv.data(), dout.data(), out.data(), x.data(), lse.data(), workspace.data(), c.B, c.T, c.H, c.G, c.hd, c.window);
    printf("%-8s against the twin in double: out %.2e, lse %.2e, dqkv %.2e\n", path.name, difference(host(data.out[0], c.out()), out),
           difference(host(data.lse[0], c.lse()), lse), difference(host(data.dqkv[0], c.qkv()), dqkv));
}

void bench_path(const Path& path, const Shape& c, const Data& data) {
    const double moved = 2.0 * c.qkv() + 2.0 * c.out() + 4.0 * c.lse(), flops = 4.0 * c.hd * c.pairs();
    bench::print_row(std::string(path.name) + " fwd " + c.name, bench::time_ms([&](int i) { path.forward(c, data[i]); }), moved, flops);
    for (int i = 0; i < 3; i++) path.forward(c, data[i]);
    bench::print_row(std::string(path.name) + " bwd " + c.name, bench::time_ms([&](int i) { path.backward(c, data[i]); }), 2 * moved, 2.5 * flops);
}

void bench_shape(const Shape& c, bool hopper) {
    const Data data(c, 3);
    bench_path(PORTABLE, c, data);
    if (!hopper) return;
    const std::vector<bf16> out = host(data.out[0], c.out()), dqkv = host(data.dqkv[0], c.qkv());
    const std::vector<float> lse = host(data.lse[0], c.lse());
    for (int i = 0; i < 3; i++) {                                        // poison again: what sm90 does not write must show
        CUDA_CHECK(cudaMemset(data.out[i], 0xFF, (size_t)c.out() * 2));
        CUDA_CHECK(cudaMemset(data.lse[i], 0xFF, (size_t)c.lse() * 4));
        CUDA_CHECK(cudaMemset(data.dqkv[i], 0xFF, (size_t)c.qkv() * 2));
    }
    bench_path(HOPPER, c, data);
    printf("    sm90 against portable: out %.2e, lse %.2e, dqkv %.2e\n", difference(host(data.out[0], c.out()), out), difference(host(data.lse[0], c.lse()), lse),
           difference(host(data.dqkv[0], c.qkv()), dqkv));
}

} // namespace

int main() {
    const DeviceInfo info = device_info();
    const bool hopper = gpu::sm90::usable();
    printf("%s, sm90 path %s\n", info.name.c_str(), hopper ? "usable" : "NOT usable (needs compute capability 9.0 and code for sm_90a)");
    check_small(PORTABLE, SMALL);
    if (hopper) check_small(HOPPER, SMALL);
    bench::print_header();
    for (const Shape& c : SHAPES) bench_shape(c, hopper);
    return 0;
}
