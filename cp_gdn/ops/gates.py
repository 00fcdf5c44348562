"""Log decay and write strength of the delta rule, from their projections.

    g = -exp(A_log) softplus(a + dt_bias)        beta = sigmoid(b)

as in Gated DeltaNet (arXiv 2412.06464), computed in fp32 (fp64 for fp64 inputs).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..eager import untraced
from .chunked import compute_dtype
from .engines import obstacle, use_kernels

_MOST_HEADS = 256  # of the kernels


class _FusedGates(Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        from ..kernels.gates import decay_and_strength

        ctx.save_for_backward(a, b, A_log, dt_bias)
        return decay_and_strength(a, b, A_log.float(), dt_bias.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        from ..kernels.gates import decay_and_strength_backward

        a, b, A_log, dt_bias = ctx.saved_tensors
        da, db, dA_log, ddt_bias = decay_and_strength_backward(
            a, b, A_log.float(), dt_bias.float(), *grads
        )
        return da, db, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype)


_fused_gates = untraced(_FusedGates.apply)


def decay_and_strength(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, *, engine: str = "auto"
) -> tuple[Tensor, Tensor]:
    """g and beta of every token and value head.

    Args:
        a, b: [B, T, Hv]. A_log, dt_bias: [Hv].
        engine: "tilelang" (one kernel each way; Hopper, bf16 or fp16, at most 256 heads), "torch",
            or "auto": tilelang where it can.

    Returns:
        g and beta, [B, T, Hv] fp32 (fp64 for fp64 inputs); g is the natural logarithm of the gate.

    Raises:
        ValueError: shapes that differ, an unknown engine, or "tilelang" where it cannot.
    """
    if a.shape != b.shape or A_log.shape != a.shape[-1:] or dt_bias.shape != a.shape[-1:]:
        raise ValueError(
            f"a, b, A_log, dt_bias have shapes {tuple(a.shape)}, {tuple(b.shape)}, "
            f"{tuple(A_log.shape)}, {tuple(dt_bias.shape)}; expected [B, T, Hv] twice and [Hv] twice"
        )
    reason = obstacle(a)
    if reason is None and (b.dtype != a.dtype or a.shape[-1] > _MOST_HEADS):
        reason = (
            f"it takes a and b of one dtype and at most {_MOST_HEADS} heads, not {a.dtype} and "
            f"{b.dtype} with {a.shape[-1]} heads"
        )
    if use_kernels(engine, reason):
        return _fused_gates(a, b, A_log, dt_bias)
    wide = compute_dtype(a.dtype)
    g = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
    return g, b.to(wide).sigmoid()
