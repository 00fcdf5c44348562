"""The short depthwise convolution before the Gated DeltaNet rule, owner of its filters.

    y = silu(causal_conv1d(x, weight))

The filters have the shape [D, 1, W] of ``torch.nn.Conv1d`` and its initial distribution, so
checkpoints agree.
"""

import torch
from torch import Tensor, nn

from ..context import CPContext
from ..ops.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """[B, T, D] -> [B, T, D], one filter of ``kernel_size`` taps a channel, no bias, then SiLU."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size).uniform_(-bound, bound))

    def forward(self, x: Tensor, *, cp_context: CPContext | None = None) -> Tensor:
        return causal_conv1d(x, self.weight.to(x.dtype), cp_context=cp_context)
