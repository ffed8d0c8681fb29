"""Samba in PyTorch: what a user without this trainer would run, and what this trainer is compared with.

The scan and the convolution are mamba_ssm's and causal_conv1d's fused CUDA kernels, attention is FlashAttention-2 through PyTorch, and
RMSNorm, RoPE, SwiGLU and the loss are compiled by torch.compile. Parameters are fp32 under bf16 autocast, the residual stream is fp32.
Tensors have the names of microsoft/Samba, so that a model.safetensors of train_samba loads as it is.

Where mamba_ssm or a GPU is missing there are plain PyTorch forms of the same operations: `fast` says which are used. They are for comparing
numbers; times of theirs mean nothing.
"""

import json
import math

import torch
import torch.nn.functional as F
from torch import nn

try:
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    fast = torch.cuda.is_available()
except ImportError:
    fast = False

device = "cuda" if torch.cuda.is_available() else "cpu"
compiled = torch.compile if fast else (lambda function: function)


@compiled
def rms_norm(x, weight, eps):
    """x (B,T,d) fp32 -> the same, normalised"""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@compiled
def swiglu(gate, up):
    """(B,T,F), (B,T,F) -> silu(gate) * up, in fp32, rounded once"""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


@compiled
def rotate(x, cos, sin):
    """x (B,T,H,hd): RoPE on halves, in fp32; cos, sin (T,1,hd/2)"""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


@compiled
def mean_loss(logits, targets):
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1))


def attention(q, k, v, window):
    """(B,T,H,hd) each; a query sees the last `window` keys, itself included (0: all)"""
    if fast:
        T = q.shape[1]
        left = window - 1 if 0 < window < T else -1
        return torch.ops.aten._flash_attention_forward(q, k, v, None, None, T, T, 0.0, True, False, window_size_left=left, window_size_right=0)[0]
    age = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(q.shape[1], device=q.device)[None, :]
    seen = (age >= 0) & (age < window) if window > 0 else age >= 0
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen).transpose(1, 2)


def plain_mamba_inner(xz, m):
    """What mamba_inner_fn computes, one time step after the other. xz (B,2e,T)"""
    x, z = xz.chunk(2, dim=1)  # (B,e,T) each
    T = x.shape[-1]
    u = F.silu(F.conv1d(F.pad(x, (3, 0)).float(), m.conv1d.weight, m.conv1d.bias, groups=x.shape[1])).to(x.dtype)
    x_dbl = m.x_proj(u.transpose(1, 2))  # (B,T,R+2N)
    rank, N = m.dt_proj.weight.shape[1], m.A_log.shape[1]
    dt = F.softplus(F.linear(x_dbl[..., :rank], m.dt_proj.weight).float() + m.dt_proj.bias)  # (B,T,e)
    B, C = x_dbl[..., rank : rank + N].float(), x_dbl[..., rank + N :].float()  # (B,T,N)
    A = -torch.exp(m.A_log)  # (e,N)
    u32 = u.transpose(1, 2).float()
    h = torch.zeros(x.shape[0], x.shape[1], N, device=x.device)
    ys = []
    for t in range(T):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u32[:, t])[..., None] * B[:, t, None, :]  # (B,e,N)
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, dim=1) + m.D * u32  # (B,T,e)
    return m.out_proj((y * F.silu(z.transpose(1, 2).float())).to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Mamba(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, e, N, R = c["n_embd"], 2 * c["n_embd"], c["d_state"], math.ceil(c["n_embd"] / 16)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, 4, groups=e)
        self.x_proj = nn.Linear(e, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, e)
        self.A_log = nn.Parameter(torch.empty(e, N))
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=False)

    def forward(self, n):
        if not fast:
            return plain_mamba_inner(self.in_proj(n).transpose(1, 2), self)
        B, T, d = n.shape
        # W n^T, so that time is contiguous without a transpose
        weight = self.in_proj.weight.to(torch.bfloat16)
        xz = (weight @ n.to(torch.bfloat16).reshape(B * T, d).t()).view(-1, B, T).transpose(0, 1)  # (B,2e,T)
        return mamba_inner_fn(xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight, None,
                              -torch.exp(self.A_log), None, None, self.D, delta_bias=self.dt_proj.bias, delta_softplus=True)  # fmt: skip


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.groups, self.hd, self.window = c["n_head"], c["n_query_groups"], c["head_size"], max(0, c["local_window"])
        self.attn = nn.Linear(c["n_embd"], (self.heads + 2 * self.groups) * self.hd, bias=False)
        self.proj = nn.Linear(self.heads * self.hd, c["n_embd"], bias=False)

    def forward(self, n, rope):
        B, T, _ = n.shape
        q, k, v = self.attn(n).view(B, T, self.groups, self.heads // self.groups + 2, self.hd).split([self.heads // self.groups, 1, 1], dim=3)
        q, k, v = q.reshape(B, T, self.heads, self.hd), k.reshape(B, T, self.groups, self.hd), v.reshape(B, T, self.groups, self.hd)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.proj(attention(q, k, v, self.window).reshape(B, T, self.heads * self.hd))


class SwiGLU(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, n):
        return self.w3(swiglu(self.w1(n), self.w2(n)))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.swiglu = SwiGLU(c["n_embd"], c["intermediate_size"])

    def forward(self, n):
        return self.swiglu(n)


class Block(nn.Module):
    def __init__(self, c, letter):
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(c["n_embd"], c["norm_eps"]), RMSNorm(c["n_embd"], c["norm_eps"])
        self.attn = Mamba(c) if letter == "M" else Attention(c)
        self.mlp = Mlp(c)

    def forward(self, x, rope):
        n = self.norm_1(x)
        x = x + (self.attn(n) if isinstance(self.attn, Mamba) else self.attn(n, rope))
        return x + self.mlp(self.norm_2(x))


class Samba(nn.Module):
    """c: the configuration as train_samba writes it. Blocks M and S; a tied head."""

    def __init__(self, c):
        super().__init__()
        if set(c["blocks"]) - {"M", "S"} or not c["tied"]:
            raise SystemExit(f"error: blocks {c['blocks']}, tied {c['tied']}: the twin knows blocks M and S and a tied head")
        self.c = c
        d = c["n_embd"]
        self.lm_head = nn.Linear(d, c["padded_vocab_size"], bias=False)
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(Block(c, letter) for letter in c["blocks"]), "ln_f": RMSNorm(d, c["norm_eps"])})

    def rope(self, T):
        if self.c["nope"]:
            return None
        half = self.c["head_size"] // 2
        angles = torch.arange(T, dtype=torch.float64)[:, None] * self.c["rope_base"] ** (-torch.arange(half, dtype=torch.float64) / half)
        return [f(angles).float().to(self.lm_head.weight.device)[:, None, :] for f in (torch.cos, torch.sin)]  # (T,1,hd/2)

    def forward(self, tokens, targets, rope):
        """tokens, targets (B,T) -> mean loss"""
        x = F.embedding(tokens, self.lm_head.weight)  # (B,T,d) fp32: the residual stream
        for block in self.transformer["h"]:
            x = block(x, rope)
        return mean_loss(self.lm_head(self.transformer["ln_f"](x)), targets)


def load(path):
    """The model and configuration of a model.safetensors that train_samba wrote"""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        model = Samba(json.loads(file.metadata()["config"]))
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return model.to(device)
