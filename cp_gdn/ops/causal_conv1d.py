"""Depthwise causal convolution over sharded, packed sequences.

    y_t = act( sum_{s = 0}^{W-1} weight[:, W - 1 - s] * x_{t - s} + bias ),   x_{t - s} = 0 before the
    document's first token

A shard needs the W - 1 tokens before it (the halo), from as many predecessors as hold them. Document
boundaries are masks made
from the context's position_ids, so nothing is read on the host.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import boundary
from ..comm import Pending
from ..context import CPContext
from ..eager import untraced
from .engines import obstacle, use_kernels

_WIDTH, _MULTIPLE = 4, 4  # taps, and channels of a part, that the kernels take


class Halo:
    """The ``width`` tokens before a shard on their way to it, later their gradients on the way back.

    Both ways beside whatever the current stream does; :func:`send_halo` makes one.
    """

    def __init__(self, x: Tensor, context: CPContext, width: int):
        self._context, self._width = context, width
        self._tokens = boundary.start_exchange_halo(x.detach(), context, width)
        self._gradients: Pending[list[tuple[slice, Tensor]]] | None = None

    def tokens(self) -> Tensor:
        """[B, width, D]"""
        return self._tokens.wait()

    def give_back(self, dhalo: Tensor) -> None:
        self._gradients = boundary.start_return_halo(dhalo, self._context, self._width)

    def add_gradients(self, dx: Tensor) -> Tensor:
        """dx [B, T, D] of the shard, with what the ranks after it gave back."""
        assert self._gradients is not None
        for tokens, part in self._gradients.wait():
            dx[:, tokens] += part
        return dx


def send_halo(x: Tensor, context: CPContext | None, width: int) -> tuple[Tensor, Halo | None]:
    """x [B, T, D] as it is, to be convolved, and the tokens before it; None where no document crosses a cut, or
    width is 0.

    What is computed between this call and the convolution hides the exchange, in the backward too.
    """
    if context is None or not context.any_crossing or width == 0:
        return x, None
    context.check_tokens(x)
    return _send(x, context, width)


@untraced
def _send(x: Tensor, context: CPContext, width: int) -> tuple[Tensor, Halo]:
    halo = Halo(x, context, width)
    return _Sent.apply(x, halo), halo


class _Sent(torch.autograd.Function):
    """The identity; in the backward, where the gradients of the tokens that others saw arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.halo.add_gradients(grads[0]), None


class _Received(torch.autograd.Function):
    """[B, T, D] -> its halo [B, width, D], whose gradient returns by way of :class:`_Sent`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        return halo.tokens()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.halo.give_back(grads[0])
        return None, None


_received = untraced(_Received.apply)


class _FusedConv(torch.autograd.Function):
    """x [B, T, D] -> its three parts after convolution and SiLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        filters: Tensor,
        sizes: tuple[int, int, int],
        context: CPContext | None,
        halo: Halo | None,
    ) -> tuple[Tensor, ...]:
        from ..kernels.conv import causal_conv_silu

        ctx.halo = halo
        before = x.new_zeros(x.shape[0], _WIDTH - 1, x.shape[2]) if halo is None else halo.tokens()
        packed = context is not None and context.num_documents > 1
        positions = (context.position_ids.to(x.device),) if context is not None and packed else ()
        ctx.save_for_backward(x, before, filters, *positions)
        return causal_conv_silu(
            x, before, filters.float(), positions[0] if positions else None, sizes
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels.conv_backward import causal_conv_silu_backward

        x, before, filters, *positions = ctx.saved_tensors
        dq, dk, dv = grads
        dx, dhalo, dfilters = causal_conv_silu_backward(
            x, before, filters.float(), positions[0] if positions else None, (dq, dk, dv)
        )
        if ctx.halo is not None:
            ctx.halo.give_back(dhalo)
        return dx, dfilters.to(filters.dtype), None, None, None


_fused_conv = untraced(_FusedConv.apply)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    split: None = None,
    cp_context: CPContext | None = None,
    halo: Halo | None = None,
    engine: str = "auto",
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    split: Sequence[int],
    cp_context: CPContext | None = None,
    halo: Halo | None = None,
    engine: str = "auto",
) -> tuple[Tensor, ...]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    split: Sequence[int] | None = None,
    cp_context: CPContext | None = None,
    halo: Halo | None = None,
    engine: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Depthwise causal convolution along T, one filter a channel.

    Args:
        x: [B, T, D]; under context parallelism T is this rank's part.
        weight: [D, W] or [D, 1, W]. bias: [D] or None.
        activation: "silu" or None.
        split: sizes that add to D: return the channels in as many tensors.
        cp_context: carries the shards and the documents; None: one rank, one document a row.
        halo: of this x, if :func:`send_halo` was called before; otherwise it is fetched here.
        engine: "tilelang" (one kernel each way; Hopper, bf16 or fp16, W = 4, SiLU, no bias, a split in three multiples
            of 4; its products are of ``weight`` as it is, and its results are contiguous), "torch" (``weight`` in the
            dtype of x), or "auto": tilelang where it can.

    Returns:
        [B, T, D], or a tuple of [B, T, split[i]].

    Raises:
        ValueError: shapes that do not fit, an unknown activation or engine, or "tilelang" where it cannot.
    """
    filters = weight.squeeze(1) if weight.ndim == 3 else weight
    if x.ndim != 3 or filters.ndim != 2 or filters.shape[0] != x.shape[2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [B, T, D] and [D, W] or [D, 1, W]"
        )
    if activation not in ("silu", None):
        raise ValueError(f'activation={activation!r}; choose "silu" or None')
    if split is not None and (sum(split) != x.shape[2] or min(split) < 1):
        raise ValueError(
            f"split={tuple(split)} of {x.shape[2]} channels; the sizes must be positive and add to them"
        )
    if cp_context is not None:
        cp_context.check_tokens(x)
    reason = obstacle(x)
    if reason is None and (
        filters.shape[1] != _WIDTH
        or bias is not None
        or activation is None
        or split is None
        or len(split) != 3
        or any(size % _MULTIPLE for size in split)
    ):
        reason = (
            f"it takes W = {_WIDTH}, SiLU, no bias and a split into three multiples of {_MULTIPLE}"
        )
    kernels = use_kernels(engine, reason)
    if halo is None:
        x, halo = send_halo(x, cp_context, filters.shape[1] - 1)
    if kernels:
        assert split is not None
        return _fused_conv(x, filters, tuple(split), cp_context, halo)
    y = _convolve(x, filters.to(x.dtype), bias, cp_context, halo)
    y = F.silu(y) if activation == "silu" else y
    return y if split is None else y.split(list(split), -1)


def _convolve(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    cp_context: CPContext | None,
    halo: Halo | None,
) -> Tensor:
    B, T, D = x.shape
    width = filters.shape[1] - 1
    before = x.new_zeros(B, width, D) if halo is None else _received(x, halo)
    padded = torch.cat((before, x), 1)  # [B, width + T, D]
    if cp_context is not None and cp_context.num_documents > 1:
        positions = cp_context.position_ids.to(x.device)
        y = x * filters[:, width]
        for s in range(1, width + 1):
            inside = (positions >= s).unsqueeze(-1)
            shifted = padded[:, width - s : width - s + T]
            y = y + torch.where(inside, shifted, 0) * filters[:, width - s]
    else:
        y = F.conv1d(padded.transpose(1, 2), filters.unsqueeze(1), groups=D).transpose(1, 2)
    return y if bias is None else y + bias
