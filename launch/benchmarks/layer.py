"""Time what lies around the delta rule: ``python launch/bench.py op=layer``

Convolution, gates and gated norm by themselves, each as eager PyTorch, as torch.compile makes it
and as the kernels of the layer; then the whole layer, its surroundings eager and on the kernels (the
rule on tilelang in both, projections under bf16 autocast). Times are medians of CUDA-graph replays,
ms; every operand is several times the L2 cache. Writes docs/results/layer-h200.json. Needs one
Hopper GPU. Arguments, all optional:

    tokens=32768 key_heads=16 value_heads=32 hidden=2048 replays=20 out=docs/results/layer-h200
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from cp_gdn import CPGatedDeltaNet, build_cp_context
from cp_gdn.ops import causal_conv1d, gated_rms_norm, gates

from .timing import need_gpu, parse, peak, results_path, write

EPS = 1e-6


@dataclass
class Options:
    op: str = "layer"
    tokens: int = 32768
    key_heads: int = 16
    value_heads: int = 32
    hidden: int = 2048
    replays: int = 20
    out: str = "docs/results/layer-h200"


Function = Callable[..., Sequence[Tensor]]


def time_graph(call: Callable[[], Any], replays: int) -> float:
    """Median ms of a replay. The current stream must not be the default one: it captures."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(replays)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def compiled_conv(split: Sequence[int]) -> Function:
    def run(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        padded = F.pad(x, (0, 0, 3, 0))
        taps = [padded[:, s : s + x.shape[1]].float() * weight[:, s] for s in range(4)]
        y = F.silu(taps[0] + taps[1] + taps[2] + taps[3]).to(x.dtype)
        return [part.contiguous() for part in y.split(list(split), -1)]

    return torch.compile(run, fullgraph=True)


@torch.compile(fullgraph=True)
def compiled_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> Sequence[Tensor]:
    return -A_log.exp() * F.softplus(a.float() + dt_bias), b.float().sigmoid()


@torch.compile(fullgraph=True)
def compiled_norm(x: Tensor, z: Tensor, weight: Tensor) -> Sequence[Tensor]:
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * weight
    return ((y * F.silu(z.float())).to(x.dtype),)


def parts(options: Options) -> Iterator[tuple[str, dict[str, Function], list[Tensor], int, int]]:
    """Name, implementations, inputs, and the least bytes that forward and backward move."""
    T, Hv = options.tokens, options.value_heads
    split = (options.key_heads * 128, options.key_heads * 128, Hv * 128)

    def low(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    def conv(engine: str) -> Function:
        return lambda x, w: causal_conv1d.causal_conv1d(x, w, split=split, engine=engine)

    def eager_conv(x: Tensor, w: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in conv("torch")(x, w)]

    x = [low(1, T, sum(split)), wide(sum(split), 4) / 2]
    runs: dict[str, Function] = {"eager": eager_conv, "torch_compile": compiled_conv(split)}
    yield "conv", {**runs, "cp_gdn": conv("tilelang")}, x, 2 * x[0].nbytes, 3 * x[0].nbytes

    def gate(engine: str) -> Function:
        return lambda *inputs: gates.decay_and_strength(*inputs, engine=engine)

    x = [low(1, T, Hv), low(1, T, Hv), wide(Hv), wide(Hv)]
    runs = {"eager": gate("torch"), "torch_compile": compiled_gates, "cp_gdn": gate("tilelang")}
    yield "gates", runs, x, 6 * x[0].nbytes, 8 * x[0].nbytes

    def norm(engine: str) -> Function:
        return lambda x, z, w: (gated_rms_norm.gated_rms_norm(x, z, w, EPS, engine=engine),)

    x = [low(1, T, Hv, 128), low(1, T, Hv, 128), wide(128)]
    runs = {"eager": norm("torch"), "torch_compile": compiled_norm, "cp_gdn": norm("tilelang")}
    yield "norm", runs, x, 3 * x[0].nbytes, 5 * x[0].nbytes


def measure_part(
    name: str, runs: dict[str, Function], inputs: list[Tensor], reads: int, more: int, replays: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"part": name, "forward_bytes": reads, "backward_bytes": more}
    leaves = [x.requires_grad_() for x in inputs]
    results: dict[str, list[Tensor]] = {}
    for kind, run in runs.items():
        with torch.no_grad():
            shapes = [torch.randn_like(y) for y in runs["cp_gdn"](*inputs)]

        def step(run: Function = run, given: list[Tensor] = shapes) -> list[Tensor]:
            outputs = run(*leaves)
            return [*outputs, *torch.autograd.grad(outputs, leaves, given)]

        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        row[f"{kind}_first_call_s"] = time.perf_counter() - started
        torch.manual_seed(0)
        given = [torch.randn_like(y) for y in shapes]
        once, twice = (step(run, given) for _ in range(2))
        row[f"{kind}_same_bits"] = all(map(torch.equal, once, twice))
        results[kind] = [x.detach() for x in once]
        del once, twice
        row[f"{kind}_forward_ms"] = time_graph(partial(run, *leaves), replays)
        row[f"{kind}_step_ms"] = time_graph(step, replays)
    row["differences_from_eager"] = [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(results["cp_gdn"], results["eager"], strict=True)
    ]
    forward, step_ms = row["cp_gdn_forward_ms"], row["cp_gdn_step_ms"]
    row["forward_terabytes_s"] = reads / forward / 1e9
    row["backward_terabytes_s"] = more / (step_ms - forward) / 1e9
    return row


@contextlib.contextmanager
def eager_surroundings() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (causal_conv1d, gates, gated_rms_norm):
            stack.enter_context(patch.object(module, "obstacle", lambda x: "eager is measured"))
        yield


def measure_layer(options: Options) -> dict[str, Any]:
    layer = CPGatedDeltaNet(
        options.hidden, options.key_heads, options.value_heads, engine="tilelang"
    ).cuda()
    context = build_cp_context(seq_len=options.tokens, device="cuda")
    x = torch.randn(1, options.tokens, options.hidden, device="cuda", requires_grad=True)
    dy = torch.randn_like(x).bfloat16()

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return layer(x, cp_context=context)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), [x, *layer.parameters()], dy)

    row: dict[str, Any] = {"part": "layer"}
    for kind in ("eager", "cp_gdn"):
        with eager_surroundings() if kind == "eager" else contextlib.nullcontext():
            row[f"{kind}_forward_ms"] = time_graph(forward, options.replays)
            row[f"{kind}_step_ms"] = time_graph(step, options.replays)
            row[f"{kind}_peak_gib"] = peak(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    row["kernels_ms"] = [
        (e.key[:80], e.count, e.device_time_total / 1e3) for e in events if e.device_time_total > 0
    ]
    return row


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    need_gpu()
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        write(path, options, rows)
        times = (f"{k[:-3]} {v:.3f}" for k, v in row.items() if k.endswith("_ms") and k[0] != "k")
        print(f"{row['part']:8s} ms: {', '.join(times)}", flush=True)

    torch.manual_seed(0)
    with torch.cuda.stream(torch.cuda.Stream()):
        report(measure_layer(options))
        torch.cuda.empty_cache()
        for name, runs, inputs, reads, more in parts(options):
            report(measure_part(name, runs, inputs, reads, more, options.replays))
            torch.cuda.empty_cache()
