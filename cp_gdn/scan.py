"""The algebra of summaries: what a stretch of tokens does to the recurrent state.

A stretch acts on the state S [K, V] of a value head as an affine map

    S_out = M S_in + S_ext,    M [K, K], S_ext [K, V]

(M is a product of `alpha_t (I - beta_t k_t k_t^T)`, Yang et al., Gated Delta Networks, arXiv 2412.06464).
Affine maps compose,
so chunk, segment and rank summaries are one associative scan; the gradient of the state goes the other way
through the transposed map,

    dS_in = M^T dS_out + dS_ext.

Leading dimensions (batch, heads) broadcast. Plain torch, no ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """The map of one stretch. ``M`` [..., K, K] is None where the stretch starts a document: nothing comes in."""

    M: Tensor | None
    S: Tensor  # [..., K, V]


def apply(summary: Summary, S_in: Tensor | None) -> Tensor:
    """State after the stretch, [..., K, V]; ``S_in`` None means that nothing comes in."""
    if summary.M is None or S_in is None:
        return summary.S
    return torch.matmul(summary.M, S_in) + summary.S


def compose(later: Summary, earlier: Summary) -> Summary:
    """The map of ``earlier`` followed by ``later``."""
    S = apply(later, earlier.S)
    if later.M is None or earlier.M is None:
        return Summary(None, S)
    return Summary(torch.matmul(later.M, earlier.M), S)


def transpose(M: Tensor | None) -> Tensor | None:
    """The transition of the reverse direction, M^T."""
    return None if M is None else M.mT


def scan(summaries: list[Summary], links: list[bool]) -> list[Tensor | None]:
    """Incoming state of every stretch in walking order.

    ``links[i]`` says whether a state goes from stretch i to stretch i + 1 (length len(summaries) - 1).
    """
    incoming: list[Tensor | None] = [None]
    for summary, linked in zip(summaries[:-1], links, strict=True):
        incoming.append(apply(summary, incoming[-1]) if linked else None)
    return incoming
