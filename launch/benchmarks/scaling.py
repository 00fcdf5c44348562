"""What a rank computes in larger groups, on one GPU, and the scaling that this predicts: ``launch/bench.py op=scaling``

Weak scaling of the operator, forward + backward: every rank holds T tokens of one document. The ranks are virtual
(cp_gdn.virtual) and take turns; a profiler says how long the device is busy in a rank's turns, copies between ranks
left out. What the link takes instead is added, as if nothing ran beside it, for the owners' all-to-all of the states:

    predicted ms = slowest rank's ms + 2 passes * 2 messages * latency + bytes / bandwidth

Predictions, not measurements of P GPUs; docs/results/scaling-predicted.json says so in every row. Arguments:

    tokens=[32768,131072] heads=[[16,32],[16,64]] ranks=[1,2,4,8,16] gates=[qwen,slow] repeats=3
    latency_us=30 gigabytes_per_s=150     of the link; defaults: measured between two H200s through NCCL
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from cp_gdn import build_cp_context
from cp_gdn.virtual import VirtualGroup, run_virtual_ranks

from .cp import ours, passes
from .cp_timeline import annotate, read_trace, spans
from .inputs import draw
from .timing import need_gpu, parse, pyplot, results_path, write


@dataclass
class Options:
    op: str = "scaling"
    tokens: list[int] = field(default_factory=lambda: [32768, 131072])
    heads: list[list[int]] = field(default_factory=lambda: [[16, 32], [16, 64]])
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    gates: list[str] = field(default_factory=lambda: ["qwen", "slow"])
    repeats: int = 3
    latency_us: float = 30.0
    gigabytes_per_s: float = 150.0
    most_tokens: int = 1 << 20  # of all ranks together: they share one GPU's memory
    out: str = "docs/results/scaling-predicted"


Turns = list[tuple[int, int]]


def rank_turns(group: VirtualGroup, inputs: list[Tensor], do: Tensor, repeats: int) -> list[Turns]:
    """This rank's turns in each repeat; every rank computes on the same inputs."""
    T = inputs[0].shape[1]
    context = build_cp_context(group, seq_len=T * group.size, exchange="all_to_all")
    both = passes(ours(context), inputs, do)[1]
    turns = []
    for _ in range(repeats):
        group.share(None, "start")
        group.take_turns()
        both()
        turns.append(group.take_turns())
    return turns


def busy(kernels: list[dict[str, Any]], base: int, turns: Turns) -> tuple[float, dict[str, float]]:
    """Milliseconds in which a kernel ran during the turns, and those of each step's kernels, which may overlap."""
    total, steps, end = 0.0, dict[str, float](), float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["start"]):
        start, stop = kernel["start"], kernel["start"] + kernel["us"]
        middle = base + (start + stop) / 2 * 1e3
        if kernel["copy"] or not any(first <= middle <= last for first, last in turns):
            continue
        steps[kernel["step"]] = steps.get(kernel["step"], 0.0) + kernel["us"] / 1e3
        total += max(0.0, stop - max(start, end)) / 1e3
        end = max(end, stop)
    return total, steps


def rank_times(
    P: int, inputs: list[Tensor], do: Tensor, repeats: int
) -> list[tuple[float, dict[str, float]]]:
    """:func:`busy` of every rank: the median repeat's."""
    run_virtual_ranks(P, rank_turns, inputs, do, 1, device="cuda")
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    ) as profiler:
        turns = run_virtual_ranks(P, rank_turns, inputs, do, repeats, device="cuda")
    trace = read_trace(profiler)
    kernels, base = spans(trace), trace["baseTimeNanoseconds"]
    return [
        sorted((busy(kernels, base, each) for each in rank), key=lambda times: times[0])[
            len(rank) // 2
        ]
        for rank in turns
    ]


def measure(options: Options, T: int, heads: list[int], gates: str) -> list[dict[str, Any]]:
    inputs = list(draw(T, *heads, gates, 0))
    do = torch.randn_like(inputs[2])
    rows: list[dict[str, Any]] = []
    for P in options.ranks:
        if options.most_tokens < P * T:
            continue
        ranks = rank_times(P, inputs, do, options.repeats)
        slowest, steps = max(ranks, key=lambda times: times[0])
        state = heads[1] * 128 * 128 * 4
        link = 0.0
        if P > 1:  # forward: S and M out, S_in back; backward: dS out, dS_in back
            sent = (P - 1) / P * state * (3 + 2)
            link = 4 * options.latency_us / 1e3 + sent / options.gigabytes_per_s / 1e6
        row = {
            "tokens_a_rank": T, "Hk": heads[0], "Hv": heads[1], "gates": gates, "ranks": P,
            "rank_ms": [total for total, _ in ranks], "slowest_rank_ms": slowest,
            "slowest_rank_steps_ms": steps, "link_ms": link,
            "predicted_ms": slowest + link, "kind": "prediction from virtual ranks",
        }  # fmt: skip
        for reference in (1, 2):
            first = next((r for r in [*rows, row] if r["ranks"] == reference), None)
            if first:
                row[f"efficiency_against_{reference}"] = first["predicted_ms"] / row["predicted_ms"]
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    figure, axes = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = f"{row['tokens_a_rank'] // 1024}k a rank, {row['Hk']}/{row['Hv']}, {row['gates']}"
        lines.setdefault(name, []).append(row)
    for name, points in lines.items():
        axes.plot(
            [p["ranks"] for p in points],
            [100 * p["efficiency_against_1"] for p in points],
            marker="o",
            linestyle="--",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r["ranks"] for r in rows}), sorted({r["ranks"] for r in rows}))
    axes.set_ylim(0, 105)
    axes.set_xlabel("ranks (virtual ranks on one H200: predicted, not measured on P GPUs)")
    axes.set_ylabel("weak-scaling efficiency against one GPU, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    need_gpu()
    annotate()
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    work = [(T, h, g) for T in options.tokens for h in options.heads for g in options.gates]
    for T, heads, gates in tqdm(work, unit="series"):
        for row in measure(options, T, heads, gates):
            rows.append(row)
            tqdm.write(
                f"{T // 1024}k a rank {heads[0]}/{heads[1]} {gates} P={row['ranks']}: slowest rank "
                f"{row['slowest_rank_ms']:.3f} ms, predicted {row['predicted_ms']:.3f}, "
                f"efficiency {row['efficiency_against_1']:.2f}; "
                + ", ".join(f"{k} {v:.3f}" for k, v in row["slowest_rank_steps_ms"].items())
            )
        write(path, options, rows)
    plot(rows, path.with_suffix(".png"))
