"""Small corpora, stores and forked processes for the data tests."""

import multiprocessing as mp
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cp_gdn.train.data import DataConfig, TokenStore


def text_config(path: Path, cache_dir: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"kind": "text", "path": str(path), "cache_dir": str(cache_dir)}
    return DataConfig(**{**values, "seq_len": 8, "val_fraction": 0.3, **changes})


def write_texts(folder: Path, count: int = 12) -> dict[str, bytes]:
    """Files of different lengths; returns their content by relative name."""
    texts = {f"part{i % 3}/{i:02d}.txt": f"counting {i} ".encode() * (i + 1) for i in range(count)}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return texts


def documents(store: TokenStore) -> list[list[int]]:
    return [
        store.tokens[a:b].tolist() for a, b in zip(store.starts, store.ends, strict=True)
    ]  # eos included


def byte_documents(store: TokenStore) -> list[bytes]:
    assert all(d[-1] == store.eos_id for d in documents(store))
    return [bytes(d[:-1]) for d in documents(store)]


def counting_store(lengths: Sequence[int], chosen: Sequence[bool] | None = None) -> TokenStore:
    """Every token of the file is its own position, so that a token says where it came from."""
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    starts = ends - np.array(lengths, dtype=np.int64)
    keep = np.ones(len(lengths), dtype=bool) if chosen is None else np.array(chosen)
    return TokenStore(
        tokens=np.arange(ends[-1], dtype=np.uint32),
        starts=starts[keep],
        ends=ends[keep],
        eos_id=1 << 30,
        num_bytes=int(ends[-1]),
        target_counts=np.zeros(1, dtype=np.int64),
        fingerprint="counting",
    )


def forked(count: int, fn: Callable[[int], Any], timeout_s: float = 30) -> list[Any]:
    """What ``fn(index)`` returned or raised in each of ``count`` forked processes."""
    context = mp.get_context("fork")
    queue = context.Queue()

    def main(index: int) -> None:
        try:
            queue.put((index, fn(index)))
        except BaseException as error:
            queue.put((index, error))

    processes = [context.Process(target=main, args=(i,)) for i in range(count)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=timeout_s) for _ in processes)
    for process in processes:
        process.join(timeout_s)
    return [results[i] for i in range(count)]
