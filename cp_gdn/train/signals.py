"""SIGTERM asks for a checkpoint and a clean end: noted here, agreed on by all ranks in the next step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.set = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Catch the first SIGTERM inside the block; a second one acts as it would have before."""

        def note(signum: int, frame: FrameType | None) -> None:
            self.set = True
            signal.signal(signal.SIGTERM, previous)

        previous = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
