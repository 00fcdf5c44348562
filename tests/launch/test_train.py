"""launch/train.py as a user starts it: under torchrun, in a folder of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cp_gdn.train.metrics import read_metrics
from tests.train.helpers import write_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SMALL = [
    "experiment=none",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.full_attention_interval=2",
    "model.intermediate_size=48",
    "data.seq_len=160",
    "data.val_fraction=0.2",
    "validation.packs=1",
    "logging=disabled",
]


def start(folder, *overrides, ranks=2):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    return subprocess.Popen(
        [*torchrun, str(SCRIPT), *SMALL, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    out, _ = process.communicate(timeout=150)
    return process.returncode, out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder / "text")
    return folder


def test_trains_then_refuses_another_model_under_the_same_name(place):
    text = ["data=text", "data.path=text", "name=mine"]
    code, out = finish(start(place, *text, "steps=3", "deepspeed=zero2", "cp.size=2"))
    assert code == 0, out
    assert "step 3/3 | loss " in out
    assert "bits per byte (unigram model: " in out
    run = place / "runs" / "mine"
    assert [r["train/step"] for r in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert "hidden_size: 32" in (run / "config.yaml").read_text()
    for name in ("loss.png", "throughput.png", "checkpoints/step-000000003/complete"):
        assert (run / name).is_file()
    assert [p.name for p in place.iterdir() if p.name == "outputs"] == []

    code, out = finish(start(place, *text, "steps=4", "deepspeed=zero2", "model.hidden_size=64"))
    assert code != 0
    for rank in (0, 1):
        assert f"[rank {rank}] ValueError: " in out
    assert "model.hidden_size is 64 but was 32" in out


def test_sigterm_to_one_rank_checkpoints_and_ends_all_with_success(place):
    process = start(place, "data=text", "data.path=text", "name=stopped", "steps=100000")
    metrics = place / "runs" / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find a single rank")
    os.kill(int(children.read_text().split()[-1]), signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert "stopped as asked after step " in out
    done = len(read_metrics(metrics))
    assert (place / f"runs/stopped/checkpoints/step-{done:09d}/complete").is_file()


@pytest.mark.parametrize(
    ("override", "message"), [("cp.sizee=2", "sizee"), ("steps=0", "steps is 0 but must be")]
)
def test_a_typo_ends_with_an_error_before_anything_is_written(override, message, tmp_path):
    code, out = finish(start(tmp_path, "name=typo", override))
    assert code != 0
    assert message in out
    assert not (tmp_path / "runs").exists()


def test_runs_alone_without_torchrun(place):
    command = [sys.executable, str(SCRIPT), *SMALL, "data=text", "data.path=text"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "name=alone", "steps=1", "deepspeed=zero3"],
        cwd=place,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained 1 steps, 160 tokens" in done.stdout
