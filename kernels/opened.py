"""What a forward holds between its stages, and what it leaves to the backward."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .common import CHUNK
from .inputs import KEY_DIM, Packed
from .layout import Layout
from .plan import Plan


class Saved(NamedTuple):
    """What a backward needs beside the inputs: 132 bytes a token and value head, 8 a token and key
    head where the kernels normalise, and 128 KiB a head and place between two segments. `a` and `gate` are read as they
    are; preparing them again would cost as much time as writing and reading them, and nothing else of
    the forward is worth its bytes. Where no M is needed any more `maps` and `live` are placeholders."""

    a: torch.Tensor  # [NC, Hv, 64, 64], see prepare.py
    gate: torch.Tensor  # [NC, Hv, 64] fp32
    rnorm: torch.Tensor  # [NC, Hk, 64] fp32 if the kernels normalise, else a placeholder
    qnorm: torch.Tensor  # the same of the queries, from close_forward on
    states: torch.Tensor  # [NS, Hv, K, V] fp32: the state that leaves each segment but a last one
    cu_seqlens: torch.Tensor  # [N + 1] int32
    order: torch.Tensor | None  # [N] int32, documents as they are begun, if none is cut
    maps: torch.Tensor  # [NM, Hv, 2, K, K] bf16: M of the summarised segments, high and low half
    live: torch.Tensor  # [NM, Hv] int32: whether its M was written (summary.py)
    entering: torch.Tensor | None  # [NC, Hv, V, K], the state that enters each chunk, and
    vd: torch.Tensor | None  # [NC, Hv, 64, V], with `keep_states`: else the backward replays them
    plan: Plan

    @property
    def ordering(self) -> tuple[torch.Tensor, int]:
        """`order` and 1, or a stand-in and 0: kernels' arguments."""
        return (self.cu_seqlens, 0) if self.order is None else (self.order, 1)

    def keeping(self) -> "Saved":
        """With room for what the main pass keeps."""
        return self._replace(**{name: self.a.new_empty(shape) for name, shape in self._kept()})

    def promising(self) -> "Saved":
        """With stand-ins of what a second forward will keep: its shapes, nothing of its memory. A backward that
        used them would return NaN."""
        nothing = _nothing(self.a.dtype, self.a.device)
        return self._replace(**{name: nothing.expand(shape) for name, shape in self._kept()})

    def _kept(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        chunks, heads = self.a.shape[:2]
        return (
            ("entering", (chunks, heads, KEY_DIM, KEY_DIM)),
            ("vd", (chunks, heads, CHUNK, KEY_DIM)),
        )


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # a later forward may save it
        return torch.full((), float("nan"), dtype=dtype, device=device)


@dataclass
class OpenForward:
    """A forward between open_forward and close_forward."""

    packed: Packed
    shape: tuple[int, ...]  # of v and o
    initial: torch.Tensor | None
    layout: Layout
    saved: Saved
    external: torch.Tensor  # [NM, Hv, K, V] fp32, S_ext of the summarised segments
    maps: torch.Tensor  # Saved's, or larger ones that the backward does not need
    live: torch.Tensor
    tickets: torch.Tensor  # [1] int32, zero: segments that CTAs of the main pass take
    pending: int  # so many documents, the first ones, have no states of segments yet
    asked: bool = False  # for what leaves
    q: torch.Tensor | None = None  # [L, Hk, K], once its norms are there
