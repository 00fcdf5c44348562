"""The backward of the gated delta rule on Hopper, and reverse summaries of shards: functions to call.

    chains (S replayed from the forward's segments, dS walked back) -> gradients -> beta_gradient

The maths is in backward_chains.py and backward_gradients.py. Nothing here reads the device, and two
calls on the same inputs give the same bits.
"""

from typing import NamedTuple

import torch

from .backward_beta import beta_gradient
from .backward_chains import chains
from .backward_gradients import SMALLEST_BETA, gradients
from .common import CHUNK
from .forward import DTYPES, KEY_DIM, Saved


class Gradients(NamedTuple):
    """In the order of the forward's arguments; shapes and dtypes are theirs."""

    dq: torch.Tensor  # [B, T, Hk, K]
    dk: torch.Tensor  # [B, T, Hk, K]
    dv: torch.Tensor  # [B, T, Hv, V]
    dg: torch.Tensor  # [B, T, Hv]
    dbeta: torch.Tensor  # [B, T, Hv]
    dh0: torch.Tensor  # [N, Hv, K, V] fp32


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


def chunk_gdn_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    saved: Saved,
    do: torch.Tensor,
    dfinal: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Gradients:
    """Gradients of chunk_gdn_forward, whose arguments q to beta and keywords are repeated here.

    Args:
        saved: what the forward returned.
        do: [B, T, Hv, V] in the dtype of q. dfinal: [N, Hv, K, V] fp32, zero if None.

    Raises:
        ValueError: if do, dfinal or saved do not fit the inputs.
    """
    value_heads = v.shape[2]
    _check(q, saved, do, dfinal, value_heads)
    normalize = use_qk_l2norm_in_kernel
    scale = KEY_DIM**-0.5 if scale is None else scale
    dtype, beta_dtype = DTYPES[q.dtype], DTYPES[beta.dtype]
    documents = saved.cu_seqlens.numel() - 1
    bits = (documents - 1).bit_length()
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    q_, k_, v_, do_, beta_ = (_flat(x) for x in (q, k, v, do, beta))
    tokens, chunks = q_.shape[0], saved.a.shape[0]

    # What lies between the two halves: 1280 bytes a token and value head, free again on return.
    entering = q_.new_empty(chunks, value_heads, KEY_DIM, KEY_DIM)  # [NC, Hv, V, K]
    dleaving = torch.empty_like(entering)
    vd = q_.new_empty(chunks, value_heads, CHUNK, KEY_DIM)
    dv = torch.empty_like(v_)
    dh0 = saved.gate.new_empty(documents, value_heads, KEY_DIM, KEY_DIM)
    chains(dtype=dtype, normalize=normalize)(
        q_, k_, v_, do_, saved.a, saved.gate, saved.rnorm, saved.cu_seqlens,
        saved.states if initial_state is None else initial_state.contiguous(), saved.states,
        dh0 if dfinal is None else dfinal.contiguous(), dh0, entering, dleaving, vd, dv,
        scale, saved.plan.segment, bits, int(initial_state is not None), int(dfinal is not None),
    )  # fmt: skip

    dq, dk = torch.empty_like(q_), torch.empty_like(k_)
    dg = saved.gate.new_empty(tokens, value_heads)
    dbeta = torch.empty_like(dg)
    pairs = torch.empty(1 + chunks * value_heads, dtype=torch.int32, device=q.device)
    pairs[:1].zero_()
    gradients(
        ratio=value_heads // q.shape[2], dtype=dtype, beta_dtype=beta_dtype, normalize=normalize,
        processors=processors,
    )(
        q_, k_, do_, vd, dv, entering, dleaving, saved.gate, saved.rnorm, beta_, saved.cu_seqlens,
        dq, dk, dg, dbeta, pairs, scale, bits,
    )  # fmt: skip
    beta_gradient(
        smallest=SMALLEST_BETA[dtype], dtype=dtype, beta_dtype=beta_dtype, normalize=normalize,
        processors=processors,
    )(
        q_, k_, v_, do_, vd, dv, entering, dleaving, saved.gate, saved.rnorm, beta_,
        saved.cu_seqlens, pairs, dbeta, scale, bits,
    )  # fmt: skip
    return Gradients(
        dq.view(q.shape),
        dk.view(k.shape),
        dv.view(v.shape),
        dg.view(g.shape).to(g.dtype),
        dbeta.view(beta.shape).to(beta.dtype),
        dh0,
    )


def chunk_gdn_reverse_summary(
    q: torch.Tensor,
    k: torch.Tensor,
    saved: Saved,
    do: torch.Tensor,
    dfinal: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> torch.Tensor:
    """dS_ext [N, Hv, K, V] fp32 of every sequence: dS_in = M^T dS_out + dS_ext, M as in
    chunk_gdn_summary. Arguments as in chunk_gdn_backward; a `dfinal` known here counts in."""
    value_heads = do.shape[2]
    _check(q, saved, do, dfinal, value_heads)
    documents = saved.cu_seqlens.numel() - 1
    q_, k_, do_ = (_flat(x) for x in (q, k, do))
    total = saved.gate.new_empty(documents, value_heads, KEY_DIM, KEY_DIM)
    unused = q_.new_empty(1, value_heads, KEY_DIM, KEY_DIM)
    dlast = total if dfinal is None else dfinal.contiguous()
    chains(dtype=DTYPES[q.dtype], normalize=use_qk_l2norm_in_kernel, store=False)(
        q_, k_, do_, do_, saved.a, saved.gate, saved.rnorm, saved.cu_seqlens, saved.states,
        saved.states, dlast, total, unused, unused, unused[:, :, :CHUNK].contiguous(), do_,
        KEY_DIM**-0.5 if scale is None else scale, saved.plan.segment, 0, 0,
        int(dfinal is not None),
    )  # fmt: skip
    return total
