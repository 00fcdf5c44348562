"""The benchmarks' host side: operations, packed lengths, and what a run writes. No GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


@pytest.fixture
def timing(monkeypatch):
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    monkeypatch.syspath_prepend(str(LAUNCH))
    from benchmarks import timing

    return timing


def test_an_unknown_operation_names_those_that_exist():
    command = [sys.executable, str(LAUNCH / "bench.py"), "op=sideward"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "op=sideward" in run.stderr
    assert all(op in run.stderr for op in ("forward", "backward", "step", "recompute"))


@pytest.mark.parametrize("program", ["bench.py", "compile.py"])
def test_help_is_what_the_program_opens_with(program):
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    command = [sys.executable, str(LAUNCH / program), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert f"python launch/{program}" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["op=model", "kinds=[fast]"], "there are tilelang, torch, fla and float32"),
        (["op=model", "steps=3"], "steps=3"),
        (["op=numerics", "kinds=[odd]"], "there are random, slow"),
    ],
)
def test_what_cannot_run_is_refused(arguments, told):
    pytest.importorskip("tilelang", reason="tilelang is not installed")
    command = [sys.executable, str(LAUNCH / "bench.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and told in run.stderr, run.stderr


@pytest.mark.parametrize("documents", [1, 8, -32])
def test_documents_fill_the_tokens(timing, documents):
    sizes = timing.lengths(32768, documents)
    assert len(sizes) == abs(documents)
    assert sum(sizes) == 32768 and min(sizes) > 0


@pytest.mark.parametrize("keep", [False, True])
def test_a_checkpointed_step_runs_its_forward_twice(timing, monkeypatch, keep):
    from benchmarks import recompute

    seen = []

    def forward(*x, keep_states=False, **how):
        seen.append(keep_states)
        return "o", None, f"saved by forward {len(seen)}"

    monkeypatch.setattr(recompute, "chunk_gdn_forward", forward)
    monkeypatch.setattr(recompute, "chunk_gdn_backward", lambda *given, **how: given[-2:])
    _, step = recompute.steps(5 * [None], "do", {}, keep)
    assert step() == ("o", ("o", ("saved by forward 2", "do")))
    assert seen == [False, keep]


def test_a_run_writes_rows_and_plot(timing, monkeypatch, tmp_path):
    def measure(case):
        assert case.ratio == 4
        return {**case.row(), "cp_gdn_ms": 1.0, "cp_gdn_sets_ms": [1.0], "flash_qla_ms": 2.0}

    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "get_device_name", lambda: "none")
    arguments = ["op=step", "shapes=[[8192,2,8]]", "packed=[[8192,2,8]]", "gates=[qwen,slow]"]
    timing.run(arguments, timing.Options(out="results/step"), measure)
    rows = json.loads((tmp_path / "results/step.json").read_text())["rows"]
    assert [(r["gates"], r["documents"], r["skewed"]) for r in rows] == [
        ("qwen", 1, False), ("slow", 1, False), ("qwen", 8, False), ("qwen", 32, True)
    ]  # fmt: skip
    assert timing.timed(rows[0]) == ["cp_gdn", "flash_qla"]
    assert (tmp_path / "results/step.png").stat().st_size > 1000
