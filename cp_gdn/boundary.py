"""What crosses the cuts between shards: boundary states, their gradients, and the convolution's halo.

Boundary states walk the ranks in order, forward from rank 0, backward from rank P - 1, each hop an affine map
(scan.py):

    S_in[r + 1] = M[r] S_in[r] + S_ext[r]        dS_in[r - 1] = M[r]^T dS_in[r] + dS_ext[r]

The exchanges differ only in who evaluates this chain: neighbours (ring), the owner of a head (all_to_all), or everybody
(all_gather). Which hops exist is host knowledge of the context, so a rank never waits for a message that nobody sends.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .comm import Mark, Messages, Pending, mark, operations, swap
from .scan import Summary, apply, scan, transpose

if TYPE_CHECKING:
    from .context import CPContext

# ---- boundary states -----------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """The M that the backward reuses: this rank's own (ring), or every rank's for the owned or for all heads."""

    own: Tensor | None = None
    by_rank: Tensor | None = None


def start_exchange_states(
    summary: Summary, context: "CPContext", ready: Mark | None
) -> Pending[tuple[Tensor | None, Transitions]]:
    """:func:`exchange_states` of a summary that was there at ``ready`` (comm.mark), beside what the current stream
    does since then and next."""
    return Pending(partial(exchange_states, summary, context), summary.S.device, summary, ready)


def start_exchange_gradients(
    dS: Tensor,
    transitions: Transitions,
    context: "CPContext",
    ready: Mark | None,
) -> Pending[Tensor | None]:
    """:func:`exchange_gradients` of a dS that was there at ``ready`` (comm.mark), beside what the current stream
    does since then and next."""
    return Pending(partial(exchange_gradients, dS, transitions, context), dS.device, dS, ready)


def exchange_states(summary: Summary, context: "CPContext") -> tuple[Tensor | None, Transitions]:
    """State that enters this rank from its predecessor, [B, Hv, K, V]; None where no document crosses the cut.

    A rank without a state for its successor gives room for what it receives as ``summary.S``.
    ``summary.M`` [B, Hv, K, K] is needed on through ranks only. The second result serves :func:`exchange_gradients`.
    """
    with operations.named(f"boundary states, {context.exchange}"):
        if context.exchange == "ring":
            return _ring(summary, context, reverse=False), Transitions(own=summary.M)
        run = _all_to_all if context.exchange == "all_to_all" else _all_gather
        S_in, transitions = run(summary, None, context, reverse=False)
        return S_in, Transitions(by_rank=transitions)


def exchange_gradients(dS: Tensor, transitions: Transitions, context: "CPContext") -> Tensor | None:
    """Gradient that enters this rank's last state from its successor; the forward's M serve again, transposed."""
    with operations.named(f"gradients of boundary states, {context.exchange}"):
        if context.exchange == "ring":
            return _ring(Summary(transpose(transitions.own), dS), context, reverse=True)
        run = _all_to_all if context.exchange == "all_to_all" else _all_gather
        return run(Summary(None, dS), transpose(transitions.by_rank), context, reverse=True)[0]


def receive_state(room: Tensor, context: "CPContext", *, reverse: bool = False) -> Tensor | None:
    """The neighbour's state (reverse: the successor's gradient) in ``room``; None where nothing crosses that cut."""
    with operations.named("boundary state"):
        return _receive(room, context, reverse)


def send_state(state: Tensor, context: "CPContext", *, reverse: bool = False) -> None:
    """Hand the state to the successor (reverse: the gradient to the predecessor), where a document crosses the cut."""
    with operations.named("boundary state"):
        _send(state, context, reverse)


def _receive(room: Tensor, context: "CPContext", reverse: bool) -> Tensor | None:
    if not (context.crosses_right if reverse else context.crosses_left):
        return None
    swap([], [(context.rank + (1 if reverse else -1), room)], context)
    return room


def _send(state: Tensor, context: "CPContext", reverse: bool) -> None:
    if context.crosses_left if reverse else context.crosses_right:
        swap([(context.rank + (-1 if reverse else 1), state.contiguous())], [], context)


def _ring(summary: Summary, context: "CPContext", *, reverse: bool) -> Tensor | None:
    room = summary.S  # no more than that, where nothing is sent
    if context.crosses_left and context.crosses_right:
        room = torch.empty_like(room, memory_format=torch.contiguous_format)
    S_in = _receive(room, context, reverse)
    # what goes on from S_in does so on through ranks only
    S_out = apply(summary, S_in) if context.is_through else summary.S
    _send(S_out, context, reverse)
    return S_in


def _sends(context: "CPContext", rank: int, reverse: bool) -> bool:
    """Whether ``rank`` has a state for its successor (reverse: a gradient for its predecessor)."""
    return context.crosses(rank if reverse else rank + 1)


def _receives(context: "CPContext", rank: int, reverse: bool) -> bool:
    return context.crosses(rank + 1 if reverse else rank)


def _walk(
    S: Tensor, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> list[Tensor | None]:
    """Incoming state of every rank, in rank order, from the ranks' summaries; M [P, ...] of through ranks."""
    ranks = list(range(context.size))
    if reverse:
        ranks.reverse()
    links = [context.crosses(max(a, b)) for a, b in itertools.pairwise(ranks)]
    chain = [Summary(M[r] if M is not None and context.through(r) else None, S[r]) for r in ranks]
    incoming = scan(chain, links)
    return [incoming[ranks.index(r)] for r in range(context.size)]


def _spread(
    parts: Sequence[Tensor], into: Tensor, goes: Callable[[int, int], bool], context: "CPContext"
) -> tuple[Messages, Messages]:
    """What to send and to receive where rank a sends ``parts[b]`` to rank b if ``goes(a, b)``, which keeps it in
    ``into[a]``; a rank's own part is copied."""
    me, ranks = context.rank, range(context.size)
    if goes(me, me):
        into[me].copy_(parts[me])
    outgoing = [(b, parts[b]) for b in ranks if b != me and goes(me, b) and parts[b].numel()]
    incoming = [(a, into[a]) for a in ranks if a != me and goes(a, me) and into[a].numel()]
    return outgoing, incoming


def _all_gather(
    summary: Summary, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """States go to all ranks behind (reverse: before) their own; the forward's M to all, because the backward needs
    those of the other side."""
    P = context.size
    S = summary.S.contiguous()
    every = S.new_empty(P, *S.shape)

    def onward(a: int, b: int) -> bool:
        return _sends(context, a, reverse) and (b < a if reverse else a < b)

    outgoing, incoming = _spread([S] * P, every, onward, context)
    if not reverse and context.any_through:
        own = S if summary.M is None else summary.M.contiguous()
        M = S.new_empty(P, *S.shape[:-1], S.shape[-2])
        more = _spread([own] * P, M, lambda a, b: context.through(a), context)
        outgoing, incoming = outgoing + more[0], incoming + more[1]
    swap(outgoing, incoming, context)
    S_in = _walk(every, M, context, reverse=reverse)[context.rank]
    return (S_in if _receives(context, context.rank, reverse) else None), M


def _all_to_all(
    summary: Summary, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Heads scattered over the ranks: an owner scans its heads for all ranks and sends each its incoming state."""
    P, me = context.size, context.rank
    S = summary.S.contiguous().flatten(0, -3)  # [B * Hv, K, V]
    counts = [len(S) // P + (rank < len(S) % P) for rank in range(P)]
    owned = S.new_empty(P, counts[me], *S.shape[1:])

    outgoing, incoming = _spread(
        S.split(counts), owned, lambda a, b: _sends(context, a, reverse), context
    )
    if not reverse and context.any_through:
        own = S if summary.M is None else summary.M.contiguous().flatten(0, -3)
        M = S.new_empty(P, counts[me], S.shape[1], S.shape[1])
        more = _spread(own.split(counts), M, lambda a, b: context.through(a), context)
        outgoing, incoming = outgoing + more[0], incoming + more[1]
    swap(outgoing, incoming, context)

    states = _walk(owned, M, context, reverse=reverse)
    back = torch.empty_like(S)
    swap(
        *_spread(
            [owned[me] if state is None else state.contiguous() for state in states],
            back.split(counts),
            lambda a, b: _receives(context, b, reverse),
            context,
        ),
        context,
    )
    return (back.view_as(summary.S) if _receives(context, me, reverse) else None), M


# ---- convolution halo ----------------------------------------------------------------------------------------------


def _halo_spans(context: "CPContext", width: int) -> tuple[list, list]:
    """Who sends which tokens: ([(target, low, high)], [(source, low, high)]), global tokens.

    A rank needs the ``width`` tokens before its first one that belong to the same document, from as many predecessors
    as hold them.
    """
    bounds = context.shard_bounds

    def need(rank: int) -> int:
        return max(context.document_start(bounds[rank]), bounds[rank] - width, 0)

    sends = []
    for target in range(context.rank + 1, context.size):
        if bounds[target] - width >= context.end:
            break
        low = max(need(target), context.start)
        if low < context.end:
            sends.append((target, low, context.end))
    receives = []
    if context.rank > 0:
        low = need(context.rank)
        for source in range(context.rank - 1, -1, -1):
            if bounds[source + 1] <= low:
                break
            receives.append((source, max(low, bounds[source]), bounds[source + 1]))
    return sends, receives


def exchange_halo(x: Tensor, context: "CPContext", width: int) -> Tensor:
    """The ``width`` tokens before this shard, [B, width, D]; zero where the document does not reach that far back."""
    sends, receives = _halo_spans(context, width)
    start, B, D = context.start, x.shape[0], x.shape[2]
    halo = x.new_zeros(B, width, D)
    outgoing = [(p, x[:, low - start : high - start].contiguous()) for p, low, high in sends]
    incoming = [(p, x.new_empty(B, high - low, D)) for p, low, high in receives]
    with operations.named("halo of the convolution"):
        swap(outgoing, incoming, context)
    for (_, low, high), (_, part) in zip(receives, incoming, strict=True):
        halo[:, low - start + width : high - start + width] = part
    return halo


def return_halo(dhalo: Tensor, context: "CPContext", width: int) -> list[tuple[slice, Tensor]]:
    """Send the gradient of the halo to its owners; what this rank gets, as (local tokens, gradient) to be added."""
    sends, receives = _halo_spans(context, width)
    start, B, D = context.start, dhalo.shape[0], dhalo.shape[2]
    outgoing = [
        (p, dhalo[:, low - start + width : high - start + width].contiguous())
        for p, low, high in receives
    ]
    incoming = [(p, dhalo.new_empty(B, high - low, D)) for p, low, high in sends]
    with operations.named("gradient of the convolution's halo"):
        swap(outgoing, incoming, context)
    return [
        (slice(low - start, high - start), part)
        for (_, low, high), (_, part) in zip(sends, incoming, strict=True)
    ]


def start_exchange_halo(x: Tensor, context: "CPContext", width: int) -> Pending[Tensor]:
    """:func:`exchange_halo`, while the current stream goes on."""
    return Pending(partial(exchange_halo, x, context, width), x.device, x, mark(x.device))


def start_return_halo(
    dhalo: Tensor, context: "CPContext", width: int
) -> Pending[list[tuple[slice, Tensor]]]:
    """:func:`return_halo`, while the current stream goes on."""
    return Pending(
        partial(return_halo, dhalo, context, width), dhalo.device, dhalo, mark(dhalo.device)
    )
