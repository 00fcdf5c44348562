"""A picture of one forward + backward of the operator over the ranks: what runs when, on which stream.

    torchrun --nproc-per-node 2 launch/bench.py op=timeline shape=[65536,16,32] gates=qwen

Takes a profiler trace of every rank, names the kernels by the step of the operator that launched them, and draws
docs/results/cp-timeline.png; the numbers, how much of the exchange other kernels cover, go into the .json beside it.

An exchange lasts, on a rank, from the moment when its stream for messages may begin, which is when what the rank sends
was made, until that stream has what the rank receives: the wait for the other rank is part of it. A message by boxes
leaves only copies in a trace, and not who issued them, so a copy of one number on that stream tells either end.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterable
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

STEPS = (
    "open", "leaving", "meanwhile", "close", "open_backward", "entering", "replay", "close_backward"
)  # fmt: skip
COLOURS = {
    "open": "#4878a8", "leaving": "#86b0d8", "meanwhile": "#b0c8a0", "close": "#1f4e79",
    "open_backward": "#c8763c", "entering": "#e8b48c", "replay": "#6a9c58",
    "close_backward": "#8c4a1c", "exchange": "#b02020",
}  # fmt: skip


@dataclass
class Options:
    op: str = "timeline"
    shape: list[int] = field(default_factory=lambda: [65536, 16, 32])
    gates: str = "qwen"
    exchange: str = "ring"
    out: str = "docs/results/cp-timeline"


def annotate(
    note: Callable[[str], AbstractContextManager[Any]] = record_function,
    tell: Callable[[], Any] = lambda: None,
) -> None:
    """Let the trace, or whoever keeps the notes, know which step of the operator launches what; ``tell`` is called at
    either end of an exchange, on its stream."""

    def labelled(name: str, function: Any, tell: Callable[[], Any] = lambda: None) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with note(name):
                tell()
                result = function(*args, **kwargs)
                tell()
                return result

        return call

    for step in STEPS:
        setattr(HopperRun, step, labelled(step, getattr(HopperRun, step)))
    for name in ("exchange_states", "exchange_gradients"):
        setattr(boundary, name, labelled("exchange", getattr(boundary, name), tell))


def read_trace(profiler: profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def spans(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Kernels and copies of a Chrome trace with the step whose annotation encloses their launch; microseconds.

    What an exchange launched is one span, from its first event to its last; copies on its stream between them are it.
    """
    events = trace["traceEvents"]
    notes = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in COLOURS]
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    found: list[dict[str, Any]] = []
    exchanges: dict[float, dict[str, Any]] = {}
    for e in events:
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(e["args"].get("correlation"), e)
        inside = [
            n
            for n in notes
            if n["tid"] == launch["tid"] and n["ts"] <= launch["ts"] <= n["ts"] + n["dur"]
        ]
        step = inside[-1]["name"] if inside else "other"
        span = {
            "step": "exchange" if "nccl" in e["name"].lower() else step,
            "start": e["ts"],
            "us": e["dur"],
            "stream": e["args"]["stream"],
            "copy": e["cat"] == "gpu_memcpy",
            "launched": launch["ts"],
        }
        if step == "exchange":
            first = exchanges.setdefault(inside[-1]["ts"], span)
            begin = min(first["start"], e["ts"])
            end = max(first["start"] + first["us"], e["ts"] + e["dur"])
            first |= {"start": begin, "us": end - begin, "copy": True}
        else:
            found.append(span)
    return [s for s in found if not (s["copy"] and _within(s, exchanges.values()))] + [
        *exchanges.values()
    ]


def _within(copy: dict[str, Any], exchanges: Iterable[dict[str, Any]]) -> bool:
    return any(
        copy["stream"] == x["stream"] and x["start"] <= copy["start"] <= x["start"] + x["us"]
        for x in exchanges
    )


def covered(rank: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of exchanges on a rank, and how many of them a kernel of another step ran beside."""
    kernels = sorted(
        (s["start"], s["start"] + s["us"])
        for s in rank
        if s["step"] != "exchange" and not s["copy"]
    )
    total = hidden = 0.0
    for s in rank:
        if s["step"] != "exchange":
            continue
        at, high = s["start"], s["start"] + s["us"]
        total += high - at
        for a, b in kernels:  # they may run side by side
            hidden += max(0.0, min(b, high) - max(a, at))
            at = max(at, min(b, high))
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
        dot, other = torch.zeros(2, device="cuda")
        annotate(tell=lambda: dot.copy_(other))
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
