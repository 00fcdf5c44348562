"""Packs of seq_len tokens: an epoch's documents, shuffled, laid end to end and cut; the packs shuffled again.

With the documents in the order o_0, o_1, ... and c_j the tokens before o_j, pack i holds the
stretch [i L, (i + 1) L) of that stream, found by a binary search in c. So a pack is a pure function
of (seed, epoch, i) and the loader's state is two integers. A document that the end of a pack cuts
goes on as a new document in the next pack; no target is lost by that, because the label of the last
token before the cut is the token after it. The end of the epoch is filled up with padding. The
packs are handed out in an order of their own, or a document of many packs would fill many steps in
a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cp_gdn.train.data.corpus import TokenStore

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Pack:
    """One micro batch of one row.

    Attributes:
        input_ids: LongTensor [seq_len].
        labels: LongTensor [seq_len], already shifted: the token after ``input_ids[t]`` in its
            document, IGNORE_INDEX at a document's last token and in padding. A pack of padding
            alone has no label at all.
        cu_seqlens: document offsets, 0 ... seq_len; padding is a document of its own.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: tuple[int, ...]


class PackLoader:
    """One data-parallel rank's packs: those with index dp_rank, dp_rank + dp_size, ... of an epoch.

    All dp ranks have ``packs_per_epoch`` packs; where the epoch has fewer, the last ones are
    padding. Ranks that share a sequence pass the same ``dp_rank``.

    Args:
        store: the documents.
        seq_len: tokens in a pack.
        dp_rank, dp_size: which share of the packs.
        seed: with the epoch, decides the order of the documents.
        shuffle: False keeps the order of the store in every epoch.

    Raises ValueError for seq_len < 2, a negative seed, and a dp_rank outside [0, dp_size).
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
    ):
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len} but a pack needs at least 2 tokens; raise it")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"dp_rank is {dp_rank} but must lie in [0, dp_size) with dp_size {dp_size}; pass "
                "the rank in the data-parallel group, not the global one"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed} but must not be negative; choose another")
        self._store, self._seq_len, self._shuffle = store, seq_len, shuffle
        self._dp_rank, self._dp_size, self._seed = dp_rank, dp_size, seed
        self.num_packs = -(-store.num_tokens // seq_len)
        self.packs_per_epoch = -(-self.num_packs // dp_size)
        self.epoch = 0
        self.sample = 0  # packs of this epoch that this rank has handed out
        self._stream: _Stream | None = None

    def next(self) -> Pack:
        """The next pack; after the last one of an epoch comes the first of the next epoch."""
        if self.sample == self.packs_per_epoch:
            self.epoch, self.sample, self._stream = self.epoch + 1, 0, None
        if self._stream is None:
            shuffle_key = (self._seed, self.epoch) if self._shuffle else None
            self._stream = _Stream(self._store, shuffle_key, num_packs=self.num_packs)
        pack = self._stream.pack(self.sample * self._dp_size + self._dp_rank, self._seq_len)
        self.sample += 1
        return pack

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; the same on every rank."""
        return {"epoch": self.epoch, "sample": self.sample, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken.

        Raises ValueError where it was taken with another seed, seq_len, dp_size or corpus.
        """
        differences = [
            f"{name} is {mine!r} but the saved run had {state.get(name)!r}"
            for name, mine in self._identity().items()
            if state.get(name) != mine
        ]
        if differences:
            raise ValueError(
                f"the data loader cannot resume: {'; '.join(differences)}; the packs would not be "
                "those that the saved run has left; resume with the saved values, or start a new "
                "run"
            )
        epoch, sample = state.get("epoch"), state.get("sample")
        if not (isinstance(epoch, int) and isinstance(sample, int) and epoch >= 0) or not (
            0 <= sample <= self.packs_per_epoch
        ):
            raise ValueError(
                f"the data loader cannot resume at epoch {epoch!r}, sample {sample!r}; an epoch "
                f"has {self.packs_per_epoch} samples; the checkpoint is damaged, use an earlier one"
            )
        self.epoch, self.sample, self._stream = epoch, sample, None

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "seq_len": self._seq_len,
            "dp_size": self._dp_size,
            "fingerprint": self._store.fingerprint,
        }


def validation_packs(
    store: TokenStore, seq_len: int, max_packs: int, *, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Pack]:
    """The first ``max_packs`` packs of the store in its own order, or all if there are fewer.

    With dp_size > 1 each rank gets its share, all of them equally many packs.
    """
    loader = PackLoader(
        store, seq_len=seq_len, dp_rank=dp_rank, dp_size=dp_size, seed=0, shuffle=False
    )
    for _ in range(-(-min(max_packs, loader.num_packs) // dp_size)):
        yield loader.next()


class _Stream:
    """One epoch's documents end to end, and the order of its packs."""

    def __init__(self, store: TokenStore, shuffle_key: tuple[int, int] | None, *, num_packs: int):
        self._tokens, self._eos_id = store.tokens, store.eos_id
        order: npt.NDArray[np.int64] | slice = slice(None)
        self._pack_order = np.arange(num_packs)
        if shuffle_key is not None:
            # numpy keeps a generator's raw bits from version to version, but not its permutations.
            bits = np.random.PCG64(shuffle_key)
            order = np.argsort(bits.random_raw(store.num_documents), kind="stable")
            self._pack_order = np.argsort(bits.random_raw(num_packs), kind="stable")
        self._starts = store.starts[order]
        self._lengths = store.ends[order] - self._starts
        self._cumulative = np.cumsum(self._lengths)

    def pack(self, place: int, seq_len: int) -> Pack:
        """The pack that comes in place ``place`` of the epoch; past the last one, padding."""
        index = int(self._pack_order[place]) if place < len(self._pack_order) else place
        input_ids = np.full(seq_len, self._eos_id, dtype=np.int64)
        labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
        starts, lengths, is_document_end = self._spans(index * seq_len, (index + 1) * seq_len)
        offsets = np.zeros(len(starts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        filled = int(offsets[-1])
        positions = np.arange(filled) + np.repeat(starts - offsets[:-1], lengths)
        input_ids[:filled] = self._tokens[positions]
        labels[:filled] = self._tokens[np.minimum(positions + 1, len(self._tokens) - 1)]
        labels[offsets[1:][is_document_end] - 1] = IGNORE_INDEX
        cu_seqlens = tuple(offsets.tolist()) + ((seq_len,) if filled < seq_len else ())
        return Pack(torch.from_numpy(input_ids), torch.from_numpy(labels), cu_seqlens)

    def _spans(
        self, begin: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The stretch [begin, end) of the stream as pieces of documents.

        Returns where each piece starts in the token file, its length, and whether it ends its
        document.
        """
        first = np.searchsorted(self._cumulative, begin, side="right")
        last = np.searchsorted(self._cumulative, end, side="left") + 1
        doc_ends = self._cumulative[first:last]
        doc_starts = doc_ends - self._lengths[first:last]
        piece_starts = np.maximum(doc_starts, begin)
        piece_ends = np.minimum(doc_ends, end)
        in_file = self._starts[first:last] + piece_starts - doc_starts
        return in_file, piece_ends - piece_starts, piece_ends == doc_ends
