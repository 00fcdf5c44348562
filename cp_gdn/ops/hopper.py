"""The tilelang engine: calls of the operator on the Hopper kernels of :mod:`cp_gdn.kernels`.

Same calls as the torch engine (chunked.TorchRun). Nothing here reads the device, and TileLang is
imported at the first call that uses it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..context import CPContext
from ..scan import Summary
from . import engines, head_dims
from .chunked import Gradients


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
        rows = q.shape[0]
        self._offsets = context.local_offsets.to(q.device) if rows == 1 else None
        self.num_sequences = len(context.pieces) if rows == 1 else rows

    def some_states(self, count: int) -> Tensor:
        """Zeros [count, Hv, K, V]."""
        return self.room(count).zero_()

    def room(self, count: int) -> Tensor:
        """For states [count, Hv, K, V]; nothing is written there yet."""
        q, _, v = self._inputs[:3]
        return q.new_empty(count, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    def open(self, h0: Tensor | None, left: int, right: int, *, summarise: bool) -> None:
        from ..kernels.forward import open_forward

        self._opened = open_forward(
            *self._inputs[1:],
            initial_state=h0,
            cu_seqlens=self._offsets,
            open_left=left,
            open_right=right,
            use_qk_l2norm_in_kernel=self._normalize,
            summarise=summarise,
        )

    def leaving(self, *, transition: bool) -> Summary:
        from ..kernels.forward import leaving_summary

        return Summary(*leaving_summary(self._opened, transition=transition))

    def leaving_state(self, incoming: Tensor | None) -> Tensor | None:
        from ..kernels.forward import leaving_state

        return leaving_state(self._opened, incoming=incoming)

    def close(self, incoming: Tensor | None, *, final: bool) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, Hv, V]; final states if asked for."""
        from ..kernels.forward import close_forward

        o, states, saved = close_forward(
            self._opened,
            self._inputs[0],
            incoming=incoming,
            scale=self._scale,
            output_final_state=final,
        )
        kept = dict(vars(saved))
        self.plan = kept.pop("plan")
        self.kept = list(kept.values())
        return o, states

    def open_backward(
        self, h0: Tensor | None, do: Tensor, dht: Tensor | None, left: int, right: int
    ) -> None:
        from ..kernels.backward import chunk_gdn_backward, open_backward
        from ..kernels.forward import Saved

        call = functools.partial(
            open_backward if left or right else chunk_gdn_backward,
            *self._inputs,
            Saved(*self.kept, plan=self.plan),
            do.to(self._inputs[0].dtype).contiguous(),
            dht,
            scale=self._scale,
            initial_state=h0,
            use_qk_l2norm_in_kernel=self._normalize,
        )
        self._all_known = None if left or right else call
        if self._all_known is None:
            self._opened = call(open_left=left, open_right=right)

    def entering(self, incoming: Tensor | None = None) -> Tensor:
        from ..kernels.backward import entering_summary

        return entering_summary(self._opened, incoming=incoming)

    entering_gradient = entering

    def replay(self, *, at_once: bool) -> None:
        """What needs no late gradient, also beside ``entering`` if ``at_once``."""
        from ..kernels.backward import replay

        if self._all_known is None:
            replay(self._opened, at_once=at_once)

    def close_backward(self, incoming: Tensor | None) -> Gradients:
        from ..kernels.backward import close_backward

        if self._all_known is not None:
            return Gradients(*self._all_known())
        return Gradients(*close_backward(self._opened, incoming=incoming))
