"""A picture of one forward + backward of the operator over the ranks: what runs when, on which stream.

    torchrun --nproc-per-node 2 launch/bench.py op=timeline shape=[65536,16,32] gates=qwen

Takes a profiler trace of every rank, names the kernels by the step of the operator that launched them, and draws
docs/results/cp-timeline.png; the numbers, how much of the exchange other kernels cover, go into the .json beside it.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from cp_gdn import boundary, build_cp_context
from cp_gdn.ops.hopper import HopperRun

from .cp import joined, ours, passes
from .inputs import draw
from .timing import parse, pyplot, results_path

STEPS = ("open", "leaving", "close", "open_backward", "entering", "replay", "close_backward")
COLOURS = {
    "open": "#4878a8", "leaving": "#86b0d8", "close": "#1f4e79", "open_backward": "#c8763c",
    "entering": "#e8b48c", "replay": "#6a9c58", "close_backward": "#8c4a1c", "exchange": "#b02020",
}  # fmt: skip


@dataclass
class Options:
    op: str = "timeline"
    shape: list[int] = field(default_factory=lambda: [65536, 16, 32])
    gates: str = "qwen"
    exchange: str = "ring"
    out: str = "docs/results/cp-timeline"


def annotate(note: Callable[[str], AbstractContextManager[Any]] = record_function) -> None:
    """Let the trace, or whoever keeps the notes, know which step of the operator launches what."""

    def labelled(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with note(name):
                return function(*args, **kwargs)

        return call

    for step in STEPS:
        setattr(HopperRun, step, labelled(step, getattr(HopperRun, step)))
    for name in ("exchange_states", "exchange_gradients"):
        setattr(boundary, name, labelled("exchange", getattr(boundary, name)))


def read_trace(profiler: profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def spans(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Kernels and copies of a Chrome trace with the step whose annotation encloses their launch; microseconds."""
    events = trace["traceEvents"]
    notes = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in COLOURS]
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    found = []
    for e in events:
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(e["args"].get("correlation"), e)
        inside = [
            n["name"]
            for n in notes
            if n["tid"] == launch["tid"] and n["ts"] <= launch["ts"] <= n["ts"] + n["dur"]
        ]
        step = "exchange" if "nccl" in e["name"].lower() else (inside or ["other"])[-1]
        stream = e["args"]["stream"]
        copy = e["cat"] == "gpu_memcpy"
        found.append(
            {"step": step, "start": e["ts"], "us": e["dur"], "stream": stream, "copy": copy,
             "launched": launch["ts"]}
        )  # fmt: skip
    return found


def covered(rank: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of NCCL kernels on a rank, and how many of them another kernel ran beside."""
    others = sorted((s["start"], s["start"] + s["us"]) for s in rank if s["step"] != "exchange")
    total = hidden = 0.0
    for s in rank:
        if s["step"] != "exchange":
            continue
        low, high = s["start"], s["start"] + s["us"]
        total += high - low
        for a, b in others:
            hidden += max(0.0, min(b, high) - max(a, low))
    return {"exchange_us": total, "covered_us": hidden}


def draw_picture(ranks: list[list[dict[str, Any]]], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(12, 1.2 + 0.8 * len(ranks) * 2), layout="constrained")
    labels, used = [], set()
    for number, rank in enumerate(ranks):
        begin = min(s["start"] for s in rank)
        for lane, kind in enumerate(("compute", "exchange")):
            y = number * 2.4 + lane
            labels.append((y, f"GPU {number}, {kind}"))
            for s in rank:
                if (s["step"] == "exchange") == (kind == "exchange"):
                    colour = COLOURS.get(s["step"], "#bbbbbb")
                    axes.broken_barh(
                        [(s["start"] - begin, s["us"])], (y - 0.4, 0.8), color=colour, linewidth=0
                    )
                    used.add(s["step"])
    axes.set_yticks([y for y, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds since the rank's first kernel")
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=COLOURS.get(name, "#bbbbbb")) for name in sorted(used)
    ]
    axes.legend(
        handles, sorted(used), ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25)
    )
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    with joined() as (rank, group):
        T, key_heads, value_heads = options.shape
        context = build_cp_context(group, seq_len=T, exchange=options.exchange)
        inputs = [
            context.shard(x).contiguous() for x in draw(T, key_heads, value_heads, options.gates, 0)
        ]
        annotate()
        both = passes(ours(context), inputs, torch.randn_like(inputs[2]))[1]
        for _ in range(3):
            both()
        torch.cuda.synchronize()
        dist.barrier(group)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                both()
            torch.cuda.synchronize()
        found = sorted(spans(read_trace(profiler)), key=lambda s: s["start"])
        third = [s for s in found if s["start"] >= found[0]["start"]][-(len(found) // 3) :]
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, third, group=group)
        if rank == 0:
            path = results_path(options.out)
            draw_picture(every, path.with_suffix(".png"))
            numbers = [covered(spans_of_rank) for spans_of_rank in every]
            path.with_suffix(".json").write_text(
                json.dumps(
                    {
                        "shape": options.shape,
                        "gates": options.gates,
                        "ranks": numbers,
                        "spans": every,
                    }
                )
                + "\n"
            )
            print(numbers, flush=True)
