"""The boxes between GPUs: their protocol on the host's memory, and two GPUs that swap by them against NCCL."""

import ctypes
import threading
import time

import pytest
import torch
import torch.distributed as dist

from cp_gdn import build_cp_context, comm, mailbox

from .distributed import run_ranks


class HostDriver:
    """The driver's calls on host memory, each done when it returns: a stream is its caller's thread."""

    def __getattr__(self, name):
        return lambda *arguments: 700 + len(name)  # nothing else works here

    def cuStreamBatchMemOp_v2(self, stream, count, operations, flags):
        wait, write = operations
        assert (count, wait.operation, wait.flags, write.operation) == (2, 1, 1, 2)
        end = time.monotonic() + 10
        while ctypes.c_uint32.from_address(wait.address).value != wait.value:
            assert time.monotonic() < end, "nobody sets the flag"
            time.sleep(1e-4)
        return self.cuStreamWriteValue32_v2(stream, write.address, write.value, write.flags)

    def cuStreamWriteValue32_v2(self, stream, address, value, flags):
        ctypes.c_uint32.from_address(address).value = value
        return 0

    def cuMemcpyAsync(self, target, source, size, stream):
        ctypes.memmove(target, source, size)
        return 0


@pytest.fixture
def pair(monkeypatch):
    """The mailboxes of two ranks, and the memory that they share."""
    monkeypatch.setattr(mailbox, "_driver", HostDriver)
    monkeypatch.setattr(mailbox, "CAPACITY", 4096)
    memory = torch.zeros(2, 2 * 4096 + 4 * 64, dtype=torch.uint8)
    memory[:, 2 * 4096 + 2 * 64 :].view(torch.int32).view(2, 2, 16)[:, :, 0] = 1  # "empty"
    bases = [row.data_ptr() for row in memory]
    return [mailbox.Mailbox(rank, bases) for rank in range(2)], memory


def test_messages_arrive_in_order_and_whole(pair):
    """The sender is ahead of the receiver, who is ahead of it the other way."""
    (first, second), _ = pair
    messages = [[torch.full((i % 5 + 1, 3), float(i)), torch.arange(i + 1)] for i in range(40)]
    got = [[torch.empty_like(x) for x in message] for message in messages]
    back = [[torch.empty_like(x) for x in message] for message in messages]

    def there():
        for message, answer in zip(messages, back, strict=True):
            first.send(1, message, 0)
            first.receive(1, answer, 0)

    def here():
        for message in got:
            second.receive(0, message, 0)
            time.sleep(1e-3)
            second.send(0, message, 0)

    threads = [threading.Thread(target=fn) for fn in (there, here)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for message, one, two in zip(messages, got, back, strict=True):
        for x, y, z in zip(message, one, two, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)


def test_a_box_is_not_filled_before_it_is_empty(pair):
    (first, second), _ = pair
    one, two, out = torch.ones(4), torch.full((4,), 2.0), torch.empty(4)
    first.send(1, [one], 0)
    sender = threading.Thread(target=first.send, args=(1, [two], 0))
    sender.start()
    time.sleep(0.05)
    assert sender.is_alive()
    for expected in (one, two):
        second.receive(0, [out], 0)
        assert torch.equal(out, expected)
    sender.join()


def test_where_a_rank_has_no_such_memory_nobody_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("no GPU is asked"))
    monkeypatch.setattr(mailbox, "_allocate", lambda size: None)
    assert mailbox.open_mailbox(0, 2, lambda mine: [mine, ("here", b"")]) is None


def _swaps(rank, size, boxes):
    """Messages of all ranks to all, small and too large for a box, several turns; eager, then from a graph."""
    group = dist.group.WORLD
    context = build_cp_context(group, seq_len=64 * size)
    opened = comm._mailboxes[group]
    if not boxes:
        comm._mailboxes[group] = None
    sizes = [1 << 10, 3 << 19, 3 << 20]  # floats; the last is more than a box holds
    peers = [p for p in range(size) if p != rank]
    out = [(p, torch.zeros(n, device="cuda")) for p in peers for n in sizes[: 2 + p % 2]]
    into = [(p, torch.zeros(n, device="cuda")) for p in peers for n in sizes[: 2 + rank % 2]]
    seen = []

    def turn():
        comm.swap(out, into, context)

    def run(call, k):
        for i, (p, x) in enumerate(out):
            x.fill_(1000 * k + 100 * rank + 10 * p + i)
        call()
        seen.extend((x.min().item(), x.max().item()) for _, x in into)

    for k in range(4):
        run(turn, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn()
    for k in range(4, 8):
        run(graph.replay, k)
    comm._mailboxes[group] = opened
    return opened is not None, seen


def _both_ways(rank, size):
    return [_swaps(rank, size, boxes) for boxes in (True, False)]


@pytest.mark.multi_gpu
def test_two_gpus_swap_by_boxes_what_they_swap_by_nccl():
    for (opened, boxes), (_, nccl) in run_ranks(2, _both_ways, backend="nccl", timeout_s=60):
        assert opened
        assert boxes == nccl
        assert all(low == high for low, high in boxes) and len(set(boxes)) > 8
