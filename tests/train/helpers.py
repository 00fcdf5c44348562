"""Small models, packs, corpora and configurations for the tests of training."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_gdn.models.hybrid import HybridLM
from cp_gdn.train.config import (
    CheckpointConfig,
    CPConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)
from cp_gdn.train.data import IGNORE_INDEX, DataConfig, Pack

# Imported late and slowly by a run; forked ranks inherit them from here
for module in ("deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot"):
    importlib.import_module(module)

VOCAB = 61
MODEL = ModelConfig(
    hidden_size=32,
    num_layers=2,
    full_attention_interval=2,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    initializer_range=0.1,  # so that no gradient drowns in rounding; from 0.2 on training amplifies rounding
)


def tiny_model(seed: int = 0, vocab_size: int = VOCAB) -> HybridLM:
    torch.manual_seed(seed)
    model = HybridLM(MODEL.for_vocabulary(vocab_size))
    slow_heads(model)
    return model


def slow_heads(model: torch.nn.Module) -> None:
    """The first value head of every layer decays by about 1e-4 a token: its state crosses every cut alive."""
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            with torch.no_grad():
                p[0] = -9.0


def random_pack(seed: int, seq_len: int, *, padding: int = 0, ignored: slice | None = None) -> Pack:
    """Documents of uneven length, then padding; ``ignored``: a stretch without labels."""
    rng = np.random.default_rng(seed)
    text = seq_len - padding
    cuts = sorted(rng.choice(np.arange(1, text), size=2, replace=False).tolist())
    offsets = (0, *cuts, text, *([seq_len] if padding else []))
    # Skewed tokens, so that there is something to learn in a few steps
    ids = torch.from_numpy((rng.random(seq_len) ** 3 * VOCAB).astype(np.int64))
    labels = torch.cat((ids[1:], ids.new_full((1,), IGNORE_INDEX)))
    for end in offsets[1:]:
        labels[end - 1] = IGNORE_INDEX
    labels[text:] = IGNORE_INDEX
    if ignored is not None:
        labels[ignored] = IGNORE_INDEX
    return Pack(ids, labels, offsets)


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """A folder of text files with structure that a small model learns."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = ["state", "decay", "chunk", "rank", "shard", "gate", "scan", "key"]
    for i in range(12):
        text = " ".join(rng.choice(words, size=int(rng.integers(40, 400))).tolist())
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


def deepspeed_recipe(stage: int) -> dict[str, Any]:
    """Buckets smaller than the model, so that it takes several."""
    buckets = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
    return {"zero_optimization": {"stage": stage, **(buckets if stage else {})}}


def tiny_config(folder: Path, text: Path, *, stage: int = 1, **changes: Any) -> TrainConfig:
    """A run of a few seconds; ``changes`` replace fields of TrainConfig."""
    config = TrainConfig(
        name="tiny",
        folder=str(folder),
        steps=6,
        model=MODEL,
        data=DataConfig(
            kind="text",
            path=str(text),
            seq_len=160,
            cache_dir=str(text.parent / "cache"),
            val_fraction=0.2,
        ),
        cp=CPConfig(),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=2, weight_decay=0.1, clip=1.0),
        logging=LoggingConfig(wandb="disabled"),
        checkpoint=CheckpointConfig(every=3),
        validation=ValidationConfig(every=3, packs=2),
        deepspeed=deepspeed_recipe(stage),
    )
    return dataclasses.replace(config, **changes)
