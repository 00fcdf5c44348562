"""Timing on one GPU, and what the benchmarks of single calls share: options, rows, tables, plots."""

import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from .inputs import draw, lengths

ROOT = Path(__file__).resolve().parent.parent.parent
SCALE = 128**-0.5
Parsed = TypeVar("Parsed")
TFLOPS, TERABYTES = 790.0, 4.3  # measured ceilings of an H200: bf16 products, copies


@dataclass
class Options:
    op: str = ""
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
    documents: list[int] = field(default_factory=lambda: [8, -32])  # of packed; skewed if negative
    gates: list[str] = field(default_factory=lambda: ["qwen", "flash_qla", "slow"])
    sets: int = 2
    replays: int = 20
    out: str = ""


@dataclass
class Case:
    """One row: [T, key heads, value heads]; documents (1; n equal ones; -n skewed ones); gates."""

    shape: list[int]
    documents: int
    gates: str
    options: Options

    @property
    def tokens(self) -> int:
        return self.shape[0]

    @property
    def ratio(self) -> float:
        """Value heads of a key head."""
        return self.shape[2] / self.shape[1]

    def draw(self, seed: int):
        return draw(*self.shape, self.gates, seed)

    @property
    def offsets(self) -> torch.Tensor:
        sizes = lengths(self.tokens, self.documents)
        return torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(lengths(self.tokens, self.documents))

    @property
    def packing(self) -> dict[str, Any]:
        """Arguments of our forward: offsets on the device, and what the operator finds in those on the host."""
        if self.documents == 1:
            return {}
        sizes = torch.tensor(lengths(self.tokens, self.documents))
        order = sizes.argsort(descending=True, stable=True).to("cuda", torch.int32)
        return {"cu_seqlens": self.offsets, "max_seqlen": self.longest, "order": order}

    def row(self) -> dict[str, Any]:
        return {
            "T": self.shape[0], "Hk": self.shape[1], "Hv": self.shape[2],
            "documents": abs(self.documents), "skewed": self.documents < 0, "gates": self.gates,
        }  # fmt: skip


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


def time_peers(row: dict[str, Any], calls: dict[str, list], replays: int) -> None:
    """<name>_ms, mean over input sets, and its parts into the row; a peer that fails is a result, not
    a reason to stop."""
    for name, each in calls.items():
        try:
            times, row[f"{name}_spread"] = time_graphs(each, replays)
        except Exception as problem:
            row[f"{name}_error"] = repr(problem)[:200]
            continue
        row[f"{name}_ms"] = statistics.mean(times)
        row[f"{name}_sets_ms"] = times


def peak(call: Callable[[], Any]) -> float:
    """GiB that a call holds at most beyond what is there before it, results included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def environment() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "absent"

    packages = ("torch", "tilelang", "flash-qla", "flashinfer-python", "flash-linear-attention")
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
        **{name: of(name) for name in packages},
    }


def label(row: dict[str, Any]) -> str:
    text = f"{row['T'] // 1024}k {row['Hk']}/{row['Hv']}"
    if row["documents"] > 1:
        text += f", {row['documents']} {'skewed ' if row['skewed'] else ''}docs"
    return f"{text}, {row['gates']}"


def timed(row: dict[str, Any]) -> list[str]:
    return [k[:-3] for k in row if k.endswith("_ms") and not k.endswith("sets_ms")]


def pyplot() -> Any:
    """matplotlib.pyplot that draws into files, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot(rows: list[dict[str, Any]], path: Path, what: str) -> None:
    names = timed(rows[0])
    figure, axes = pyplot().subplots(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [y + i * height for y in range(len(rows))]
        axes.barh(places, [row.get(f"{name}_ms", 0) for row in rows], height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(rows))], [label(r) for r in rows])
    axes.set_xlabel(f"{what}, ms (median of graph replays, mean over input sets)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(defaults: Parsed, arguments: list[str]) -> Parsed:
    """The dataclass with ``name=value`` arguments put in; an unknown name is an error."""
    merged = OmegaConf.merge(OmegaConf.structured(defaults), OmegaConf.from_dotlist(arguments))
    return cast(Parsed, OmegaConf.to_object(merged))


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError("no GPU here; the benchmark needs a Hopper GPU")


def results_path(out: str) -> Path:
    """Where results go, without the suffix; its folder is made."""
    path = ROOT / out
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, options: Any, rows: list[dict[str, Any]], **about: Any) -> None:
    """<path>.json: where and with what it was measured, and the rows so far."""
    result = {"environment": {**environment(), **about}, "options": asdict(options), "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


def run(arguments: list[str], defaults: Options, measure: Callable[[Case], dict[str, Any]]) -> None:
    """Measure every row of the options, print a table, write the .json and the plot."""
    options = parse(defaults, arguments)
    need_gpu()
    work = [Case(shape, 1, gates, options) for shape in options.shapes for gates in options.gates]
    work += [
        Case(shape, n, options.gates[0], options)
        for shape in options.packed
        for n in options.documents
    ]
    rows: list[dict[str, Any]] = []
    path = results_path(options.out)
    for case in tqdm(work, unit="shape"):
        row = measure(case)
        rows.append(row)
        torch.cuda.empty_cache()
        write(path, options, rows)
        times = " ".join(f"{name} {row[f'{name}_ms']:.3f}" for name in timed(row))
        ratio = next((row[name] for name in row if name.startswith("ratio_to_")), 0)
        tqdm.write(f"{label(row):32s} {times} ratio {ratio:.2f}")
    plot(rows, path.with_suffix(".png"), options.op)
