"""Checkpoints that are either whole or not there, and resuming from the newest whole one.

A checkpoint is written into a temporary folder; then come the state of the run, a completeness
marker, the rename to ``step-000000100``, the file ``latest``, and only then are older ones removed.
Interrupted anywhere, the previous checkpoint stays valid. DeepSpeed writes model and optimizer,
each rank its random state, the first rank ``run.json``.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_gdn import comm
from cp_gdn.train.topology import Topology

MARKER = "complete"
TAGS = "step-" + 9 * "[0-9]"


def newest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names, else the newest complete one, else None."""
    pointer = folder / "latest"
    if pointer.is_file():
        named = folder / pointer.read_text().strip()
        if (named / MARKER).is_file():
            return named
    every = complete(folder)
    return every[-1] if every else None


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"{TAGS}/{MARKER}"))


def differences(saved: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> list[str]:
    """'key is X but was Y' for every leaf in which two nested dictionaries differ."""
    found = []
    for key in sorted(saved.keys() | mine.keys()):
        old, new = saved.get(key), mine.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {new!r} but was {old!r}")
    return found


class Checkpoints:
    """The checkpoints of one run in ``folder``, which only runs of the same ``identity`` may continue.

    identity: what must not change under a run's name (model, data, ranks); JSON values only.
    """

    def __init__(self, folder: Path, topology: Topology, *, identity: dict[str, Any], keep: int):
        self._folder, self._topology, self._keep = folder, topology, keep
        self._identity = json.loads(json.dumps(identity))

    def find(self) -> tuple[str, dict[str, Any]] | None:
        """(tag, run state) of the checkpoint to resume from, the same on every rank; None for a new run.

        Raises ValueError on every rank where the checkpoint is one of another model, other data or
        other ranks.
        """

        def read() -> tuple[str, dict[str, Any]] | None:
            path = newest(self._folder)
            if path is None:
                return None
            return path.name, json.loads((path / "run.json").read_text())

        found = self._topology.on_first_rank(read, f"read the checkpoint in {self._folder}")
        if found is None:
            return None
        changed = differences(found[1]["identity"], self._identity)
        if changed:
            raise ValueError(
                f"{self._folder / found[0]} cannot be resumed: {'; '.join(changed)}. A run keeps its model, data and "
                "ranks; choose another name for a new run, restore these values, or delete that folder"
            )
        return found

    def load(self, engine: Any, tag: str) -> None:
        """Restore model, optimizer and this rank's random state."""
        try:
            path, _ = engine.load_checkpoint(str(self._folder), tag=tag)
            state = torch.load(self._folder / tag / self._random_name(), weights_only=False)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"could not load the checkpoint {self._folder / tag} ({type(error).__name__}: {error}); if a file is "
                "missing or damaged, delete that folder to resume from an earlier one"
            ) from error
        if path is None:
            raise ValueError(
                f"{self._folder / tag} holds no complete DeepSpeed checkpoint; delete it to resume from an earlier one"
            )
        _set_random_state(state)

    def save(self, engine: Any, state: dict[str, Any], *, step: int) -> Path:
        """Write checkpoint ``step`` with the JSON values ``state``; every rank calls it."""
        tag = f"step-{step:09d}"
        temporary, final = self._folder / f"{tag}.tmp", self._folder / tag
        self._topology.on_first_rank(lambda: _empty(temporary), f"prepare {temporary}")
        engine.save_checkpoint(str(self._folder), tag=temporary.name, save_latest=False)
        torch.save(_random_state(), temporary / self._random_name())
        comm.barrier()

        def publish() -> None:
            _write(
                temporary / "run.json", json.dumps({**state, "identity": self._identity}, indent=1)
            )
            _write(temporary / MARKER, "")
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _write(self._folder / "latest.tmp", tag)
            (self._folder / "latest.tmp").replace(self._folder / "latest")
            self._prune(final)

        self._topology.on_first_rank(publish, f"write the checkpoint {final}")
        return final

    def _prune(self, current: Path) -> None:
        older = [path for path in complete(self._folder) if path != current]
        kept = [current, *older[len(older) - (self._keep - 1) :]]
        for path in self._folder.glob("step-*"):
            if path not in kept:
                shutil.rmtree(path)

    def _random_name(self) -> str:
        return f"random-rank{self._topology.rank:05d}.pt"


def _empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
