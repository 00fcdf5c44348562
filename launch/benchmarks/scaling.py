"""What a rank computes in larger groups, on one GPU, and the scaling that this predicts: ``launch/bench.py op=scaling``

Weak scaling of the operator, forward + backward: every rank holds T tokens of one document. The ranks are virtual
(cp_gdn.virtual), so a rank's device time is measured without its waits; the exchange is added from the link, as the
owners' all-to-all of the states:

    predicted ms = slowest rank's ms + 2 passes * 2 messages * (latency + bytes / bandwidth)

Predictions, not measurements of P GPUs; docs/results/scaling-predicted.json says so in every row. Arguments:

    tokens=[32768,131072] heads=[[16,32],[16,64]] ranks=[1,2,4,8,16] gates=[qwen,slow] repeats=5
    latency_us=30 gigabytes_per_s=150     of the link; defaults: measured between two H200s through NCCL
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cp_gdn import build_cp_context
from cp_gdn.virtual import VirtualGroup, run_virtual_ranks

from .cp import ours, passes
from .inputs import draw
from .timing import need_gpu, parse, pyplot, results_path, write


@dataclass
class Options:
    op: str = "scaling"
    tokens: list[int] = field(default_factory=lambda: [32768, 131072])
    heads: list[list[int]] = field(default_factory=lambda: [[16, 32], [16, 64]])
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    gates: list[str] = field(default_factory=lambda: ["qwen", "slow"])
    repeats: int = 5
    latency_us: float = 30.0
    gigabytes_per_s: float = 150.0
    most_tokens: int = 1 << 20  # of all ranks together: they share one GPU's memory
    out: str = "docs/results/scaling-predicted"


def rank_times(group: VirtualGroup, inputs: list[Tensor], do: Tensor, repeats: int) -> list[float]:
    """Milliseconds of each repeat, this rank's own work; every rank computes on the same inputs."""
    T = inputs[0].shape[1]
    context = build_cp_context(group, seq_len=T * group.size, exchange="all_to_all")
    both = passes(ours(context), inputs, do)[1]
    times = []
    for _ in range(repeats + 1):
        group.share(None, "start")
        group.take_milliseconds()
        both()
        times.append(group.take_milliseconds())
    return times[1:]


def measure(options: Options, T: int, heads: list[int], gates: str) -> list[dict[str, Any]]:
    inputs = list(draw(T, *heads, gates, 0))
    do = torch.randn_like(inputs[2])
    rows: list[dict[str, Any]] = []
    for P in options.ranks:
        if options.most_tokens < P * T:
            continue
        each = run_virtual_ranks(P, rank_times, inputs, do, options.repeats, device="cuda")
        medians = [statistics.median(times) for times in each]
        state = heads[1] * 128 * 128 * 4
        link = 0.0
        if P > 1:  # forward: S and M out, S_in back; backward: dS out, dS_in back
            sent = (P - 1) / P * state * (3 + 2)
            link = 4 * options.latency_us / 1e3 + sent / options.gigabytes_per_s / 1e6
        row = {
            "tokens_a_rank": T, "Hk": heads[0], "Hv": heads[1], "gates": gates, "ranks": P,
            "rank_ms": medians, "slowest_rank_ms": max(medians), "link_ms": link,
            "predicted_ms": max(medians) + link, "kind": "prediction from virtual ranks",
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
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    work = [(T, h, g) for T in options.tokens for h in options.heads for g in options.gates]
    for T, heads, gates in tqdm(work, unit="series"):
        for row in measure(options, T, heads, gates):
            rows.append(row)
            tqdm.write(
                f"{T // 1024}k a rank {heads[0]}/{heads[1]} {gates} P={row['ranks']}: slowest rank "
                f"{row['slowest_rank_ms']:.3f} ms, predicted {row['predicted_ms']:.3f}, "
                f"efficiency {row['efficiency_against_1']:.2f}"
            )
        write(path, options, rows)
    plot(rows, path.with_suffix(".png"))
