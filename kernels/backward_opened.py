"""What a backward holds between its stages, and what it decides from shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch

from .backward_beta import beta_gradient
from .backward_gradients import SMALLEST_BETA, gradients
from .backward_replay import replay
from .backward_reverse import reverse
from .common import CHUNK, cuts, slots
from .inputs import DTYPES, KEY_DIM, flat
from .launch import KEPT, current_stream, multiprocessors, ready, record
from .opened import OpenForward, Saved
from .plan import takes_turns

# Value heads (times rows of a batch) from which dS chains of whole sequences fill the GPU.
MANY_CHAINS = 64
BETWEEN = 1280  # bytes a token and value head between the kernels: S, dS, Vd
LARGE = 2**30  # so many of them, and a single sequence goes block by block
# Of value heads times documents, and of chunks times value heads: what makes kept states pay.
KEEPING_CHAINS, KEEPING_CHUNKS = 48, 2**14
FULL = 7 / 8  # of the multiprocessors
FEW_CHAINS = 2.5  # summaries a multiprocessor


def _check(q, saved, do, dfinal, value_heads) -> None:
    expected = (*q.shape[:2], value_heads, q.shape[-1])
    if tuple(do.shape) != expected or do.dtype != q.dtype:
        raise ValueError(f"do is {tuple(do.shape)} {do.dtype}; expected {expected} in {q.dtype}")
    if saved.a.shape[1] != value_heads or saved.a.dtype != q.dtype:
        raise ValueError(
            f"saved is of {saved.a.shape[1]} value heads in {saved.a.dtype}, the inputs of "
            f"{value_heads} in {q.dtype}: pass what the forward of these inputs returned"
        )
    if dfinal is not None:
        expected = (saved.cu_seqlens.numel() - 1, value_heads, KEY_DIM, KEY_DIM)
        if tuple(dfinal.shape) != expected or dfinal.dtype != torch.float32:
            raise ValueError(
                f"dfinal is {tuple(dfinal.shape)} {dfinal.dtype}; expected {expected} in fp32"
            )


@dataclass(frozen=True, eq=False)
class Layout:
    """What backwards of the same shapes, dtypes and options have in common: sizes and kernels."""

    q: tuple[int, ...]  # shapes as given, of k too
    v: tuple[int, ...]
    gate_dtype: torch.dtype  # of g
    beta_dtype: torch.dtype
    cut: bool  # the dS chain runs in the forward's segments
    processors: int  # multiprocessors of the GPU
    documents: int
    chunks: int  # slots; the last one of a single sequence is never in use
    many: bool  # chains of whole sequences fill the GPU
    block: int  # chunk slots of a block of time
    in_blocks: bool  # the states, too, are made and used block by block
    beside: bool  # the replay runs beside the dS chain, on a stream of its own
    entering: tuple[int, ...]  # shapes: what the replay makes, and its lists
    vd: tuple[int, ...]
    pairs: tuple[int, ...]
    summaries: int  # slots of summarised segments
    blocks: int  # of these, those that are not a document's last, at most
    segment: int  # chunks a segment of the dS chain
    segments: int  # slots of the forward's segments
    persistent: bool  # the replay takes them in turn
    halves: int  # of the dS chain: blocks of 64 columns of a value head a CTA
    ratio: int  # value heads of a key head
    replay_halves: int  # the replay's
    summary_halves: int  # the summaries'
    kind: dict[str, Any]  # options of the kernels

    @cached_property
    def summary(self) -> Callable[..., None]:
        return ready(reverse, halves=self.summary_halves, store=False, **self.kind)

    @cached_property
    def reverse(self) -> Callable[..., None]:
        return ready(reverse, halves=self.halves, store=True, **self.kind)

    @cached_property
    def replay(self) -> Callable[..., None]:
        return ready(replay, halves=self.replay_halves, **self.kind)

    @cached_property
    def gradients(self) -> Callable[..., None]:
        return ready(gradients, ratio=self.ratio, processors=self.processors, **self.kind)

    @cached_property
    def beta_gradient(self) -> Callable[..., None]:
        smallest = SMALLEST_BETA[self.kind["dtype"]]
        return ready(beta_gradient, smallest=smallest, processors=self.processors, **self.kind)


def halves_of(chains: int, processors: int) -> int:
    """Half the columns of a value head are a CTA's where chains are few and their latency counts. Where
    they fill the GPU both halves are: bytes count, and q, k and `a` are read once."""
    return 2 if chains >= FULL * processors else 1


_layouts: dict[tuple[Any, ...], Layout] = {}


def layout_of(q, v, g, beta, saved, do, dfinal, *, normalize, cut, at_once=False) -> Layout:
    """The layout of a backward's arguments, whose checks it makes; ValueError if they do not fit."""
    kind = (
        q.device, q.shape, v.shape, do.shape, q.dtype, g.dtype, beta.dtype, do.dtype,
        saved.a.shape, saved.a.dtype, saved.cu_seqlens.shape, saved.plan, normalize, cut, at_once,
        saved.entering is None,
        None if dfinal is None else (dfinal.shape, dfinal.dtype),
    )  # fmt: skip
    layout = _layouts.get(kind)
    if layout is None:
        _check(q, saved, do, dfinal, v.shape[2])
        if len(_layouts) == KEPT:
            _layouts.clear()
        layout = _layouts[kind] = _lay_out(q, v, g, beta, saved, normalize, cut, at_once)
    return layout


def _lay_out(q, v, g, beta, saved, normalize, cut, at_once) -> Layout:
    slots_, heads = saved.a.shape[:2]
    processors, tokens = multiprocessors(q.device), q.shape[0] * q.shape[1]
    documents = saved.cu_seqlens.numel() - 1
    block = block_length(saved, cut, processors)
    many = heads * q.shape[0] >= MANY_CHAINS
    kept = saved.entering is not None
    in_blocks = at_once and cut and block < slots_ and documents == 1 and not kept
    room = block if in_blocks else slots_
    summaries = slots(tokens, documents, saved.plan.summarised * CHUNK)
    # gates truncate most heads' chains: a few whole ones are waited for, the shorter the better
    few = summaries * heads <= FEW_CHAINS * processors
    # whole: a segment longer than any document, so that each is one
    segment = saved.plan.segment if cut else tokens // CHUNK + 2
    chains = (ceil(block / segment) if cut else documents) * heads
    return Layout(
        q=q.shape,
        v=v.shape,
        gate_dtype=g.dtype,
        beta_dtype=beta.dtype,
        cut=cut,
        processors=processors,
        documents=documents,
        chunks=max(1, ceil(tokens / CHUNK)) if documents == 1 else slots_,
        many=many,
        block=block,
        in_blocks=in_blocks,
        beside=not in_blocks and not many and not kept,
        entering=(room, heads, KEY_DIM, KEY_DIM),
        vd=(room, heads, CHUNK, KEY_DIM),
        pairs=(ceil(slots_ / block), 1 + block * heads),
        summaries=summaries,
        blocks=cuts(tokens, saved.plan.summarised * CHUNK),
        segment=segment,
        segments=slots(tokens, documents, saved.plan.segment * CHUNK),
        persistent=takes_turns(tokens, documents),
        halves=halves_of(chains, processors),
        ratio=heads // q.shape[2],
        replay_halves=saved.plan.halves,
        summary_halves=1 if few else 2,
        kind={
            "dtype": DTYPES[q.dtype],
            "beta_dtype": DTYPES[beta.dtype],
            "normalize": normalize,
        },
    )


@dataclass
class Walk:
    """The dS chain, and how far it is."""

    dstates: torch.Tensor  # [NS, Hv, K, V] fp32, of the states that leave the segments
    dfinal: torch.Tensor | None  # of the last documents
    dv: torch.Tensor  # [L, Hv, V]
    dh0: torch.Tensor  # [n, Hv, K, V] fp32, of the first sequences, as far as wanted
    carried: torch.Tensor  # [2, Hv, K, V] fp32, what goes on from one block to the next
    whole: torch.Tensor | None = None  # [NC, Hv, V, K], dS after each chunk, where all is there


@dataclass
class OpenBackward:
    """A backward between its stages: its inputs with batch and time in one axis, and what it made."""

    layout: Layout
    q: torch.Tensor  # [L, Hk, K]
    k: torch.Tensor
    v: torch.Tensor  # [L, Hv, V]
    do: torch.Tensor
    beta: torch.Tensor  # [L, Hv]
    saved: Saved
    dfinal: torch.Tensor | None  # [N, Hv, K, V] fp32
    initial: torch.Tensor | None  # of the first sequences
    scale: float
    normalize: bool
    open_left: int
    open_right: int
    truncate: bool
    entering: torch.Tensor  # [NC or block, Hv, V, K], the state that enters each chunk: replay's
    vd: torch.Tensor  # [NC or block, Hv, 64, V]
    lists: torch.Tensor  # of int32, to be zeroed: the next two
    tickets: torch.Tensor  # [1], of the replay: tickets.py
    pairs: torch.Tensor  # [blocks, 1 + pairs] int32: how many hold a beta of nearly zero, which
    stream: torch.cuda.Stream  # the caller's
    begun: torch.cuda.Event | None  # when the inputs were there, for a replay beside
    # [blocks + open_left, Hv, K, V] fp32, dS_ext of summarised segments, where the states enter
    external: torch.Tensor | None = None
    walk: "Walk | None" = None
    asked: bool = False  # for the replay
    replayed: torch.cuda.Event | None = None


def hold(
    layout, q, k, v, beta, saved, do, dfinal, scale, initial, normalize, normalized, left=0, right=0
) -> OpenBackward:
    """Inputs with batch and time in one axis, `do` as given."""
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    if initial is not None:
        initial = initial.contiguous()
    # the replay's, which waits on another stream for `begun`: torch may fill new memory, on this one
    entering, vd = saved.entering, saved.vd
    if entering is None:
        entering, vd = q.new_empty(layout.entering), q.new_empty(layout.vd)
    blocks, each = layout.pairs
    lists = saved.cu_seqlens.new_empty(1 + blocks * each)
    pairs = lists[1:].view(blocks, each)
    stream = current_stream(q.device)
    return OpenBackward(
        layout, q, k, v, flat(do), beta, saved, dfinal, initial,
        KEY_DIM**-0.5 if scale is None else scale, normalize, left, right, normalize or normalized,
        entering, vd, lists, lists[:1], pairs, stream, record(stream) if layout.beside else None,
    )  # fmt: skip


def block_length(saved: Saved, cut: bool, processors: int) -> int:
    """Chunk slots of a block of time. One long sequence has a few: where chains are not cut thirds, whose
    dS alone makes room; else halves, of whole segments that fill the GPU. Documents would fill it worse."""
    chunks, heads = saved.a.shape[:2]
    many = cut or heads >= MANY_CHAINS
    if saved.cu_seqlens.numel() > 2 or not many or chunks * CHUNK * heads * BETWEEN < LARGE:
        return chunks
    if not cut:
        return ceil(chunks / 3)
    filling = saved.plan.segment * ceil(FULL * processors / heads)
    block = filling * ceil(chunks // 2 / filling)
    return block if block < chunks - 1 else chunks  # the last slot is not in use


def keeping_pays(opened: OpenForward) -> bool:
    """Whether a forward whose backward follows at once saves time by keeping what that would replay: where so many dS
    chains run that the replay finds no multiprocessors beside them, or where it is long. Not where the backward
    walks blocks of time, whose states exist a block at a time: 5 % of the time is not worth 24 % of the memory."""
    saved, layout = opened.saved, opened.layout
    chunks, heads = saved.a.shape[:2]
    if heads * opened.shape[0] >= MANY_CHAINS:
        return True
    if block_length(saved, layout.plan.split, layout.processors) < chunks:
        return False
    return heads * layout.documents >= KEEPING_CHAINS or chunks * heads >= KEEPING_CHUNKS
