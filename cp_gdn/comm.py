"""Every collective of the project: messages between ranks, gathers, and the few that training needs.

A group is a process group, or ranks that are threads of this process (virtual.py). What crosses the cuts between
shards is built on these in boundary.py.
"""

import functools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .virtual import VirtualGroup

if TYPE_CHECKING:
    from .context import CPContext

# torch 2.13 renames the flat collectives; the old name then warns
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


Group = dist.ProcessGroup | VirtualGroup
Result = TypeVar("Result")
MOST_EVENTS = 1024  # spans that a CommMeter keeps unread, unless they have not ended


class Operation(NamedTuple):
    """A message or collective that was issued: what it serves, and when (time.monotonic)."""

    name: str
    issued: float
    done: torch.cuda.Event | None


class Operations:
    """What this rank has issued and not seen end, for the watchdog (watchdog.py); kept only while that runs."""

    def __init__(self) -> None:
        self._purpose: ContextVar[str] = ContextVar("purpose", default="")  # virtual ranks: threads
        self._open: deque[Operation] = deque()
        self._active = False

    def start(self) -> None:
        self._active = True

    def stop(self) -> None:
        self._active = False
        self._open.clear()

    @contextmanager
    def named(self, purpose: str) -> Iterator[None]:
        """Operations issued within serve this purpose, or the one that was named before."""
        before = self._purpose.set(self._purpose.get() or purpose)
        try:
            yield
        finally:
            self._purpose.reset(before)

    @contextmanager
    def issue(self, what: str | Callable[[], str], done: torch.cuda.Event | None) -> Iterator[None]:
        """An operation that ends with the block, or with the event that the block records."""
        if not self._active:
            yield
            return
        what = what if isinstance(what, str) else what()
        purpose = self._purpose.get()
        name = f"{purpose} ({what})" if purpose else what
        operation = Operation(name, time.monotonic(), done)
        self._open.append(operation)
        yield
        if done is None:
            self._open.remove(operation)

    def oldest(self) -> Operation | None:
        """The first operation that has not ended; called from the watchdog's thread."""
        while self._open:
            first = self._open[0]
            if first.done is None or not first.done.query():
                return first
            self._open.popleft()
        return None


operations = Operations()


@dataclass
class CommMeter:
    """Counts what the context-parallel layers exchange: bytes sent by this rank, calls, and time.

    Time is wall clock on the CPU (blocking calls) and CUDA events on the GPU, which are read in :meth:`take`, and
    earlier, without a wait, where more than MOST_EVENTS spans pile up.
    """

    bytes: int = 0
    _calls: int = 0
    _taken: int = 0
    _seconds: float = 0.0
    _events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=deque)

    @contextmanager
    def span(
        self, nbytes: int, device: torch.device, what: str | Callable[[], str]
    ) -> Iterator[None]:
        self.bytes += nbytes
        self._calls += 1
        if device.type != "cuda":
            started = time.perf_counter()
            with operations.issue(what, None):
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
            with operations.issue(what, after):
                yield
                after.record()
            self._events.append((before, after))
            if len(self._events) > MOST_EVENTS:
                self._read_ended(2)

    def _read_ended(self, most: int) -> None:
        """Add up the first spans, as far as they have ended."""
        for _ in range(most):
            before, after = self._events[0]
            if not after.query():
                return
            self._seconds += before.elapsed_time(after) / 1e3
            self._events.popleft()

    def take(self) -> dict[str, float]:
        """{"bytes", "seconds", "calls"} since the last call; waits for the GPU events it reads."""
        for _, after in self._events:
            after.synchronize()
        self._read_ended(len(self._events))
        out = {"bytes": self.bytes - self._taken, "seconds": self._seconds, "calls": self._calls}
        self._taken, self._seconds, self._calls = self.bytes, 0.0, 0
        return out


meter = CommMeter()


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def swap(
    outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]], context: "CPContext"
) -> None:
    """Send and receive (peer, tensor) pairs in one batch; what goes to one peer arrives in the order of the list."""
    if not outgoing and not incoming:
        return
    group = context.group
    device = (outgoing or incoming)[0][1].device

    def what() -> str:
        targets, sources = sorted({p for p, _ in outgoing}), sorted({p for p, _ in incoming})
        return f"to ranks {targets}, from ranks {sources}"

    with meter.span(_nbytes(*(t for _, t in outgoing)), device, what):
        if isinstance(group, VirtualGroup):
            group.exchange(outgoing, incoming)
        else:
            assert group is not None
            _send_and_receive(outgoing, incoming, group, device)


def _send_and_receive(
    outgoing: list[tuple[int, Tensor]],
    incoming: list[tuple[int, Tensor]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """What dist.batch_isend_irecv does, at less cost to the host: one group call of NCCL, if that is the backend."""
    together = group._get_backend(device).supports_coalescing
    if together:
        group._start_coalescing(device)
    requests = [group.send([tensor], peer, 0) for peer, tensor in outgoing]
    requests += [group.recv([tensor], peer, 0) for peer, tensor in incoming]
    if together:
        requests = [group._end_coalescing(device)]
    for request in requests:
        request.wait()


def _gather_flat(every: Tensor, mine: Tensor, group: Group | None) -> None:
    """[n, ...] of every rank into [P * n, ...]."""
    with meter.span(_nbytes(mine), mine.device, "all_gather"):
        if isinstance(group, VirtualGroup):
            group.all_gather(every, mine)
        else:
            _all_gather_flat(every, mine, group=group)


def _scatter_rows(
    out: Tensor, given: Tensor, out_counts: list[int], in_counts: list[int], group: Group | None
) -> None:
    """Rows of ``given``, ``in_counts`` for each rank; into ``out`` what they have for this one, ``out_counts`` each."""
    with meter.span(_nbytes(given), given.device, "all_to_all"):
        if isinstance(group, VirtualGroup):
            group.all_to_all(out, given, out_counts, in_counts)
        else:
            dist.all_to_all_single(out, given, out_counts, in_counts, group=group)


# ---- on a stream of its own ----------------------------------------------------------------------------------------


class Pending(Generic[Result]):
    """An exchange under way, on a stream of its own where the tensors are on a GPU.

    It starts after ``ready`` (:func:`mark`), so that work that the current stream was given since then runs beside it.
    :meth:`wait` makes the current stream wait for it, not the host, and returns the result; it may be called again.
    """

    def __init__(
        self,
        exchange: Callable[[], Result],
        device: torch.device,
        inputs: Any,
        ready: torch.cuda.Event | None,
    ):
        self._inputs = inputs  # what the other stream reads must not be freed before the wait
        self._done = None
        if device.type != "cuda":
            self._result = exchange()
            return
        stream = _stream(device)
        assert ready is not None
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            self._result = exchange()
            self._done = stream.record_event()

    def wait(self) -> Result:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = self._inputs = None
        return self._result


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Where the current stream stands; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


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
    _gather_flat(every, padded, context.group)
    if min(sizes) == longest:
        return every
    return torch.cat([every[r * longest : r * longest + n] for r, n in enumerate(sizes)])


def sum_rows(x: Tensor, context: "CPContext") -> Tensor:
    """Sum over the ranks of [seq_len, ...], cut to this rank's rows; added in rank order, 16-bit types in fp32."""
    mine = context.num_tokens
    parts = x.new_empty(context.size * mine, *x.shape[1:])
    sizes = list(context.shard_sizes)
    _scatter_rows(parts, x.contiguous(), [mine] * context.size, sizes, context.group)
    wide = torch.float32 if x.element_size() == 2 else x.dtype
    return parts.view(context.size, mine, *x.shape[1:]).sum(0, dtype=wide).to(x.dtype)


def sum_parts(parts: list[tuple[int, slice, Tensor]], rows: int) -> Tensor:
    """``rows`` rows with every (rank, place, part) added at its place; in rank order, 16-bit types in fp32."""
    stops = [0, *(place.stop for _, place, _ in parts)]
    if stops == [*(place.start for _, place, _ in parts), rows]:  # end to end: nothing to add
        return torch.cat([part for _, _, part in parts])
    like = parts[0][2]
    wide = torch.float32 if like.element_size() == 2 else like.dtype
    total = like.new_zeros(rows, *like.shape[1:], dtype=wide)
    for _, place, part in sorted(parts, key=lambda part: part[0]):
        total[place] += part
    return total.to(like.dtype)


# ---- collectives of training ---------------------------------------------------------------------------------------


def _reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    done = torch.cuda.Event() if tensor.is_cuda else None
    with operations.issue("all_reduce", done):
        dist.all_reduce(tensor, op=op, group=group)
        if done is not None:
            done.record()
    return tensor


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, in place; the tensor itself where there is no process group."""
    return _reduce(tensor, dist.ReduceOp.SUM, group) if dist.is_initialized() else tensor


def all_reduce_max(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Maximum over the ranks, in place."""
    return _reduce(tensor, dist.ReduceOp.MAX, group) if dist.is_initialized() else tensor


def sum_over_group(tensor: Tensor, context: "CPContext") -> Tensor:
    """Sum of a replicated-shape tensor over the context's ranks, metered like the exchanges; returns a new tensor."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    with meter.span(_nbytes(total), total.device, "all_reduce"):
        if isinstance(context.group, VirtualGroup):
            context.group.all_reduce(total)
        else:
            dist.all_reduce(total, group=context.group)
    return total


def broadcast_object(obj: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The picklable ``obj`` of rank ``src`` on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, group_src=src, group=group)
    return box[0]


def gather_objects(obj: Any, group: Group | None = None) -> list[Any]:
    """Every rank's picklable ``obj``, in rank order, on every rank."""
    if isinstance(group, VirtualGroup):
        return group.share(obj, "gather_objects")
    if not dist.is_initialized():
        return [obj]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, obj, group=group)
    return every


_warm: "weakref.WeakSet[dist.ProcessGroup]" = weakref.WeakSet()


def warm_up(group: Group | None) -> None:
    """Open the connections of an NCCL group once, all ranks together: later messages concern some of them only."""
    if group is None or isinstance(group, VirtualGroup):
        return
    if group in _warm or dist.get_backend(group) != "nccl":
        return
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    _warm.add(group)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group=group)
