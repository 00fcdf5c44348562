"""The tilelang engine: calls of the operator on the Hopper kernels of :mod:`cp_gdn.kernels`.

Same calls as the torch engine (chunked.TorchRun). Nothing here reads the device, and TileLang is
imported at the first call that uses it.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..context import CPContext
from ..scan import Summary
from . import engines, head_dims
from .chunked import Gradients


@functools.cache
def _stages() -> tuple[ModuleType, ModuleType]:
    """The stages of forward and backward."""
    from ..kernels import backward, forward

    return forward, backward


def obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot take this call, or None if they can."""
    reason = engines.obstacle(q)
    if reason is None and q.shape[3] > head_dims.DIM:
        return f"it takes key heads of up to {head_dims.DIM} columns, not K = {q.shape[3]}"
    return reason


class HopperRun:
    """One call of the operator on the kernels, in the steps of sharded.py; states [n, Hv, K, V] fp32, sequences and
    steps as in chunked.TorchRun.

    ``kept`` and ``plan`` are what the forward kernels save for the backward ones.
    """

    kept: Sequence[Tensor] = ()
    plan: Any = None

    def __init__(self, inputs: Sequence[Tensor], scale: float, normalize: bool, context: CPContext):
        q, k, v, g, beta = inputs
        self._inputs, self._scale, self._normalize = (q, k, v, g, beta), scale, normalize
        self._forward, self._backward = _stages()
        rows = q.shape[0]
        self._offsets = None
        self.num_sequences = rows
        if rows == 1:
            offsets, device = context.local_offsets, q.device
            self._offsets = offsets if offsets.device == device else offsets.to(device)
            self.num_sequences = len(context.pieces)

    def some_states(self, count: int) -> Tensor:
        """Zeros [count, Hv, K, V]."""
        return self.room(count).zero_()

    def room(self, count: int) -> Tensor:
        """For states [count, Hv, K, V]; nothing is written there yet."""
        q, _, v = self._inputs[:3]
        return q.new_empty(count, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    def open(self, h0: Tensor | None, left: int, right: int, *, summarise: bool) -> None:
        self._opened = self._forward.open_forward(
            *self._inputs[1:],
            initial_state=h0,
            cu_seqlens=self._offsets,
            open_left=left,
            open_right=right,
            use_qk_l2norm_in_kernel=self._normalize,
            summarise=summarise,
        )

    def leaving(self, *, transition: bool) -> Summary:
        return Summary(*self._forward.leaving_summary(self._opened, transition=transition))

    def leaving_state(self, incoming: Tensor | None) -> Tensor | None:
        return self._forward.leaving_state(self._opened, incoming=incoming)

    def meanwhile(self) -> None:
        """What :meth:`close` begins with and no state enters."""
        self._forward.norm_queries(self._opened, self._inputs[0])

    def close(self, incoming: Tensor | None, *, final: bool) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, Hv, V]; final states if asked for."""
        o, states, saved = self._forward.close_forward(
            self._opened,
            self._inputs[0],
            incoming=incoming,
            scale=self._scale,
            output_final_state=final,
        )
        *self.kept, self.plan = saved
        return o, states

    def open_backward(
        self, h0: Tensor | None, do: Tensor, dht: Tensor | None, left: int, right: int
    ) -> None:
        dtype = self._inputs[0].dtype
        given = (
            *self._inputs,
            self._forward.Saved(*self.kept, self.plan),
            do if do.dtype == dtype else do.to(dtype),
            dht,
        )
        how = {
            "scale": self._scale,
            "initial_state": h0,
            "use_qk_l2norm_in_kernel": self._normalize,
        }
        self._all_known = None
        if left or right:
            self._opened = self._backward.open_backward(
                *given, **how, open_left=left, open_right=right
            )
        else:
            self._all_known = given, how

    def entering(self, incoming: Tensor | None = None) -> Tensor:
        return self._backward.entering_summary(self._opened, incoming=incoming)

    entering_gradient = entering

    def replay(self, *, at_once: bool) -> None:
        """What needs no late gradient, also beside ``entering`` if ``at_once``."""
        if self._all_known is None:
            self._backward.replay(self._opened, at_once=at_once)

    def close_backward(self, incoming: Tensor | None) -> Gradients:
        if self._all_known is not None:
            given, how = self._all_known
            return Gradients(*self._backward.chunk_gdn_backward(*given, **how))
        return Gradients(*self._backward.close_backward(self._opened, incoming=incoming))
