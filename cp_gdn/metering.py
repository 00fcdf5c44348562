"""What a rank has issued and what its exchanges cost: for the watchdog, and for the trainer's log.

Both are fed by comm.py and read by others: `operations` names what has not ended, `meter` counts bytes, calls and time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


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
        self.watched = False

    def start(self) -> None:
        self.watched = True

    def stop(self) -> None:
        self.watched = False
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
        if not self.watched:
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


class Span(NamedTuple):
    """Between two events of a device that are recorded with their time."""

    device: torch.device
    before: torch.cuda.Event
    after: torch.cuda.Event


@dataclass
class CommMeter:
    """Counts what the context-parallel layers exchange: bytes sent by this rank, calls, and time.

    Time is wall clock on the CPU (blocking calls) and CUDA events on the GPU. Those that have ended are read as new
    spans begin, which reuse them, the others in :meth:`take`.
    """

    bytes: int = 0
    _calls: int = 0
    _taken: int = 0
    _seconds: float = 0.0
    _spans: deque[Span] = field(default_factory=deque)

    @contextmanager
    def span(
        self, nbytes: int, device: torch.device, what: str | Callable[[], str]
    ) -> Iterator[torch.cuda.Stream | None]:
        """Around an exchange; gives the current stream, None on the CPU."""
        self.bytes += nbytes
        self._calls += 1
        if device.type != "cuda":
            started = time.perf_counter()
            with operations.issue(what, None):
                yield None
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(device)
        if torch.cuda.is_current_stream_capturing():
            yield stream
            return
        span = self._next(device)
        span.before.record(stream)
        with operations.issue(what, span.after):
            yield stream
            span.after.record(stream)
        self._spans.append(span)

    def _next(self, device: torch.device) -> Span:
        """The events of the first span, if it has ended, or new ones: the watchdog's stay as they are."""
        if self._spans and self._spans[0].after.query():
            first = self._spans.popleft()
            self._seconds += first.before.elapsed_time(first.after) / 1e3
            if first.device == device and not operations.watched:
                return first
        return Span(
            device, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        )

    def take(self) -> dict[str, float]:
        """{"bytes", "seconds", "calls"} since the last call; waits for the GPU events it reads."""
        for _, before, after in self._spans:
            after.synchronize()
            self._seconds += before.elapsed_time(after) / 1e3
        out = {"bytes": self.bytes - self._taken, "seconds": self._seconds, "calls": self._calls}
        self._taken, self._seconds, self._calls = self.bytes, 0.0, 0
        self._spans.clear()
        return out


meter = CommMeter()
