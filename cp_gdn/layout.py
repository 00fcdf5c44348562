"""How the tokens of one rank are cut into chunks: host tuples and one index tensor, built once a batch.

A *piece* is the part of one document that lies in one shard. The chunk grid starts at every piece's first
token. Chunks are
stored step-major: step j holds chunk j of every piece that has one, longest pieces first, so that the pieces
still running at
step j are a prefix, and walking the recurrence needs slices only:

    chunk id of (piece p, step j) = step_offsets[j] + position[p]

Nothing here knows of ranks or process groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a shard that belong to document ``doc``, whose global span is [doc_start, doc_end)."""

    start: int
    end: int
    doc: int
    doc_start: int
    doc_end: int


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of ``batch`` rows of ``num_tokens`` tokens. Sequences are numbered row by row, piece by piece.

    order: sequence numbers, longest first; slots [batch * num_tokens]: the place of each token among the
    padded chunk rows.
    """

    batch: int
    num_tokens: int
    num_sequences: int
    order: tuple[int, ...]
    step_offsets: tuple[int, ...]
    dense: bool
    slots: Tensor  # [B * T] long
    order_index: Tensor  # [N] long: sequence at each position
    position_index: Tensor  # [N] long: position of each sequence

    @property
    def num_chunks(self) -> int:
        return self.step_offsets[-1]

    def to_chunks(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [chunks, CHUNK, ...], zeros where a chunk is longer than its piece."""
        flat = x.reshape(self.batch * self.num_tokens, *x.shape[2:])
        if not self.dense:
            rows = flat.new_zeros(self.num_chunks * CHUNK, *flat.shape[1:])
            flat = rows.index_copy_(0, self.slots, flat)
        return flat.view(self.num_chunks, CHUNK, *x.shape[2:])

    def from_chunks(self, x: Tensor) -> Tensor:
        """[chunks, CHUNK, ...] -> [B, T, ...], the inverse of :meth:`to_chunks`."""
        flat = x.reshape(self.num_chunks * CHUNK, *x.shape[2:])
        if not self.dense:
            flat = flat.index_select(0, self.slots)
        return flat.view(self.batch, self.num_tokens, *x.shape[2:])

    def steps(self, first: int = 0, last: int | None = None) -> list[tuple[slice, int]]:
        """(chunk ids, active count) of every step, for the sequences at positions [first, last) of ``order`` only."""
        last = self.num_sequences if last is None else last
        out = []
        for low, high in zip(self.step_offsets[:-1], self.step_offsets[1:], strict=True):
            active = min(high - low, last) - first
            if active <= 0:
                break
            out.append((slice(low + first, low + first + active), active))
        return out


def build_layout(pieces: tuple[Piece, ...], batch: int, device: torch.device) -> ChunkLayout:
    """The layout of ``batch`` rows that are each cut into ``pieces`` (one piece where batch > 1)."""
    num_tokens = pieces[-1].end
    lengths = [p.end - p.start for p in pieces] * batch
    counts = [-(-length // CHUNK) for length in lengths]
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    position = [0] * len(order)
    for place, sequence in enumerate(order):
        position[sequence] = place

    step_offsets = [0]
    active = len(order)
    for done in range(counts[order[0]]):
        while counts[order[active - 1]] <= done:
            active -= 1
        step_offsets.append(step_offsets[-1] + active)

    # of every chunk, sequence by sequence: its step, its first token and how many it holds
    sizes, chunks = torch.tensor(lengths), torch.tensor(counts)
    step = torch.arange(sum(counts)) - (chunks.cumsum(0) - chunks).repeat_interleave(chunks)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(chunks) + step * CHUNK
    held = (sizes.repeat_interleave(chunks) - step * CHUNK).clamp_(max=CHUNK)
    chunk = torch.tensor(step_offsets)[step] + torch.tensor(position).repeat_interleave(chunks)
    slots = torch.arange(batch * num_tokens) + (chunk * CHUNK - start).repeat_interleave(held)
    dense = len(lengths) == 1 and num_tokens % CHUNK == 0
    return ChunkLayout(
        batch=batch,
        num_tokens=num_tokens,
        num_sequences=len(lengths),
        order=tuple(order),
        step_offsets=tuple(step_offsets),
        dense=dense,
        slots=slots.to(device),
        order_index=torch.tensor(order, dtype=torch.long, device=device),
        position_index=torch.tensor(position, dtype=torch.long, device=device),
    )
