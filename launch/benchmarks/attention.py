"""Causal softmax attention over GPUs beside one: ``torchrun --nproc-per-node 2 launch/bench.py op=attention``

One process a GPU. Every row is one document of T tokens, bf16: on one GPU whole, cut over all of them with the scores
shared out evenly, and with every query computed at home; forward, and forward + backward, launches included, each call
started together and counted with its slowest rank, the median of as many calls as fit a second, one at least.
`exchange` is the balanced call with the attention itself left out; `graph` is it captured and replayed. Checks first:
outputs and gradients against one GPU's. Writes docs/results/attention-2xh200.json. Arguments:

    shapes=[[131072,16,2,256],...]    T, query heads, key heads, head size
    out=docs/results/attention-2xh200
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from cp_gdn import balance, build_cp_context, comm
from cp_gdn.context import CPContext
from cp_gdn.ops import attention
from cp_gdn.ops.attention import causal_attention

from .cp import graph_of, joined, passes
from .cp_timing import slowest
from .timing import parse, results_path, write

NAMES = ("o", "dq", "dk", "dv")


@dataclass
class Options:
    op: str = "attention"
    shapes: list[list[int]] = field(
        default_factory=lambda: [
            [16384, 16, 2, 256],
            [32768, 16, 2, 256],
            [131072, 16, 4, 128],
            [131072, 16, 2, 256],
            [262144, 16, 2, 256],
        ]
    )
    out: str = "docs/results/attention-2xh200"


def draw(shape: list[int]) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, T, heads, D]."""
    T, heads, kv_heads, D = shape
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(1, T, h, D, device="cuda", dtype=torch.bfloat16) for h in sizes]


def planned(T: int, group: dist.ProcessGroup, balanced: bool) -> CPContext:
    context = build_cp_context(group, seq_len=T)
    with patch.object(balance, "TOLERANCE", balance.TOLERANCE if balanced else float("inf")):
        balance.plan_for(context)
    return context


def ours(context: CPContext | None) -> Callable[..., Tensor]:
    return lambda q, k, v: causal_attention(q, k, v, cp_context=context)


def timed(call: Callable[[], Any], group: dist.ProcessGroup) -> float:
    """Median ms of a call that has been made before."""
    times: list[float] = []
    while not times or (sum(times) < 1000 and len(times) < 9):
        dist.barrier(group)
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(slowest(start.elapsed_time(stop), group))
    return statistics.median(times)


def measure(shape: list[int], group: dist.ProcessGroup) -> dict[str, Any]:
    T, heads, kv_heads, D = shape
    row: dict[str, Any] = {"T": T, "Hq": heads, "Hkv": kv_heads, "D": D, "errors": {}}
    contexts = {name: planned(T, group, name == "balanced") for name in ("balanced", "unbalanced")}
    balanced = contexts["balanced"]
    *inputs, do = draw(shape)
    part = [balanced.shard(x).contiguous() for x in (*inputs, do)]

    def times(step: Callable[..., Tensor], tensors: list[Tensor]) -> dict[str, float]:
        forward, both = passes(step, tensors[:3], tensors[3])
        torch.cuda.reset_peak_memory_stats()
        found = {"both_ms": timed(both, group), "forward_ms": timed(forward, group)}
        return {**found, "peak_gib": slowest(torch.cuda.max_memory_allocated() / 2**30, group)}

    alone = [balanced.shard(x).clone() for x in passes(ours(None), inputs, do)[1]()]
    for name, context in contexts.items():
        comm.meter.take()
        mine = passes(ours(context), part[:3], part[3])[1]()
        row[f"{name}_bytes"] = slowest(comm.meter.take()["bytes"], group)
        row["errors"][name] = {
            which: slowest(((a.double() - b.double()).norm() / b.double().norm()).item(), group)
            for which, a, b in zip(NAMES, mine, alone, strict=True)
        }
    del alone, mine
    row["one_gpu"] = times(ours(None), [*inputs, do])
    del inputs, do
    torch.cuda.empty_cache()
    for name, context in contexts.items():
        row[name] = times(ours(context), part)
        row[f"{name}_ratio"] = row[name]["both_ms"] / row["one_gpu"]["both_ms"]
    both = passes(ours(balanced), part[:3], part[3])[1]
    if T <= 65536:
        row["graph_ms"] = timed(graph_of(both), group)
    with patch.object(attention, "attend", lambda q, k, v, scale, new_shape: q + 0):
        both()
        row["exchange_ms"] = timed(both, group)
    return row


def describe(row: dict[str, Any]) -> str:
    text = f"{row['T'] // 1024}k {row['Hq']}/{row['Hkv']} D={row['D']}"
    for name in ("one_gpu", "balanced", "unbalanced"):
        text += f" | {name} {row[name]['both_ms']:.2f} (forward {row[name]['forward_ms']:.2f})"
    text += f" | ratios {row['balanced_ratio']:.3f} {row['unbalanced_ratio']:.3f}"
    return f"{text} | graph {row.get('graph_ms', 0):.2f} exchange {row['exchange_ms']:.2f}"


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    with joined() as (rank, group):
        for shape in options.shapes:
            rows.append(measure(shape, group))
            torch.cuda.empty_cache()
            if rank == 0:
                print(describe(rows[-1]), rows[-1]["errors"], flush=True)
                write(path, options, rows, gpus=dist.get_world_size())
