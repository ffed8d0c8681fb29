"""Attention as PyTorch has it, at the shapes of bench_attention.cu: FlashAttention-2 with a window (the operator behind
scaled_dot_product_attention) and compiled flex_attention. Prints the table that `make bench-attention` continues.

    python dev/bench/attention_peers.py [--shapes 1]

Needs a PyTorch with CUDA; says so and ends with status 0 where there is none, because the peers are a comparison, not a part of
samba.cu. Times are medians of 30 calls between two events, inputs rotate over three buffers, as in bench.cuh.
"""

import argparse
import statistics
import sys

# name, B, T, query heads, key heads, head_dim, window (0: all earlier keys); as SHAPES in bench_attention.cu
SHAPES = [
    ("T 4096 window 2048", 8, 4096, 12, 12, 128, 2048),
    ("T 16384 window 2048", 2, 16384, 12, 12, 128, 2048),
    ("T 4096 window 512", 8, 4096, 12, 12, 128, 512),
    ("T 4096 full", 8, 4096, 12, 12, 128, 0),
    ("T 4096 window 2048 hd 64", 8, 4096, 24, 24, 64, 2048),
    ("T 4096 window 2048 MQA", 8, 4096, 12, 1, 128, 2048),
]
COPIES, WARMUP, REPEATS = 3, 5, 30


def visible_pairs(T, window):
    window = min(window, T) if window > 0 else T
    return window * (window + 1) // 2 + (T - window) * window


def median_ms(torch, call):
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for i in range(WARMUP):
        call(i)
    for i, (begin, end) in enumerate(events):
        begin.record()
        call(WARMUP + i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def print_row(name, ms, flops):
    print(f"{name:<42} {ms:9.4f} {flops / ms * 1e-9:10.1f}", flush=True)


def flash_calls(torch, q, k, v, dout, window):
    """q, k, v, dout: lists of (B, T, heads, head_dim). Returns forward(i) and backward(i)."""
    T, left = q[0].shape[1], window - 1 if window > 0 else -1
    forward_op, backward_op = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    sides = dict(window_size_left=left, window_size_right=0)

    def forward(i):
        i %= COPIES
        return forward_op(q[i], k[i], v[i], None, None, T, T, 0.0, True, False, **sides)

    saved = [forward(i) for i in range(COPIES)]

    def backward(i):
        i %= COPIES
        out, lse, rng_state, unused, _ = saved[i]
        return backward_op(dout[i], q[i], k[i], v[i], out, lse, None, None, T, T, 0.0, True, rng_state, unused, **sides)

    return forward, backward


def flex_calls(torch, q, k, v, dout, window):
    """Inputs as for flash_calls; flex_attention wants (B, heads, T, head_dim), which these are made into by strides."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # a form compiled for each shape and mode, and PyTorch runs a function uncompiled that has more than eight
    T = q[0].shape[1]

    def seen(b, h, i, p):
        return (p <= i) & (i - p < window) if window > 0 else p <= i

    mask = create_block_mask(seen, None, None, T, T, device="cuda")
    attention = torch.compile(flex_attention, dynamic=False)
    heads_first = [[x.transpose(1, 2).detach().requires_grad_() for x in xs] for xs in (q, k, v)]
    gqa = q[0].shape[2] != k[0].shape[2]

    def run(i):
        return attention(*(xs[i % COPIES] for xs in heads_first), block_mask=mask, enable_gqa=gqa)

    def forward(i):
        with torch.no_grad():
            return run(i)

    saved = [run(i) for i in range(COPIES)]

    def backward(i):
        i %= COPIES
        return torch.autograd.grad(saved[i], [xs[i] for xs in heads_first], dout[i].transpose(1, 2), retain_graph=True)

    return forward, backward


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("attention_peers.py: no PyTorch here, so no FlashAttention-2 and no flex_attention to compare with")
        return
    if not torch.cuda.is_available():
        print("attention_peers.py: PyTorch sees no CUDA device, so there is nothing to compare with")
        return
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}")
    print(f"{'operation':<42} {'ms':>9} {'TFLOP/s':>10}")
    for name, B, T, H, G, hd, window in SHAPES[: arguments.shapes]:
        make = lambda heads: [torch.randn(B, T, heads, hd, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
        q, k, v, dout = make(H), make(G), make(G), make(H)
        flops = 4.0 * hd * visible_pairs(T, window) * B * H
        for peer, calls in (("FlashAttention-2", flash_calls), ("flex_attention", flex_calls)):
            try:
                forward, backward = calls(torch, q, k, v, dout, window)
                print_row(f"{peer} fwd {name}", median_ms(torch, forward), flops)
                print_row(f"{peer} bwd {name}", median_ms(torch, backward), 2.5 * flops)
            except Exception as error:  # a peer that cannot run is reported, not hidden
                print(f"{peer} {name}: could not run: {str(error).splitlines()[0][:120]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
