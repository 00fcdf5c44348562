"""Progress of one long piece of work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 30.0


def say(message: str) -> None:
    """One line on stderr, where the bar is too."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts up to ``total`` bytes inside a ``with``; ``to(done)`` says how far the work is."""

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._bar: tqdm | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, desc=self._what, unit="B", unit_scale=True, dynamic_ncols=True
            )
        else:
            say(f"{self._what} ({self._total / 1e6:.1f} MB)")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            say(f"{self._what}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB")
