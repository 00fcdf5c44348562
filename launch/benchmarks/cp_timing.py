"""Times of calls that all ranks of a group make together."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from cp_gdn import comm


def slowest(value: float, group: dist.ProcessGroup) -> float:
    worst = torch.tensor([value], device="cuda", dtype=torch.float64)
    return comm.all_reduce_max(worst, group).item()


def time_calls(
    calls: list[Callable[[], Any]], repeats: int, group: dist.ProcessGroup
) -> dict[str, float]:
    """Median ms and the distance between quartiles; calls take turns, a call lasts as long as its slowest rank."""
    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        dist.barrier(group)
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        calls[i % len(calls)]()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    worst = torch.tensor(times, device="cuda", dtype=torch.float64)
    low, middle, high = statistics.quantiles(comm.all_reduce_max(worst, group).tolist(), n=4)
    return {"ms": middle, "spread": high - low}
