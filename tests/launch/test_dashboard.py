"""The dashboard shows metrics that a run writes, and says what it needs where its package is missing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "dashboard.py"
INSTALLED = importlib.util.find_spec("wandb_workspaces") is not None


def dry_run():
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(INSTALLED, reason="wandb-workspaces is installed")
def test_missing_package_is_one_sentence():
    done = dry_run()
    assert done.returncode == 2
    assert "needs the optional package wandb-workspaces" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not INSTALLED, reason="needs wandb-workspaces")
def test_the_specification_is_json_with_the_metrics_of_a_run():
    done = dry_run()
    assert done.returncode == 0, done.stderr
    text = json.dumps(json.loads(done.stdout))
    for metric in ("train/loss", "perf/tokens_per_s_per_gpu", "comm/cp_exchange_ms"):
        assert metric in text
