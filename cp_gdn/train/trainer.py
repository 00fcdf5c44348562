"""The training run: what is built, in which order, and the loop over steps.

Everything that can fail by itself (corpus, model, logging) is built before the process group, so
that a bad configuration ends every rank with the same message at once. After that the ranks act
together: what only one of them can know (a checkpoint, a signal, a bad value) is shared before
anyone acts on it.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cp_gdn.models.hybrid import HybridLM
from cp_gdn.train.callbacks import Callback, Record
from cp_gdn.train.checkpoint import Checkpoints
from cp_gdn.train.config import TrainConfig, validate
from cp_gdn.train.data import Corpus, PackLoader, build_corpus
from cp_gdn.train.engine import build_engine
from cp_gdn.train.metrics import JsonlMetrics
from cp_gdn.train.perf import PerfMonitor
from cp_gdn.train.plots import Plots
from cp_gdn.train.progress import Progress
from cp_gdn.train.schedule import learning_rate
from cp_gdn.train.signals import StopFlag
from cp_gdn.train.step import TrainStep
from cp_gdn.train.topology import Topology, launched_world_size, open_topology
from cp_gdn.train.validation import Validation
from cp_gdn.train.wandb_logger import WandbLogger, check_wandb
from cp_gdn.watchdog import Watchdog


class Trainer:
    """State of a run and its loop; callbacks read ``step`` (steps done) and what it was built from."""

    def __init__(self, config: TrainConfig, topology: Topology, corpus: Corpus, model: nn.Module):
        self.config, self.topology, self.corpus = config, topology, corpus
        self.step = 0
        self.tokens_seen = 0
        self.wandb_id: str | None = None
        self.stopped = False
        self.folder = Path(config.folder)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            topology,
            identity=_identity(config, topology, corpus),
            keep=config.checkpoint.keep,
        )
        resumed = self.checkpoints.find()
        self.engine: Any = build_engine(model, config)
        self.loader = PackLoader(
            corpus.train,
            seq_len=config.data.seq_len,
            dp_rank=topology.dp_rank,
            dp_size=topology.dp_size,
            seed=config.data.seed,
        )
        if resumed is not None:
            self._resume(*resumed)
        self._step = TrainStep(self.engine, topology, config.cp.exchange)
        tokens_per_step = config.data.seq_len * topology.dp_size * config.gradient_accumulation
        self._tokens_per_step = tokens_per_step
        self._perf = PerfMonitor(
            flops_per_token=self.engine.module.model.flops_per_token(config.data.seq_len),
            tokens_per_step=tokens_per_step,
        )
        self.wandb = WandbLogger(
            config.logging,
            name=config.name,
            folder=self.folder,
            settings=dataclasses.asdict(config),
        )
        self.plots = Plots(self.folder)
        self.callbacks: list[Callback] = [
            self._perf,
            Validation(),
            JsonlMetrics(self.folder / "metrics.jsonl"),
            self.wandb,
            Progress(config.steps),
            self.plots,
        ]

    def fit(self) -> None:
        """Train until the last step, or until a rank is told to stop; ends with a checkpoint."""
        config, flag = self.config, StopFlag()
        for callback in self.callbacks:
            callback.on_start(self)
        with flag.installed():
            while self.step < config.steps and not self.stopped:
                started = time.perf_counter()
                packs = [self.loader.next() for _ in range(config.gradient_accumulation)]
                data_seconds = time.perf_counter() - started
                lr = learning_rate(self.step, config.steps, config.optim)
                result = self._step.run(packs, step=self.step + 1, lr=lr, stop=flag.set)
                self.step += 1
                self.tokens_seen += self._tokens_per_step
                self.stopped = result.stop
                self._perf.step_done(data_seconds)
                if self._records_at(self.step):
                    record: Record = {
                        "train/step": self.step,
                        "train/loss": result.loss,
                        "train/grad_norm": result.grad_norm,
                        "train/lr": lr,
                        "train/tokens_seen": self.tokens_seen,
                    }
                    for callback in self.callbacks:
                        callback.on_record(self, record)
                if self._ends() or self.step % config.checkpoint.every == 0:
                    self._save()
        for callback in self.callbacks:
            callback.on_end(self)

    def validates_at(self, step: int) -> bool:
        return step % self.config.validation.every == 0 or step == self.config.steps

    def pause(self) -> None:
        """Tell the callbacks that time went by that is not a step's."""
        for callback in self.callbacks:
            callback.on_pause(self)

    def _records_at(self, step: int) -> bool:
        return step % self.config.logging.every == 0 or self.validates_at(step) or self._ends()

    def _ends(self) -> bool:
        return self.stopped or self.step == self.config.steps

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "loader": self.loader.state_dict(),
            "wandb_id": self.wandb_id,
        }
        self.checkpoints.save(self.engine, state, step=self.step)
        self.pause()

    def _resume(self, tag: str, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.checkpoints.load(self.engine, tag)
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.wandb_id = state["wandb_id"]
        if self.topology.is_first:
            print(
                f"resumed {self.config.name} from step {self.step} of {self.config.steps}",
                flush=True,
            )


def _identity(config: TrainConfig, topology: Topology, corpus: Corpus) -> dict[str, Any]:
    return {
        "model": {**dataclasses.asdict(config.model), "vocab_size": corpus.vocab_size},
        "data": {"fingerprint": corpus.fingerprint, "seq_len": config.data.seq_len},
        "ranks": {"world_size": topology.world_size, "cp_size": topology.cp_size},
        "zero_stage": config.zero_stage,
    }


def train(config: TrainConfig, *, config_text: str | None = None) -> None:
    """Run ``config`` to its end, resuming where its folder holds a checkpoint, and say where the results are.

    config_text: what the first rank writes to ``config.yaml``, once the run is accepted.

    Raises ValueError on every rank for a configuration that cannot run, NonFiniteError on every
    rank where training diverges.
    """
    world_size = launched_world_size()
    validate(config, world_size)
    check_wandb(config.logging)
    if config.debug:
        os.environ["CP_GDN_DEBUG"] = "1"
    corpus = build_corpus(config.data, rank=int(os.environ.get("RANK", "0")))
    torch.manual_seed(config.seed)
    model = HybridLM(config.model.for_vocabulary(corpus.vocab_size))
    model.set_activation_checkpointing(config.activation_checkpointing)
    with (
        open_topology(config.cp.size, timeout_s=config.timeout_s) as topology,
        Watchdog(config.timeout_s),
    ):
        trainer = Trainer(config, topology, corpus, model)
        topology.on_first_rank(
            lambda: _open_folder(trainer.folder, config_text), f"write to {config.folder}"
        )
        trainer.fit()
        if topology.is_first:
            print(_results(trainer), flush=True)


def _open_folder(folder: Path, config_text: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if config_text is not None:
        (folder / "config.yaml").write_text(config_text)


def _results(trainer: Trainer) -> str:
    folder = trainer.folder
    if trainer.stopped and trainer.step < trainer.config.steps:
        head = f"stopped as asked after step {trainer.step}; the same command resumes"
    else:
        head = f"trained {trainer.step} steps, {trainer.tokens_seen:,} tokens"
    rows = [("plot", str(path)) for path in trainer.plots.drawn]
    rows.append(("metrics", str(folder / "metrics.jsonl")))
    rows.append(("checkpoint", str(folder / "checkpoints" / f"step-{trainer.step:09d}")))
    if trainer.wandb.offline_folder is not None:
        rows.append(("W&B, offline", f"{trainer.wandb.offline_folder}  (wandb sync uploads it)"))
    return "\n".join(["", head, *(f"  {name:<13}{where}" for name, where in rows)])
