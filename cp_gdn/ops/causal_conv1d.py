"""Depthwise causal convolution over sharded, packed sequences.

    y_t = act( sum_{s = 0}^{W-1} weight[:, W - 1 - s] * x_{t - s} + bias ),   x_{t - s} = 0 before the
    document's first token

A shard needs the W - 1 tokens before it (the halo), from as many predecessors as hold them. Document
boundaries are masks made
from the context's position_ids, so nothing is read on the host.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import boundary
from ..context import CPContext


class _Halo(torch.autograd.Function):
    """[B, T, D] -> the ``width`` tokens before the shard, [B, width, D]; the backward hands their gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: CPContext, width: int) -> Tensor:
        ctx.context, ctx.width, ctx.length = context, width, x.shape[1]
        return boundary.exchange_halo(x, context, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dhalo,) = grads
        dx = dhalo.new_zeros(dhalo.shape[0], ctx.length, dhalo.shape[2])
        for tokens, part in boundary.return_halo(dhalo, ctx.context, ctx.width):
            dx[:, tokens] += part
        return dx, None, None


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cp_context: CPContext | None = None,
) -> Tensor:
    """Depthwise causal convolution along T, one filter a channel.

    Args:
        x: [B, T, D]; under context parallelism T is this rank's part.
        weight: [D, W] or [D, 1, W]. bias: [D] or None.
        activation: "silu" or None.
        cp_context: carries the shards and the documents; None: one rank, one document a row.

    Returns:
        [B, T, D].

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
    """
    filters = weight.squeeze(1) if weight.ndim == 3 else weight
    if x.ndim != 3 or filters.ndim != 2 or filters.shape[0] != x.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [B, T, D] and [D, W] or [D, 1, W]"
        )
    if activation not in ("silu", None):
        raise ValueError(f'activation={activation!r}; choose "silu" or None')
    B, T, D = x.shape
    width = filters.shape[1] - 1
    if cp_context is not None:
        cp_context.check_tokens(x)

    if cp_context is not None and cp_context.any_crossing:
        halo = _Halo.apply(x, cp_context, width)
    else:
        halo = x.new_zeros(B, width, D)
    padded = torch.cat((halo, x), 1)  # [B, width + T, D]
    if cp_context is not None and cp_context.num_documents > 1:
        positions = cp_context.position_ids.to(x.device)
        y = x * filters[:, width]
        for s in range(1, width + 1):
            inside = (positions >= s).unsqueeze(-1)
            shifted = padded[:, width - s : width - s + T]
            y = y + torch.where(inside, shifted, 0) * filters[:, width - s]
    else:
        y = F.conv1d(padded.transpose(1, 2), filters.unsqueeze(1), groups=D).transpose(1, 2)
    if bias is not None:
        y = y + bias
    return F.silu(y) if activation == "silu" else y
