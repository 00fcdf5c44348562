"""Context parallelism on the GPUs of one host beside one GPU: ``torchrun --nproc-per-node 2 launch/bench.py op=cp``

One process a GPU. Every row is one sequence of T tokens: on one GPU whole, and cut over all of them; times are of the
operator, forward and forward + backward through autograd, launches included, of the slowest rank. ms: calls that start
cold, all ranks together, with the device idle; host_ms is how long the slowest host takes to issue one. queued_ms: of
calls issued one after another, so that the host runs ahead as it does in training, a call's share of their time.
cp_own_thread: autograd runs the backward in the caller's thread (torch.autograd.set_multithreading_enabled), not in one
of its own that wakes up for it. Checks first: outputs and gradients over the ranks against one GPU's. Writes
docs/results/cp-2xh200.json and .png. Arguments:

    peers=[flash_qla]    flash_qla (inter-card), fla, ulysses (head-parallel all-to-all around our kernels; it
                         sends so much that NCCL then gets all its channels, otherwise four)
    shapes=[[65536,16,32],...]   T of the whole sequence, key heads, value heads
    gates=[qwen,slow] exchanges=[ring,all_gather,all_to_all] repeats=20 out=docs/results/cp-2xh200
    layer=true       also the whole layer, hidden 2048 (cp_layers.py)
    model=131072     also a decoder's training step with so many tokens a GPU; 0: not
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from cp_gdn import boundary, build_cp_context, chunk_gated_delta_rule, comm

from .cp_layers import measure_layer, measure_model
from .cp_peers import PEERS, flash_qla_alone
from .cp_timing import slowest, time_calls, time_queued
from .inputs import draw
from .timing import parse, pyplot, results_path, write

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")


@dataclass
class Options:
    op: str = "cp"
    peers: list[str] = field(default_factory=lambda: ["flash_qla"])
    shapes: list[list[int]] = field(
        default_factory=lambda: [[65536, 16, 32], [131072, 16, 32], [65536, 16, 64]]
    )
    gates: list[str] = field(default_factory=lambda: ["qwen", "slow"])
    exchanges: list[str] = field(default_factory=lambda: ["ring"])
    repeats: int = 20
    layer: bool = True
    model: int = 131072
    out: str = "docs/results/cp-2xh200"


def passes(step, inputs: list[Tensor], do: Tensor) -> tuple[Callable, Callable]:
    """The forward alone, as training runs it, and forward + backward; both return tensors to look at."""

    def both() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = step(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    def forward() -> Tensor:
        return step(*(x.detach().requires_grad_() for x in inputs))

    return forward, both


def timed(step, sets, repeats: int, group: dist.ProcessGroup) -> dict[str, Any]:
    pairs = [passes(step, inputs, do) for inputs, do in sets]
    both = time_calls([b for _, b in pairs], repeats, group)
    both["queued_ms"] = time_queued([b for _, b in pairs], group)
    forward = time_calls([f for f, _ in pairs], repeats, group)
    return {"forward": forward, "both": both}


def ours(context=None) -> Callable[..., Tensor]:
    rule = partial(
        chunk_gated_delta_rule,
        use_qk_l2norm_in_kernel=True,
        cp_context=context,
        engine="tilelang",
    )
    return lambda *inputs: rule(*inputs)[0]


def errors(step, whole, shard, group: dist.ProcessGroup) -> dict[str, float]:
    """Relative L2 over the ranks against one GPU, the worst rank."""
    inputs, do = whole
    alone = passes(ours(), inputs, do)[1]()
    local = passes(step, [shard(x) for x in inputs], shard(do))[1]()
    found = {}
    for name, a, b in zip(NAMES, local, alone, strict=True):
        b = shard(b).double()
        found[name] = slowest(((a.double() - b).norm() / b.norm()).item(), group)
    return found


def graph_of(call: Callable) -> Callable:
    """The call as a CUDA graph, captured after it ran."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def without_exchange():
    """A step whose states never travel: what remains is what a rank computes."""
    nothing = boundary.Transitions()
    return patch.multiple(
        boundary,
        exchange_states=lambda summary, context: (torch.zeros_like(summary.S), nothing),
        exchange_gradients=lambda dS, transitions, context: torch.zeros_like(dS),
    )


def measure(options: Options, shape: list[int], gates: str, group) -> dict[str, Any]:
    T, key_heads, value_heads = shape
    row: dict[str, Any] = {
        "what": "operator", "T": T, "Hk": key_heads, "Hv": value_heads, "gates": gates
    }  # fmt: skip
    wholes = []
    for seed in range(2):
        inputs = list(draw(T, key_heads, value_heads, gates, seed))
        wholes.append((inputs, torch.randn_like(inputs[2])))
    context = build_cp_context(group, seq_len=T, exchange=options.exchanges[0])

    def shard(x: Tensor) -> Tensor:
        return context.shard(x).contiguous()

    row["errors"] = errors(ours(context), wholes[0], shard, group)
    row["one_gpu"] = timed(ours(), wholes, options.repeats, group)
    if "flash_qla" in options.peers:
        row["flash_qla_one_gpu"] = timed(flash_qla_alone(), wholes, options.repeats, group)
    parts = [([shard(x) for x in inputs], shard(do)) for inputs, do in wholes]
    del wholes
    torch.cuda.empty_cache()

    for exchange in options.exchanges:
        context = build_cp_context(group, seq_len=T, exchange=exchange)
        comm.meter.take()
        passes(ours(context), *parts[0])[1]()
        row[f"{exchange}_bytes"] = comm.meter.take()["bytes"]
        row[f"cp_{exchange}"] = timed(ours(context), parts, options.repeats, group)
    context = build_cp_context(group, seq_len=T, exchange=options.exchanges[0])
    with torch.autograd.set_multithreading_enabled(False):
        row["cp_own_thread"] = timed(ours(context), parts, options.repeats, group)
    with without_exchange():
        row["cp_without_exchange"] = timed(ours(context), parts, options.repeats, group)
    replays = [graph_of(passes(ours(context), *part)[1]) for part in parts]
    row["cp_graph"] = {"both": time_calls(replays, options.repeats, group)}
    row["cp_graph"]["both"]["queued_ms"] = time_queued(replays, group)
    del replays
    for name in options.peers:
        peer = PEERS[name](T, group, value_heads)
        row[f"cp_{name}"] = timed(peer, parts, options.repeats, group)
        torch.cuda.empty_cache()

    best = row[f"cp_{options.exchanges[0]}"]["both"]
    others = {"one_gpu": "one_gpu", "flash_qla_cp": "cp_flash_qla"}
    for kind, suffix in (("ms", ""), ("queued_ms", "_queued")):
        for name, other in others.items():
            if other in row:
                row[f"ratio_to_{name}{suffix}"] = best[kind] / row[other]["both"][kind]
    return row


def describe(row: dict[str, Any]) -> str:
    text = f"{row['T'] // 1024}k {row['Hk']}/{row['Hv']} {row['gates']}"
    text += f" {row['what']}"
    for name, value in row.items():
        if isinstance(value, dict) and "both" in value:
            both = value["both"]
            text += f" | {name} {both['ms']:.3f}"
            if "queued_ms" in both:
                text += f", queued {both['queued_ms']:.3f}"
            if "forward" in value:
                text += f" (forward {value['forward']['ms']:.3f}, host {both['host_ms']:.2f})"
        elif name.startswith("ratio"):
            text += f" | {name} {value:.3f}"
    return text


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    names = [k for k, v in rows[0].items() if isinstance(v, dict) and "both" in v]
    rows = [row for row in rows if row["what"] == "operator"]
    figure, axes = pyplot().subplots(figsize=(9, 1.1 * len(rows) + 1.2), layout="constrained")
    height = 0.85 / len(names)
    for i, name in enumerate(names):
        values = [row[name]["both"]["ms"] if name in row else 0 for row in rows]
        bars = axes.barh([y + i * height for y in range(len(rows))], values, height, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    labels = [f"{r['T'] // 1024}k, {r['Hk']}/{r['Hv']}, {r['gates']}" for r in rows]
    axes.set_yticks([y + 0.42 - height / 2 for y in range(len(rows))], labels)
    axes.set_xlabel("forward + backward, ms (slowest rank, launches included)")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


@contextmanager
def joined(*, few_channels: bool = False) -> Iterator[tuple[int, dist.ProcessGroup]]:
    """This rank and the group of all processes that torchrun started."""
    if "RANK" not in os.environ:
        raise ValueError(
            "this benchmark runs a process a GPU: torchrun --nproc-per-node 2 launch/bench.py op=cp"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"process {local + 1} of this host has no GPU of its own: there are {gpus}"
        )
    torch.cuda.set_device(local)
    if few_channels:
        # Messages of a few MB need few multiprocessors; while one waits for its sender it holds them,
        # and chains of 128 CTAs would not fit beside it.
        os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", "4")
    dist.init_process_group(
        "nccl",
        timeout=datetime.timedelta(seconds=60),
        pg_options=dist.ProcessGroupNCCL.Options(is_high_priority_stream=True),
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )
    group = dist.group.WORLD
    assert group is not None
    yield dist.get_rank(), group
    dist.destroy_process_group()


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    with joined(few_channels="ulysses" not in options.peers) as (rank, group):
        work = [
            partial(measure, options, shape, gates, group)
            for shape in options.shapes
            for gates in options.gates
        ]
        if options.layer:
            work += [partial(measure_layer, T, options.repeats, group) for T in (65536, 131072)]
        if options.model:
            work += [partial(measure_model, layers, options.model, group) for layers in (3, 4)]
        for job in work:
            rows.append(job())
            torch.cuda.empty_cache()
            if rank == 0:
                print(describe(rows[-1]), rows[-1].get("errors", ""), flush=True)
                write(path, options, rows, gpus=dist.get_world_size())
        if rank == 0:
            plot(rows, path.with_suffix(".png"))
