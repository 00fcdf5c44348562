"""CPContext: how one batch of long sequences is cut over a group of ranks, decided once on the host.

Rank r holds the tokens [bounds[r], bounds[r + 1]) of every sequence. A state crosses the cut before rank r where a
document has tokens on both sides of it; a rank is *through* where one document covers it whole and goes on at both
ends: only there is the transition M of `S_out = M S_in + S_ext` needed. All of this is known to every rank from the
document offsets alone, so layers neither read device memory nor ask each other what to do.
"""

import bisect
import itertools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import comm, sharding
from .layout import CHUNK, ChunkLayout, Piece, build_layout
from .virtual import VirtualGroup

EXCHANGES = ("ring", "all_to_all", "all_gather", "serial")


@dataclass(frozen=True, eq=False)
class CPContext:
    """What a layer must know about the sharding of its batch. Make one with :func:`build_cp_context`, once a batch.

    Tokens are counted per row; with more than one row (B > 1) every row is one document. Host fields are of ints;
    ``position_ids`` [T_local] (int64, the position within the document), ``local_offsets`` [pieces + 1] (int32, the
    pieces of this shard) and ``local_order`` [pieces] (int32, the longest first) lie on ``device``.
    """

    group: comm.Group | None
    rank: int
    size: int
    seq_len: int
    shard_bounds: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    exchange: str
    device: torch.device
    pieces: tuple[Piece, ...]
    position_ids: Tensor
    local_offsets: Tensor
    local_order: Tensor
    _layouts: dict[tuple[int, torch.device], ChunkLayout] = field(default_factory=dict, repr=False)
    # kinds of calls (shapes, dtypes, options) that were found to fit, and what they need: of the operators
    calls: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def longest_piece(self) -> int:
        """Tokens of the longest piece of a document on this rank."""
        return max(piece.end - piece.start for piece in self.pieces)

    @cached_property
    def start(self) -> int:
        return self.shard_bounds[self.rank]

    @cached_property
    def end(self) -> int:
        return self.shard_bounds[self.rank + 1]

    @cached_property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        bounds = self.shard_bounds
        return tuple(high - low for low, high in itertools.pairwise(bounds))

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def document_start(self, token: int) -> int:
        """Global offset at which the document of global token ``token`` starts."""
        return self.cu_seqlens[bisect.bisect_right(self.cu_seqlens, token) - 1]

    def crosses(self, cut: int) -> bool:
        """Whether a document lies on both sides of the cut before rank ``cut`` (0 < cut < size)."""
        return self._crossed[cut]

    def through(self, rank: int) -> bool:
        """Whether one document covers the shard of ``rank`` and crosses both its cuts."""
        return self._covered[rank]

    @cached_property
    def _crossed(self) -> tuple[bool, ...]:
        bounds = self.shard_bounds[1:-1]
        return (False, *(self.document_start(bound) < bound for bound in bounds), False)

    @cached_property
    def _covered(self) -> tuple[bool, ...]:
        bounds, crossed = self.shard_bounds, self._crossed
        return tuple(
            crossed[r] and crossed[r + 1] and self.document_start(bounds[r + 1]) < bounds[r]
            for r in range(self.size)
        )

    @cached_property
    def is_through(self) -> bool:
        return self.through(self.rank)

    @cached_property
    def any_through(self) -> bool:
        """Whether any rank is through; where none is, no rank needs an M."""
        return any(self._covered)

    @cached_property
    def crosses_left(self) -> bool:
        return self.crosses(self.rank)

    @cached_property
    def crosses_right(self) -> bool:
        return self.crosses(self.rank + 1)

    @cached_property
    def any_crossing(self) -> bool:
        """Whether any cut of the group is crossed; where none is, no rank exchanges anything."""
        return any(self._crossed)

    def check_tokens(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` [B, T, ...] is this rank's part of a batch that the context fits."""
        B, T = x.shape[:2]
        if self.num_tokens != T:
            raise ValueError(
                f"got {T} tokens but the context gives rank {self.rank} {self.num_tokens} of {self.seq_len}; shard the "
                "input with ctx.shard, and build a context for every batch shape"
            )
        if B > 1 and self.num_documents > 1:
            raise ValueError(
                f"batch size {B} with {self.num_documents} packed documents; document offsets describe one row, so "
                "pass B = 1 (concatenate the rows and extend cu_seqlens) or leave cu_seqlens out"
            )

    def layout(self, batch: int, device: torch.device) -> ChunkLayout:
        """The chunk layout of ``batch`` rows of this shard; built at the first use and kept."""
        key = (batch, device)
        if key not in self._layouts:
            self._layouts[key] = build_layout(self.pieces, batch, device)
        return self._layouts[key]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's slice of a tensor that holds the whole sequence along ``dim``, a view of it; differentiable.

        The gradient is zero outside the slice. Raises ValueError if ``dim`` is not ``seq_len`` long.
        """
        return sharding.shard(x, self, dim)

    def gather(self, local: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence along ``dim`` from every rank's slice, the same on every rank; differentiable.

        The gradient is the sum of the ranks' gradients, cut to this rank's slice. Raises ValueError if ``dim`` is not
        ``num_tokens`` long.
        """
        return sharding.gather(local, self, dim)


def build_cp_context(
    group: comm.Group | DeviceMesh | None = None,
    *,
    seq_len: int,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    shard_sizes: Sequence[int] | None = None,
    exchange: str = "auto",
    device: torch.device | str | None = None,
) -> CPContext:
    """Plan the sharding of one batch over the ranks of ``group``.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, the group of a virtual rank (virtual.py), or None for a single rank.
        seq_len: tokens of the whole sequence (per row).
        cu_seqlens: GLOBAL document offsets ``0 = c_0 < c_1 < ... < c_N = seq_len`` (list or tensor, read once);
            None: one document.
        shard_sizes: tokens per rank, positive, summing to ``seq_len``; default: cuts at multiples of 64, as even as
            possible, or an even split by tokens where there are fewer 64-token blocks than ranks.
        exchange: "ring", "all_to_all", "all_gather", "serial" or "auto".
        device: where the index tensors live; default: the current CUDA device for NCCL groups, the virtual
            ranks' device, else the CPU.

    Raises:
        ValueError: the same on every rank that passes the same arguments, before any communication.
    """
    group, rank, size = _resolve_group(group)
    arguments = (seq_len, cu_seqlens, shard_sizes, exchange, size)
    agree = debug_enabled() and size > 1
    bounds, offsets, exchange = _agreed(group, *arguments) if agree else _plan(*arguments)
    if device is None and isinstance(group, VirtualGroup):
        device = group.device
    elif device is None:
        on_gpu = isinstance(group, dist.ProcessGroup) and comm.moves_by_nccl(group)
        device = (
            torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        )
    device = torch.device(device)

    pieces = _pieces(offsets, bounds[rank], bounds[rank + 1])
    sizes = torch.tensor([p.end - p.start for p in pieces])
    starts = torch.tensor([p.doc_start for p in pieces]).repeat_interleave(sizes)
    positions = torch.arange(bounds[rank], bounds[rank + 1]) - starts
    context = CPContext(
        group=group,
        rank=rank,
        size=size,
        seq_len=bounds[-1],
        shard_bounds=bounds,
        cu_seqlens=offsets,
        exchange=exchange,
        device=device,
        pieces=pieces,
        position_ids=positions.to(device),
        local_offsets=torch.tensor([0, *(p.end for p in pieces)], dtype=torch.int32, device=device),
        local_order=sizes.argsort(descending=True, stable=True).to(device, torch.int32),
    )
    context.layout(1, device)
    comm.warm_up(group)
    return context


def debug_enabled() -> bool:
    """Whether CP_GDN_DEBUG asks for value checks that read device memory."""
    return os.environ.get("CP_GDN_DEBUG", "0") not in ("", "0")


def _resolve_group(group) -> tuple[comm.Group | None, int, int]:
    if group is None:
        return None, 0, 1
    if isinstance(group, VirtualGroup):
        return group, group.rank, group.size
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"the DeviceMesh has {group.ndim} axes {group.mesh_dim_names}; context parallelism needs one axis: "
                'pass a slice of it, such as mesh["cp"]'
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            "this rank is not a member of the group; every rank must build its context with the context-parallel "
            "group that it belongs to (with a DeviceMesh, pass its cp axis)"
        )
    return group, dist.get_rank(group), dist.get_world_size(group)


def _ints(name: str, values: Tensor | Sequence[int], rule: str) -> tuple[int, ...]:
    """Integers as they are: what int() would round or parse is refused."""
    try:
        return tuple(map(operator.index, values.tolist() if isinstance(values, Tensor) else values))
    except TypeError:
        raise ValueError(f"{name} is {values!r}; it must be {rule}") from None


Plan = tuple[tuple[int, ...], tuple[int, ...], str]


def _plan(seq_len: Any, cu_seqlens: Any, shard_sizes: Any, exchange: str, size: int) -> Plan:
    """Bounds, offsets and exchange of the arguments of build_cp_context."""
    rule = "a positive int, the tokens of the whole sequence"
    (seq_len,) = _ints("seq_len", [seq_len], rule)
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; it must be {rule}")
    offsets = _check_offsets(cu_seqlens, seq_len)
    bounds = _check_bounds(shard_sizes, seq_len, size)
    if exchange == "auto":
        exchange = "ring" if size <= 2 else "all_to_all"
    if exchange not in EXCHANGES:
        raise ValueError(
            f"exchange={exchange!r} is unknown; choose one of {', '.join(EXCHANGES)} or auto"
        )
    return bounds, offsets, exchange


def _agreed(group: comm.Group | None, *arguments: Any) -> Plan:
    """:func:`_plan`, or an error on every rank where one rank's arguments are bad or not those of another."""
    mine: Plan | str
    try:
        mine = _plan(*arguments)
    except ValueError as problem:
        mine = str(problem)
    plans = comm.gather_objects(mine, group)
    odd = [rank for rank, plan in enumerate(plans) if plan != plans[0]]
    if odd:
        bad = [f"; rank {rank}: {plan}" for rank, plan in enumerate(plans) if isinstance(plan, str)]
        raise ValueError(
            f"ranks {odd} planned another sharding than rank 0 (bounds, offsets or exchange differ); every rank must "
            f"call build_cp_context with the same seq_len, cu_seqlens, shard_sizes and exchange{''.join(bad)}"
        )
    if isinstance(mine, str):
        raise ValueError(mine)
    return mine


def _check_offsets(cu_seqlens: Tensor | Sequence[int] | None, seq_len: int) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (0, seq_len)
    offsets = _ints("cu_seqlens", cu_seqlens, "document offsets, a list or 1-D tensor of integers")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != seq_len:
        ends = f"{offsets[0]} to {offsets[-1]}" if offsets else "None to None"
        raise ValueError(
            f"cu_seqlens runs from {ends} but must run from 0 to seq_len = {seq_len}; under context parallelism "
            "it holds GLOBAL offsets, the same on every rank"
        )
    for place, (low, high) in enumerate(itertools.pairwise(offsets)):
        if high <= low:
            raise ValueError(
                f"cu_seqlens is not increasing: entry {place + 1} is {high} after {low}; drop empty documents and sort "
                "the offsets"
            )
    return offsets


def _check_bounds(shard_sizes: Sequence[int] | None, seq_len: int, size: int) -> tuple[int, ...]:
    if seq_len < size:
        raise ValueError(
            f"seq_len {seq_len} is smaller than the {size} ranks of the group; every rank needs at least one token: "
            "use fewer ranks or longer sequences"
        )
    if shard_sizes is None:
        blocks, unit = -(-seq_len // CHUNK), CHUNK
        if blocks < size:
            blocks, unit = seq_len, 1
        each, extra = divmod(blocks, size)
        return tuple(min(seq_len, unit * (r * each + min(r, extra))) for r in range(size + 1))
    sizes = _ints("shard_sizes", shard_sizes, "one integer for each rank")
    if len(sizes) != size or any(s < 1 for s in sizes):
        raise ValueError(
            f"shard_sizes is {list(sizes)} for {size} ranks; give one positive number of tokens for each rank"
        )
    if sum(sizes) != seq_len:
        raise ValueError(
            f"shard_sizes sum to {sum(sizes)} but seq_len is {seq_len}; they must cover every token exactly once"
        )
    return (0, *itertools.accumulate(sizes))


def _pieces(offsets: tuple[int, ...], start: int, end: int) -> tuple[Piece, ...]:
    first = bisect.bisect_right(offsets, start) - 1
    pieces = []
    for doc in range(first, len(offsets) - 1):
        low, high = offsets[doc], offsets[doc + 1]
        if low >= end:
            break
        pieces.append(Piece(max(low, start) - start, min(high, end) - start, doc, low, high))
    return tuple(pieces)
