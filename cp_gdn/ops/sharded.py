"""One call of the operator over the ranks of a context, whatever engine runs it: open, exchange, close.

    forward     open (everything that no incoming state enters), S_in[r] from the summaries of the ranks before r, close
    backward    open, dS_in[r] from the reverse summaries of the ranks after r; the states are replayed meanwhile; close

In the exchange "serial" nothing is summarised for others: what leaves is found from what entered.

The local sequences are the rows of the batch, or the pieces of packed documents. States cross only at the ends of a
shard: into the first piece and out of the last one, or in and out of every row. The exchange runs on a stream of its
own; only a rank that receives waits for it before it closes.
"""

from typing import NamedTuple

from torch import Tensor

from .. import boundary, comm
from ..context import CPContext
from ..scan import Summary
from . import chunked, hopper

Run = chunked.TorchRun | hopper.HopperRun


class Ends(NamedTuple):
    """Of the local sequences ``each`` may be parted at either cut; documents do cross ``left`` and ``right``."""

    sequences: int
    each: int
    left: int
    right: int

    @property
    def entering(self) -> slice:
        return slice(0, self.each)

    @property
    def leaving(self) -> slice:
        return slice(self.sequences - self.each, self.sequences)


def ends(context: CPContext, num_sequences: int) -> Ends:
    """All rows, or the first and the last piece."""
    each = num_sequences if len(context.pieces) == 1 else 1
    return Ends(
        num_sequences,
        each,
        each if context.crosses_left else 0,
        each if context.crosses_right else 0,
    )


def sharded_forward(
    run: Run,
    initial_state: Tensor | None,
    output_final_state: bool,
    context: CPContext,
    cuts: Ends,
) -> tuple[Tensor, Tensor | None, Tensor | None, boundary.Transitions]:
    """o, final states of all documents or None, the states that entered the local sequences [n, Hv, K, V] (of the
    first ones; zero elsewhere), and the M for the backward."""
    count = cuts.sequences
    h0 = None
    if initial_state is not None:
        h0 = initial_state[documents(context, count)].clone()
        h0[: cuts.left] = 0
    if context.exchange == "serial":
        run.open(h0, cuts.left, cuts.right, summarise=False)
        run.meanwhile()
        S_in = boundary.receive_state(run.room(cuts.each), context)
        S_out = run.leaving_state(S_in)
        if S_out is not None:
            boundary.send_state(S_out, context)
        late = S_out is None and cuts.right > 0
        o, states = run.close(S_in, final=output_final_state or late)
        if late:
            boundary.send_state(states[cuts.leaving], context)
        transitions = boundary.Transitions()
    else:
        run.open(h0, cuts.left, cuts.right, summarise=True)
        pending = None
        if context.any_crossing:
            summary = (
                run.leaving(transition=context.is_through)
                if cuts.right
                else Summary(None, run.room(cuts.each))
            )
            ready = comm.mark(summary.S.device)
            pending = boundary.start_exchange_states(summary, context, ready)
            run.meanwhile()
        S_in = pending.wait_there()[0] if pending and cuts.left else None
        o, states = run.close(S_in, final=output_final_state)
        transitions = pending.wait_there()[1] if pending else boundary.Transitions()
    h0 = _with(h0, S_in)

    if not output_final_state:
        return o, None, h0, transitions
    if context.size == 1:
        return o, states, h0, transitions
    ended = slice(0, count - cuts.right)
    final = states.new_zeros(_num_states(context, count), *states.shape[1:])
    final[documents(context, count)][ended] = states[ended]
    return o, comm.sum_over_group(final, context), h0, transitions


def sharded_backward(
    run: Run,
    h0: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    transitions: boundary.Transitions,
    context: CPContext,
    cuts: Ends,
) -> chunked.Gradients:
    """All gradients of this rank's part; dh0 [n, Hv, K, V] still holds what left to the predecessor."""
    count = cuts.sequences
    dht = None
    if dfinal is not None:
        if context.size > 1:
            dfinal = comm.sum_over_group(dfinal, context)
        dht = dfinal[documents(context, count)].clone()
        dht[count - cuts.right :] = 0

    run.open_backward(h0, do, dht, cuts.left, cuts.right)
    at_once = comm.takes_no_multiprocessor(context)
    if context.exchange == "serial":
        dS_in = boundary.receive_state(run.room(cuts.each), context, reverse=True)
        dS_out = run.entering_gradient(dS_in) if cuts.left else None
        if dS_out is not None:
            boundary.send_state(dS_out, context, reverse=True)
        run.replay(at_once=at_once)
        out = run.close_backward(dS_in)
        if dS_out is None:
            boundary.send_state(out.dh0[cuts.entering], context, reverse=True)
        return out
    pending = None
    if context.any_crossing:
        run.begin_replay(at_once=at_once)
        dS = run.entering() if cuts.left else run.room(cuts.each)
        ready = comm.mark(dS.device)
        run.replay(at_once=at_once)  # launched first: the host prepares the messages meanwhile
        pending = boundary.start_exchange_gradients(dS, transitions, context, ready)
    else:
        run.replay(at_once=at_once)
    dS_in = pending.wait_there() if pending and cuts.right else None
    out = run.close_backward(dS_in)
    if pending:
        pending.wait_there()
    return out


def documents(context: CPContext, num_sequences: int) -> slice:
    """Rows of a [N, ...] state that belong to the local sequences: documents are numbered in order."""
    first = context.pieces[0].doc
    return slice(first, first + num_sequences)


def _with(states: Tensor | None, late: Tensor | None) -> Tensor | None:
    """``states`` [n, Hv, K, V] of all local sequences with those that came late, the first ones; or these alone."""
    if states is None or late is None:
        return late if states is None else states
    states[: len(late)] = late
    return states


def _num_states(context: CPContext, num_sequences: int) -> int:
    """Sequences of the whole batch, N: its rows, or all documents."""
    return num_sequences if context.num_documents == 1 else context.num_documents
