"""Random inputs of the benchmarks, on the GPU."""

import torch
import torch.nn.functional as F


def draw_gates(kind: str, tokens: int, heads: int) -> torch.Tensor:
    """Log gates [1, T, Hv] fp32."""
    if kind == "qwen":  # g = -A softplus(a + dt_bias), A uniform to 16, dt log-uniform
        A = torch.empty(heads, device="cuda").uniform_(0, 16)
        dt = torch.empty(heads, device="cuda").uniform_(-6.907755, -2.302585).exp()
        bias = torch.log(torch.expm1(dt))
        return -A * F.softplus(0.5 * torch.randn(1, tokens, heads, device="cuda") + bias)
    if kind == "flash_qla":  # a quarter of the heads do not decay
        g = -F.softplus(torch.randn(1, tokens, heads, device="cuda")) / 16
        g[..., torch.randperm(heads, device="cuda")[: max(1, heads // 4)]] = 0
        return g
    if kind == "slow":
        return -1e-4 * torch.rand(1, tokens, heads, device="cuda")
    raise ValueError(f"gates={kind}; there are qwen, flash_qla and slow")


def draw(tokens: int, key_heads: int, value_heads: int, gates: str, seed: int):
    torch.manual_seed(seed)

    def unit():
        x = torch.randn(1, tokens, key_heads, 128, device="cuda")
        return F.normalize(x, dim=-1).bfloat16()

    q, k = unit(), unit()
    v = torch.randn(1, tokens, value_heads, 128, device="cuda").bfloat16()
    return q, k, v, draw_gates(gates, tokens, value_heads), torch.rand_like(v[..., 0].float())


def lengths(tokens: int, documents: int) -> list[int]:
    """Equal documents, or (negative) as many of skewed random lengths."""
    if documents > 0:
        return [tokens // documents] * documents
    share = torch.rand(-documents, generator=torch.Generator().manual_seed(0)).log().neg() ** 2
    sizes = (share / share.sum() * tokens).long().clamp_min(1).tolist()
    sizes[0] += tokens - sum(sizes)
    return sizes
