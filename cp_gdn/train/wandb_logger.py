"""Weights & Biases, from the first rank only and imported only where a run logs to it.

The run id goes into the checkpoint, so that a resumed run goes on in the same W&B run.
metrics.jsonl is complete without it.
"""

import importlib.util
from pathlib import Path
from typing import Any

from cp_gdn.train.callbacks import Callback, Record
from cp_gdn.train.config import LoggingConfig


def check_wandb(config: LoggingConfig) -> None:
    """Raises ValueError where the run is to be logged but the package is missing."""
    if config.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb is {config.wandb!r} but the package wandb is not installed; install it, or set "
            "logging=disabled: metrics.jsonl is written in any case"
        )


class WandbLogger(Callback):
    """Logs every record against train/step."""

    def __init__(self, config: LoggingConfig, *, name: str, folder: Path, settings: dict[str, Any]):
        self._config, self._name, self._folder, self._settings = config, name, folder, settings
        self._run: Any = None

    def on_start(self, trainer) -> None:
        if self._config.wandb != "disabled":
            trainer.wandb_id = trainer.topology.on_first_rank(
                lambda: self._open(trainer.wandb_id), "open the W&B run"
            )

    def _open(self, wandb_id: str | None) -> str:
        """Start or resume the run; its id."""
        import wandb

        mode: Any = self._config.wandb
        try:
            self._run = wandb.init(
                project=self._config.project,
                group=self._config.group,
                name=self._name,
                job_type="train",
                dir=str(self._folder),
                mode=mode,
                id=wandb_id,
                resume="allow" if self._config.wandb == "online" else None,
                config=self._settings,
                settings=wandb.Settings(console="off", silent=self._config.wandb == "offline"),
            )
        except wandb.Error as error:
            raise ValueError(f"{error} Or set logging=offline, which needs no account") from error
        self._run.define_metric("train/step")
        for section in ("train", "perf", "comm", "memory", "val"):
            self._run.define_metric(f"{section}/*", step_metric="train/step")
        self._run.define_metric("train/loss", step_metric="train/step", summary="min")
        self._run.define_metric("val/bits_per_byte", step_metric="train/step", summary="min")
        return self._run.id

    def on_record(self, trainer, record: Record) -> None:
        if self._run is not None:
            self._run.log(record)

    def on_end(self, trainer) -> None:
        if self._run is not None:
            self._run.finish()

    @property
    def offline_folder(self) -> Path | None:
        """Where the offline run lies, for ``wandb sync``."""
        if self._run is None or self._config.wandb != "offline":
            return None
        return Path(self._run.dir).parent
