"""What a rank has issued and what its exchanges cost: for the watchdog, and for the trainer's log.

Both are fed by comm.py and read by others: `operations` names what has not ended, `meter` counts bytes, calls and time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Operation(NamedTuple):
    """A message or collective that was issued: what it serves, and when (time.monotonic)."""

    name: str
    issued: float
    done: torch.cuda.Event | None


class Named:
    """Operations issued within serve this purpose, or the one that was named before."""

    __slots__ = ("_before", "_name", "_purpose")

    def __init__(self, purpose: ContextVar[str], name: str):
        self._purpose, self._name = purpose, name
        self._before: Token[str] | None = None

    def __enter__(self) -> None:
        self._before = self._purpose.set(self._purpose.get() or self._name)

    def __exit__(self, *exception: object) -> None:
        assert self._before is not None
        self._purpose.reset(self._before)


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

    def named(self, purpose: str) -> Named:
        """A context: operations issued within serve this purpose, or the one that was named before."""
        return Named(self._purpose, purpose)

    def begin(
        self, what: str | Callable[[], str], done: torch.cuda.Event | None
    ) -> Operation | None:
        """An operation that ends with ``done``, once that is recorded, or with :meth:`end`."""
        if not self.watched:
            return None
        what = what if isinstance(what, str) else what()
        purpose = self._purpose.get()
        name = f"{purpose} ({what})" if purpose else what
        operation = Operation(name, time.monotonic(), done)
        self._open.append(operation)
        return operation

    def end(self, operation: Operation | None) -> None:
        if operation is not None and operation.done is None:
            self._open.remove(operation)

    @contextmanager
    def issue(self, what: str | Callable[[], str], done: torch.cuda.Event | None) -> Iterator[None]:
        """An operation that ends with the block, or with the event that the block records."""
        operation = self.begin(what, done)
        yield
        self.end(operation)

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

    def span(self, nbytes: int, device: torch.device, what: str | Callable[[], str]) -> "Exchange":
        """A context around an exchange; gives the current stream, None on the CPU."""
        return Exchange(self, nbytes, device, what)

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


class Exchange:
    """:meth:`CommMeter.span`. One that raises counts no time, and to the watchdog it does not end."""

    __slots__ = (
        "_device",
        "_meter",
        "_nbytes",
        "_operation",
        "_span",
        "_started",
        "_stream",
        "_what",
    )

    def __init__(
        self, meter: CommMeter, nbytes: int, device: torch.device, what: str | Callable[[], str]
    ):
        self._meter, self._nbytes, self._device, self._what = meter, nbytes, device, what
        self._operation: Operation | None = None
        self._span: Span | None = None

    def __enter__(self) -> torch.cuda.Stream | None:
        meter, device = self._meter, self._device
        meter.bytes += self._nbytes
        meter._calls += 1
        if device.type != "cuda":
            self._operation = operations.begin(self._what, None)
            self._started = time.perf_counter()
            return None
        self._stream = torch.cuda.current_stream(device)
        if not torch.cuda.is_current_stream_capturing():
            self._span = meter._next(device)
            self._span.before.record(self._stream)
            self._operation = operations.begin(self._what, self._span.after)
        return self._stream

    def __exit__(self, problem: object, *rest: object) -> None:
        if problem is not None:
            return
        if self._span is not None:
            self._span.after.record(self._stream)
            self._meter._spans.append(self._span)
        elif self._device.type != "cuda":
            self._meter._seconds += time.perf_counter() - self._started
            operations.end(self._operation)


meter = CommMeter()
