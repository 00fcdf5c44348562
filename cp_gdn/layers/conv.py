"""The short depthwise convolution before the Gated DeltaNet rule, owner of its filters.

    [q k v] = silu(causal_conv1d(x, weight))

The filters have the shape [D, 1, W] of ``torch.nn.Conv1d`` and its initial distribution, so
checkpoints agree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..context import CPContext
from ..ops.causal_conv1d import Halo, causal_conv1d, send_halo


class CausalConv1d(nn.Module):
    """[B, T, D] -> [B, T, split[i]], one filter of ``kernel_size`` taps a channel, no bias, then SiLU."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        bound = kernel_size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size).uniform_(-bound, bound))

    def forward(
        self,
        x: Tensor,
        split: Sequence[int],
        *,
        cp_context: CPContext | None = None,
        halo: Halo | None = None,
        engine: str = "auto",
    ) -> tuple[Tensor, ...]:
        return causal_conv1d(
            x, self.weight, split=split, cp_context=cp_context, halo=halo, engine=engine
        )

    def send_halo(self, x: Tensor, cp_context: CPContext | None) -> tuple[Tensor, Halo | None]:
        """What forward is to be given: x, and the tokens before this shard on their way."""
        return send_halo(x, cp_context, self.weight.shape[-1] - 1)
