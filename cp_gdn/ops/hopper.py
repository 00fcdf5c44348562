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
from . import engines, head_dims, recompute
from .chunked import Gradients
from .recompute import States


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

    ``inputs``, ``kept`` and ``plan`` are what the forward hands to the backward: ``inputs`` with batch and time in one
    axis. ``layouts`` are those of the kernels, found at the first call of a kind.
    """

    kept: Sequence[Tensor] = ()
    plan: Any = None

    def __init__(
        self,
        inputs: Sequence[Tensor],
        scale: float,
        normalize: bool,
        context: CPContext,
        layouts: dict[Any, Any],
    ):
        self.inputs = inputs
        self._scale, self._normalize = scale, normalize
        self._context, self._layouts = context, layouts
        self._forward, self._backward = _stages()

    def room(self, count: int) -> Tensor:
        """For states [count, Hv, K, V]; nothing is written there yet."""
        q, _, v, g, _ = self.inputs
        return g.new_empty(count, *g.shape[-1:], q.shape[-1], v.shape[-1], dtype=torch.float32)

    def open(self, h0: Tensor | None, left: int, right: int, *, summarise: bool) -> None:
        q, *inputs = self.inputs
        offsets = order = None
        if q.shape[0] == 1:
            offsets, order = (
                x if x.device == q.device else x.to(q.device)
                for x in (self._context.local_offsets, self._context.local_order)
            )
        self._opened = self._forward.open_forward(
            *inputs,
            initial_state=h0,
            cu_seqlens=offsets,
            open_left=left,
            open_right=right,
            use_qk_l2norm_in_kernel=self._normalize,
            summarise=summarise,
            max_seqlen=None if offsets is None else self._context.longest_piece,
            order=order,
            layout=self._layouts.get("forward"),
        )
        self._layouts["forward"] = self._opened.layout

    def leaving(self, *, transition: bool) -> Summary:
        return Summary(*self._forward.leaving_summary(self._opened, transition=transition))

    def leaving_state(self, incoming: Tensor | None) -> Tensor | None:
        return self._forward.leaving_state(self._opened, incoming=incoming)

    def meanwhile(self) -> None:
        """What :meth:`close` begins with and no state enters."""
        self._forward.norm_queries(self._opened, self.inputs[0])

    def close(self, incoming: Tensor | None, *, final: bool) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, Hv, V]; final states if asked for."""
        opened = self._opened
        wanted = recompute.states()
        if wanted is not States.NONE and not self._backward.keeping_pays(opened):
            wanted = States.NONE
        o, states, saved = self._forward.close_forward(
            opened,
            self.inputs[0],
            incoming=incoming,
            scale=self._scale,
            output_final_state=final,
            keep_states=wanted is States.KEPT,
        )
        if wanted is States.PROMISED:
            saved = saved.promising()
        self.inputs = (opened.q, *opened.packed[:4])
        *self.kept, self.plan = saved
        return o, states

    def open_backward(
        self, h0: Tensor | None, do: Tensor, dht: Tensor | None, left: int, right: int
    ) -> None:
        inputs, saved = self.inputs, self._forward.Saved(*self.kept, self.plan)
        do = do if do.dtype == inputs[0].dtype else do.to(inputs[0].dtype)
        kind, whole = ("backward", saved.entering is None), not (left or right)
        layout = self._layouts.get(kind)
        if layout is None:
            q, _, v, g, beta = (x.unflatten(0, do.shape[:2]) for x in inputs)
            layout = self._layouts[kind] = self._backward.layout_for(
                q, v, g, beta, saved, do, dht, normalize=self._normalize, whole=whole
            )
        given = (*inputs, saved, do, dht)
        how = {
            "scale": self._scale,
            "initial_state": h0,
            "use_qk_l2norm_in_kernel": self._normalize,
            "layout": layout,
        }
        self._all_known = None
        if not whole:
            self._opened = self._backward.open_backward(
                *given, **how, open_left=left, open_right=right
            )
        else:
            self._all_known = given, how

    def begin_replay(self, *, at_once: bool) -> None:
        """What needs no late gradient, already now if it runs beside ``entering``."""
        if self._all_known is None:
            self._backward.begin_replay(self._opened, at_once=at_once)

    def entering(self, incoming: Tensor | None = None) -> Tensor:
        return self._backward.entering_summary(self._opened, incoming=incoming)

    entering_gradient = entering

    def replay(self, *, at_once: bool) -> None:
        """What needs no late gradient, also beside ``entering`` if ``at_once``; if it was not begun."""
        if self._all_known is None:
            self._backward.replay(self._opened, at_once=at_once)

    def close_backward(self, incoming: Tensor | None) -> Gradients:
        if self._all_known is not None:
            given, how = self._all_known
            return Gradients(*self._backward.chunk_gdn_backward(*given, **how))
        return Gradients(*self._backward.close_backward(self._opened, incoming=incoming))
