"""Virtual ranks: any number of context-parallel ranks as threads of one process, on one device.

    results = run_virtual_ranks(8, step, device="cuda")      # step(group) builds its context with that group

What a rank computes and what crosses a cut are those of a process group of that size, so shardings larger than the
machine can be tried, tested and timed. The ranks take turns: one runs until it needs what another has not sent yet.
Messages are copies on the device; a backward pass runs in its rank's own thread.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class VirtualGroup:
    """What :mod:`cp_gdn.comm` needs of a process group, between threads. Made by :func:`run_virtual_ranks`."""

    def __init__(self, size: int, device: torch.device, timeout_s: float):
        self.size, self.device, self._timeout = size, device, timeout_s
        self._own = threading.local()
        self._turn = threading.Condition()  # held by the rank that runs
        self._failed = False
        self._mail: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._rounds: dict[int, dict[int, Any]] = defaultdict(dict)
        self._turns: dict[int, list[tuple[int, int]]] = defaultdict(list)

    @property
    def rank(self) -> int:
        return self._own.rank

    def exchange(
        self, outgoing: list[tuple[int, Tensor]], incoming: list[tuple[int, Tensor]]
    ) -> None:
        """Send and receive (peer, tensor) pairs."""
        for peer, tensor in outgoing:
            self._mail[self.rank, peer].append(tensor.clone())
        self._turn.notify_all()
        boxes = [(peer, self._mail[peer, self.rank]) for peer, _ in incoming]

        def missing() -> list[int]:
            return [peer for peer, box in boxes if not box]

        self._wait("messages", missing)
        for (_, buffer), (_, box) in zip(incoming, boxes, strict=True):
            buffer.copy_(box.popleft())

    def share(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, in rank order; all ranks call, in the same order."""
        number, self._own.round = self._own.round, self._own.round + 1
        there = self._rounds[number]
        there[self.rank] = value
        self._turn.notify_all()
        self._rounds.pop(
            number - 2, None
        )  # whoever calls again has read the last round, so all left this one
        self._wait(what, lambda: [rank for rank in range(self.size) if rank not in there])
        return [there[rank] for rank in range(self.size)]

    def all_gather(self, every: Tensor, mine: Tensor) -> None:
        parts = self.share(mine.clone(), "all_gather")
        torch.cat([part.flatten() for part in parts], out=every.view(-1))

    def all_to_all(
        self, out: Tensor, given: Tensor, out_counts: list[int], in_counts: list[int]
    ) -> None:
        """Rows of ``given``, ``in_counts`` for each rank; what the ranks have for this one into ``out``."""
        blocks = self.share(given.clone().split(in_counts), "all_to_all")
        for place, block in zip(out.split(out_counts), blocks, strict=True):
            place.copy_(block[self.rank])

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in rank order, in place."""
        total = torch.zeros_like(tensor)
        for part in self.share(tensor.clone(), "all_reduce"):
            total += part
        tensor.copy_(total)

    def take_turns(self) -> list[tuple[int, int]]:
        """When this rank ran since the last call: (start, stop) in ns, as of time.time_ns().

        A turn ends when the device is idle, so what a profiler sees the device do within it is this rank's own work.
        """
        self._end_turn()
        self._own.start = time.time_ns()
        return self._turns.pop(self.rank)

    def run(self, rank: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """One rank's life, in its own thread."""
        self._own.rank, self._own.round = rank, 0
        with self._turn, torch.autograd.set_multithreading_enabled(False):
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self._own.start = time.time_ns()
            try:
                return fn(self, *args)
            except BaseException:
                self._failed = True
                self._turn.notify_all()
                raise
            finally:
                self._end_turn()

    def _wait(self, what: str, missing: Callable[[], list[int]]) -> None:
        """Let others run until no rank is missing."""
        if not missing():
            return
        self._end_turn()
        on_time = self._turn.wait_for(lambda: not missing() or self._failed, self._timeout)
        self._own.start = time.time_ns()
        if not on_time:
            raise TimeoutError(
                f"virtual rank {self.rank} waited {self._timeout} s for {what}; missing: ranks {missing()}"
            )
        if missing():
            raise _OtherRankFailed

    def _end_turn(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._turns[self.rank].append((self._own.start, time.time_ns()))


class _OtherRankFailed(RuntimeError):
    """This rank stops because another one raised; that one's exception is reported."""


def run_virtual_ranks(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    device: torch.device | str = "cpu",
    timeout_s: float = 60,
) -> list[Any]:
    """Run ``fn(group, *args)`` in ``size`` virtual ranks on ``device``; their results in rank order.

    ``build_cp_context(group, ...)`` takes the group that ``fn`` gets. Raises what the first failing rank raised:
    TimeoutError, naming the operation and the missing ranks, where one waited longer than ``timeout_s`` for others.
    """
    if size < 1:
        raise ValueError(f"size is {size}; there must be at least one virtual rank")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # threads begin on device 0
        device = torch.device("cuda", torch.cuda.current_device())
    group = VirtualGroup(size, device, timeout_s)
    results: list[Any] = [None] * size
    problems: list[BaseException] = []

    def live(rank: int) -> None:
        try:
            results[rank] = group.run(rank, fn, args)
        except _OtherRankFailed:
            pass
        except BaseException as problem:  # handed to the caller's thread
            problems.append(problem)

    threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return results
