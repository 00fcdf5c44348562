"""metrics.jsonl: one JSON object a recorded step, written and flushed before anything else is told of it."""

import json
from pathlib import Path
from typing import IO

from cp_gdn.train.callbacks import Callback, Record


def read_metrics(path: Path) -> list[Record]:
    """All whole records of a metrics.jsonl, in order; a line that a crash cut short is left out."""
    records = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class JsonlMetrics(Callback):
    """Writes the records of the first rank. Resuming drops those after the checkpoint, which come again."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None

    def on_start(self, trainer) -> None:
        if not trainer.topology.is_first:
            return
        kept = [r for r in read_metrics(self._path) if r["train/step"] <= trainer.step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")

    def on_record(self, trainer, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def on_end(self, trainer) -> None:
        if self._file is not None:
            self._file.close()
