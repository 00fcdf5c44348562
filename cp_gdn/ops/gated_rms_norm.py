"""RMS normalisation of the delta rule's outputs, gated.

    y = x / rms(x) * weight * silu(gate)        rms(x) = sqrt(mean(x^2) + eps) over the last dimension

in this order, as in Qwen3-Next and Qwen3.5; computed in fp32 (fp64 for fp64 inputs).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..eager import untraced
from .chunked import compute_dtype
from .engines import obstacle, use_kernels

_DIMS = (64, 128, 256)  # of the kernels


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / rms(x), in the dtype of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class _FusedGatedNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        from ..kernels.norm import gated_norm

        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return gated_norm(x, gate, weight.float(), eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.norm import gated_norm_backward

        x, gate, weight = ctx.saved_tensors
        dx, dgate, dweight = gated_norm_backward(x, gate, weight.float(), *grads, ctx.eps)
        return dx, dgate, dweight.to(weight.dtype), None


_fused_gated_norm = untraced(_FusedGatedNorm.apply)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-6, *, engine: str = "auto"
) -> Tensor:
    """RMSNorm of ``x`` times SiLU of ``gate``.

    Args:
        x, gate: [..., D]. weight: [D]. eps: added to the mean square.
        engine: "tilelang" (one kernel each way; Hopper, bf16 or fp16, D 64, 128 or 256), "torch",
            or "auto": tilelang where it can.

    Returns:
        [..., D] in the dtype of x.

    Raises:
        ValueError: shapes that differ, an unknown engine, or "tilelang" where it cannot.
    """
    if x.shape != gate.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x, gate, weight have shapes {tuple(x.shape)}, {tuple(gate.shape)}, "
            f"{tuple(weight.shape)}; expected [..., D] twice and [D]"
        )
    reason = obstacle(x)
    if reason is None and (gate.dtype != x.dtype or x.shape[-1] not in _DIMS):
        reason = (
            f"it takes x and gate of one dtype and D one of {_DIMS}, not {x.dtype} and {gate.dtype} "
            f"with D = {x.shape[-1]}"
        )
    if use_kernels(engine, reason):
        return _fused_gated_norm(x, gate, weight, eps)
    wide = compute_dtype(x.dtype)
    y = normalize(x.to(wide), eps) * weight.to(wide)
    return (y * F.silu(gate.to(wide))).to(x.dtype)
