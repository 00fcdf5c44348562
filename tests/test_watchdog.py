"""A rank that stops or stays away ends the others, with its number and the operation in the message."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException

from cp_gdn import build_cp_context, chunk_gated_delta_rule
from cp_gdn.watchdog import Watchdog

from .cases import make_case
from .distributed import run_ranks


def _step(exchange):
    case = make_case(192, 1, 2, 4, 4)
    context = build_cp_context(dist.group.WORLD, seq_len=192, exchange=exchange)
    chunk_gated_delta_rule(*(context.shard(x) for x in case.inputs[:5]), cp_context=context)


def _with_a_lost_rank(rank, size, folder, exchange, way):
    pid = Path(folder) / "pid"

    def report(message):
        (Path(folder) / f"message-{rank}").write_text(message)
        time.sleep(1.0)  # the others report too before the first exit ends them
        os.kill(int(pid.read_text()), signal.SIGKILL)
        os._exit(1)

    with Watchdog(1.0, report):
        _step(exchange)  # connections are open, everybody lives
        if rank == size - 2:
            pid.write_text(str(os.getpid()))
            if way == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(30)
        _step(exchange)
        if rank < size - 2:  # served by nobody in the ring: waits in the next collective instead
            dist.barrier()


@pytest.mark.parametrize(
    ("exchange", "way", "operation", "missing"),
    [
        (
            "ring",
            "stopped",
            "boundary states, ring (to ranks [], from ranks [1])",
            "no sign of life",
        ),
        (
            "all_gather",
            "elsewhere",
            "boundary states, all_gather (to ranks [], from ranks [0, 1])",
            "in no exchange",
        ),
        ("serial", "elsewhere", "boundary state (to ranks [], from ranks [1])", "in no exchange"),
    ],
)
def test_the_lost_rank_is_named(tmp_path, exchange, way, operation, missing):
    with pytest.raises(ProcessExitedException):
        run_ranks(3, _with_a_lost_rank, str(tmp_path), exchange, way)
    message = (tmp_path / "message-2").read_text()
    assert message.startswith(f"[rank 2] {operation}: not done after 0:00:01")
    assert f"rank 1 ({'' if way == 'stopped' else 'alive, but '}{missing})" in message
    assert "rank 0 (no sign" not in message


def _all_well(rank, size):
    seen = []
    with Watchdog(0.4, seen.append):
        for _ in range(4):
            _step("all_to_all")
            time.sleep(0.3)
    return seen


def test_ranks_that_answer_are_left_alone():
    assert run_ranks(2, _all_well) == [[], []]


def test_one_rank_has_nobody_to_watch():
    def alone(rank, size):
        with Watchdog(0.1):
            return torch.zeros(1)

    assert run_ranks(1, alone)[0].item() == 0
