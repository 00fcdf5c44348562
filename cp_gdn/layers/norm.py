"""RMS normalisation, plain and gated.

    RMSNorm        y = x / rms(x) * (1 + weight)           weight starts at 0
    GatedRMSNorm   y = x / rms(x) * weight * silu(z)       weight starts at 1, norm before gate

with rms(x) = sqrt(mean(x^2) + eps) over the last dimension, as in Qwen3-Next and Qwen3.5. Computed
in fp32 (fp64 for fp64 inputs), returned in the dtype of the input.
"""

import torch
from torch import Tensor, nn

from ..ops.chunked import compute_dtype
from ..ops.gated_rms_norm import gated_rms_norm, normalize


class RMSNorm(nn.Module):
    """Zero-centred RMSNorm over the last dimension of ``x`` [..., D]."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = compute_dtype(x.dtype)
        return (normalize(x.to(wide), self.eps) * (1 + self.weight.to(wide))).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of ``x`` [..., D] times silu of ``gate`` [..., D]."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor, *, engine: str = "auto") -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps, engine=engine)
