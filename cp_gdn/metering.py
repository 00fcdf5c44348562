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

MANY_SPANS = 32  # so many exchanges are read together


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


class Exchange(NamedTuple):
    """One that has begun: on the CPU ``since`` when, on a GPU with a ``span``, unless nobody wants it or a graph is
    captured."""

    operation: Operation | None
    since: float | None = None
    stream: torch.cuda.Stream | None = None
    span: Span | None = None


@dataclass
class CommMeter:
    """Counts what the context-parallel layers exchange: bytes sent by this rank, calls, and time.

    Time is wall clock on the CPU (blocking calls) and CUDA events on the GPU, there only where somebody has set
    ``timed``: they cost the host. Those that have ended are read now and then, as new ones begin, which use their
    events again, the others in :meth:`take`.
    """

    timed: bool = False
    bytes: int = 0
    _calls: int = 0
    _taken: int = 0
    _seconds: float = 0.0
    _spans: deque[Span] = field(default_factory=deque)
    _free: list[Span] = field(default_factory=list)

    def begin(
        self,
        nbytes: int,
        device: torch.device,
        what: str | Callable[[], str],
        stream: torch.cuda.Stream | None = None,
    ) -> Exchange:
        """An exchange, on the ``stream`` of a GPU. What raises before its :meth:`end` counts no time, and to the
        watchdog it does not end."""
        self.bytes += nbytes
        self._calls += 1
        if stream is None:
            return Exchange(operations.begin(what, None), since=time.perf_counter())
        wanted = self.timed or operations.watched
        if not wanted or torch.cuda.is_current_stream_capturing():
            return Exchange(None)
        span = self._next(device)
        span.before.record(stream)
        return Exchange(operations.begin(what, span.after), stream=stream, span=span)

    def end(self, exchange: Exchange) -> None:
        if exchange.span is not None:
            exchange.span.after.record(exchange.stream)
            self._spans.append(exchange.span)
        elif exchange.since is not None:
            self._seconds += time.perf_counter() - exchange.since
            operations.end(exchange.operation)

    def _next(self, device: torch.device) -> Span:
        """The events of a span that was read, or new ones: the watchdog's stay as they are."""
        if len(self._spans) >= MANY_SPANS:
            while self._spans and self._spans[0].after.query():
                span = self._spans.popleft()
                self._seconds += span.before.elapsed_time(span.after) / 1e3
                if not operations.watched:
                    self._free.append(span)
        if self._free and self._free[-1].device == device:
            return self._free.pop()
        return Span(
            device, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        )

    def take(self) -> dict[str, float]:
        """{"bytes", "seconds", "calls"} since the last call; waits for the GPU events it reads. On a GPU seconds are
        those of exchanges that were ``timed``."""
        for span in self._spans:
            span.after.synchronize()
            self._seconds += span.before.elapsed_time(span.after) / 1e3
        out = {"bytes": self.bytes - self._taken, "seconds": self._seconds, "calls": self._calls}
        self._taken, self._seconds, self._calls = self.bytes, 0.0, 0
        self._spans.clear()
        return out


meter = CommMeter()
