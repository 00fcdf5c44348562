"""What is measured and shown: peaks by device name, MFU, the line of a step, W&B, and the plots' inputs."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from cp_gdn.train import perf
from cp_gdn.train.config import LoggingConfig
from cp_gdn.train.metrics import read_metrics
from cp_gdn.train.plots import plot_run
from cp_gdn.train.progress import line
from cp_gdn.train.trainer import train
from cp_gdn.train.wandb_logger import check_wandb
from tests.distributed import run_ranks
from tests.train.helpers import MODEL, tiny_config, write_corpus


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peak_of_known_devices(name, tflops):
    assert perf.peak_flops(name) == tflops * 1e12


def test_unknown_hardware_has_no_peak():
    assert perf.peak_flops("CPU") is None
    assert perf.peak_flops("NVIDIA GeForce GTX 1080") is None


def with_a_known_peak(rank, size, config):
    perf.peak_flops = lambda name: 1e12
    train(config)


def test_mfu_is_model_flops_over_peak(tmp_path):
    text = write_corpus(tmp_path / "corpus" / "text")
    config = tiny_config(tmp_path / "run", text, steps=2)
    run_ranks(2, with_a_known_peak, config)
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    from cp_gdn.models.hybrid import HybridLM

    flops = HybridLM(MODEL.for_vocabulary(257)).flops_per_token(160)
    assert last["perf/mfu"] == pytest.approx(
        flops * last["perf/tokens_per_s"] / (2 * 1e12), rel=0.02
    )


def test_the_line_of_a_step():
    record = {
        "train/step": 7,
        "train/loss": 2.5,
        "train/grad_norm": 0.51,
        "train/lr": 1e-3,
        "perf/tokens_per_s": 12345.6,
        "perf/step_time_s": 0.33,
        "val/loss": 2.0,
        "val/bits_per_byte": 2.885,
        "val/unigram_bits_per_byte": 4.6,
    }
    assert line(record, 30) == (
        "step 7/30 | loss 2.5000 | grad norm 0.51 | lr 1.00e-03 | 12,346 tokens/s | 0.33 s/step | "
        "validation 2.885 bits per byte (unigram model: 4.600)"
    )


def test_plots_need_no_validation_and_no_timing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"train/step": 1, "train/loss": 2.0}) + "\n")
    assert [p.name for p in plot_run(tmp_path)] == ["loss.png"]
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_run(tmp_path) == []


def log_to_wandb(rank, size, config):
    assert "wandb" not in sys.modules
    train(config)
    return "wandb" in sys.modules


def test_wandb_is_imported_by_the_first_rank_only_and_its_id_survives_a_resume(tmp_path):
    text = write_corpus(tmp_path / "corpus" / "text")
    config = tiny_config(tmp_path / "run", text, steps=2, logging=LoggingConfig(wandb="offline"))
    assert run_ranks(2, log_to_wandb, config, timeout_s=120) == [True, False]
    checkpoints = tmp_path / "run/checkpoints"
    first = json.loads((checkpoints / "step-000000002/run.json").read_text())["wandb_id"]
    longer = dataclasses.replace(config, steps=3)
    run_ranks(2, log_to_wandb, longer, timeout_s=120)
    second = json.loads((checkpoints / "step-000000003/run.json").read_text())["wandb_id"]
    assert first == second
    logged = list((tmp_path / "run/wandb").glob(f"offline-run-*-{first}/run-{first}.wandb"))
    assert logged


def refused_by_wandb(rank, size, config):
    import wandb

    def init(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    wandb.init = init
    try:
        train(config)
    except ValueError as error:
        return str(error)


def test_what_wandb_refuses_ends_every_rank(tmp_path):
    text = write_corpus(tmp_path / "corpus" / "text")
    config = tiny_config(tmp_path / "run", text, steps=1, logging=LoggingConfig(wandb="online"))
    first, second = run_ranks(2, refused_by_wandb, config)
    assert first == second
    assert "could not open the W&B run" in first
    assert "No API key configured. Or set logging=offline" in first


def test_missing_wandb_is_refused_unless_disabled(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="wandb is not installed; install it, or set logging=disabled"
    ):
        check_wandb(LoggingConfig(wandb="offline"))
    check_wandb(LoggingConfig(wandb="disabled"))
