"""Whole runs in a folder: what they write, that they resume exactly, and what they refuse."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from cp_gdn.train.data import PackLoader
from cp_gdn.train.metrics import read_metrics
from cp_gdn.train.trainer import train
from tests.distributed import run_ranks
from tests.train.helpers import MODEL, deepspeed_recipe, tiny_config, write_corpus


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def run(rank, size, config, stop_before_pack=None):
    """Train; with ``stop_before_pack`` the last rank alone gets a SIGTERM while it fetches that pack."""
    if stop_before_pack is not None and rank == size - 1:
        fetch = PackLoader.next

        def fetch_and_signal(self):
            if self.sample == stop_before_pack:
                os.kill(os.getpid(), signal.SIGTERM)
            return fetch(self)

        PackLoader.next = fetch_and_signal
    train(config, config_text="name: tiny\n")


def metrics(folder):
    return read_metrics(folder / "metrics.jsonl")


def refusal(rank, size, config):
    try:
        train(config)
    except ValueError as error:
        return str(error)
    return None


TRAINED = {"train/step", "train/loss", "train/grad_norm", "train/lr", "train/tokens_seen"}
TIMED = {
    "perf/tokens_per_s",
    "perf/tokens_per_s_per_gpu",
    "perf/step_time_s",
    "perf/data_time_s",
    "comm/cp_exchange_ms",
    "comm/cp_exchange_mib",
}
VALIDATED = {"val/loss", "val/bits_per_byte", "val/unigram_bits_per_byte"}


def test_a_run_leaves_metrics_plots_config_and_checkpoint(tmp_path, text, capfd):
    folder = tmp_path / "tiny"
    run_ranks(2, run, tiny_config(folder, text))
    records = metrics(folder)
    assert [r["train/step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for i, record in enumerate(records):
        expected = TRAINED | {"memory/max_rss_gib"}
        expected |= TIMED if i > 0 else set()  # the first step is not timed
        expected |= VALIDATED if record["train/step"] in (3, 6) else set()
        assert record.keys() == expected
    last = records[-1]
    assert last["train/loss"] < records[0]["train/loss"]
    assert last["train/tokens_seen"] == 6 * 160  # two ranks share every pack
    assert last["perf/tokens_per_s"] == pytest.approx(160 / last["perf/step_time_s"])
    assert last["perf/tokens_per_s_per_gpu"] == pytest.approx(last["perf/tokens_per_s"] / 2)
    assert last["comm/cp_exchange_mib"] > 0
    nats_per_byte = last["val/loss"]  # the byte tokenizer: a token is a byte
    assert last["val/bits_per_byte"] == pytest.approx(nats_per_byte / 0.6931471805599453)
    assert {p.name for p in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "throughput.png",
    }
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert {"latest", "step-000000003", "step-000000006"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    out = capfd.readouterr().out
    assert out.count("perf/mfu is not recorded") == 1
    for place in ("loss.png", "throughput.png", "metrics.jsonl", "step-000000006"):
        assert str(folder) in out
        assert place in out


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_reproduces_the_uninterrupted_run_exactly(stage, tmp_path, text):
    config = tiny_config(
        tmp_path / "whole",
        text,
        steps=8,
        gradient_accumulation=2,
        deepspeed=deepspeed_recipe(stage),
    )
    run_ranks(2, run, config)
    parted = dataclasses.replace(config, folder=str(tmp_path / "parted"))
    run_ranks(2, run, parted, 8)  # two packs a step: the signal comes in the fifth step
    assert [r["train/step"] for r in metrics(tmp_path / "parted")] == [1, 2, 3, 4, 5]
    latest = (tmp_path / "parted/checkpoints/latest").read_text()
    assert latest == "step-000000005"
    run_ranks(2, run, parted)
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "parted")
    for key in (
        "train/step",
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "train/tokens_seen",
        "val/loss",
    ):
        assert [r.get(key) for r in resumed] == [r.get(key) for r in whole], key


def test_resuming_after_a_crash_repeats_the_steps_since_the_checkpoint(tmp_path, text):
    config = tiny_config(tmp_path / "tiny", text, steps=3)
    run_ranks(2, run, config)
    first = metrics(tmp_path / "tiny")
    with (tmp_path / "tiny/metrics.jsonl").open("a") as file:  # two steps that no checkpoint holds
        file.write(json.dumps({"train/step": 4, "train/loss": 99.0}) + '\n{"train/step": 5, "tra')
    run_ranks(2, run, dataclasses.replace(config, steps=5))
    records = metrics(tmp_path / "tiny")
    assert [r["train/step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[:3] == first
    assert records[3]["train/loss"] < 10


def test_another_model_data_or_layout_under_the_same_name_is_refused(tmp_path, text):
    config = tiny_config(tmp_path / "tiny", text, steps=1)
    run_ranks(2, run, config)
    other_text = write_corpus(tmp_path / "other" / "text", seed=1)
    changes = {
        "model.hidden_size is 64 but was 32": {"model": dataclasses.replace(MODEL, hidden_size=64)},
        "data.fingerprint is": {"data": dataclasses.replace(config.data, path=str(other_text))},
        "data.seq_len is 192 but was 160": {"data": dataclasses.replace(config.data, seq_len=192)},
        "zero_stage is 3 but was 1": {"deepspeed": deepspeed_recipe(3)},
    }
    for expected, change in changes.items():
        messages = run_ranks(2, refusal, dataclasses.replace(config, **change))
        assert messages[0] is not None, expected
        assert messages[0] == messages[1]
        assert expected in messages[0]
        assert "choose another name" in messages[0]
    assert "ranks.world_size is 1 but was 2" in run_ranks(1, refusal, config)[0]
    assert (tmp_path / "tiny/checkpoints/latest").read_text() == "step-000000001"


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("cp.size is 3 but does not divide the 2 ranks", {"cp": {"size": 3}}),
        ("data path /nowhere/at/all cannot be read", {"data": {"path": "/nowhere/at/all"}}),
    ],
)
def test_what_cannot_run_is_refused_on_every_rank(expected, change, tmp_path, text):
    config = tiny_config(tmp_path / "tiny", text)
    for name, values in change.items():
        setattr(config, name, dataclasses.replace(getattr(config, name), **values))
    messages = run_ranks(2, refusal, config)
    assert messages[0] == messages[1]
    assert messages[0] is not None
    assert expected in messages[0]
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_does_not_change_the_loss(precision, tmp_path, text):
    base = tiny_config(
        tmp_path / "base", text, steps=2, precision=precision, deepspeed=deepspeed_recipe(3)
    )
    run_ranks(2, run, base)
    recomputed = dataclasses.replace(
        base, folder=str(tmp_path / "recomputed"), activation_checkpointing=True, debug=True
    )
    run_ranks(2, run, recomputed)
    losses = [[r["train/loss"] for r in metrics(tmp_path / n)] for n in ("base", "recomputed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_data_parallel_ranks_see_different_packs_and_count_all_tokens(tmp_path, text):
    config = tiny_config(tmp_path / "dp", text, steps=2)
    config.cp.size = 1
    run_ranks(2, run, config)
    accumulated = tiny_config(tmp_path / "acc", text, steps=2, gradient_accumulation=2)
    run_ranks(1, run, accumulated)
    dp, acc = metrics(tmp_path / "dp"), metrics(tmp_path / "acc")
    assert dp[-1]["train/tokens_seen"] == acc[-1]["train/tokens_seen"] == 2 * 2 * 160
    for a, b in zip(dp, acc, strict=True):  # pack 2 i + r goes to rank r, or to micro batch r
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    assert torch.tensor(dp[0]["train/loss"]).isfinite()
