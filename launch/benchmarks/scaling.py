"""How the operator scales, measured on the GPUs that there are and predicted for more: ``launch/bench.py op=scaling``

Forward + backward. Weak scaling: every rank holds T tokens of one document. Strong: the ranks share T tokens.

    torchrun --nproc-per-node P launch/bench.py op=scaling     measured, into docs/results/scaling-<P>xh200.json
    python launch/bench.py op=scaling                          predicted, docs/results/scaling-predicted.json

A prediction takes virtual ranks (cp_gdn.virtual), which take turns on one GPU; a profiler says how long the device is
busy in a rank's turns, copies between ranks left out. What the link takes instead is added, as if nothing ran beside
it, for the owners' all-to-all of the states:

    predicted ms = slowest rank's ms + 2 passes * 2 messages * latency + bytes / bandwidth

Every row says which it is, and so does the plot of all these files, scaling.png. Arguments:

    weak=[32768,131072] strong=[262144] heads=[[16,32],[16,64]] gates=[qwen,slow] repeats=3
    ranks=[1,2,4,8,16]                    of predictions
    latency_us=30 gigabytes_per_s=150     of the link; defaults: measured between two H200s through NCCL
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from cp_gdn import build_cp_context
from cp_gdn.virtual import VirtualGroup, run_virtual_ranks

from .cp import graph_of, joined, ours, passes
from .cp_timeline import annotate, read_trace, spans
from .cp_timing import time_calls
from .inputs import draw
from .timing import need_gpu, parse, pyplot, results_path, write

EFFICIENCY = "efficiency_against_"
PREDICTED, MEASURED = "predicted from virtual ranks", "measured on as many GPUs"


@dataclass
class Options:
    op: str = "scaling"
    weak: list[int] = field(default_factory=lambda: [32768, 131072])
    strong: list[int] = field(default_factory=lambda: [262144])
    heads: list[list[int]] = field(default_factory=lambda: [[16, 32], [16, 64]])
    gates: list[str] = field(default_factory=lambda: ["qwen", "slow"])
    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    repeats: int = 3
    latency_us: float = 30.0
    gigabytes_per_s: float = 150.0
    most_tokens: int = 1 << 20  # of all virtual ranks together: they share one GPU's memory
    out: str = "docs/results/scaling"


@dataclass
class Series:
    """One line of the plot: T tokens a rank (weak) or of all ranks (strong)."""

    scaling: str
    tokens: int
    heads: list[int]
    gates: str

    def a_rank(self, P: int) -> int:
        return self.tokens if self.scaling == "weak" else self.tokens // P

    def row(self, P: int, kind: str) -> dict[str, Any]:
        return {
            "scaling": self.scaling, "tokens": self.tokens, "tokens_a_rank": self.a_rank(P),
            "Hk": self.heads[0], "Hv": self.heads[1], "gates": self.gates, "ranks": P, "kind": kind,
        }  # fmt: skip

    def efficiency(self, one_ms: float, ms: float, times: int) -> float:
        """Of ``times`` as many ranks as took ``one_ms``."""
        return one_ms / ms / (1 if self.scaling == "weak" else times)

    def __str__(self) -> str:
        share = "a rank" if self.scaling == "weak" else "in all"
        return f"{self.tokens // 1024}k {share}, {self.heads[0]}/{self.heads[1]}, {self.gates}"


# ---- predicted -----------------------------------------------------------------------------------------------------

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


Notes = list[tuple[str, int, int]]  # which step of the operator ran when, in ns as turns


def busy(
    kernels: list[dict[str, Any]], base: int, turns: Turns, notes: Notes
) -> tuple[float, dict[str, float]]:
    """Milliseconds in which a kernel ran during the turns, and those of the kernels that each step launched, which
    may overlap."""
    total, steps, end = 0.0, dict[str, float](), float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["start"]):
        start, stop = kernel["start"], kernel["start"] + kernel["us"]
        middle = base + (start + stop) / 2 * 1e3
        if kernel["copy"] or not any(first <= middle <= last for first, last in turns):
            continue
        launched = base + kernel["launched"] * 1e3
        inside = [(begun, step) for step, begun, over in notes if begun <= launched <= over]
        step = max(inside)[1] if inside else "other"
        steps[step] = steps.get(step, 0.0) + kernel["us"] / 1e3
        total += max(0.0, stop - max(start, end)) / 1e3
        end = max(end, stop)
    return total, steps


def rank_times(
    P: int, inputs: list[Tensor], do: Tensor, repeats: int, notes: Notes
) -> list[tuple[float, dict[str, float]]]:
    """:func:`busy` of every rank: the median repeat's."""
    run_virtual_ranks(P, rank_turns, inputs, do, 1, device="cuda")
    notes.clear()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        turns = run_virtual_ranks(P, rank_turns, inputs, do, repeats, device="cuda")
    trace = read_trace(profiler)
    kernels, base = spans(trace), trace["baseTimeNanoseconds"]
    found = []
    for rank in turns:
        times = sorted(
            (busy(kernels, base, each, notes) for each in rank), key=lambda times: times[0]
        )
        found.append(times[len(times) // 2])
    return found


def keep_notes() -> Notes:
    """Notes of what runs from now on: a profiler's own annotations miss threads that begin later."""
    notes: Notes = []

    @contextmanager
    def note(step: str) -> Iterator[None]:
        begun = time.time_ns()
        yield
        notes.append((step, begun, time.time_ns()))

    annotate(note)
    return notes


def predict(options: Options, series: Series, notes: Notes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for P in options.ranks:
        if options.most_tokens < P * series.a_rank(P):
            continue
        inputs = list(draw(series.a_rank(P), *series.heads, series.gates, 0))
        ranks = rank_times(P, inputs, torch.randn_like(inputs[2]), options.repeats, notes)
        slowest, steps = max(ranks, key=lambda times: times[0])
        state = series.heads[1] * 128 * 128 * 4
        link = 0.0
        if P > 1:  # forward: S and M out, S_in back; backward: dS out, dS_in back
            sent = (P - 1) / P * state * (3 + 2)
            link = 4 * options.latency_us / 1e3 + sent / options.gigabytes_per_s / 1e6
        row = series.row(P, PREDICTED) | {
            "rank_ms": [total for total, _ in ranks], "slowest_rank_ms": slowest,
            "slowest_rank_steps_ms": steps, "link_ms": link, "ms": slowest + link,
        }  # fmt: skip
        rows.append(row)
        for reference in (r for r in rows if r["ranks"] in (1, 2)):
            row[f"{EFFICIENCY}{reference['ranks']}"] = series.efficiency(
                reference["ms"], row["ms"], P // reference["ranks"]
            )
        torch.cuda.empty_cache()
    return rows


# ---- measured ------------------------------------------------------------------------------------------------------


def measure(options: Options, series: Series, group: dist.ProcessGroup) -> dict[str, Any]:
    """All GPUs, and each of them alone with a rank's tokens (weak) or all tokens (strong): ms of the slowest rank, of
    replayed graphs and of calls launched one by one."""
    P = dist.get_world_size(group)
    row = series.row(P, MEASURED)
    repeats = 4 * options.repeats

    def times(name: str, tokens: int, context: Any) -> None:
        inputs = list(draw(tokens, *series.heads, series.gates, 0))
        both = passes(ours(context), inputs, torch.randn_like(inputs[2]))[1]
        eager = time_calls([both], repeats, group)
        graph = time_calls([graph_of(both)], repeats, group)
        row[f"{name}ms"], row[f"{name}spread_ms"] = graph["ms"], graph["spread"]
        row[f"{name}launched_ms"] = eager["ms"]
        torch.cuda.empty_cache()

    times("one_gpu_", series.tokens, None)
    context = build_cp_context(group, seq_len=P * series.a_rank(P))
    times("", series.a_rank(P), context)
    row[f"{EFFICIENCY}1"] = series.efficiency(row["one_gpu_ms"], row["ms"], P)
    return row


# ---- plot ----------------------------------------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    panels = [("weak", "qwen", "weak, initial gates"), ("weak", "slow", "weak, all heads slow")]
    panels += [("strong", "qwen", "strong, initial gates"), ("strong", "slow", "strong, all slow")]
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axis, (scaling, gates, title) in zip(axes.flat, panels, strict=True):
        own = [r for r in rows if (r["scaling"], r["gates"]) == (scaling, gates)]
        names = sorted({(r["tokens"], r["Hk"], r["Hv"]) for r in own})
        for number, name in enumerate(names):
            text = f"{name[0] // 1024}k {'a GPU' if scaling == 'weak' else 'tokens'}, {name[1]}/{name[2]}"
            for kind, style in ((PREDICTED, {"linestyle": "--", "markerfacecolor": "none"}),
                                (MEASURED, {"linestyle": "", "marker": "s", "markersize": 9})):  # fmt: skip
                points = sorted(
                    (r["ranks"], 100 * r[f"{EFFICIENCY}1"])
                    for r in own
                    if (r["tokens"], r["Hk"], r["Hv"], r["kind"]) == (*name, kind)
                    and f"{EFFICIENCY}1" in r
                )
                if points:
                    style = {"marker": "o", "color": f"C{number}", **style}
                    axis.plot(
                        *zip(*points, strict=True), label=f"{text}: {kind.split()[0]}", **style
                    )
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log", base=2)
        ticks = sorted({r["ranks"] for r in own}) or [1]
        axis.set_xticks(ticks, ticks)
        axis.set_ylim(0, 110)
        axis.set_xlabel("GPUs")
        axis.set_ylabel("efficiency against one GPU, %")
        axis.grid(alpha=0.3)
        if own:
            axis.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    need_gpu()
    path = results_path(options.out)
    series = [
        Series(scaling, T, heads, gates)
        for scaling in ("weak", "strong")
        for T in getattr(options, scaling)
        for heads in options.heads
        for gates in options.gates
    ]
    rows: list[dict[str, Any]] = []
    if "RANK" in os.environ:
        with joined(few_channels=True) as (rank, group):
            P = dist.get_world_size(group)
            for each in series:
                rows.append(measure(options, each, group))
                if rank == 0:
                    print(f"{each}: {rows[-1]}", flush=True)
                    write(path.with_name(f"{path.name}-{P}xh200"), options, rows, gpus=P)
    else:
        rank = 0
        notes = keep_notes()
        for each in tqdm(series, unit="series"):
            new = predict(options, each, notes)
            rows += new
            write(path.with_name(f"{path.name}-predicted"), options, rows)
            for row in new:
                steps = ", ".join(f"{k} {v:.3f}" for k, v in row["slowest_rank_steps_ms"].items())
                against = ", ".join(
                    f"{row[key]:.2f} of {key[len(EFFICIENCY) :]}'s"
                    for key in row
                    if key.startswith(EFFICIENCY)
                )
                tqdm.write(
                    f"{each}, P={row['ranks']}: {row['ms']:.3f} ms predicted, efficiency {against}; "
                    f"slowest rank: {steps}"
                )
    if rank == 0:
        found = sorted(path.parent.glob(f"{path.name}-*.json"))
        plot(
            [r for file in found for r in json.loads(file.read_text())["rows"]],
            path.with_suffix(".png"),
        )
