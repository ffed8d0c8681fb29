// A decode step in one kernel. Formulas: kernels/cpu/decode.h; the same roundings as the kernels of decode.cuh, which do what does not
// fit here (possible(): bf16, compute capability 9.0, sizes).
//
// A step reads every weight once, and its 70 results that depend on each other are small: what it takes is the bytes over the
// bandwidth if memory never waits for them. So one block an SM stays for the whole step:
//   - four producer warps stream the block's rows of all matrices of all layers, keys, values and scan states in the order of their
//     use through a ring of 204 KB in shared memory (decode/step_ring.cuh). They wait for nothing but room, so that 27 MB, 8 us
//     of memory time, are there or on their way while the blocks wait for each other. Alone they reach 93% of a copy's bandwidth at
//     batch 1 and all of it at batch 16.
//   - 8 consumer warps compute (decode/step_linear.cuh, decode/step_attention.cuh). Between two phases all blocks meet: a counter in L2, one
//     arrival a block. From the first arrival to the first product of the next phase it is 2.5 to 3 thousand clocks, most of it three
//     trips to L2; everything that does not depend on other blocks (addresses, zeros, operands of the first tile) is done before.
//
//   phase      mamba: in_proj + conv | x_proj | dt_proj + scan | out_proj + residual     attention: qkv + RoPE | parts of the keys | their
//              sum, ring | proj + residual     mlp: w1|w2 + SwiGLU | w3 + residual     at the end: head
//
// Bytes: those of all weights, keys and values in the window, scan states twice; Samba-421M 0.923 GB at batch 1, 2.093 GB at batch 16.
// Activations go through L2: each block reads all of a phase's input, 2 B K bytes (B = 16, K = 4096: 17 MB for all blocks).
// Measured, with the draw: dev/results/2026-11-27_h200_generate.
#pragma once
#include "step_attention.cuh"

namespace gpu {
namespace decode {

#if __CUDA_ARCH__ >= 900
// Pieces of a phase that this block gets: for the measurement that only streams
template <int LANES> __device__ inline int pieces(const StepArgs& a, const Phase& ph, int p) {
    if (ph.task == Task::combine) return 0;
    if (ph.task != Task::attend) return Share(a.shares[p * gridDim.x + blockIdx.x]).tiles * ((ph.K + PIECE - 1) / PIECE + (ph.task == Task::scan));
    int n = 0;
    for (int part = blockIdx.x; part < a.B * a.H * a.splits; part += gridDim.x) {
        const KeyPart k(a, part, ph.capacity, [&](int b) { return a.position[b]; });
        n += (int)((k.end - k.begin + 2 * THREADS / LANES - 1) / (2 * THREADS / LANES));
    }
    return n;
}

template <int NT, int LANES>
__device__ inline void consume(const StepArgs& a, Ring ring, const Scratch& s, Phase* phases /*shared, 2*/, int4* shares /*shared, 2*/) {
    constexpr int WORDS = sizeof(Phase) / 4;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    unsigned target = threadIdx.x == 0 ? __ldcg(a.counter + 1) : 0;
    // A phase's description comes one phase ahead: a word a thread
    const auto word_of = [&](int p) -> unsigned {
        if (threadIdx.x < WORDS) return ((const unsigned*)(a.phases + p))[threadIdx.x];
        return threadIdx.x < WORDS + 4 ? ((const unsigned*)(a.shares + p * gridDim.x + blockIdx.x))[threadIdx.x - WORDS] : 0;
    };
    const auto keep_word = [&](int p, unsigned word) {
        if (threadIdx.x < WORDS) ((unsigned*)(phases + p % 2))[threadIdx.x] = word;
        else if (threadIdx.x < WORDS + 4) ((unsigned*)(shares + p % 2))[threadIdx.x - WORDS] = word;
    };
    keep_word(0, word_of(0));
    if (threadIdx.x < a.B) s.position[threadIdx.x] = __ldcg((const long long*)a.position + threadIdx.x);
    const int own = part_of(a.d, blockIdx.x, gridDim.x), owned = part_of(a.d, blockIdx.x + 1, gridDim.x) - own;
    for (int i = threadIdx.x; i < a.B * owned; i += THREADS)
        s.own[i / owned * MAX_OWN + i % owned] = __ldcg(a.x + (int64_t)(i / owned) * a.d + own + i % owned);
    consumers_meet();
    for (int p = 0; p < a.count; p++) {
        const Phase& ph = phases[p % 2];
        const Linear<NT> linear{a, ph, Share(shares[p % 2]), s};
        const Operands early = linear.early_first();
        typename Linear<NT>::Input input;
        linear.prepare(input);
        long long* trace = a.trace && threadIdx.x == 0 ? a.trace + ((int64_t)p * gridDim.x + blockIdx.x) * 4 : nullptr;
        if (p > 0) {                                                               // all blocks have done what was before
            if (threadIdx.x == 0 && !a.probe) {
                target += gridDim.x;
                unsigned seen;
                for (unsigned polls = 0;; polls++) {
                    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.counter) : "memory");
                    if ((int)(seen - target) >= 0) break;
                    // Blocks are missing: not all are resident. No trap: with one ptxas gives no more registers than a block starts with
                    if (polls > 1u << 24) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ll), "r"(polls) : "memory");
                }
            }
            consumers_meet();
        }
        const bool more = p + 1 < a.count;
        const unsigned word = more ? word_of(p + 1) : 0;
        if (trace) trace[0] = trace[1] = clock64();
        if (a.probe == 2) {
            for (int n = pieces<LANES>(a, ph, p); n > 0; n--) ring.wait_for_piece(), ring.release();
        } else if (ph.task == Task::attend) {
            Attend<LANES>{a, ph, s}.run(ring);
        } else if (ph.task == Task::combine) {
            combine(a, ph, s.position);
        } else {
            linear.run(ring, input, early, trace);
        }
        if (more) keep_word(p + 1, word);
        consumers_meet();
        if (threadIdx.x == 0 && more && !a.probe) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.counter) : "memory");
        if (trace) trace[2] = clock64();
    }
    if (threadIdx.x == 0 && blockIdx.x == 0 && !a.probe) a.counter[1] = target;    // all blocks have read it: they have been through a barrier
}
#endif

template <int NT, int LANES> __global__ void __launch_bounds__(STEP_THREADS, 1) step_kernel(const __grid_constant__ StepArgs a) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char step_memory[];
    __shared__ __align__(8) uint64_t bars[2 * STAGES];
    __shared__ __align__(16) Phase phases[2];
    __shared__ int4 shares[2];
    __shared__ float own[MAX_BATCH * MAX_OWN], scale[MAX_BATCH], BC[2 * MAX_STATES];
    __shared__ int64_t position[MAX_BATCH];
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    Ring ring{shared_address(step_memory), shared_address(bars), shared_address(bars + STAGES), {}};
    asm volatile("" : "+r"(ring.data), "+r"(ring.full), "+r"(ring.empty));         // kept in registers, not computed again at each use
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(ring.full + i * 8, PRODUCERS / WARP), mbarrier_init(ring.empty + i * 8, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        Producer{a, ring}.template run<LANES>();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        consume<NT, LANES>(a, ring, Scratch{(float*)(step_memory + STAGES * STAGE), own, scale, BC, position}, phases, shares);
    }
#endif
}

} // namespace decode

// ---------------------------------------------------------------------------------------------------------------------
// The host's side: the table of phases

class DecodeStep {
public:
    DecodeStep() = default;
    DecodeStep(const DecodeStep&) = delete;
    DecodeStep& operator=(const DecodeStep&) = delete;
    ~DecodeStep() { if (memory) cudaFree(memory); }

    // Whether run() can do this model's step
    static bool possible(const DecodeModel& m) {
        using namespace decode;
        if (sizeof(floatX) != 2 || gpu().major < 9 || m.B > MAX_BATCH) return false;
        const int most = (m.B > 8 ? 16 : 24) * WARPS * 32;
        const auto columns = [&](int K) { return K % 8 == 0 && K <= most; };
        if (!columns(m.d) || ceil_div(m.d, gpu().sms) > MAX_OWN) return false;
        for (const DecodeLayer& l : m.layers) {
            const bool states = m.N % 4 == 0 && m.N * m.B <= MAX_STATES && TILE * m.N * 4 * (m.B + 1) <= STAGE;
            if (l.kind == DecodeLayer::mamba && (!states || !columns(m.e) || !columns(m.rank) || (m.rank + 2 * m.N) % 8)) return false;
            if (l.kind == DecodeLayer::attention && (m.hd % 8 || m.hd > 256 || l.capacity >= INT32_MAX || !columns(m.H * m.hd))) return false;
            if (l.kind == DecodeLayer::mlp && !columns(l.F)) return false;
        }
        return true;
    }

    void create(const DecodeModel& m, Stream stream) {
        const Buffers buffers = make_buffers(m, stream);
        tasks = phases_of(m, buffers);
        args.count = (int)tasks.size();
        const std::vector<int4> shares = shares_of(tasks);
        copy_to_device(buffers.table, tasks.data(), tasks.size() * sizeof(tasks[0]), stream);
        copy_to_device(buffers.shares, shares.data(), shares.size() * sizeof(shares[0]), stream);
        stream_sync(stream);
        check_residence();
    }
    bool ready() const { return memory; }

    void run([[maybe_unused]] Stream stream) const {
        if constexpr (sizeof(floatX) == 2) decode::launch(kernel(), dim3((unsigned)decode::gpu().sms), decode::STEP_THREADS, SHARED, stream, args);
    }

    decode::StepArgs args{};               // a benchmark may set the fields of measurements
    std::vector<decode::Phase> tasks;

private:
    using Phase = decode::Phase;
    struct Buffers { Phase::X *u, *z, *x_dbl /*(B, rank + 2 N)*/, *qkv, *out; Phase* table; int4* shares; };

    // The memory of the blocks' exchange, and the arguments that point to it
    Buffers make_buffers(const DecodeModel& m, Stream stream) {
        using namespace decode;
        const int splits = std::clamp(gpu().sms / std::max(1, m.H), 1, 64);
        int64_t F = 8;
        for (const DecodeLayer& l : m.layers) F = std::max<int64_t>(F, l.F);
        int64_t bytes = 0;
        const auto place = [&](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
        const int64_t width = m.rank + 2 * m.N, count = 4 * (int64_t)m.layers.size() + 1;
        const int64_t table = place(count * sizeof(Phase)), share = place(count * gpu().sms * sizeof(int4)), counter = place(8);
        const int64_t sums = place(4ll * m.B * gpu().sms), parts = place(4ll * m.B * m.H * splits * (2 + m.hd));
        const int64_t u = place(2ll * m.B * m.e), z = place(2ll * m.B * m.e), x_dbl = place(2 * m.B * width);
        const int64_t qkv = place(2ll * m.B * (m.H + 2 * m.G) * m.hd);
        const int64_t out = place(2ll * m.B * std::max<int64_t>({(int64_t)m.e, F, (int64_t)m.H * m.hd}));
        if (memory) CUDA_CHECK(cudaFree(memory));
        memory = (char*)device_alloc((size_t)bytes, "the buffers of a decode step");
        device_zero(memory, (size_t)bytes, stream);
        const auto X = [&](int64_t at) { return (Phase::X*)(memory + at); };
        const int depth = m.B > 2 ? 4 : 2;                                         // with few sequences the latency of results matters more
        args = {(const Phase*)(memory + table), (const int4*)(memory + share), 0,
                m.B, m.d, m.e, m.N, m.rank, m.H, m.G, m.hd, m.V, splits, m.rope, m.eps, m.x, m.cos_sin, m.position, m.logits,
                (float*)(memory + parts), (float*)(memory + sums), (unsigned*)(memory + counter), 0, depth, nullptr};
        return {X(u), X(z), X(x_dbl), X(qkv), X(out), (Phase*)(memory + table), (int4*)(memory + share)};
    }

    std::vector<Phase> phases_of(const DecodeModel& m, const Buffers& buffers) const {
        using namespace decode;
        std::vector<Phase> phases;
        // What the next norm's reader reads: at first as the sampler left it
        const float* squares = m.squares;
        int squares_n = (int)ceil_div(m.d, ROWS);
        const auto normed = [&](Task task, int results, const floatX* w) {
            Phase p{};
            p.task = task, p.results = results, p.K = p.in_stride = m.d, p.w = (const Phase::X*)w;
            p.in = (const Phase::X*)m.xw, p.squares = squares, p.squares_n = squares_n;
            return p;
        };
        const auto plain = [&](Task task, int results, int K, int stride, const floatX* w, const Phase::X* in) {
            Phase p{};
            p.task = task, p.results = results, p.K = K, p.in_stride = stride, p.w = (const Phase::X*)w, p.in = in;
            return p;
        };
        const auto residual = [&](const floatX* w, int K, const float* norm) {
            Phase p = plain(Task::residual, m.d, K, K, w, buffers.out);
            p.norm = norm, p.out = norm ? (Phase::X*)m.xw : nullptr;
            if (norm) squares = args.sums, squares_n = gpu().sms;
            phases.push_back(p);
        };
        for (const DecodeLayer& l : m.layers) {
            if (l.kind == DecodeLayer::mamba) {
                Phase p = normed(Task::conv, 2 * m.e, l.in_proj);
                p.out = buffers.u, p.z = buffers.z, p.halo = (Phase::X*)l.halo, p.conv_w = l.conv_w, p.conv_b = l.conv_b;
                phases.push_back(p);
                p = plain(Task::x_proj, m.rank + 2 * m.N, m.e, m.e, l.x_proj, buffers.u);
                p.out = buffers.x_dbl;
                phases.push_back(p);
                p = plain(Task::scan, m.e, m.rank, m.rank + 2 * m.N, l.dt_proj, buffers.x_dbl);
                p.out = buffers.out, p.u = buffers.u, p.z = buffers.z, p.h = l.h, p.A_log = l.A_log, p.D = l.D, p.dt_bias = l.dt_bias;
                phases.push_back(p);
                residual(l.out_proj, m.e, l.next_norm);
            } else if (l.kind == DecodeLayer::attention) {
                Phase p = normed(Task::qkv, (m.H + 2 * m.G) * m.hd / 2, l.qkv);
                p.out = buffers.qkv;
                phases.push_back(p);
                p = Phase{};
                p.qkv = buffers.qkv, p.ring = (Phase::X*)l.ring, p.out = buffers.out;
                p.capacity = l.capacity, p.per_capacity = 1.0 / (double)std::max<int64_t>(1, l.capacity);
                p.task = Task::attend, phases.push_back(p);
                p.task = Task::combine, phases.push_back(p);
                residual(l.proj, m.H * m.hd, l.next_norm);
            } else {
                Phase p = normed(Task::swiglu, l.F, l.w1);
                p.out = buffers.out;
                phases.push_back(p);
                residual(l.w3, l.F, l.next_norm);
            }
        }
        phases.push_back(normed(Task::head, m.V, m.head));
        return phases;
    }

    // Each block's part of a phase's results
    static std::vector<int4> shares_of(const std::vector<Phase>& phases) {
        using namespace decode;
        std::vector<int4> shares;
        for (const Phase& p : phases)
            for (int64_t i = 0; i < gpu().sms; i++) {
                const int most = p.task == Task::qkv || p.task == Task::swiglu ? TILE / 2 : TILE;
                const int begin = (int)(p.results * i / gpu().sms), n = (int)(p.results * (i + 1) / gpu().sms) - begin;
                const int tiles = (int)ceil_div(n, most);
                shares.push_back({begin, n, tiles, tiles ? n / tiles : 0});
            }
        return shares;
    }

    static constexpr size_t SHARED = decode::STAGES * decode::STAGE + decode::PARTIAL * sizeof(float);
    using Kernel = void (*)(decode::StepArgs);
    template <int NT> Kernel of_heads() const {
        if (args.hd <= 64) return decode::step_kernel<NT, 8>;
        return args.hd <= 128 ? decode::step_kernel<NT, 16> : decode::step_kernel<NT, 32>;
    }
    Kernel kernel() const { return args.B > 8 ? of_heads<2>() : of_heads<1>(); }
    // Blocks wait for each other: each SM must hold one
    void check_residence() const {
        if constexpr (sizeof(floatX) == 2) {
            int blocks = 0;
            CUDA_CHECK(cudaFuncSetAttribute(kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)SHARED));
            CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel(), decode::STEP_THREADS, SHARED));
            if (blocks < 1) fail("the kernel of a decode step does not fit on a multiprocessor of this GPU");
        }
    }
    char* memory = nullptr;
};

} // namespace gpu
