"""Cut a tensor along the sequence and put it together again, differentiably.

The ranks' losses add. So the gradient of ``shard`` is zero outside the slice, and the gradient of ``gather``
is the sum of
what every rank sends back, cut to this rank's slice.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import comm
from .eager import untraced

if TYPE_CHECKING:
    from .context import CPContext


def _check_length(x: Tensor, dim: int, length: int, name: str) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(
            f"dim={dim} of a {x.ndim}-D tensor; give the dimension that runs along the sequence"
        )
    if x.shape[dim] != length:
        raise ValueError(
            f"dimension {dim} has {x.shape[dim]} entries but {name} is {length}; shard takes the whole "
            "sequence, gather "
            "this rank's part, and the context must have been built for this batch"
        )
    return dim % x.ndim


def shard(x: Tensor, context: "CPContext", dim: int = 1) -> Tensor:
    """This rank's slice of ``x`` along ``dim`` (length seq_len)."""
    dim = _check_length(x, dim, context.seq_len, "seq_len")
    return x.narrow(dim, context.start, context.num_tokens)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, context: "CPContext", dim: int) -> Tensor:
        ctx.context, ctx.dim = context, dim
        return comm.gather_rows(local.movedim(dim, 0), context).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (
            comm.sum_rows(grads[0].movedim(ctx.dim, 0), ctx.context).movedim(0, ctx.dim),
            None,
            None,
        )


_gather = untraced(_Gather.apply)


def gather(local: Tensor, context: "CPContext", dim: int = 1) -> Tensor:
    """Every rank's slice along ``dim`` (length num_tokens), put together in rank order on every rank."""
    dim = _check_length(local, dim, context.num_tokens, "num_tokens")
    if context.size == 1:
        return local
    return _gather(local, context, dim)
