"""Times of calls that all ranks of a group make together, of the slowest rank.

``ms``: a call that starts cold. All ranks have ended all work before it, so the device waits for the host at first: how
long a single call takes.

``queued_ms``: calls issued one after another, as training does. The host runs ahead of the device where it needs less
time for a call than the device; what it does is then hidden, and what the device does counts.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from cp_gdn import comm

QUEUE, ROUNDS = 8, 3  # calls one after another, and how often


def slowest(value: float, group: dist.ProcessGroup) -> float:
    worst = torch.tensor([value], device="cuda", dtype=torch.float64)
    return comm.all_reduce_max(worst, group).item()


def time_calls(
    calls: list[Callable[[], Any]], repeats: int, group: dist.ProcessGroup
) -> dict[str, float]:
    """Median ms of cold calls and the distance between their quartiles; calls take turns.

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


def time_queued(calls: list[Callable[[], Any]], group: dist.ProcessGroup) -> float:
    """``queued_ms``, the median of a few rounds. Nothing is kept of a call but while the next one is issued."""
    times = []
    for _ in range(ROUNDS):
        dist.barrier(group)
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        calls[-1]()  # the device is busy from here on
        start.record()
        for i in range(QUEUE):
            calls[i % len(calls)]()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / QUEUE)
    worst = comm.all_reduce_max(torch.tensor(times, device="cuda", dtype=torch.float64), group)
    return statistics.median(worst.tolist())
