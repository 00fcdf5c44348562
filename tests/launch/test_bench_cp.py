"""The host side of the benchmarks of context parallelism: what they refuse, and how traces become pictures."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def benchmarks(monkeypatch):
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    monkeypatch.syspath_prepend(str(LAUNCH))
    from benchmarks import cp, cp_timeline, scaling, timing

    return {"cp": cp, "timeline": cp_timeline, "scaling": scaling, "timing": timing}


def test_a_process_a_gpu_is_asked_for():
    command = [sys.executable, str(LAUNCH / "bench.py"), "op=cp"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "torchrun --nproc-per-node 2" in run.stderr


def test_an_exchange_by_boxes_lasts_from_its_first_copy_to_its_last(benchmarks, tmp_path):
    """65 us: a dot when the state was there, the state's copy that nobody is seen to issue, a dot when it has
    arrived; 40 of them beside the replay and a kernel that runs beside the replay."""
    events = [
        _event("user_annotation", "entering", 0, 5),
        _event("user_annotation", "exchange", 20, 10),
        _event("user_annotation", "replay", 40, 10),
        _event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        _event("cuda_runtime", "cudaMemcpyAsync", 21, 1, correlation=2),
        _event("cuda_runtime", "cudaMemcpyAsync", 29, 1, correlation=4),
        _event("cuda_runtime", "cudaLaunchKernel", 41, 1, correlation=5),
        _event("cuda_runtime", "cudaLaunchKernel", 42, 1, correlation=6),
        _event("kernel", "main_kernel", 50, 50, correlation=1, stream=7),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 105, 1, correlation=2, stream=18),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 160, 5, correlation=3, stream=18),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 169, 1, correlation=4, stream=18),
        _event("kernel", "main_kernel", 100, 35, correlation=5, stream=7),
        _event("kernel", "main_kernel", 120, 25, correlation=6, stream=17),
    ]
    found = benchmarks["timeline"].spans({"traceEvents": events})
    assert [(s["step"], s["start"], s["us"], s["copy"]) for s in found] == [
        ("entering", 50, 50, False),
        ("replay", 100, 35, False),
        ("replay", 120, 25, False),
        ("exchange", 105, 65, True),
    ]
    assert benchmarks["timeline"].covered(found) == {"exchange_us": 65.0, "covered_us": 40.0}
    benchmarks["timeline"].draw_picture([found, found], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["cp", "timeline", "scaling"])
def test_an_unknown_argument_is_refused(benchmarks, name):
    with pytest.raises(Exception, match="tokenz"):
        benchmarks["timing"].parse(benchmarks[name].Options(), ["tokenz=3"])


def _event(category, name, start, length, **args):
    return {"cat": category, "name": name, "ts": start, "dur": length, "tid": 1, "args": args}


def test_kernels_are_named_by_the_step_that_launched_them(benchmarks, tmp_path):
    """An open kernel of 100 us; an NCCL kernel of 40 us, the first 30 of them beside the replay."""
    events = [
        _event("user_annotation", "open", 0, 10),
        _event("user_annotation", "replay", 20, 10),
        _event("cuda_runtime", "launch", 1, 1, correlation=1),
        _event("cuda_runtime", "launch", 21, 1, correlation=2),
        _event("cuda_runtime", "launch", 35, 1, correlation=3),
        _event("kernel", "main_kernel", 50, 100, correlation=1, stream=7),
        _event("kernel", "main_kernel", 150, 30, correlation=2, stream=7),
        _event("kernel", "ncclDevKernel_SendRecv", 150, 40, correlation=3, stream=9),
    ]
    found = benchmarks["timeline"].spans({"traceEvents": events})
    assert [(s["step"], s["us"]) for s in found] == [
        ("open", 100),
        ("replay", 30),
        ("exchange", 40),
    ]
    assert benchmarks["timeline"].covered(found) == {"exchange_us": 40.0, "covered_us": 30.0}
    benchmarks["timeline"].draw_picture([found, found], tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_the_plot_has_a_bar_a_measurement(benchmarks, tmp_path):
    row = {
        "what": "operator",
        "T": 65536,
        "Hk": 16,
        "Hv": 32,
        "gates": "slow",
        "ratio_to_one_gpu": 0.5,
    }
    row |= {"one_gpu": {"both": {"ms": 6.0}}}
    ring = {"ms": 3.0, "queued_ms": 2.5, "host_ms": 1.25}
    row |= {"cp_ring": {"both": ring, "forward": {"ms": 1.0}}}
    text = benchmarks["cp"].describe(row)
    assert "one_gpu 6.000" in text and "ratio_to_one_gpu 0.500" in text
    assert "cp_ring 3.000, queued 2.500 (forward 1.000, host 1.25)" in text
    benchmarks["cp"].plot([row, {**row, "what": "layer"}], tmp_path / "cp.png")
    assert (tmp_path / "cp.png").stat().st_size > 1000


def test_a_rank_is_busy_while_its_kernels_run(benchmarks):
    """In two turns: kernels of 100 and 60 us that overlap by 20, a copy, and one of 30 us; others' do not count."""

    def kernel(start, us, copy=False):
        return {"launched": start - 5, "start": start, "us": us, "copy": copy}

    kernels = [
        kernel(10, 100), kernel(90, 60), kernel(150, 20, copy=True), kernel(210, 50), kernel(310, 30)
    ]  # fmt: skip
    base = 1_000_000
    turns = [(base, base + 200_000), (base + 300_000, base + 400_000)]
    notes = [("open", base, base + 90_000), ("replay", base + 80_000, base + 90_000)]
    total, steps = benchmarks["scaling"].busy(kernels, base, turns, notes)
    assert abs(total - 0.17) < 1e-9
    assert steps == {"open": 0.1, "replay": 0.06, "other": 0.03}


def test_the_plot_tells_predictions_from_measurements(benchmarks, tmp_path):
    scaling = benchmarks["scaling"]
    weak = scaling.Series("weak", 32768, [16, 32], "qwen")
    strong = scaling.Series("strong", 262144, [16, 32], "slow")
    assert (weak.a_rank(8), strong.a_rank(8)) == (32768, 32768)
    assert weak.efficiency(2.0, 2.5, 8) == 0.8 and strong.efficiency(16.0, 2.5, 8) == 0.8
    rows = [
        series.row(P, kind) | {"efficiency_against_1": 1 - P / 20}
        for series in (weak, strong)
        for kind, ranks in ((scaling.PREDICTED, (1, 2, 4)), (scaling.MEASURED, (2,)))
        for P in ranks
    ]
    scaling.plot(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 1000
