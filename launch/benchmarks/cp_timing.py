"""Times of calls that all ranks of a group make together."""

import statistics
import time
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
    """Median ms and the distance between quartiles; calls take turns, a call lasts as long as its slowest rank.

    ``host_ms``: until the call returned, by the host's clock. The device is idle when it begins and nothing waits for
    it, so that is what Python, the launches and the messages' preparation take.
    """
    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    times, host = [], []
    for i in range(repeats):
        dist.barrier(group)
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        begun = time.perf_counter()
        calls[i % len(calls)]()
        host.append((time.perf_counter() - begun) * 1e3)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    worst = torch.tensor([times, host], device="cuda", dtype=torch.float64)
    times, host = comm.all_reduce_max(worst, group).tolist()
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "spread": high - low, "host_ms": statistics.median(host)}
