"""Callbacks: one concern each, called by the trainer at four moments; a record is a flat dictionary of metrics."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cp_gdn.train.trainer import Trainer

Record = dict[str, float]


class Callback:
    """Does nothing. Callbacks run in the order in which the trainer holds them; each may add to the record."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step, after a resume."""

    def on_record(self, trainer: "Trainer", record: Record) -> None:
        """After a step whose metrics are recorded. Called on every rank."""

    def on_pause(self, trainer: "Trainer") -> None:
        """After validation or a checkpoint, whose time is not the step's."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, when nothing has failed."""
