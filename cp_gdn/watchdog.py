"""Ends a rank that waits for another one in vain, saying in which operation and for whom.

Every rank tells the others through the process group's store that it lives and which exchange it waits in. Where an
exchange has not ended after ``timeout_s``, the ranks that show no sign of life, or that are in no exchange while the
others wait in one, are named on stderr and the process exits with code 1: a state that did not arrive is never
trained on. The check runs in a thread; it reads CUDA events and never stops the device.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from . import comm
from .metering import Operation

SILENCE_S = 3.0  # a rank whose beat stands still for so long is taken for dead


def _end_process(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


class Watchdog:
    """``with Watchdog(timeout_s):`` around everything that exchanges; every rank of the default group enters it.

    ``timeout_s`` counts from when an operation was issued, so it must exceed the time of a training step. ``on_stall``
    gets the message instead of the default, which prints it and ends the process.
    """

    def __init__(self, timeout_s: float, on_stall: Callable[[str], None] = _end_process):
        self._timeout, self._on_stall = timeout_s, on_stall
        self._period = min(1.0, timeout_s / 8)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("cp_gdn/watchdog", store)
        self._count = 0
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cp_gdn watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._size > 1:
            comm.operations.start()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        comm.operations.stop()

    def _watch(self) -> None:
        if self._device is not None:  # or this thread would open a context on the first GPU
            torch.cuda.set_device(self._device)
        while not self._over.wait(self._period):
            waiting = None
            try:
                waiting, age = self._beat()
                if waiting is not None and age > self._timeout:
                    others = self._missing()
                    # it may have ended while the others were looked at
                    if comm.operations.oldest() == waiting and not self._over.is_set():
                        self._on_stall(self._message(waiting, others))
                        return
            except (
                RuntimeError
            ) as problem:  # the store is gone, and with it the process that held it
                if waiting is not None and not self._over.is_set():
                    self._on_stall(
                        self._message(waiting, f"unknown, their store failed: {problem}")
                    )
                return

    def _beat(self) -> tuple[Operation | None, float]:
        """Tell the others that this rank lives and how long its oldest open operation has waited."""
        waiting = comm.operations.oldest()
        age = 0.0 if waiting is None else time.monotonic() - waiting.issued
        self._count += 1
        self._store.set(str(self._rank), json.dumps([self._count, age]))
        return waiting, age

    def _missing(self) -> str:
        before = self._beats()
        until = time.monotonic() + SILENCE_S
        while time.monotonic() < until and not self._over.wait(self._period):
            self._beat()
        after = self._beats()
        silent = [r for r in after if after[r] is None or after[r] == before[r]]
        elsewhere = [r for r, beat in after.items() if r not in silent and beat and beat[1] == 0.0]
        found = [f"rank {r} (no sign of life)" for r in silent]
        found += [f"rank {r} (alive, but in no exchange)" for r in elsewhere]
        return ", ".join(found) or "none: all ranks are in an exchange, so look at the link"

    def _beats(self) -> dict[int, list[float] | None]:
        beats: dict[int, list[float] | None] = {}
        for rank in range(self._size):
            if rank != self._rank:
                there = self._store.check([str(rank)])
                beats[rank] = json.loads(self._store.get(str(rank))) if there else None
        return beats

    def _message(self, waiting: Operation, missing: str) -> str:
        return (
            f"[rank {self._rank}] {waiting.name}: not done after {timedelta(seconds=self._timeout)}. "
            f"Missing: {missing}. This process ends; start the run again under the same name to resume "
            "from its last checkpoint."
        )
