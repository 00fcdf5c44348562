"""One 16-bit copy of an activation for several linear layers.

Under torch.autocast every linear layer that reads a 32-bit activation makes its own copy, keeps it
for its backward, and returns its own 32-bit gradient to be added. Here they share one copy; their
gradients are added in 32 bits all the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Copies(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        low = x.to(dtype)
        return tuple(low.view_as(low) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].to(ctx.dtype)
        for grad in grads[1:]:
            total += grad
        return total, None, None


def share_copy(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` tensors equal to what ``count`` linear layers make of ``x`` under autocast.

    They share memory: read them only. Without autocast, or if ``x`` is not fp32, each is ``x``.
    """
    device = x.device.type
    if x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return (x,) * count
    return _Copies.apply(x, torch.get_autocast_dtype(device), count)
