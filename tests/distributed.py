"""Start P ranks, run a function in each, and return what each rank returned.

Gloo ranks are forked: cheap (a tenth of a second for four ranks), and closures and patches reach them. NCCL
ranks are spawned,
one a GPU, because CUDA does not survive a fork; they stay for later calls, as starting them takes ten seconds. The
file:// store needs no port, so tests run in parallel. A rank that raises ends the others, and its traceback is the
test's failure.
"""

import atexit
import datetime
import functools
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _join(rank: int, size: int, folder: str, backend: str, timeout_s: float) -> None:
    """Initialise the default process group."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
    )


def _run(rank: int, size: int, folder: str, fn: Callable, args: tuple) -> None:
    torch.save(fn(rank, size, *args), f"{folder}/result-{rank}.pt")
    dist.barrier()


def _results(size: int, folder: str) -> list[Any]:
    return [
        torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False) for rank in range(size)
    ]


def _rank_main(
    rank: int, size: int, folder: str, backend: str, timeout_s: float, fn: Callable, args: tuple
):
    _join(rank, size, folder, backend, timeout_s)
    try:
        _run(rank, size, folder, fn, args)
    finally:
        dist.destroy_process_group()


def _serve(rank: int, size: int, folder: str, end: connection.Connection) -> None:
    """A rank that stays: runs what it is sent, and answers with a traceback or None, until it is sent None."""
    _join(rank, size, folder, "nccl", 120)
    while (work := end.recv()) is not None:
        try:
            _run(rank, size, folder, *work)
            end.send(None)
        except BaseException:
            end.send(traceback.format_exc())
    dist.destroy_process_group()


class _Ranks:
    """NCCL ranks that stay."""

    def __init__(self, size: int):
        self._folder = tempfile.TemporaryDirectory()
        spawn = mp.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(size):
            mine, theirs = spawn.Pipe()
            given = (rank, size, self._folder.name, theirs)
            self._processes.append(spawn.Process(target=_serve, args=given, daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that a rank's end is noticed
            self._ends.append(mine)
        atexit.register(self._stop)

    def run(self, fn: Callable, args: tuple, timeout_s: float) -> list[Any]:
        for end in self._ends:
            end.send((fn, args))
        waiting = dict(enumerate(self._ends))
        while waiting:
            ready = connection.wait(list(waiting.values()), timeout_s)
            problem = "" if ready else f"ranks {list(waiting)}: nothing for {timeout_s} s"
            for rank, end in list(waiting.items()):
                if end in ready:
                    del waiting[rank]
                    try:
                        problem = end.recv() or problem
                    except EOFError:
                        problem = f"rank {rank} has ended"
            if problem:
                for process in self._processes:
                    process.kill()
                _staying.cache_clear()
                raise RuntimeError(problem)
        return _results(len(self._ends), self._folder.name)

    def _stop(self) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            if process.is_alive():
                end.send(None)
        for process in self._processes:
            process.join(10)


@functools.cache
def _staying(size: int) -> _Ranks:
    return _Ranks(size)


def run_ranks(
    size: int, fn: Callable, *args: Any, backend: str = "gloo", timeout_s: float = 60
) -> list[Any]:
    """Run ``fn(rank, size, *args)`` in ``size`` ranks; returns the list of results in rank order.

    The default process group is initialised; results must be picklable by ``torch.save``, and for "nccl" fn must be
    importable and leave nothing changed.
    """
    if backend == "nccl":
        return _staying(size).run(fn, args, timeout_s)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank_main,
            args=(size, folder, backend, timeout_s, fn, args),
            nprocs=size,
            start_method="fork",
        )
        return _results(size, folder)
