"""A tokenised corpus: two sets of documents, to train and to validate on, over one memory map.

Losses are compared in bits per byte, which does not depend on the tokenizer. With n bytes of text
and m targets (every token but the first of each document),

    bits per byte = (mean loss in nats / ln 2) / (n / m)

and the baseline is that of a unigram model, p(w) = (count_train(w) + 1) / (m_train + V).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_gdn.train.data.cache import open_or_write
from cp_gdn.train.data.config import DataConfig
from cp_gdn.train.data.progress import say
from cp_gdn.train.data.sources import list_files
from cp_gdn.train.data.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Some of a corpus's documents.

    Attributes:
        tokens: [corpus tokens] uint16 or uint32, memory-mapped, the documents of all stores.
        starts, ends: [documents] int64, document ``i`` is ``tokens[starts[i]:ends[i]]``.
        eos_id: the last token of every document; also fills what a pack has no text for.
        num_bytes: bytes of text in these documents.
        target_counts: [vocabulary] int64, how often each token is a target here.
        fingerprint: the same for the same tokens in the same documents.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    eos_id: int
    num_bytes: int
    target_counts: npt.NDArray[np.int64]
    fingerprint: str

    @cached_property
    def num_tokens(self) -> int:
        return int((self.ends - self.starts).sum())

    @property
    def num_documents(self) -> int:
        return len(self.starts)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each target; exactly 1 with the byte tokenizer."""
        return self.num_bytes / (self.num_tokens - self.num_documents)


@dataclass(frozen=True, eq=False)
class Corpus:
    """What ``build_corpus`` returns. Token ids lie in [0, vocab_size)."""

    train: TokenStore
    val: TokenStore
    vocab_size: int
    eos_id: int
    fingerprint: str

    @property
    def bytes_per_token(self) -> float:
        """That of the validation text, which turns a validation loss into bits per byte."""
        return self.val.bytes_per_token

    def bits_per_byte(self, loss: float) -> float:
        """``loss``, the mean over the validation targets in nats, in bits per byte of text."""
        return loss / math.log(2) / self.bytes_per_token


def build_corpus(config: DataConfig, *, rank: int = 0) -> Corpus:
    """Opens the corpus, tokenising it first where ``config.cache_dir`` does not hold it yet.

    Every rank calls it, with no process group: one takes the file lock and does the work, the
    others wait and then map the result. ``rank`` decides only who speaks of waiting; the process at
    work shows its progress.

    Raises ValueError, the same in every process: a path or tokenizer that cannot be read, no file
    that fits, a record without text, no text at all, less training text than one pack, a cache_dir
    that cannot be written.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    files = list_files(config.kind, config.path)
    cached = open_or_write(config, files, tokenizer, rank=rank)
    meta = cached.meta

    def store(name: str, chosen: npt.NDArray[np.bool_], row: int) -> TokenStore:
        return TokenStore(
            tokens=cached.tokens,
            starts=cached.offsets[:-1][chosen],
            ends=cached.offsets[1:][chosen],
            eos_id=meta["eos_id"],
            num_bytes=meta[f"{name}_bytes"],
            target_counts=cached.counts[row],
            fingerprint=f"{meta['fingerprint']}-{name}",
        )

    train, val = store("train", ~cached.is_val, 0), store("val", cached.is_val, 1)
    if train.num_tokens < config.seq_len:
        raise ValueError(
            f"the training part of the corpus {config.path or config.kind} has {train.num_tokens} "
            f"tokens but seq_len is {config.seq_len}; one sample needs seq_len tokens; give more "
            "text or lower seq_len"
        )
    if rank == 0 and meta["one_document"]:
        share = 100 * val.num_tokens / (train.num_tokens + val.num_tokens)
        say(f"the corpus is one document: its last {share:.1f} % are held out for validation")
    return Corpus(train, val, meta["vocab_size"], meta["eos_id"], meta["fingerprint"])


def unigram_bits_per_byte(corpus: Corpus) -> float:
    """What a unigram model of the training text costs on the validation text, in bits per byte."""
    counts = corpus.train.target_counts
    bits = -np.log2((counts + 1) / (counts.sum() + len(counts)))
    return float(corpus.val.target_counts @ bits) / corpus.val.num_bytes
