"""chunk_gated_delta_rule: the Gated DeltaNet operator, on one device or over the ranks of a context.

Under context parallelism a rank summarises the document that leaves it (`S_out = M S_in + S_ext`), the
summaries are exchanged, and
then the rank runs as one device would, from its true incoming state. The backward does the same from the other
end, with the
transposed M of the forward. In the exchange "serial" nothing is summarised: a rank waits for its predecessor's state.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..context import CPContext, build_cp_context, debug_enabled
from ..scan import Summary
from . import chunked
from .reference import l2_normalize

log = logging.getLogger("cp_gdn")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    cp_context: CPContext | None = None,
    engine: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule (arXiv 2412.06464) over T tokens, in chunks; differentiable in every tensor.

    Args:
        q, k: [B, T, Hk, K]. Under context parallelism T is this rank's part of the sequence.
        v: [B, T, Hv, V], Hv a multiple of Hk: value head h reads key head ``h // (Hv // Hk)``.
        g: [B, T, Hv], log of the gate, <= 0 (natural logarithm). beta: [B, T, Hv], write strength.
        scale: multiplies q; default ``1 / sqrt(K)``.
        initial_state: [N, Hv, K, V] fp32 (fp64 with fp64 inputs); N = B, or the number of documents. Under context
            parallelism N counts ALL documents and every rank passes the same tensor; its gradient on a rank is that
            rank's contribution, to be summed over ranks.
        output_final_state: also return the state after every document's last token, [N, Hv, K, V]; under context
            parallelism the same tensor on every rank, wherever the document ends. The ranks' incoming gradients add.
        use_qk_l2norm_in_kernel: normalise q and k to unit length (eps 1e-6) first.
        cu_seqlens: document offsets of packed sequences [N + 1], B = 1; read on the host. Leave it out with a
            ``cp_context``, which carries them.
        cp_context: from :func:`cp_gdn.build_cp_context`; every rank of its group must call, and backpropagate.
        engine: "torch" (any device), "tilelang" (Hopper), or "auto".

    Returns:
        o [B, T, Hv, V] in the dtype of v, and the final states (fp32; fp64 with fp64 inputs) or None.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit; with CP_GDN_DEBUG=1 also gates that are positive or NaN,
            beta outside [0, 2] and states that are not finite, on every rank of the group.
    """
    context = _context_for(q, cu_seqlens, cp_context)
    _check_shapes(q, k, v, g, beta, initial_state, context)
    _pick_engine(engine, q.device.type)
    if debug_enabled():
        _check_values(g, beta, initial_state, context)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    with torch.autocast(q.device.type, enabled=False):  # the recurrence stays in fp32
        if use_qk_l2norm_in_kernel:
            dtype = chunked.compute_dtype(q.dtype)
            q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
        o, final = _GatedDeltaRule.apply(
            q, k, v, g, beta, initial_state, scale, output_final_state, context
        )
    return o, final if output_final_state else None


class _GatedDeltaRule(torch.autograd.Function):
    """summarise -> exchange -> run; the backward the same in reverse rank order."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        scale: float,
        output_final_state: bool,
        context: CPContext,
    ) -> tuple[Tensor, Tensor | None]:
        layout = context.layout(q.shape[0], q.device)
        terms = chunked.prepare(q, k, v, g, beta, scale, layout)
        entering, leaving = _crossing(context, layout.num_sequences)
        h0 = terms.v.new_zeros(layout.num_sequences, v.shape[2], q.shape[3], v.shape[3])
        if initial_state is not None:
            documents = _documents(context, layout.num_sequences)
            h0[:] = initial_state[documents]
        if context.crosses_left:
            h0[entering] = 0

        transitions = comm.Transitions()
        if context.exchange == "serial":
            S_in = comm.receive_state(h0[entering], context)
        elif context.any_crossing:
            S_in, transitions = comm.exchange_states(
                _summarise(terms, layout, h0, context), context
            )
        else:
            S_in = None
        if S_in is not None:
            h0[entering] = S_in

        o, states = chunked.forward(terms, layout, h0.index_select(0, layout.order_index))
        states = states.index_select(0, layout.position_index)  # [N_local, Hv, K, V]
        if context.exchange == "serial":
            comm.send_state(states[leaving], context)
        ctx.save_for_backward(q, k, v, g, beta, h0, transitions.own, transitions.by_rank)
        ctx.context, ctx.scale = context, scale
        ctx.state_shape = None if initial_state is None else initial_state.shape
        ctx.output_final_state = output_final_state
        if not output_final_state:
            return o.to(v.dtype), None
        if context.size == 1:
            return o.to(v.dtype), states
        ended = _ended(context, layout.num_sequences)
        count = q.shape[0] if q.shape[0] > 1 else context.num_documents
        final = states.new_zeros(count, *states.shape[1:])
        final[_documents(context, layout.num_sequences)][ended] = states[ended]
        return o.to(v.dtype), comm.sum_over_group(final, context)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return _GatedDeltaRule._gradients(ctx, *grads)

    @staticmethod
    def _gradients(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, h0, own, by_rank = ctx.saved_tensors
        context: CPContext = ctx.context
        layout = context.layout(q.shape[0], q.device)
        terms = chunked.prepare(q, k, v, g, beta, ctx.scale, layout)
        dO = chunked.chunk_gradient(do, layout, terms.v.dtype)
        entering, leaving = _crossing(context, layout.num_sequences)
        documents = _documents(context, layout.num_sequences)
        dht = torch.zeros_like(h0)
        if ctx.output_final_state:
            if context.size > 1:
                dfinal = comm.sum_over_group(dfinal, context)
            ended = _ended(context, layout.num_sequences)
            dht[ended] = dfinal[documents][ended]

        if context.exchange == "serial":
            dS_in = comm.receive_state(dht[leaving], context, reverse=True)
        elif context.any_crossing:
            dS = _summarise_reverse(terms, layout, dO, dht, context)
            dS_in = comm.exchange_gradients(dS, comm.Transitions(own, by_rank), context)
        else:
            dS_in = None
        if dS_in is not None:
            dht[leaving] = dS_in

        order = layout.order_index
        out = chunked.backward(
            terms, layout, h0.index_select(0, order), dO, dht.index_select(0, order)
        )
        dh0 = out.dh0.index_select(0, layout.position_index)
        if context.exchange == "serial":
            comm.send_state(dh0[entering], context, reverse=True)
        d_initial = None
        if ctx.state_shape is not None:
            if context.crosses_left:
                dh0[entering] = 0
            d_initial = dh0.new_zeros(ctx.state_shape)
            d_initial[documents] = dh0
        return (
            out.dq.to(q.dtype),
            out.dk.to(k.dtype),
            out.dv.to(v.dtype),
            out.dg.to(g.dtype),
            out.dbeta.to(beta.dtype),
            d_initial,
            None,
            None,
            None,
        )


def _summarise(terms, layout, h0: Tensor, context: CPContext) -> Summary:
    """Summary of the sequences that leave this rank (zeros where none does), [B, Hv, K, V]."""
    _, leaving = _crossing(context, layout.num_sequences)
    if not context.crosses_right:
        return Summary(None, torch.zeros_like(h0[leaving]))
    first, last = _positions(layout, leaving)
    S = chunked.final_state(terms, layout, h0[leaving], first, last)
    M = chunked.transition(terms, layout, first, last) if context.through(context.rank) else None
    return Summary(M, S)


def _summarise_reverse(terms, layout, dO: Tensor, dht: Tensor, context: CPContext) -> Tensor:
    """dS_ext of the sequences that entered this rank (zeros where none did), [B, Hv, K, V]."""
    entering, _ = _crossing(context, layout.num_sequences)
    if not context.crosses_left:
        return torch.zeros_like(dht[entering])
    first, last = _positions(layout, entering)
    return chunked.gradient_of_state(terms, layout, dO, dht[entering], first, last)


def _crossing(context: CPContext, num_sequences: int) -> tuple[slice, slice]:
    """Local sequences that may enter from the left and leave to the right: all rows, or the first and the last
    piece."""
    if len(context.pieces) == 1:
        return slice(0, num_sequences), slice(0, num_sequences)
    return slice(0, 1), slice(num_sequences - 1, num_sequences)


def _positions(layout, sequences: slice) -> tuple[int, int]:
    count = sequences.stop - sequences.start
    first = layout.order.index(sequences.start)
    return first, first + count


def _documents(context: CPContext, num_sequences: int) -> slice:
    """Rows of a [N, ...] state that belong to the local sequences: documents are numbered in order."""
    first = context.pieces[0].doc
    return slice(first, first + num_sequences)


def _ended(context: CPContext, num_sequences: int) -> slice:
    """Local sequences whose document ends in this shard."""
    _, leaving = _crossing(context, num_sequences)
    return slice(0, leaving.start if context.crosses_right else num_sequences)


def _context_for(q: Tensor, cu_seqlens, cp_context: CPContext | None) -> CPContext:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, Hk, K]")
    B, T = q.shape[:2]
    if cp_context is None:
        if cu_seqlens is not None and B > 1:
            raise ValueError(
                f"cu_seqlens with B = {B}; packed documents are one row, so reshape to [1, B * T, ...] and extend "
                "the offsets"
            )
        if cu_seqlens is None:
            return _plain_context(T, q.device)
        return build_cp_context(seq_len=T, cu_seqlens=cu_seqlens, device=q.device)
    if cu_seqlens is not None:
        raise ValueError(
            "both cu_seqlens and cp_context were given; under context parallelism the context carries the GLOBAL "
            "offsets: pass cu_seqlens to build_cp_context only"
        )
    cp_context.check_tokens(q)
    return cp_context


@functools.lru_cache(maxsize=64)
def _plain_context(seq_len: int, device: torch.device) -> CPContext:
    return build_cp_context(seq_len=seq_len, device=device)


def _check_shapes(q, k, v, g, beta, initial_state, context: CPContext) -> None:
    B, T, Hk, K = q.shape
    if k.shape != q.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)} but q has {tuple(q.shape)}; they must agree"
        )
    if v.ndim != 4 or v.shape[:2] != (B, T):
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [B = {B}, T = {T}, Hv, V]")
    Hv, V = v.shape[2:]
    if Hv % Hk:
        raise ValueError(
            f"{Hv} value heads and {Hk} key heads; Hv must be a multiple of Hk, each key head serving "
            "Hv / Hk value heads"
        )
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (B, T, Hv):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected [B, T, Hv] = {(B, T, Hv)}"
            )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must share one of bf16, fp16, "
            "fp32, fp64: cast them"
        )
    state_dtype = chunked.compute_dtype(q.dtype)
    for name, x in (("g", g), ("beta", beta)):
        if x.dtype not in (q.dtype, state_dtype):
            raise ValueError(
                f"{name} is {x.dtype}; expected {state_dtype} or {q.dtype}, the dtype of q"
            )
    if initial_state is None:
        return
    N = B if B > 1 else context.num_documents
    if initial_state.shape != (N, Hv, K, V) or initial_state.dtype != state_dtype:
        raise ValueError(
            f"initial_state is {initial_state.dtype} {tuple(initial_state.shape)}; expected {state_dtype} "
            f"[N, Hv, K, V] = {(N, Hv, K, V)}, N counting all documents of the whole sequence"
        )


def _check_values(
    g: Tensor, beta: Tensor, initial_state: Tensor | None, context: CPContext
) -> None:
    problems = []
    if not bool((g <= 0).all()):
        problems.append(
            f"g has {int((~(g <= 0)).sum())} entries that are positive or NaN; g is the LOG of the gate "
            "and must be <= 0"
        )
    if not bool(((beta >= 0) & (beta <= 2)).all()):
        problems.append("beta has entries outside [0, 2]; apply a sigmoid before")
    if initial_state is not None and not bool(initial_state.isfinite().all()):
        problems.append(
            "initial_state is not finite; check the state that an earlier call returned"
        )
    verdicts = [problems] if context.size == 1 else comm.gather_objects(problems, context.group)
    found = [f"rank {rank}: {p}" for rank, verdict in enumerate(verdicts) for p in verdict]
    if found:
        raise ValueError("; ".join(found))


def _pick_engine(engine: str, device: str) -> None:
    if engine == "tilelang":
        raise ValueError(
            'engine="tilelang" has no backward yet and cannot train; use engine="torch", or "auto", which picks it'
        )
    if engine not in ("auto", "torch"):
        raise ValueError(f"engine={engine!r} is unknown; choose torch, tilelang or auto")
    if engine == "auto":
        _announce("torch", device)


@functools.cache
def _announce(engine: str, device: str) -> None:
    log.info("engine auto: %s on %s", engine, device)
