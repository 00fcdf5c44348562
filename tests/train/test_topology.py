"""Ranks of the (dp, cp) mesh, and what the first rank's failure means to the others."""

import pytest
import torch

from cp_gdn import comm
from cp_gdn.train.topology import _device, open_topology
from tests.distributed import run_ranks


def place(rank, size):
    with open_topology(2) as topology:
        total = comm.all_reduce_sum(torch.tensor(float(rank)), topology.cp_group)
        try:
            topology.on_first_rank(lambda: (_ for _ in ()).throw(OSError("no space")), "save")
        except ValueError as error:
            return topology.dp_rank, topology.cp_rank, total.item(), str(error)


def test_context_parallel_groups_are_contiguous():
    found = run_ranks(4, place)
    assert [f[:3] for f in found] == [(0, 0, 1.0), (0, 1, 1.0), (1, 0, 5.0), (1, 1, 5.0)]
    assert {f[3] for f in found} == {"could not save (OSError: no space); mend or free that place"}


def test_more_ranks_than_gpus_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 ranks were started on a host with 2 GPUs"):
        _device(True)
    assert _device(False) == torch.device("cpu")
