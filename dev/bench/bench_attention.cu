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
    double useful = 0;                                                   // pairs, where documents leave fewer than the window does
    double pairs() const {
        if (useful > 0) return useful;
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

struct Buffers { bf16 *dqkv, *out; float* lse; const bf16 *qkv, *dout; void* workspace; int* drawn; const int* starts; };
// What a path is: the portable kernels or the Hopper ones, and how much memory dS may take (0: it is made again; CHOSEN: as the library does)
struct Path { const char* name; bool portable; int64_t limit; };
constexpr int64_t ALL = (int64_t)1 << 40, CHOSEN = -1;
const Path PORTABLE = {"portable", true, gpu::attn::DS_LIMIT}, HOPPER = {"sm90", false, CHOSEN};
const Path VARIANTS[] = {{"portable, dS again", true, 0}, {"sm90, dS again", false, 0}, {"sm90, dS kept", false, gpu::attn::DS_LIMIT},
                         {"sm90, dS in two parts", false, (int64_t)1 << 30}};

gpu::attn::Args<bf16> arguments(const Shape& c, const Buffers& p) {
    gpu::attn::Args<bf16> a = gpu::attention_args<bf16>(p.qkv, nullptr, 0, 0, p.starts, c.B, c.T, c.H, c.G, c.hd, c.window);
    a.out = p.out, a.lse = p.lse, a.dqkv = p.dqkv, a.dout = p.dout, a.saved_out = p.out, a.drawn = p.drawn;
    return a;
}
gpu::attn::Workspace workspace_of(const Shape& c, int64_t limit) {
    return {c.B, c.T, c.H, c.hd, c.window <= 0 ? c.T : std::min(c.window, c.T), true, limit == CHOSEN ? gpu::attn::ds_limit(c.hd) : limit};
}
void forward(const Path& path, const Shape& c, const Buffers& p) { gpu::attn::forward(arguments(c, p), path.portable, 0); }
void backward(const Path& path, const Shape& c, const Buffers& p) {
    gpu::attn::Args<bf16> a = arguments(c, p);
    workspace_of(c, path.limit).give(a, p.workspace);
    gpu::attn::backward(a, path.portable, 0);
}

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
    bench::Counter drawn;
    const int* starts = nullptr;
    Data(const Shape& c, int copies)
        : qkv(c.qkv(), copies, 2.f), dout(c.out(), copies), out(c.out(), copies), dqkv(c.qkv(), copies), lse(c.lse(), copies),
          workspace(workspace_of(c, ALL).bytes() / 4, 1) {}
    Buffers operator[](int i) const { return {dqkv[i], out[i], lse[i], qkv[i], dout[i], workspace[0], drawn.p, starts}; }
};

void check_small(const Path& path, const Shape& c) {
    const Data data(c, 1);
    forward(path, c, data[0]);
    backward(path, c, data[0]);
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<double> x = to_double(host(data.qkv[0], c.qkv())), dout = to_double(host(data.dout[0], c.out()));
    std::vector<double> out((size_t)c.out()), lse((size_t)c.lse()), dqkv((size_t)c.qkv()), workspace((size_t)c.lse());
    cpu::attention_forward(out.data(), lse.data(), x.data(), nullptr, 0, 0, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
    cpu::attention_backward(dqkv.data(), dout.data(), out.data(), x.data(), lse.data(), nullptr, 0, 0, nullptr, workspace.data(), c.B, c.T, c.H, c.G,
                            c.hd, c.window, nullptr);
    printf("%-8s against the twin in double: out %.2e, lse %.2e, dqkv %.2e\n", path.name, difference(host(data.out[0], c.out()), out),
           difference(host(data.lse[0], c.lse()), lse), difference(host(data.dqkv[0], c.qkv()), dqkv));
}

void bench_path(const Path& path, const Shape& c, const Data& data) {
    const double moved = 2.0 * c.qkv() + 2.0 * c.out() + 4.0 * c.lse(), flops = 4.0 * c.hd * c.pairs();
    bench::print_row(std::string(path.name) + " fwd " + c.name, bench::time_ms([&](int i) { forward(path, c, data[i]); }), moved, flops);
    for (int i = 0; i < 3; i++) forward(path, c, data[i]);
    bench::print_row(std::string(path.name) + " bwd " + c.name, bench::time_ms([&](int i) { backward(path, c, data[i]); }), 2 * moved, 2.5 * flops);
}

// Against `want`, the results of another path; everything is poisoned before: what a path does not write must show
struct Results { std::vector<bf16> out, dqkv; std::vector<float> lse; };
void bench_against(const Path& path, const Shape& c, const Data& data, Results& want) {
    for (int i = 0; i < 3; i++) {
        CUDA_CHECK(cudaMemset(data.out[i], 0xFF, (size_t)c.out() * 2));
        CUDA_CHECK(cudaMemset(data.lse[i], 0xFF, (size_t)c.lse() * 4));
        CUDA_CHECK(cudaMemset(data.dqkv[i], 0xFF, (size_t)c.qkv() * 2));
    }
    CUDA_CHECK(cudaMemset(data.workspace[0], 0xFF, (size_t)workspace_of(c, path.limit).bytes()));
    bench_path(path, c, data);
    const Results got = {host(data.out[0], c.out()), host(data.dqkv[0], c.qkv()), host(data.lse[0], c.lse())};
    if (want.out.empty()) want = got;
    else
        printf("    against the first path: out %.2e, lse %.2e, dqkv %.2e\n", difference(got.out, want.out), difference(got.lse, want.lse),
               difference(got.dqkv, want.dqkv));
}
void bench_shape(const Shape& c, bool hopper, bool variants) {
    const Data data(c, 3);
    Results first;
    bench_against(PORTABLE, c, data, first);
    if (hopper) bench_against(HOPPER, c, data, first);
    if (variants)
        for (const Path& path : VARIANTS)
            if (path.portable || hopper) bench_against(path, c, data, first);
}

// Documents of 100 to 1,900 tokens: the pairs that remain, and how well blocks outside a document are skipped
void bench_documents(Shape c, bool hopper) {
    std::vector<int> starts((size_t)(c.B * c.T));
    double pairs = 0;
    unsigned h = 1;
    for (int b = 0; b < c.B; b++)
        for (int64_t t = 0, start = 0, next = 0; t < c.T; t++) {
            if (t == next) start = t, h = h * 1664525u + 1013904223u, next = t + 100 + (h >> 8) % 1800;
            starts[(size_t)(b * c.T + t)] = (int)start;
            pairs += (double)std::min(t - start + 1, c.window) * c.H;
        }
    Data data(c, 3);
    int* device = nullptr;
    CUDA_CHECK(cudaMalloc(&device, starts.size() * 4));
    CUDA_CHECK(cudaMemcpy(device, starts.data(), starts.size() * 4, cudaMemcpyHostToDevice));
    data.starts = device, c.useful = pairs;
    Results first;
    bench_against(PORTABLE, c, data, first);
    if (hopper) bench_against(HOPPER, c, data, first);
    cudaFree(device);
}

// Chunks of T queries after a full ring: forward on useful pairs
void bench_prefix(const Shape& c, bool portable) {
    const int64_t capacity = c.window - 1, position = (int64_t)3 * capacity + 1000;          // slot 0 lies inside
    const Data data(c, 3);
    bench::Rotating<bf16> ring(c.B * capacity * 2 * c.G * c.hd, 3, 2.f);
    auto run = [&](int i) {
        gpu::attn::Args<bf16> a = gpu::attention_args<bf16>(data.qkv[i], ring[i], capacity, position, nullptr, c.B, c.T, c.H, c.G, c.hd, c.window);
        a.out = data.out[i], a.lse = data.lse[i], a.drawn = data.drawn.p;
        gpu::attn::forward(a, portable, 0);
    };
    bench::print_row(std::string(portable ? "portable" : "sm90") + " fwd " + c.name, bench::time_ms(run), 0, 4.0 * c.hd * c.window * c.T * c.B * c.H);
}

// Kernels of the portable backward one by one, in every form there is: which should attn::backward_on_tensor_cores take?
struct Kernel { const char* name; bool keys; void (*run)(const gpu::attn::Args<bf16>&, Stream); };
const Kernel KERNELS[] = {
    {"dk dv: 8 warps of 16 keys", true, gpu::attn::launch_backward_keys_mma<128, 8, 1, 64, true, true>},
    {"dk dv: 4 warps of 16 keys", true, gpu::attn::launch_backward_keys_mma<128, 4, 1, 64, true, true>},
    {"dk dv: 4 pairs of warps", true, gpu::attn::launch_backward_pairs_mma<128>},
    {"dq: from dS", false, gpu::attn::launch_backward_product_mma<128>},
    {"dq: 4 warps of 32, steps of 32", false, gpu::attn::launch_backward_queries_mma<128, 4, 2, 32>},
};
void bench_portable_kernels(const Shape& c) {
    const Data data(c, 3);
    for (int i = 0; i < 3; i++) forward(PORTABLE, c, data[i]), backward({"", true, ALL}, c, data[i]);
    const std::vector<bf16> want = host(data.dqkv[0], c.qkv());
    for (const Kernel& kernel : KERNELS) {
        auto run = [&](int i) {
            gpu::attn::Args<bf16> a = arguments(c, data[i]);
            workspace_of(c, ALL).give(a, data[i].workspace);
            kernel.run(a, 0);
        };
        bench::print_row(kernel.name, bench::time_ms(run), 0, (kernel.keys ? 8.0 : 2.0) * c.hd * c.pairs());
    }
}
// The same for the Hopper path: each kernel alone, on data[0]'s statistics
void bench_hopper_kernels(const Shape& c) {
    const Data data(c, 3);
    for (int i = 0; i < 3; i++) forward(HOPPER, c, data[i]), backward({"", false, ALL}, c, data[i]);
    using namespace gpu::sm90;
    for (int which = 0; which < 5; which++) {
        auto run = [&](int i) {
            gpu::attn::Args<bf16> a = arguments(c, data[i]);
            workspace_of(c, which == 2 || which == 4 ? 0 : ALL).give(a, data[i].workspace);
            if (which == 0) launch_statistics<128>(a, 0);
            else if (which <= 2) launch_keys<128>(a, 0);
            else if (which == 3) launch_product(a, 0);
            else launch_queries<128>(a, 0);
        };
        const char* names[] = {"sm90 statistics", "sm90 dk dv, dS kept", "sm90 dk dv", "sm90 dq from dS", "sm90 dq, S and dP again, delta"};
        const double products[] = {0, 4, 4, 1, 3};
        bench::print_row(std::string(names[which]) + " " + c.name, bench::time_ms(run), 0, products[which] * 2 * c.hd * c.pairs());
    }
}

} // namespace

int main() {
    const DeviceInfo info = device_info();
    const bool hopper = gpu::sm90::usable();
    printf("%s, sm90 path %s\n", info.name.c_str(), hopper ? "usable" : "NOT usable (needs compute capability 9.0 and code for sm_90a)");
    check_small(PORTABLE, SMALL);
    if (hopper) check_small(HOPPER, SMALL);
    bench::print_header();
    bench_portable_kernels(SHAPES[0]);
    if (hopper)
        for (int shape : {0, 2}) bench_hopper_kernels(SHAPES[shape]);
    for (const Shape& c : SHAPES) bench_shape(c, hopper, &c == SHAPES || c.window == 512);
    bench_documents({"T 4096 window 2048, documents", 8, 4096, 12, 12, 128, 2048}, hopper);
    for (bool portable : {true, false})
        if (portable || hopper) bench_prefix({"T 4096 window 2048, full ring", 8, 4096, 12, 12, 128, 2048}, portable);
    return 0;
}
