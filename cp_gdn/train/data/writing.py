"""Tokenises a corpus into files that are memory-mapped afterwards.

    tokens.bin     uint16 or uint32 by vocabulary: the documents end to end, each closed by eos
    offsets.npy    int64 [documents + 1]
    is_val.npy     bool [documents]: which side of the split
    counts.npy     int64 [2, vocabulary]: how often a token is a target in train, in validation
    meta.json      what else a reader needs

A document belongs to the validation part if the hash of its split key, as a fraction of 2**64, is
below val_fraction; so neither order nor seed moves a document across.
"""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cp_gdn.train.data.config import DataConfig
from cp_gdn.train.data.progress import Progress, say
from cp_gdn.train.data.sources import Document, SourceFile, read_documents
from cp_gdn.train.data.tokenizer import TextTokenizer, character_start

FORMAT_VERSION = 1
BATCH_BYTES = 8 << 20
BATCH_DOCUMENTS = 1024


def write_corpus(
    folder: Path, config: DataConfig, files: Sequence[SourceFile], tokenizer: TextTokenizer
) -> None:
    """Writes the files above into ``folder`` and waits until they are on disk.

    Raises ValueError for files without text, for a single document too short to be cut in two, for
    a token id outside the vocabulary, and whatever reading and tokenising the documents raises.
    """
    started = time.monotonic()
    name = config.path or config.kind
    documents = _read_all(files, config.text_key)
    first = list(islice(documents, 2))
    if not first:
        raise ValueError(
            f"the corpus {name} holds no text in its {len(files)} files; give a path with at least "
            "one document that is not empty"
        )
    one_document = len(first) == 1
    if one_document:
        first = _cut_tail(first[0], config.val_fraction)
    body = _Body(folder, tokenizer)
    with Progress(f"tokenising {name}", sum(f.size for f in files)) as progress:
        body.write(chain(first, documents), progress)
    if len(body.sizes) < 2:
        raise ValueError(
            f"the corpus {name} has fewer than two parts that are not empty once tokenised; one is "
            "needed to train on and one to validate on; give more text"
        )
    if one_document:
        is_val = np.array([False, True])
    else:
        is_val = split(np.array(body.split_keys, dtype=np.uint64), config.val_fraction)
    body.finish(is_val, one_document)
    seconds = time.monotonic() - started
    say(f"tokenised {len(is_val)} documents, {body.offsets[-1]} tokens in {seconds:.1f} s")


def split(keys: npt.NDArray[np.uint64], val_fraction: float) -> npt.NDArray[np.bool_]:
    """True for validation. With two documents or more, neither part is empty."""
    is_val = keys < np.uint64(int(val_fraction * 2**64))
    if not is_val.any():
        is_val[keys.argmin()] = True
    elif is_val.all():
        is_val[keys.argmax()] = False
    return is_val


def count_targets(
    tokens: npt.NDArray[Any],
    offsets: npt.NDArray[np.int64],
    is_val: npt.NDArray[np.bool_],
    vocab_size: int,
    chunk: int = 1 << 22,
) -> npt.NDArray[np.int64]:
    """How often each token is a target, that is any token but a document's first.

    Returns int64 [2, vocab_size]: in train, in validation.
    """
    counts = np.zeros(2 * vocab_size, dtype=np.int64)
    for begin in range(0, len(tokens), chunk):
        end = min(begin + chunk, len(tokens))
        first = np.searchsorted(offsets, begin, side="right") - 1
        last = np.searchsorted(offsets, end, side="left")
        cuts = np.clip(offsets[first : last + 1], begin, end)
        row = np.repeat(is_val[first:last].astype(np.int64), cuts[1:] - cuts[:-1])
        starts = offsets[first:last]
        is_target = np.ones(end - begin, dtype=bool)
        is_target[starts[starts >= begin] - begin] = False
        keys = tokens[begin:end] + vocab_size * row
        counts += np.bincount(keys[is_target], minlength=2 * vocab_size)
    return counts.reshape(2, vocab_size)


class _Body:
    """The token file while it grows, with what is known of each document in it."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer):
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._content = hashlib.blake2b(digest_size=16)
        self.offsets = array("q", [0])
        self.split_keys = array("Q")
        self.sizes = array("q")  # bytes of text

    def write(self, documents: Iterable[Document], progress: Progress) -> None:
        with _durable(self._folder / "tokens.bin") as out:
            for batch in _batches(documents):
                for document, ids in zip(batch, self._tokenizer.encode(batch), strict=True):
                    if len(ids):
                        self._append(out, document, ids)
                progress.to(batch[-1].position)

    def _append(self, out: BinaryIO, document: Document, ids: npt.NDArray[np.uint32]) -> None:
        if ids.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"{document.where} has the token id {ids.max()} but the tokenizer's vocabulary is "
                f"{self._tokenizer.vocab_size}; ids must lie below it; use a tokenizer.json that "
                "lists all its tokens"
            )
        tokens = np.append(ids, np.uint32(self._tokenizer.eos_id)).astype(self._dtype)
        out.write(tokens.data)
        self._content.update(tokens.data)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.sizes.append(len(document.text))
        key = hashlib.blake2b(document.split_key, digest_size=8).digest()
        self.split_keys.append(int.from_bytes(key, "little"))

    def finish(self, is_val: npt.NDArray[np.bool_], one_document: bool) -> None:
        vocab_size, eos_id = self._tokenizer.vocab_size, self._tokenizer.eos_id
        offsets = np.array(self.offsets, dtype=np.int64)
        sizes = np.array(self.sizes, dtype=np.int64)
        self._content.update(offsets.data)
        self._content.update(is_val.data)
        self._content.update(f"{self._dtype} {vocab_size} {eos_id}".encode())
        tokens = np.memmap(self._folder / "tokens.bin", dtype=self._dtype, mode="r")
        counts = count_targets(tokens, offsets, is_val, vocab_size)
        for name, values in (("offsets", offsets), ("is_val", is_val), ("counts", counts)):
            with _durable(self._folder / f"{name}.npy") as out:
                np.save(out, values)
        meta = {
            "version": FORMAT_VERSION,
            "dtype": self._dtype.name,
            "num_tokens": len(tokens),
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "train_bytes": int(sizes[~is_val].sum()),
            "val_bytes": int(sizes[is_val].sum()),
            "one_document": one_document,
            "fingerprint": self._content.hexdigest(),
        }
        with _durable(self._folder / "meta.json") as out:
            out.write(json.dumps(meta, indent=1).encode())


def _read_all(files: Sequence[SourceFile], text_key: str) -> Iterator[Document]:
    """The documents of all files; positions count from the first file on."""
    before = 0
    for file in files:
        for document in read_documents(file, text_key):
            yield document._replace(position=before + document.position)
        before += file.size


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut_tail(document: Document, val_fraction: float) -> list[Document]:
    """A corpus of one document: its head to train on, its tail to validate on."""
    text = document.text
    wanted = min(max(round(len(text) * (1 - val_fraction)), 1), len(text) - 1)
    cut = character_start(text, wanted)
    return [document._replace(text=text[:cut]), document._replace(text=text[cut:])]


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
