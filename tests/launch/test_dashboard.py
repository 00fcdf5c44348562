"""The dashboard shows metrics that a run writes, and says what it needs where its package is missing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "dashboard.py"
WITHOUT_PACKAGE = (
    "import sys, runpy; sys.modules['wandb_workspaces'] = None; sys.argv = sys.argv[1:]; "
)
WITHOUT_PACKAGE += "runpy.run_path(sys.argv[0], run_name='__main__')"


def dry_run(*interpreter_arguments):
    command = [sys.executable, *interpreter_arguments, str(SCRIPT), "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_missing_package_is_one_sentence():
    done = dry_run("-c", WITHOUT_PACKAGE)
    assert done.returncode == 2
    assert "needs the optional package wandb-workspaces" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_specification_is_json_with_the_metrics_of_a_run():
    done = dry_run()
    assert done.returncode == 0, done.stderr
    text = json.dumps(json.loads(done.stdout))
    for metric in ("train/loss", "perf/tokens_per_s_per_gpu", "comm/cp_exchange_ms"):
        assert metric in text
