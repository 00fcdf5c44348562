"""Every collective of the project: messages between ranks, gathers, and the few that training needs.

A group is a process group, or ranks that are threads of this process (virtual.py). What crosses the cuts between
shards is built on these in boundary.py.
"""

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .lanes import Lane, current_stream, lane_of
from .mailbox import CAPACITY, Mailbox, Messages, open_mailbox
from .metering import meter, operations
from .virtual import VirtualGroup

if TYPE_CHECKING:
    from .context import CPContext

# torch 2.13 renames the flat collectives; the old name then warns
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


Group = dist.ProcessGroup | VirtualGroup
Result = TypeVar("Result")


def _nbytes(*tensors: Tensor) -> int:
    return sum([t.nbytes for t in tensors])


def swap(outgoing: Messages, incoming: Messages, context: "CPContext") -> None:
    """Send and receive (peer, tensor) pairs in one batch; what goes to one peer arrives in the order of the list."""
    if not outgoing and not incoming:
        return
    group = context.group
    device = (outgoing or incoming)[0][1].device

    def what() -> str:
        targets, sources = (_global_ranks(messages, group) for messages in (outgoing, incoming))
        return f"to ranks {targets}, from ranks {sources}"

    stream = _stream_of(device)
    exchange = meter.begin(_nbytes(*[t for _, t in outgoing]), device, what, stream)
    if isinstance(group, VirtualGroup):
        group.exchange(outgoing, incoming)
    else:
        assert group is not None
        mailbox = _mailboxes.get(group)
        if mailbox is None:
            _send_and_receive(outgoing, incoming, group, device)
        else:
            assert stream is not None
            _by_mail(outgoing, incoming, group, mailbox, stream)
    meter.end(exchange)


def _global_ranks(messages: Messages, group: Group | None) -> list[int]:
    """The peers of the messages by their ranks in the whole job, as a watchdog names those that are missing."""
    peers = sorted({peer for peer, _ in messages})
    if isinstance(group, dist.ProcessGroup):
        return [dist.get_global_rank(group, peer) for peer in peers]
    return peers


def _stream_of(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream, None on the CPU."""
    return current_stream(device) if device.type == "cuda" else None


def _send_and_receive(
    outgoing: Messages, incoming: Messages, group: dist.ProcessGroup, device: torch.device
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


def takes_no_multiprocessor(context: "CPContext") -> bool:
    """Whether boundary states travel without a kernel, which would wait where others have all multiprocessors."""
    group = context.group
    return isinstance(group, dist.ProcessGroup) and _mailboxes.get(group) is not None


def _by_mail(
    outgoing: Messages,
    incoming: Messages,
    group: dist.ProcessGroup,
    mailbox: Mailbox,
    stream: torch.cuda.Stream,
) -> None:
    """What fits into the boxes, on one stream, so that both sides keep the order of their calls; the rest by NCCL."""
    lane = lane_of(stream.device).stream
    other = stream.cuda_stream != lane.cuda_stream
    if other:
        lane.wait_stream(stream)
    sent, large = _fitting(outgoing)
    received, larger = _fitting(incoming)
    for peer, tensors in sent.items():
        mailbox.send(peer, tensors, lane.cuda_stream)
    if large or larger:
        _send_and_receive(large, larger, group, stream.device)
    for peer, tensors in received.items():
        mailbox.receive(peer, tensors, lane.cuda_stream)
    if other:
        stream.wait_stream(lane)


def _fitting(messages: Messages) -> tuple[dict[int, list[Tensor]], Messages]:
    """The tensors for or from every peer that fit into a box together, and the messages of the other peers."""
    if not messages:
        return {}, []
    peers: dict[int, list[Tensor]] = {}
    for peer, tensor in messages:
        peers.setdefault(peer, []).append(tensor)
    large = [peer for peer, tensors in peers.items() if _nbytes(*tensors) > CAPACITY]
    for peer in large:
        del peers[peer]
    return peers, [message for message in messages if message[0] in large] if large else []


def _gather_flat(every: Tensor, mine: Tensor, group: Group | None) -> None:
    """[n, ...] of every rank into [P * n, ...]."""
    exchange = meter.begin(mine.nbytes, mine.device, "all_gather", _stream_of(mine.device))
    if isinstance(group, VirtualGroup):
        group.all_gather(every, mine)
    else:
        _all_gather_flat(every, mine, group=group)
    meter.end(exchange)


def _scatter_rows(
    out: Tensor, given: Tensor, out_counts: list[int], in_counts: list[int], group: Group | None
) -> None:
    """Rows of ``given``, ``in_counts`` for each rank; into ``out`` what they have for this one, ``out_counts`` each."""
    exchange = meter.begin(given.nbytes, given.device, "all_to_all", _stream_of(given.device))
    if isinstance(group, VirtualGroup):
        group.all_to_all(out, given, out_counts, in_counts)
    else:
        dist.all_to_all_single(out, given, out_counts, in_counts, group=group)
    meter.end(exchange)


# ---- on a stream of its own ----------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A point of the current stream."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event
    lane: Lane


class Pending(Generic[Result]):
    """An exchange under way, on a stream of its own where the tensors are on a GPU.

    It starts after ``ready`` (:func:`mark`), so that work that the current stream was given since then runs beside it.
    :meth:`wait` makes a stream wait for it, not the host, and returns the result; it may be called again.
    """

    def __init__(
        self, exchange: Callable[[], Result], device: torch.device, inputs: Any, ready: Mark | None
    ):
        self._inputs = inputs  # what the other stream reads must not be freed before the wait
        self._device, self._ready = device, ready
        self._done: torch.cuda.Event | None = None
        if ready is None:
            self._result = exchange()
            return
        lane = ready.lane
        lane.wait(lane.stream, ready.event)
        torch.cuda.set_stream(lane.stream)  # torch.cuda.stream looks up again what is known here
        try:
            self._result = exchange()
        finally:
            torch.cuda.set_stream(ready.stream)
        self._done = lane.record(lane.stream)

    def wait(self) -> Result:
        """Let the current stream wait."""
        return self._hold_up(current_stream(self._device)) if self._done else self._result

    def wait_there(self) -> Result:
        """Let the stream wait that ``ready`` is of."""
        return self._hold_up(self._ready.stream) if self._ready and self._done else self._result

    def _hold_up(self, stream: torch.cuda.Stream) -> Result:
        assert self._ready is not None and self._done is not None
        self._ready.lane.wait(stream, self._done)
        self._done = self._inputs = None
        return self._result


def mark(device: torch.device) -> Mark | None:
    """Where the current stream stands, for one exchange; None on the CPU."""
    if device.type != "cuda":
        return None
    lane, stream = lane_of(device), current_stream(device)
    return Mark(stream, lane.record(stream), lane)


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
    exchange = meter.begin(total.nbytes, total.device, "all_reduce", _stream_of(total.device))
    if isinstance(context.group, VirtualGroup):
        context.group.all_reduce(total)
    else:
        dist.all_reduce(total, group=context.group)
    meter.end(exchange)
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


_mailboxes: "weakref.WeakKeyDictionary[dist.ProcessGroup, Mailbox | None]" = (
    weakref.WeakKeyDictionary()
)


def moves_by_nccl(group: dist.ProcessGroup | None = None) -> bool:
    """Whether NCCL moves the group's GPU tensors. Its backend is not called "nccl" where init_process_group or
    init_device_mesh was left to choose, nor where there is another one for the CPU."""
    return "cuda:nccl" in dist.get_backend_config(group)


def warm_up(group: Group | None) -> None:
    """Open the connections of an NCCL group once, all ranks together: later messages concern some of them only."""
    if group is None or isinstance(group, VirtualGroup):
        return
    if group in _mailboxes or not moves_by_nccl(group):
        return
    dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    share = functools.partial(gather_objects, group=group)
    _mailboxes[group] = open_mailbox(dist.get_rank(group), dist.get_world_size(group), share)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group=group)
