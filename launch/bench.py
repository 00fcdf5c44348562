"""Time the kernels beside their peers: ``python launch/bench.py op=forward peers=[flash_qla]``

Needs one Hopper GPU. Prints a table and writes docs/results/forward-h200.json and .png. Times are
medians of CUDA-graph replays; between two replays of one input set another one runs, so that
nothing is found in the L2 cache. Arguments, all optional:

    peers=[flash_qla]     flash_qla (its training and its inference forward; the faster counts), fla
    shapes=[[32768,16,64],...]     T, key heads, value heads; documents=8 packs equal documents
    gates=[qwen,flash_qla,slow]    as Qwen3.5 initialises them, as FlashQLA's benchmark draws them,
                                   all near -1e-4
    sets=2 replays=20 out=docs/results/forward-h200
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from tqdm import tqdm

from cp_gdn.kernels.forward import chunk_gdn_forward

ROOT = Path(__file__).resolve().parent.parent
SCALE = 128**-0.5
TFLOPS, TERABYTES = 790.0, 4.3  # measured ceilings of an H200: bf16 products, copies


@dataclass
class Options:
    op: str = "forward"
    peers: list[str] = field(default_factory=lambda: ["flash_qla"])
    shapes: list[list[int]] = field(
        default_factory=lambda: [
            [32768, 16, 64],
            [32768, 16, 32],
            [32768, 2, 8],
            [8192, 16, 32],
            [131072, 16, 32],
        ]
    )
    packed: list[list[int]] = field(default_factory=lambda: [[32768, 16, 32], [32768, 16, 64]])
    gates: list[str] = field(default_factory=lambda: ["qwen", "flash_qla", "slow"])
    sets: int = 2
    replays: int = 20
    out: str = "docs/results/forward-h200"


def draw_gates(kind: str, tokens: int, heads: int) -> torch.Tensor:
    """Log gates [1, T, Hv] fp32."""
    if kind == "qwen":  # g = -A softplus(a + dt_bias), A uniform to 16, dt log-uniform
        A = torch.empty(heads, device="cuda").uniform_(0, 16)
        dt = torch.empty(heads, device="cuda").uniform_(-6.907755, -2.302585).exp()
        bias = torch.log(torch.expm1(dt))
        return -A * F.softplus(0.5 * torch.randn(1, tokens, heads, device="cuda") + bias)
    if kind == "flash_qla":  # a quarter of the heads do not decay
        g = -F.softplus(torch.randn(1, tokens, heads, device="cuda")) / 16
        g[..., torch.randperm(heads, device="cuda")[: max(1, heads // 4)]] = 0
        return g
    if kind == "slow":
        return -1e-4 * torch.rand(1, tokens, heads, device="cuda")
    raise ValueError(f"gates={kind}; there are qwen, flash_qla and slow")


def draw(tokens: int, key_heads: int, value_heads: int, gates: str, seed: int):
    torch.manual_seed(seed)

    def unit():
        x = torch.randn(1, tokens, key_heads, 128, device="cuda")
        return F.normalize(x, dim=-1).bfloat16()

    q, k = unit(), unit()
    v = torch.randn(1, tokens, value_heads, 128, device="cuda").bfloat16()
    return q, k, v, draw_gates(gates, tokens, value_heads), torch.rand_like(v[..., 0].float())


def lengths(tokens: int, documents: int) -> list[int]:
    """Equal documents, or (negative) as many of skewed random lengths."""
    if documents > 0:
        return [tokens // documents] * documents
    share = torch.rand(-documents, generator=torch.Generator().manual_seed(0)).log().neg() ** 2
    sizes = (share / share.sum() * tokens).long().clamp_min(1).tolist()
    sizes[0] += tokens - sum(sizes)
    return sizes


def time_graphs(calls, replays: int) -> tuple[list[float], float]:
    """Median ms of each call's graph, every replay preceded by another call's; and the widest
    distance between the quartiles of one."""
    graphs = []
    for call in calls:
        call()
    torch.cuda.synchronize()
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    medians, spread = [], 0.0
    for graph in graphs:
        others = [g for g in graphs if g is not graph] or [graph]
        events = []
        for i in range(replays):
            others[i % len(others)].replay()
            start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            stop.record()
            events.append((start, stop))
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in events]
        low, middle, high = statistics.quantiles(times, n=4)
        medians.append(middle)
        spread = max(spread, high - low)
    return medians, spread


def flash_qla(inputs, cu, train: bool):
    from flash_qla import chunk_gated_delta_rule_fwd

    return [
        lambda x=x: chunk_gated_delta_rule_fwd(*x, scale=SCALE, cu_seqlens=cu, is_train=train)
        for x in inputs
    ]


def fla(inputs, cu):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return [
        lambda x=x: chunk_gated_delta_rule(*x, scale=SCALE, cu_seqlens=cu.long()) for x in inputs
    ]


def measure(options: Options, shape: list[int], documents: int, gates: str) -> dict[str, Any]:
    tokens, key_heads, value_heads = shape
    inputs = [draw(tokens, key_heads, value_heads, gates, seed) for seed in range(options.sets)]
    sizes = lengths(tokens, documents)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)
    packed = None if documents == 1 else offsets
    row: dict[str, Any] = {
        "T": tokens, "Hk": key_heads, "Hv": value_heads, "documents": abs(documents),
        "skewed": documents < 0, "gates": gates,
    }  # fmt: skip
    calls = {
        "cp_gdn": [
            lambda x=x: chunk_gdn_forward(*x, cu_seqlens=packed, keys_normalized=True)
            for x in inputs
        ]
    }
    if "flash_qla" in options.peers:
        calls["flash_qla_train"] = flash_qla(inputs, offsets, True)
        calls["flash_qla_inference"] = flash_qla(inputs, offsets, False)
    if "fla" in options.peers:
        calls["fla"] = fla(inputs, offsets)
    for name, each in calls.items():
        try:
            times, row[f"{name}_spread"] = time_graphs(each, options.replays)
        except Exception as problem:  # a peer that fails is a result, not a reason to stop
            row[f"{name}_error"] = repr(problem)[:200]
            continue
        row[f"{name}_ms"] = statistics.mean(times)
        row[f"{name}_sets_ms"] = times
    if "flash_qla" in options.peers:
        from flash_qla import chunk_gated_delta_rule_fwd

        ours = chunk_gdn_forward(*inputs[0], cu_seqlens=packed, keys_normalized=True)[0].float()
        theirs = chunk_gated_delta_rule_fwd(*inputs[0], scale=SCALE, cu_seqlens=offsets)[2].float()
        row["difference_from_flash_qla"] = ((ours - theirs).norm() / theirs.norm()).item()
        peers = [row[f"{name}_ms"] for name in calls if f"{name}_ms" in row and "qla" in name]
        if peers:
            row["ratio_to_flash_qla"] = row["cp_gdn_ms"] / min(peers)
    ratio = value_heads / key_heads
    flops = tokens * value_heads * (8 + 2 / ratio) * 2**20 / 64
    volume = tokens * value_heads * (520 + 512 / ratio)
    row["tensor_share"] = flops / row["cp_gdn_ms"] / 1e9 / TFLOPS
    row["bandwidth_share"] = volume / row["cp_gdn_ms"] / 1e9 / TERABYTES
    row["us_per_chunk"] = row["cp_gdn_ms"] * 1e3 / (tokens / 64)
    return row


def environment() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    git = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "commit": "unknown" if git.returncode else git.stdout.strip(),
        **{name: of(name) for name in ("torch", "tilelang", "flash-qla", "flash-linear-attention")},
    }


def label(row: dict[str, Any]) -> str:
    text = f"{row['T'] // 1024}k {row['Hk']}/{row['Hv']}"
    if row["documents"] > 1:
        text += f", {row['documents']} {'skewed ' if row['skewed'] else ''}docs"
    return f"{text}, {row['gates']}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [k[:-3] for k in rows[0] if k.endswith("_ms") and not k.endswith("sets_ms")]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [y + i * height for y in range(len(rows))]
        axes.barh(places, [row.get(f"{name}_ms", 0) for row in rows], height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [label(r) for r in rows])
    axes.set_xlabel("forward, ms (median of graph replays, mean over input sets)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(arguments))
    options = OmegaConf.to_object(merged)
    assert isinstance(options, Options)
    if options.op != "forward":
        raise ValueError(f"op={options.op}; there is forward")
    if not torch.cuda.is_available():
        raise ValueError("no GPU here; the benchmark needs a Hopper GPU")
    work = [(shape, 1, gates) for shape in options.shapes for gates in options.gates]
    work += [(shape, n, options.gates[0]) for shape in options.packed for n in (8, -32)]
    rows = []
    path = ROOT / options.out
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape, documents, gates in tqdm(work, unit="shape"):
        rows.append(measure(options, shape, documents, gates))
        torch.cuda.empty_cache()
        result = {"environment": environment(), "options": asdict(options), "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        row = rows[-1]
        peer = " ".join(
            f"{k[:-3]} {row[k]:.3f}" for k in row if k.endswith("_ms") and "sets" not in k
        )
        tqdm.write(f"{label(row):32s} {peer} ratio {row.get('ratio_to_flash_qla', 0):.2f}")
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as problem:
        print(f"ValueError: {problem}", file=sys.stderr)
        raise SystemExit(2) from problem
