"""Start P ranks, run a function in each, and return what each rank returned.

Gloo ranks are forked: cheap (a tenth of a second for four ranks), and closures and patches reach them. NCCL
ranks are spawned,
one a GPU, because CUDA does not survive a fork. The file:// store needs no port, so tests run in parallel. A rank that
raises ends the others, and its traceback is the test's failure.
"""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank_main(
    rank: int, size: int, folder: str, backend: str, timeout_s: float, fn: Callable, args: tuple
):
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
    try:
        result = fn(rank, size, *args)
        torch.save(result, f"{folder}/result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(
    size: int, fn: Callable, *args: Any, backend: str = "gloo", timeout_s: float = 60
) -> list[Any]:
    """Run ``fn(rank, size, *args)`` in ``size`` ranks; returns the list of results in rank order.

    The default process group is initialised; results must be picklable by ``torch.save``, and for "nccl" fn must be
    importable.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank_main,
            args=(size, folder, backend, timeout_s, fn, args),
            nprocs=size,
            start_method="fork" if backend == "gloo" else "spawn",
        )
        return [
            torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False)
            for rank in range(size)
        ]
