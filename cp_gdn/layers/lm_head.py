"""Projection to the vocabulary, and the summed cross entropy without ever holding all logits.

    loss_sum = sum_t [ logsumexp(W h_t) - (W h_t)[label_t] ],   label_t != IGNORE_INDEX

Tokens go in slices of ``SLICE``; each slice is checkpointed, so the forward keeps hidden states
only and the backward makes one slice of logits [SLICE, vocabulary] at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.chunked import compute_dtype

IGNORE_INDEX = -100
SLICE = 4096


class LMHead(nn.Module):
    """``weight`` is a parameter [vocab_size, hidden_size]; when tied, the embedding's own."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size], or with ``labels`` [B, T] the summed loss, a scalar.

        The loss is in nats, in fp32 (fp64 for fp64 hidden states).
        """
        if labels is None:
            return F.linear(hidden_states, self.weight)
        tokens, targets = hidden_states.flatten(0, 1), labels.flatten()
        losses = [
            checkpoint(self._loss, rows, wanted, use_reentrant=False, preserve_rng_state=False)
            for rows, wanted in zip(tokens.split(SLICE), targets.split(SLICE), strict=True)
        ]
        return torch.stack(losses).sum()

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(tokens, self.weight)
        logits = logits.to(compute_dtype(logits.dtype))
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
