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
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import boundary, comm
from ..context import CPContext, build_cp_context, debug_enabled
from ..eager import untraced
from . import chunked, head_dims, hopper
from .engines import use_kernels
from .reference import l2_normalize
from .sharded import Ends, documents, ends, sharded_backward, sharded_forward

log = logging.getLogger("cp_gdn")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@untraced
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
        engine: "torch" (any device), "tilelang" (Hopper, bf16 or fp16, K up to 128; what other heads than K = V = 128
            cost is in docs/kernels.md), or "auto": tilelang where it can, else torch.

    Returns:
        o [B, T, Hv, V] in the dtype of v, and the final states (fp32; fp64 with fp64 inputs) or None.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit; with CP_GDN_DEBUG=1 also gates that are positive or NaN,
            beta outside [0, 2] and states that are not finite, on every rank of the group.
    """
    context = cp_context
    if context is None or cu_seqlens is not None:
        context = _context_for(q, cu_seqlens, cp_context)
    kind = (
        q.device, k.device, v.device, g.device, beta.device, q.shape, k.shape, v.shape, g.shape, beta.shape,
        q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype,
        None if initial_state is None else (initial_state.shape, initial_state.dtype, initial_state.device),
        engine, scale, use_qk_l2norm_in_kernel, output_final_state,
    )  # fmt: skip
    call = context.calls.get(kind)
    if call is None:
        _check_shapes(q, k, v, g, beta, initial_state, context)
        picked, dims = _pick_engine(engine, q), (q.shape[3], v.shape[3])
        fits = picked == "torch" or dims == (head_dims.DIM, head_dims.DIM)
        call = context.calls[kind] = _Call(
            picked,
            ends(context, q.shape[0] * len(context.pieces)),
            float(q.shape[-1] ** -0.5 if scale is None else scale),
            use_qk_l2norm_in_kernel,
            output_final_state,
            None if fits else dims,
            {},
        )
    if debug_enabled():
        _check_values(g, beta, initial_state, context)
    if call.engine == "torch" and use_qk_l2norm_in_kernel:
        dtype = chunked.compute_dtype(q.dtype)
        with _no_autocast(q.device.type):
            q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
    if call.dims is not None:
        q, k, v, g, beta, initial_state = head_dims.fit(q, k, v, g, beta, initial_state)
    o, final = _GatedDeltaRule.apply(call, context, initial_state, q, k, v, g, beta)
    return (o, final) if call.dims is None else head_dims.restore(o, final, *call.dims)


class _Call(NamedTuple):
    """What a call is besides its tensors; a context keeps those whose shapes and dtypes were checked."""

    engine: str
    cuts: Ends
    scale: float
    normalize: bool
    output_final_state: bool
    dims: tuple[int, int] | None  # K and V that the kernels' heads stand for, if they are others
    layouts: dict[Any, Any]  # of the kernels

    def run(
        self, inputs: Sequence[Tensor], context: CPContext
    ) -> chunked.TorchRun | hopper.HopperRun:
        if self.engine == "tilelang":
            return hopper.HopperRun(inputs, self.scale, self.normalize, context, self.layouts)
        layout = context.layout(inputs[0].shape[0], inputs[0].device)
        return chunked.TorchRun(inputs, self.scale, layout)


class _GatedDeltaRule(torch.autograd.Function):
    """summarise -> exchange -> run; the backward the same in reverse rank order."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, context: CPContext, initial_state: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with _no_autocast(inputs[0].device.type):  # the recurrence stays in fp32
            run = call.run(inputs, context)
            o, final, h0, transitions = sharded_forward(
                run, initial_state, call.output_final_state, context, call.cuts
            )
        ctx.save_for_backward(*run.inputs, h0, *transitions, *run.kept)
        ctx.call, ctx.context, ctx.plan = call, context, run.plan
        ctx.state_shape = None if initial_state is None else initial_state.shape
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do, dfinal = grads
        call: _Call = ctx.call
        context: CPContext = ctx.context
        saved = ctx.saved_tensors
        inputs, (h0, own, by_rank), kept = saved[:5], saved[5:8], saved[8:]
        with _no_autocast(do.device.type):
            run = call.run(inputs, context)
            run.kept, run.plan = kept, ctx.plan
            out = sharded_backward(
                run,
                h0,
                do,
                dfinal if call.output_final_state else None,
                boundary.Transitions(own, by_rank),
                context,
                call.cuts,
            )
        d_initial = None
        if ctx.state_shape is not None:
            out.dh0[: call.cuts.left] = 0
            d_initial = out.dh0.new_zeros(ctx.state_shape)
            d_initial[documents(context, call.cuts.sequences)] = out.dh0
        gradients = [
            grad if grad.dtype == x.dtype else grad.to(x.dtype)
            for grad, x in zip(out[:5], inputs, strict=True)
        ]
        return None, None, d_initial, *gradients


_AS_IT_IS = nullcontext()


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Without autocast; entering torch.autocast costs ten times as much as seeing that there is none to leave."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else _AS_IT_IS


def _context_for(q: Tensor, cu_seqlens, cp_context: CPContext | None) -> CPContext:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, Hk, K]")
    B, T = q.shape[:2]
    if cp_context is not None:
        raise ValueError(
            "both cu_seqlens and cp_context were given; under context parallelism the context carries the GLOBAL "
            "offsets: pass cu_seqlens to build_cp_context only"
        )
    if cu_seqlens is None:
        return _plain_context(T, q.device)
    if B > 1:
        raise ValueError(
            f"cu_seqlens with B = {B}; packed documents are one row, so reshape to [1, B * T, ...] and extend "
            "the offsets"
        )
    return build_cp_context(seq_len=T, cu_seqlens=cu_seqlens, device=q.device)


@functools.lru_cache(maxsize=64)
def _plain_context(seq_len: int, device: torch.device) -> CPContext:
    return build_cp_context(seq_len=seq_len, device=device)


def _check_shapes(q, k, v, g, beta, initial_state, context: CPContext) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected [B, T, Hk, K]")
    context.check_tokens(q)
    B, T, Hk, K = q.shape
    if k.shape != q.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)} but q has {tuple(q.shape)}; they must agree"
        )
    if v.ndim != 4 or v.shape[:2] != (B, T):
        raise ValueError(f"v has shape {tuple(v.shape)}; expected [B = {B}, T = {T}, Hv, V]")
    Hv, V = v.shape[2:]
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}; no dimension may be empty: leave such a call out"
        )
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
    for name, x in (("k", k), ("v", v), ("g", g), ("beta", beta), ("initial_state", initial_state)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q on {q.device}; move it there")
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


def _pick_engine(engine: str, q: Tensor) -> str:
    obstacle = None if engine == "torch" else hopper.obstacle(q)
    picked = "tilelang" if use_kernels(engine, obstacle) else "torch"
    if engine == "auto":
        _announce(picked, q.device.type, obstacle)
    return picked


@functools.cache
def _announce(engine: str, device: str, obstacle: str | None) -> None:
    if engine == "torch" and device == "cuda":  # to be seen where nothing configures logging
        log.warning(
            "engine auto picked torch, many times slower than tilelang, which cannot: %s", obstacle
        )
    else:
        log.info("engine auto picked %s on %s", engine, device)
