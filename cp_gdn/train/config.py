"""What a training run is made of, as plain dataclasses.

They are the schema of the recipes: launch/ registers them with Hydra, so that a misspelt key or a
value of the wrong type is refused before anything starts. Values live in recipes/*.yaml; the few
defaults here are those that no recipe varies. Everything that can be judged without a process group
is judged in ``__post_init__`` and :func:`validate`, the same on every rank.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from cp_gdn.context import EXCHANGES
from cp_gdn.models.hybrid import HybridConfig, HybridSizes
from cp_gdn.train.data import DataConfig

PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "wsd")
WANDB_MODES = ("online", "offline", "disabled")

# Keys of a DeepSpeed configuration that the trainer derives, and what sets them instead
DERIVED_KEYS = {
    "train_batch_size": "gradient_accumulation",
    "train_micro_batch_size_per_gpu": "gradient_accumulation (a pack is a micro batch)",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_clipping": "optim.clip",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "sequence_parallel_size": "cp.size",
    "data_parallel_size": "cp.size (the other ranks are data parallel)",
    "tensor_parallel": "cp.size",
}


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r} but must be one of {', '.join(allowed)}")


def _at_least(what: str, value: float, least: float) -> None:
    if not value >= least:  # NaN neither
        raise ValueError(f"{what} is {value} but must be at least {least}")


@dataclass
class ModelConfig(HybridSizes):
    """The model without its vocabulary, which the corpus' tokenizer decides."""

    def for_vocabulary(self, vocab_size: int) -> HybridConfig:
        return HybridConfig(vocab_size=vocab_size, **dataclasses.asdict(self))


@dataclass
class CPConfig:
    """size: ranks that share a sequence (None: all of them); exchange: how boundary states travel."""

    size: int | None = None
    exchange: str = "auto"

    def __post_init__(self) -> None:
        _one_of("cp.exchange", self.exchange, ("auto", *EXCHANGES))
        if self.size is not None:
            _at_least("cp.size", self.size, 1)


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule (schedule.py).

    clip: largest gradient norm, 0 for none. decay_fraction: share of the steps in which "wsd" comes
    down.
    """

    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    clip: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        _one_of("optim.schedule", self.schedule, SCHEDULES)
        for name in ("lr", "warmup_steps", "weight_decay", "clip", "min_lr_ratio"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)} but must lie in [0, 1)")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(
                f"optim.decay_fraction is {self.decay_fraction} but must lie in (0, 1]: it is a share of the steps"
            )


@dataclass
class LoggingConfig:
    """every: steps between records. wandb: online, offline or disabled; metrics.jsonl is written in any case."""

    wandb: str
    every: int = 1
    project: str = "cp-gdn"
    group: str | None = None

    def __post_init__(self) -> None:
        _one_of("logging.wandb", self.wandb, WANDB_MODES)
        _at_least("logging.every", self.every, 1)


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints (the last step always writes one); keep: how many stay."""

    every: int
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass
class ValidationConfig:
    """every: steps between validations (and after the last step); packs: sequences for each data-parallel rank."""

    every: int
    packs: int

    def __post_init__(self) -> None:
        _at_least("validation.every", self.every, 1)
        _at_least("validation.packs", self.packs, 1)


@dataclass
class TrainConfig:
    """A whole run. ``folder`` is where everything it writes goes; the same name resumes."""

    name: str
    folder: str
    steps: int
    model: ModelConfig
    data: DataConfig
    cp: CPConfig
    optim: OptimConfig
    logging: LoggingConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    deepspeed: dict[str, Any]
    seed: int = 0
    precision: str = "fp32"
    gradient_accumulation: int = 1
    activation_checkpointing: bool = False
    timeout_s: float = 300.0
    debug: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _at_least("steps", self.steps, 1)
        _at_least("gradient_accumulation", self.gradient_accumulation, 1)
        _at_least("seed", self.seed, 0)
        _at_least("timeout_s", self.timeout_s, 1)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(
                f"name is {self.name!r}; it names the run's folder, so it must not be empty, hold a slash or begin "
                "with a dot"
            )
        for key in self.deepspeed:
            if key in DERIVED_KEYS:
                raise ValueError(
                    f"deepspeed.{key} is derived by the trainer; leave it out and set {DERIVED_KEYS[key]}"
                )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(
                f"deepspeed.zero_optimization is {zero!r} but must be a dictionary that holds the stage"
            )
        stage = zero.get("stage", 0)
        if stage not in (0, 1, 2, 3):
            raise ValueError(
                f"deepspeed.zero_optimization.stage is {stage!r} but must be 0, 1, 2 or 3"
            )

    @property
    def zero_stage(self) -> int:
        return self.deepspeed.get("zero_optimization", {}).get("stage", 0)


def validate(config: TrainConfig, world_size: int) -> None:
    """Rules that join the configuration and the number of ranks; raises ValueError before any communication."""
    cp_size = config.cp.size or world_size
    if world_size % cp_size:
        raise ValueError(
            f"cp.size is {cp_size} but does not divide the {world_size} ranks; start a multiple of cp.size ranks "
            "(torchrun --nproc-per-node) or choose another cp.size"
        )
    if config.data.seq_len < cp_size:
        raise ValueError(
            f"data.seq_len is {config.data.seq_len} but the {cp_size} ranks of a context-parallel group need a token "
            "each; raise data.seq_len"
        )
