// One token for each of up to 16 sequences: the steps of a layer, fused. Formulas: kernels/cpu/decode.h.
//
// Everything here is bound by memory: each weight is read once and used B times. Samba-421M in bf16 reads 0.84 GB of weights, and of
// each sequence 75 MB of ring and 2.4 MB of scan state (read and written): 0.22 ms a token at 4.2 TB/s, of which a step
// makes 68 kernels of 3 us. So what counts is that memory never waits for the chain of small dependent results:
//   - weights do not depend on it. A kernel starts while the one before it still runs (programmatic dependent launch), brings its
//     first weights (64 KiB an SM) into registers and asks L2 for the rest, and only then waits for its input.
//   - a kernel triggers the next one after its own wait, so at most two are under way, and what a kernel reads before its wait must
//     be older than the kernel before it: weights, its layer's own state, the position.
//   - activations go through L2 (ld.cg): the kernel before wrote them while this one was already resident.
//
// Linear layers, bf16: a block takes tiles of 8 weight rows, its 8 warps take the blocks of 32 columns in turn. mma m16n8k16 with
// the sequences as its 16 rows and the weights as its 8 columns: the dot product does not care about the order of k, so a lane's 16
// bytes of a row are its operands for two mma as they come, without shared memory. The warps' sums are added in order. float, and
// sizes that are no multiples of 32: a warp a row, fp32 FMA.
//
// RMSNorm is applied as y = r (W (x w_norm)): whoever writes x also writes xw = x w_norm and the sums of squares of each 8 columns,
// so that the reader copies xw as it is and needs r only at the end.
#pragma once
#include "decode/attention.cuh"
#include "decode/common.cuh"
#include "decode/linear.cuh"
#include "decode/sample.cuh"

namespace gpu {
namespace decode {

// ---------------------------------------------------------------------------------------------------------------------
// The scan's step. 16 lanes take a channel of a sequence: a state each, and the dot product of dt_proj together.

constexpr int TEAM = 16, DT_AHEAD = 16;    // dt_proj's row: 16 x 16 values in registers, the rest (d_model over 4096) as it comes

template <class X> struct ScanArgs {
    X* out;
    float* h;
    const float* parts;
    const X *u, *z, *dt_proj;
    const float *A_log, *D, *dt_bias;
    int B, e, N, rank, splits, channels;   // channels a block
};

template <class X> __global__ void __launch_bounds__(THREADS) scan_kernel(ScanArgs<X> a) {
    extern __shared__ float x_dbl[];       // (B, rank + 2N)
    const int sub = threadIdx.x % TEAM, team = threadIdx.x / TEAM, width = a.rank + 2 * a.N;
    const int c0 = blockIdx.x * a.channels, count = min(a.channels, a.e - c0);
    float row[DT_AHEAD], h0 = 0, A0 = 0;
    const auto load = [&](int task) {      // what does not depend on the token
        const int b = task / count, c = c0 + task % count;
        const bool live = task < a.B * count;
#pragma unroll
        for (int i = 0; i < DT_AHEAD; i++) row[i] = live && sub + i * TEAM < a.rank ? to_float(a.dt_proj[(int64_t)c * a.rank + sub + i * TEAM]) : 0.f;
        h0 = live && sub < a.N ? __ldcg(a.h + ((int64_t)b * a.e + c) * a.N + sub) : 0.f;
        A0 = live && sub < a.N ? -expf(a.A_log[(int64_t)c * a.N + sub]) : 0.f;
    };
    load(team);
    wait_for_input();
    for (int i = threadIdx.x; i < a.B * width; i += THREADS) {
        float sum = 0;
#pragma unroll 8
        for (int split = 0; split < a.splits; split++) sum += __ldcg(a.parts + (int64_t)split * a.B * width + i);
        x_dbl[i] = round_to<X>(sum);
    }
    __syncthreads();
    const int tasks = a.B * count;
    for (int task = team; task - team < tasks; task += THREADS / TEAM) {         // all lanes of a warp take part in the sums
        if (task != team) load(task);
        const bool live = task < tasks;
        const int b = live ? task / count : 0, c = c0 + (live ? task % count : 0);
        const float *xd = x_dbl + b * width, *Bn = xd + a.rank, *Cn = Bn + a.N;
        const int64_t i = (int64_t)b * a.e + c;
        float dot = 0;
#pragma unroll
        for (int k = 0; k < DT_AHEAD; k++)
            if (sub + k * TEAM < a.rank) dot += row[k] * xd[sub + k * TEAM];
        for (int k = sub + DT_AHEAD * TEAM; k < a.rank; k += TEAM) dot += to_float(a.dt_proj[(int64_t)c * a.rank + k]) * xd[k];
        const float raw = round_to<X>(lanes_sum<TEAM>(dot)) + a.dt_bias[c], dt = raw > 20.f ? raw : log1pf(expf(raw));
        const float u = load_fresh(a.u + i), z = load_fresh(a.z + i), input = dt * u;
        float y = 0;
        for (int n = sub; n < a.N; n += TEAM) {
            const float before = n == sub ? h0 : __ldcg(a.h + i * a.N + n), A = n == sub ? A0 : -expf(a.A_log[(int64_t)c * a.N + n]);
            const float h = expf(dt * A) * before + input * Bn[n];
            if (live) a.h[i * a.N + n] = h;
            y += h * Cn[n];
        }
        y = lanes_sum<TEAM>(y) + a.D[c] * u;
        if (live && sub == 0) a.out[i] = from_float<X>(y * z * sigmoid<float>(z));
    }
}

} // namespace decode

// ---------------------------------------------------------------------------------------------------------------------
// The operations (arguments: kernels/cpu/decode.h)

inline void decode_norm_linear(floatX* y, const floatX* xw, const float* squares, const floatX* w, int B, int N, int d, float eps, Stream stream) {
    decode::linear(w, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::StoreOutput<floatX>{y, N}, stream);
}
inline void decode_norm(floatX* xw, float* squares, const float* x, const float* norm, int B, int d, Stream stream) {
    decode::launch(decode::norm_kernel<floatX>, dim3((unsigned)B), 256, 0, stream, xw, squares, x, norm, d);
}
inline void decode_head(float* logits, const floatX* xw, const float* squares, const floatX* w, int B, int N, int d, float eps, Stream stream) {
    decode::linear(w, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::StoreOutput<float>{logits, N}, stream);
}
inline void decode_residual(float* x, floatX* xw, float* squares, const float* norm, const floatX* in, const floatX* w, int B, int N, int K,
                            Stream stream) {
    const decode::ResidualOutput<floatX> output{x, norm ? xw : nullptr, squares, norm, N};
    decode::linear(w, B, K, 1, decode::Input<floatX>{in, nullptr, 0}, output, stream);
}
inline void decode_swiglu(floatX* hidden, const floatX* xw, const float* squares, const floatX* w1, int B, int d, int F, float eps, Stream stream) {
    decode::linear(w1, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::SwigluOutput<floatX>{hidden, F}, stream);
}
inline void decode_mamba_in(floatX* u, floatX* z, floatX* halo, const floatX* xw, const float* squares, const floatX* in_proj,
                            const float* conv_w, const float* conv_b, int B, int d, int e, float eps, Stream stream) {
    decode::linear(in_proj, B, d, 1, decode::Input<floatX>{xw, squares, eps}, decode::ConvOutput<floatX>{u, z, halo, conv_w, conv_b, e}, stream);
}
inline int decode_x_splits(int N, int e) {
    const int blocks = std::max(1, e / 32), most = std::clamp(decode::gpu().sms / (int)ceil_div(N, decode::ROWS), 1, 8);
    const int share = (int)ceil_div(blocks, most);
    return (int)ceil_div(blocks, share);   // none is empty
}
inline void decode_x_proj(float* parts, const floatX* u, const floatX* w, int B, int N, int e, Stream stream) {
    decode::linear(w, B, e, decode_x_splits(N, e), decode::Input<floatX>{u, nullptr, 0}, decode::PartOutput{parts, N, B}, stream);
}
inline void decode_scan(floatX* out, float* h, const float* parts, const floatX* u, const floatX* z, const floatX* dt_proj,
                        const float* A_log, const float* D, const float* dt_bias, int B, int e, int N, int rank, Stream stream) {
    const int channels = (int)ceil_div(e, std::min(decode::gpu().sms, e));
    const size_t shared = (size_t)B * (rank + 2 * N) * sizeof(float);
    const int splits = decode_x_splits(rank + 2 * N, e);
    decode::launch(decode::scan_kernel<floatX>, dim3((unsigned)ceil_div(e, channels)), decode::THREADS, shared, stream,
                   decode::ScanArgs<floatX>{out, h, parts, u, z, dt_proj, A_log, D, dt_bias, B, e, N, rank, splits, channels});
}
// Zero it before the first use
inline size_t decode_attention_workspace(int B, int H, int G, int hd) {
    return (size_t)round_up((int64_t)B * G * sizeof(int), 256) + (size_t)B * H * decode::attention_splits(G) * (2 + hd) * sizeof(float);
}
inline void decode_attention(floatX* out, floatX* ring, void* workspace, const floatX* qkv, const float* cos_sin, const int64_t* position,
                             int64_t capacity, int B, int H, int G, int hd, Stream stream) {
    float* parts = (float*)((char*)workspace + round_up((int64_t)B * G * sizeof(int), 256));
    const decode::AttentionArgs<floatX> a{out, ring, parts, (int*)workspace, qkv, cos_sin, position, capacity, H, G, hd,
                                          decode::attention_splits(G)};
    if (hd <= 64) decode::attention<floatX, 8>(a, B, stream);
    else if (hd <= 128) decode::attention<floatX, 16>(a, B, stream);
    else decode::attention<floatX, 32>(a, B, stream);
}
inline void decode_embed(float* x, floatX* xw, float* squares, float* cos_sin, const int* tokens, const int64_t* position, const float* norm,
                         const floatX* embedding, double rope_base, int B, int d, int hd, Stream stream) {
    const decode::EmbedArgs<floatX> args{x, xw, squares, cos_sin, norm, embedding, d, hd, decode::rope_turns(hd, rope_base)};
    decode::launch(decode::embed_kernel<floatX>, dim3((unsigned)B), 256, 0, stream, args, tokens, position);
}
inline void decode_sample(int* tokens, int* emitted, int64_t* position, int64_t* drawn, uint8_t* seen, float* x, floatX* xw, float* squares,
                          float* cos_sin, const float* logits, const uint64_t* keys, const float* norm, const floatX* embedding,
                          double rope_base, SampleOptions options, int B, int V, int choices, int d, int hd, Stream stream) {
    const auto draw = [&](auto kernel, int ranks) {        // of a sequence
        const int each = (int)ceil_div(choices, ranks * decode::SAMPLE_THREADS);
        decode::launch_clusters(kernel, dim3((unsigned)(B * ranks)), ranks, decode::SAMPLE_THREADS, 0, stream,
                                decode::SampleArgs{tokens, emitted, position, drawn, seen, logits, keys, options, B, V, choices, each},
                                decode::EmbedArgs<floatX>{x, xw, squares, cos_sin, norm, embedding, d, hd, decode::rope_turns(hd, rope_base)});
    };
    if (decode::gpu().major < 9) draw(decode::sample_kernel<floatX, 1>, 1);
    else if (B <= 8) draw(decode::sample_kernel<floatX, 8>, 8);
    else draw(decode::sample_kernel<floatX, 4>, 4);        // all clusters at once
}

} // namespace gpu
