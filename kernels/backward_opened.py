"""What a backward holds between its stages, and what it decides from shapes alone."""

from dataclasses import dataclass
from math import ceil

import torch

from .common import CHUNK
from .forward import DTYPES, KEY_DIM, Saved
from .launch import multiprocessors

# Value heads (times rows of a batch) from which dS chains of whole sequences fill the GPU.
MANY_CHAINS = 64
BETWEEN = 1280  # bytes a token and value head between the kernels: S, dS, Vd
LARGE = 2**30  # so many of them, and a single sequence goes block by block
FULL = 7 / 8  # of the multiprocessors


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


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, *x.shape[2:]).contiguous()


@dataclass
class Walk:
    """The dS chain, and how far it is."""

    dstates: torch.Tensor  # [NS, Hv, K, V] fp32, of the states that leave the segments
    dfinal: torch.Tensor | None
    halves: int
    segment: int
    dv: torch.Tensor  # [L, Hv, V]
    dh0: torch.Tensor  # [N, Hv, K, V] fp32
    carried: torch.Tensor  # [2, Hv, K, V] fp32, what goes on from one block to the next
    whole: torch.Tensor | None = None  # [NC, Hv, V, K], dS after each chunk, where all is there


@dataclass
class OpenBackward:
    """A backward between its stages: its inputs with batch and time in one axis, and what it made."""

    inputs: tuple[torch.Tensor, ...]  # q, k, v, g, beta as given
    q: torch.Tensor  # [L, Hk, K]
    k: torch.Tensor
    v: torch.Tensor  # [L, Hv, V]
    do: torch.Tensor
    beta: torch.Tensor  # [L, Hv]
    saved: Saved
    dfinal: torch.Tensor | None  # [N, Hv, K, V] fp32
    initial: torch.Tensor | None
    scale: float
    normalize: bool
    open_left: int
    open_right: int
    truncate: bool
    cut: bool  # the dS chain runs in the forward's segments
    block: int  # chunk slots of a block of time
    in_blocks: bool  # the states, too, are made and used block by block
    entering: torch.Tensor  # [NC or block, Hv, V, K], the state that enters each chunk: replay's
    vd: torch.Tensor  # [NC or block, Hv, 64, V]
    pairs: torch.Tensor  # [blocks, 1 + pairs] int32: how many hold a beta of nearly zero, which
    begun: torch.cuda.Event  # when the inputs were there
    external: torch.Tensor | None = None  # [NS, Hv, K, V] fp32, dS_ext of summarised segments
    walk: "Walk | None" = None
    replayed: torch.cuda.Event | None = None

    @property
    def documents(self) -> int:
        return self.saved.cu_seqlens.numel() - 1

    @property
    def chunks(self) -> int:
        """Chunk slots; the last one of a single sequence is never in use."""
        slots = self.saved.a.shape[0]
        return max(1, ceil(self.q.shape[0] / CHUNK)) if self.documents == 1 else slots

    @property
    def bits(self) -> int:
        return (self.documents - 1).bit_length()

    @property
    def kind(self) -> dict:
        return {
            "dtype": DTYPES[self.q.dtype],
            "beta_dtype": DTYPES[self.beta.dtype],
            "normalize": self.normalize,
        }


def hold(
    q, k, v, g, beta, saved, do, dfinal, scale, initial, normalize, normalized, left=0, right=0, *,
    cut, at_once=False,
):  # fmt: skip
    chunks, value_heads = saved.a.shape[:2]
    _check(q, saved, do, dfinal, v.shape[2])
    q_, k_, v_, do_, beta_ = (_flat(x) for x in (q, k, v, do, beta))
    dfinal, initial = (None if x is None else x.contiguous() for x in (dfinal, initial))
    block = block_length(saved, cut, multiprocessors(q.device))
    in_blocks = at_once and cut and block < chunks and saved.cu_seqlens.numel() == 2
    room = block if in_blocks else chunks
    entering = q_.new_empty(room, value_heads, KEY_DIM, KEY_DIM)
    vd = q_.new_empty(room, value_heads, CHUNK, KEY_DIM)
    pairs = torch.empty(
        ceil(chunks / block), 1 + block * value_heads, dtype=torch.int32, device=q.device
    )
    begun = torch.cuda.current_stream(q.device).record_event()
    return OpenBackward(
        (q, k, v, g, beta), q_, k_, v_, do_, beta_, saved, dfinal, initial,
        KEY_DIM**-0.5 if scale is None else scale, normalize, left, right,
        normalize or normalized, cut, block, in_blocks, entering, vd, pairs, begun,
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
