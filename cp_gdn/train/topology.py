"""Which rank does what: a (dp, cp) device mesh over all ranks, owned by the trainer.

The ranks of a context-parallel group are contiguous, rank = dp_rank * cp_size + cp_rank, so that a
group stays inside a host where it can. DeepSpeed is told nothing of the mesh: to it every rank is
data parallel (see engine.py for why).
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cp_gdn import comm


@dataclass(frozen=True)
class Topology:
    """This rank's place. ``cp_group`` is None where one rank holds the whole sequence."""

    mesh: DeviceMesh
    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    cp_group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first_rank(self, work: Callable[[], Any], what: str) -> Any:
        """Result of ``work`` on the first rank, on every rank; where it fails, every rank raises ValueError."""
        result, failure = None, None
        if self.is_first:
            try:
                result = work()
            except (OSError, ValueError, KeyError) as error:
                failure = (
                    f"could not {what} ({type(error).__name__}: {error}); mend or free that place"
                )
        result, failure = comm.broadcast_object((result, failure))
        if failure is not None:
            raise ValueError(failure)
        return result


def launched_world_size() -> int:
    """Ranks that were started, known before any process group exists."""
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


@contextmanager
def open_topology(cp_size: int | None, *, timeout_s: float = 300.0) -> Iterator[Topology]:
    """Join the process group (NCCL where there are GPUs, else gloo), make the mesh, and leave it in the end.

    An existing default group is used and left alone. After a failure nothing more is communicated:
    a peer that is gone must not keep this rank waiting.

    Raises ValueError on every rank of a host with more ranks than GPUs.
    """
    ours = not dist.is_initialized()
    device = _device(torch.cuda.is_available() if ours else comm.moves_by_nccl())
    if ours:
        # the watchdog of the trainer says more than the group's own timeout, so that one comes later
        _join(device, datetime.timedelta(seconds=timeout_s + 30))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    cp_size = cp_size or world_size
    mesh = init_device_mesh(
        device.type, (world_size // cp_size, cp_size), mesh_dim_names=("dp", "cp")
    )
    dp_rank, cp_rank = divmod(rank, cp_size)
    yield Topology(
        mesh=mesh,
        device=device,
        rank=rank,
        world_size=world_size,
        dp_rank=dp_rank,
        dp_size=world_size // cp_size,
        cp_rank=cp_rank,
        cp_size=cp_size,
        cp_group=mesh["cp"].get_group() if cp_size > 1 else None,
    )
    if ours:
        dist.destroy_process_group()


def _device(on_gpu: bool) -> torch.device:
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if not on_gpu:
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        raise ValueError(
            f"{ranks} ranks were started on a host with {gpus} GPUs; a rank needs a GPU of its own: lower "
            "--nproc-per-node, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(
            backend, timeout=timeout, device_id=device if device.type == "cuda" else None
        )
    else:  # started without torchrun: a group of one, without a network port
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
