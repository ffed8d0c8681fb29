"""The tables of scaling.md: step time of data-parallel training against the number of GPUs. python dev/scaling.py"""

MODELS = {  # parameters, FLOP a token at 4,096 tokens (train_samba info), elements of the last bucket (embedding; first layers come with it)
    "421M": (421.8e6, 2.70e9, 32000 * 1536),
    "1.3B": (1330.2e6, 8.36e9, 32000 * 2304),
    "3.8B": (3864.3e6, 24.0e9, 32064 * 2816),
}
FLOPS = 130.1e3 * 2.70e9     # a GPU: 130.1k tokens/s of 421M, measured with PyTorch on one H100; the same share of the peak for the others
HBM = 2.8e12                 # bytes/s
NVLINK = (300e9, 8e-6)
NETWORKS = {"8 x 400 Gb/s a machine": NVLINK, "100 Gb/s a machine": (11e9, 15e-6)}   # bytes/s of a ring, seconds a hop
BUCKET, SEQUENCE = 64e6, 4096


def step(model, gpus, tokens, network):
    """(seconds of a step, of it not hidden) with --zero 1"""
    parameters, flops, last = MODELS[model]
    bandwidth, hop = network if gpus > 8 else NVLINK
    own = tokens / gpus
    micro = min(own, 8 * SEQUENCE)
    compute = own * flops / FLOPS
    window = micro * flops / FLOPS                          # the last micro-batch, and the first
    update = (4 + 8) * parameters / HBM + 30 * parameters / gpus / HBM   # zero and norm of gradients, AdamW on a part
    part = (gpus - 1) / gpus
    buckets = max(1, 4 * parameters / BUCKET)
    owners = max(1.0, gpus / buckets)                       # parts that a bucket is reduced in, one after the other at the worst
    latency = buckets * owners * hop * min(gpus, 64) ** 0.5  # a chain is a pipeline: its length costs only once a piece; grows slowly
    reduce = 4 * parameters * part / bandwidth + latency
    gather = 2 * parameters * part / bandwidth + latency
    exposed = max(4 * last * part / bandwidth, reduce - 2 / 3 * window) + max(2 * last * part / bandwidth, gather - 1 / 3 * window)
    return compute + update + exposed, exposed


def table(network):
    print("| model | GPUs | tokens a step | ms | not hidden, ms | tokens/s | efficiency |\n|---|---|---|---|---|---|---|")
    for model, (_, flops, _) in MODELS.items():
        for gpus in (1, 8, 64, 512, 4096):
            tokens = max(2097152, gpus * SEQUENCE)
            seconds, exposed = step(model, gpus, tokens, network) if gpus > 1 else (tokens * flops / FLOPS + 42 * MODELS[model][0] / HBM, 0)
            rate = tokens / seconds
            print(f"| {model} | {gpus:,} | {tokens / 1e6:.1f}M | {seconds * 1e3:,.0f} | {exposed * 1e3:,.0f} | {rate / 1e6:.2f}M | {100 * rate * flops / FLOPS / gpus:.0f} % |")


for name, network in NETWORKS.items():
    print(f"\n**{name}**\n")
    table(network)
