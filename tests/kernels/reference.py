"""What the kernels must compute: the float64 token recurrence, and a mirror of their own steps.

recurrent   S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T, o_t = scale S_t^T q_t
mirror      the same result by the kernels' route: gated inverse, W-form chunks, segment summaries,
            scan; in any float dtype, optionally rounding the operands of every product as they do
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

CHUNK = 64


@dataclass
class Inputs:
    q: torch.Tensor  # [1, L, Hk, K]
    k: torch.Tensor
    v: torch.Tensor  # [1, L, Hv, V]
    g: torch.Tensor  # [1, L, Hv]
    beta: torch.Tensor
    lengths: list[int] = field(default_factory=list)
    initial: torch.Tensor | None = None  # [N, Hv, K, V]

    @property
    def cu(self) -> torch.Tensor:
        offsets = [0]
        for n in self.lengths:
            offsets.append(offsets[-1] + n)
        return torch.tensor(offsets, dtype=torch.int32, device=self.q.device)


def draw(lengths, key_heads, value_heads, *, gates="random", keys="random", dtype=torch.bfloat16,
         gate_dtype=torch.float32, initial=False, norm=True, device="cpu", seed=0):  # fmt: skip
    """Random inputs; gates: random, slow, zero, strong or mixed; keys: random, near or equal."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, device=device)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng, device=device)

    L, K, V = sum(lengths), 128, 128
    q, k = normal(1, L, key_heads, K), normal(1, L, key_heads, K)
    if keys != "random":
        common = normal(1, 1, key_heads, K)
        k = common.expand_as(k).clone() if keys == "equal" else common + k / 3
    if norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    fastest = {"random": 0.1, "slow": 1e-4, "zero": 0.0, "strong": 5.0, "mixed": 1.0}[gates]
    g = -fastest * uniform(1, L, value_heads)
    if gates == "mixed":  # every other head hardly decays
        g[..., ::2] *= 1e-4
    beta = uniform(1, L, value_heads)
    if keys == "equal":
        g, beta = torch.full_like(g, -1e-3), torch.full_like(beta, 0.835)
    return Inputs(
        q.to(dtype), k.to(dtype), normal(1, L, value_heads, V).to(dtype), g.to(gate_dtype),
        beta.to(gate_dtype), list(lengths),
        normal(len(lengths), value_heads, K, V) if initial else None,
    )  # fmt: skip


def l2norm(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def recurrent(x: Inputs, *, scale=128**-0.5, normalize=False):
    """o [1, L, Hv, V] and final states [N, Hv, K, V] in float64."""
    ratio = x.v.shape[2] // x.k.shape[2]
    q, k = x.q.double(), x.k.double()
    if normalize:
        q, k = l2norm(q), l2norm(k)
    q, k = (y[0].repeat_interleave(ratio, 1) for y in (q, k))
    v, alpha, beta = x.v[0].double(), x.g[0].double().exp(), x.beta[0].double()
    N, Hv, K, V = len(x.lengths), v.shape[1], k.shape[2], v.shape[2]
    S = torch.zeros(N, Hv, K, V, dtype=torch.float64, device=v.device)
    if x.initial is not None:
        S = x.initial.double().clone()
    o = torch.zeros_like(v)
    start = x.cu[:-1].long()
    lengths = torch.tensor(x.lengths, device=v.device)
    for t in range(max(x.lengths)):
        on = lengths > t
        at = start[on] + t
        s = alpha[at][..., None, None] * S[on]
        error = v[at] - torch.einsum("nhk,nhkv->nhv", k[at], s)
        s = s + torch.einsum("nhk,nhv->nhkv", beta[at][..., None] * k[at], error)
        S[on] = s
        o[at] = scale * torch.einsum("nhk,nhkv->nhv", q[at], s)
    return o[None], S


def error(x, reference) -> float:
    """Relative L2; NaN and Inf in x show as such."""
    return ((x.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()
