"""One call of the operator over the ranks of a context, whatever engine runs it: summarise, exchange, run.

    forward     S_in[r] from the summaries of the ranks before r, then the shard from S_in[r]
    backward    dS_in[r] from the reverse summaries of the ranks after r, then the shard's gradients

The local sequences are the rows of the batch, or the pieces of packed documents. States cross only at the ends
of a shard:
into the first piece and out of the last one, or in and out of every row.
"""

import torch
from torch import Tensor

from .. import comm
from ..context import CPContext
from ..scan import Summary
from . import chunked, hopper


def sharded_forward(
    run: chunked.TorchRun | hopper.HopperRun,
    initial_state: Tensor | None,
    output_final_state: bool,
    context: CPContext,
) -> tuple[Tensor, Tensor | None, Tensor, comm.Transitions]:
    """o, final states of all documents or None, h0 of the local sequences [n, Hv, K, V], and the M for the backward."""
    count = run.num_sequences
    entering, leaving = crossing(context, count)
    h0 = run.zero_states()
    if initial_state is not None:
        h0[:] = initial_state[documents(context, count)]
    if context.crosses_left:
        h0[entering] = 0

    transitions = comm.Transitions()
    S_in = None
    if context.exchange == "serial":
        S_in = comm.receive_state(h0[entering], context)
    elif context.any_crossing:
        summary = Summary(None, torch.zeros_like(h0[leaving]))
        if context.crosses_right:
            summary = run.summarise(h0[leaving], leaving, transition=context.through(context.rank))
        S_in, transitions = comm.exchange_states(summary, context)
    if S_in is not None:
        h0[entering] = S_in

    o, states = run.forward(h0)
    if context.exchange == "serial":
        comm.send_state(states[leaving], context)
    if not output_final_state:
        return o, None, h0, transitions
    if context.size == 1:
        return o, states, h0, transitions
    ended = _ended(context, count)
    final = states.new_zeros(_num_states(context, count), *states.shape[1:])
    final[documents(context, count)][ended] = states[ended]
    return o, comm.sum_over_group(final, context), h0, transitions


def sharded_backward(
    run: chunked.TorchRun | hopper.HopperRun,
    h0: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    transitions: comm.Transitions,
    context: CPContext,
) -> chunked.Gradients:
    """All gradients of this rank's part; dh0 [n, Hv, K, V] still holds what left to the predecessor."""
    count = run.num_sequences
    entering, leaving = crossing(context, count)
    dht = torch.zeros_like(h0)
    if dfinal is not None:
        if context.size > 1:
            dfinal = comm.sum_over_group(dfinal, context)
        ended = _ended(context, count)
        dht[ended] = dfinal[documents(context, count)][ended]

    run.receive_gradient(do)
    dS_in = None
    if context.exchange == "serial":
        dS_in = comm.receive_state(dht[leaving], context, reverse=True)
    elif context.any_crossing:
        dS = torch.zeros_like(dht[entering])
        if context.crosses_left:
            dS = run.summarise_reverse(dht[entering], entering)
        dS_in = comm.exchange_gradients(dS, transitions, context)
    if dS_in is not None:
        dht[leaving] = dS_in
    out = run.backward(h0, dht)
    if context.exchange == "serial":
        comm.send_state(out.dh0[entering], context, reverse=True)
    return out


def crossing(context: CPContext, num_sequences: int) -> tuple[slice, slice]:
    """Local sequences that may enter from the left and leave to the right: all rows, or the first and the last
    piece."""
    if len(context.pieces) == 1:
        return slice(0, num_sequences), slice(0, num_sequences)
    return slice(0, 1), slice(num_sequences - 1, num_sequences)


def documents(context: CPContext, num_sequences: int) -> slice:
    """Rows of a [N, ...] state that belong to the local sequences: documents are numbered in order."""
    first = context.pieces[0].doc
    return slice(first, first + num_sequences)


def _ended(context: CPContext, num_sequences: int) -> slice:
    """Local sequences whose document ends in this shard."""
    _, leaving = crossing(context, num_sequences)
    return slice(0, leaving.start if context.crosses_right else num_sequences)


def _num_states(context: CPContext, num_sequences: int) -> int:
    """Sequences of the whole batch, N: its rows, or all documents."""
    return num_sequences if context.num_documents == 1 else context.num_documents
