"""Every collective of the project: boundary states, convolution halos, gathers, and the few that training needs.

Boundary states walk the ranks in order, forward from rank 0, backward from rank P - 1, each hop an affine map
(scan.py):

    S_in[r + 1] = M[r] S_in[r] + S_ext[r]        dS_in[r - 1] = M[r]^T dS_in[r] + dS_ext[r]

The exchanges differ only in who evaluates this chain: neighbours (ring), the owner of a head (all_to_all), or everybody
(all_gather). Which hops exist is host knowledge of the context, so a rank never waits for a message that nobody sends.
"""

import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .scan import Summary, apply, scan, transpose

if TYPE_CHECKING:
    from .context import CPContext

# torch 2.13 renames the flat collectives; the old name then warns
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


Result = TypeVar("Result")


@dataclass
class CommMeter:
    """Counts what the context-parallel layers exchange: bytes sent by this rank, calls, and time.

    Time is wall clock on the CPU (blocking calls) and CUDA events on the GPU, read in :meth:`take` only.
    """

    bytes: int = 0
    _calls: int = 0
    _taken: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def span(self, nbytes: int, device: torch.device) -> Iterator[None]:
        self.bytes += nbytes
        self._calls += 1
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
        elif torch.cuda.is_current_stream_capturing():
            yield
        else:
            before, after = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            before.record()
            yield
            after.record()
            self._events.append((before, after))

    def take(self) -> dict[str, float]:
        """{"bytes", "seconds", "calls"} since the last call; waits for the GPU events it reads."""
        for before, after in self._events:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1e3
        out = {"bytes": self.bytes - self._taken, "seconds": self._seconds, "calls": self._calls}
        self._taken, self._seconds, self._calls = self.bytes, 0.0, 0
        self._events.clear()
        return out


meter = CommMeter()


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _swap(
    outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]], context: "CPContext"
) -> None:
    """Send and receive (peer, tensor) pairs between neighbours in one batch."""
    ops = [dist.P2POp(dist.isend, t, group=context.group, group_peer=p) for p, t in outgoing]
    ops += [dist.P2POp(dist.irecv, t, group=context.group, group_peer=p) for p, t in incoming]
    if ops:
        tensor = (outgoing or incoming)[0][1]
        with meter.span(_nbytes(*(t for _, t in outgoing)), tensor.device):
            for request in dist.batch_isend_irecv(ops):
                request.wait()


# ---- boundary states -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transitions:
    """The M that the backward reuses: this rank's own (ring), or every rank's for the owned or for all heads."""

    own: Tensor | None = None
    by_rank: Tensor | None = None


class Pending(Generic[Result]):
    """An exchange under way, on a stream of its own where the tensors are on a GPU.

    :meth:`wait` makes the current stream wait for it, not the host, and returns the result; it may be called again.
    """

    def __init__(self, exchange: Callable[[], Result], device: torch.device, inputs: Any):
        self._inputs = inputs  # what the other stream reads must not be freed before the wait
        self._done = None
        if device.type != "cuda":
            self._result = exchange()
            return
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._result = exchange()
            self._done = stream.record_event()

    def wait(self) -> Result:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = self._inputs = None
        return self._result


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def start_exchange_states(
    summary: Summary, context: "CPContext"
) -> "Pending[tuple[Tensor | None, Transitions]]":
    """:func:`exchange_states`, while the current stream goes on."""
    return Pending(lambda: exchange_states(summary, context), summary.S.device, summary)


def start_exchange_gradients(
    dS: Tensor, transitions: Transitions, context: "CPContext"
) -> "Pending[Tensor | None]":
    """:func:`exchange_gradients`, while the current stream goes on."""
    return Pending(lambda: exchange_gradients(dS, transitions, context), dS.device, dS)


def exchange_states(summary: Summary, context: "CPContext") -> tuple[Tensor | None, Transitions]:
    """State that enters this rank from its predecessor, [B, Hv, K, V]; None where no document crosses the cut.

    ``summary.M`` [B, Hv, K, K] is needed on through ranks only. The second result serves :func:`exchange_gradients`.
    """
    if context.exchange == "ring":
        return _ring(summary, context, reverse=False), Transitions(own=summary.M)
    anywhere = any(context.through(rank) for rank in range(context.size))
    M = summary.M
    if anywhere and M is None:
        K = summary.S.shape[-2]
        M = summary.S.new_zeros(*summary.S.shape[:-1], K)
    run = _all_to_all if context.exchange == "all_to_all" else _all_gather
    S_in, transitions = run(
        Summary(M if anywhere else None, summary.S), None, context, reverse=False
    )
    return S_in, Transitions(by_rank=transitions)


def exchange_gradients(dS: Tensor, transitions: Transitions, context: "CPContext") -> Tensor | None:
    """Gradient that enters this rank's last state from its successor; the forward's M serve again, transposed."""
    if context.exchange == "ring":
        return _ring(Summary(transpose(transitions.own), dS), context, reverse=True)
    run = _all_to_all if context.exchange == "all_to_all" else _all_gather
    return run(Summary(None, dS), transpose(transitions.by_rank), context, reverse=True)[0]


def receive_state(like: Tensor, context: "CPContext", *, reverse: bool = False) -> Tensor | None:
    """The neighbour's state (reverse: the successor's gradient), or None where nothing crosses that cut."""
    if not (context.crosses_right if reverse else context.crosses_left):
        return None
    buffer = torch.empty_like(like, memory_format=torch.contiguous_format)
    _swap([], [(context.rank + (1 if reverse else -1), buffer)], context)
    return buffer


def send_state(state: Tensor, context: "CPContext", *, reverse: bool = False) -> None:
    """Hand the state to the successor (reverse: the gradient to the predecessor), where a document crosses the cut."""
    if context.crosses_left if reverse else context.crosses_right:
        _swap([(context.rank + (-1 if reverse else 1), state.contiguous())], [], context)


def _ring(summary: Summary, context: "CPContext", *, reverse: bool) -> Tensor | None:
    S_in = receive_state(summary.S, context, reverse=reverse)
    through = Summary(summary.M if context.through(context.rank) else None, summary.S)
    send_state(apply(through, S_in), context, reverse=reverse)
    return S_in


def _walk(
    S: Tensor, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> list[Tensor | None]:
    """Incoming state of every rank, in rank order, from the stacked summaries S [P, ...], M [P, ...]."""
    ranks = list(range(context.size))
    if reverse:
        ranks.reverse()
    links = [context.crosses(max(a, b)) for a, b in itertools.pairwise(ranks)]
    chain = [Summary(M[r] if M is not None and context.through(r) else None, S[r]) for r in ranks]
    incoming = scan(chain, links)
    return [incoming[ranks.index(r)] for r in range(context.size)]


def _receives(context: "CPContext", reverse: bool) -> bool:
    return context.crosses_right if reverse else context.crosses_left


def _all_gather(
    summary: Summary, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    V = summary.S.shape[-1]
    message = summary.S if summary.M is None else torch.cat((summary.S, summary.M), -1)
    every = message.new_empty(context.size, *message.shape)  # [P, B, Hv, K, V (+ K)]
    with meter.span(_nbytes(message), message.device):
        _all_gather_flat(every.flatten(0, 1), message.contiguous(), group=context.group)
    if summary.M is not None:
        M = every[..., V:]
    incoming = _walk(every[..., :V], M, context, reverse=reverse)[context.rank]
    return (incoming if _receives(context, reverse) else None), M


def _all_to_all(
    summary: Summary, M: Tensor | None, context: "CPContext", *, reverse: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Heads scattered over the ranks: an owner scans its heads for all ranks and sends each its incoming state."""
    P, V = context.size, summary.S.shape[-1]
    message = summary.S if summary.M is None else torch.cat((summary.S, summary.M), -1)
    rows = message.reshape(-1, *message.shape[-2:])  # [B * Hv, K, V (+ K)]
    counts = [len(rows) // P + (rank < len(rows) % P) for rank in range(P)]
    mine = counts[context.rank]

    owned = rows.new_empty(P * mine, *rows.shape[1:])
    with meter.span(_nbytes(rows), rows.device):
        dist.all_to_all_single(owned, rows.contiguous(), [mine] * P, counts, group=context.group)
    owned = owned.view(P, mine, *rows.shape[1:])
    if summary.M is not None:
        M = owned[..., V:]
    states = torch.zeros_like(owned[..., :V], memory_format=torch.contiguous_format)
    for rank, state in enumerate(_walk(owned[..., :V], M, context, reverse=reverse)):
        if state is not None:
            states[rank] = state

    back = torch.empty_like(rows[..., :V], memory_format=torch.contiguous_format)
    with meter.span(_nbytes(states), rows.device):
        dist.all_to_all_single(back, states.flatten(0, 1), counts, [mine] * P, group=context.group)
    return (back.view_as(summary.S) if _receives(context, reverse) else None), M


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
    _swap(outgoing, incoming, context)
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
    _swap(outgoing, incoming, context)
    return [
        (slice(low - start, high - start), part)
        for (_, low, high), (_, part) in zip(sends, incoming, strict=True)
    ]


# ---- whole tensors along the sequence ------------------------------------------------------------------------------


def gather_rows(x: Tensor, context: "CPContext") -> Tensor:
    """Every rank's rows [T_local, ...] in rank order, [seq_len, ...]; shards may be uneven."""
    sizes = context.shard_sizes
    longest = max(sizes)
    padded = x.contiguous()
    if x.shape[0] < longest:
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
    every = x.new_empty(context.size * longest, *x.shape[1:])
    with meter.span(_nbytes(padded), x.device):
        _all_gather_flat(every, padded, group=context.group)
    if min(sizes) == longest:
        return every
    return torch.cat([every[r * longest : r * longest + n] for r, n in enumerate(sizes)])


def sum_rows(x: Tensor, context: "CPContext") -> Tensor:
    """Sum over the ranks of [seq_len, ...], cut to this rank's rows; added in rank order, 16-bit types in fp32."""
    mine = context.num_tokens
    parts = x.new_empty(context.size * mine, *x.shape[1:])
    with meter.span(_nbytes(x), x.device):
        dist.all_to_all_single(
            parts,
            x.contiguous(),
            [mine] * context.size,
            list(context.shard_sizes),
            group=context.group,
        )
    wide = torch.float32 if x.element_size() == 2 else x.dtype
    return parts.view(context.size, mine, *x.shape[1:]).sum(0, dtype=wide).to(x.dtype)


# ---- collectives of training ---------------------------------------------------------------------------------------


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, in place; the tensor itself where there is no process group."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Maximum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def sum_over_group(tensor: Tensor, context: "CPContext") -> Tensor:
    """Sum of a replicated-shape tensor over the context's ranks, metered like the exchanges; returns a new tensor."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    with meter.span(_nbytes(total), total.device):
        dist.all_reduce(total, group=context.group)
    return total


def broadcast_object(obj: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The picklable ``obj`` of rank ``src`` on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, group_src=src, group=group)
    return box[0]


def gather_objects(obj: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's picklable ``obj``, in rank order, on every rank."""
    if not dist.is_initialized():
        return [obj]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, obj, group=group)
    return every


_warm: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()


def warm_up(group: dist.ProcessGroup | None) -> None:
    """Open the connections of an NCCL group once, all ranks together: later messages concern some of them only."""
    if group is None or group in _warm or dist.get_backend(group) != "nccl":
        return
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    _warm.add(group)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group=group)
