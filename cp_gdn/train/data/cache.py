"""A corpus on disk, prepared once for all processes of a job and of several jobs.

A finished folder cache_dir/<key> is mapped without a lock. Where there is none, a process takes the
file lock <key>.lock, looks again, writes <key>.partial, and renames it when it is complete and on
disk. So a folder without .partial is whole, and a .partial whose lock is free was left by a process
that died: it is removed. The system frees a lock whose holder dies, so nobody waits for the dead.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cp_gdn.train.data.config import DataConfig
from cp_gdn.train.data.progress import say
from cp_gdn.train.data.sources import SourceFile
from cp_gdn.train.data.tokenizer import TextTokenizer
from cp_gdn.train.data.writing import FORMAT_VERSION, write_corpus


class Cached(NamedTuple):
    """A finished cache: the files of ``writing``, the tokens memory-mapped."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    offsets: npt.NDArray[np.int64]
    is_val: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.int64]
    meta: dict[str, Any]


def cache_key(config: DataConfig, files: Sequence[SourceFile], tokenizer: TextTokenizer) -> str:
    """The name of the cache: a fingerprint of the file listing and of what shapes the tokens."""
    listing = [(f.name, f.size, f.mtime_ns) for f in files]
    shape = (FORMAT_VERSION, config.kind, config.text_key, config.val_fraction, tokenizer.identity)
    digest = hashlib.blake2b(repr((shape, listing)).encode(), digest_size=10)
    return f"{config.kind}-{digest.hexdigest()}"


def open_or_write(
    config: DataConfig, files: Sequence[SourceFile], tokenizer: TextTokenizer, *, rank: int
) -> Cached:
    """The cache of a corpus, written first where there is none.

    Any process that finds none takes the lock and writes it, or fails by itself, so that all
    processes raise the same ValueError: those of ``write_corpus``, and one for a cache_dir that
    cannot be used. Rank 0 says that it waits.
    """
    cache_dir = Path(config.cache_dir)
    folder = cache_dir / cache_key(config, files, tokenizer)

    def tell() -> None:
        if rank == 0:
            say(f"waiting for another process that is preparing the corpus {folder}")

    try:
        if (found := read_cache(folder)) is not None:
            return found
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), on_wait=tell):
            if (found := read_cache(folder)) is not None:
                return found
            _remove_leftovers(folder)
            _write_and_rename(folder, config, files, tokenizer)
        written = read_cache(folder)
    except OSError as error:
        raise ValueError(
            f"cache_dir {cache_dir} cannot be used ({error.strerror or error}); it must be a "
            "writable folder with room for the tokens on a file system with file locks; give "
            "another cache_dir"
        ) from error
    assert written is not None
    return written


def read_cache(folder: Path) -> Cached | None:
    """The cache in ``folder``, or None where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        dtype = np.dtype(meta["dtype"])
        if (folder / "tokens.bin").stat().st_size != meta["num_tokens"] * dtype.itemsize:
            return None
        offsets, is_val, counts = (
            np.load(folder / f"{name}.npy") for name in ("offsets", "is_val", "counts")
        )
        tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    if len(offsets) != len(is_val) + 1 or offsets[-1] != len(tokens):
        return None
    return Cached(np.asarray(tokens), offsets, is_val, counts, meta)


@contextmanager
def _locked(path: Path, *, on_wait: Callable[[], None] | None) -> Iterator[bool]:
    """Holds the lock file; with ``on_wait=None`` it yields False instead of waiting."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                yield False
                return
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _remove_leftovers(folder: Path) -> None:
    """Clears the way for ``folder``, whose lock is held, and removes what dead writers left."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
    for partial in folder.parent.glob("*.partial"):
        with _locked(partial.with_suffix(".lock"), on_wait=None) as free:
            if free:
                shutil.rmtree(partial, ignore_errors=True)


def _write_and_rename(
    folder: Path, config: DataConfig, files: Sequence[SourceFile], tokenizer: TextTokenizer
) -> None:
    partial = folder.with_suffix(".partial")
    partial.mkdir()
    try:
        write_corpus(partial, config, files, tokenizer)
        _sync_folder(partial)
        partial.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
