"""Causal softmax attention over sharded, packed sequences.

    o_t = sum_{s <= t, same document} softmax_s(scale q_t . k_s) v_s

Queries stay where they are; every rank gathers the keys and values of the whole sequence, and each
of its pieces attends to its document from the document's first token up to the piece's own last
one: a causal mask aligned to the lower right corner, which the flash kernels know, so that no mask
is stored on the GPU. The gather's backward sums the ranks' gradients and hands each its slice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..context import CPContext
from ..layout import Piece

_CPU_BLOCK = 512  # queries that share one mask [_CPU_BLOCK, keys] on the CPU


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cp_context: CPContext | None = None,
) -> Tensor:
    """Causal attention of this rank's queries to their documents; differentiable in q, k, v.

    Args:
        q: [B, T, Hq, D]; under context parallelism T is this rank's part of the sequence.
        k, v: [B, T, Hkv, D], Hq a multiple of Hkv: query head h reads head ``h // (Hq // Hkv)``.
        scale: multiplies the scores; default ``1 / sqrt(D)``.
        cp_context: carries the shards and the documents; None: one rank, one document a row. Every
            rank of its group must call, and backpropagate.

    Returns:
        [B, T, Hq, D].

    Raises:
        ValueError: shapes or dtypes that do not fit, tokens that the context does not expect, B > 1
            with packed documents.
    """
    _check(q, k, v, cp_context)
    T = q.shape[1]
    if cp_context is None:
        pieces: tuple[Piece, ...] = (Piece(0, T, 0, 0, T),)
        start = 0
    else:
        pieces, start = cp_context.pieces, cp_context.start
        if cp_context.any_crossing:
            k, v = cp_context.gather(torch.stack((k, v), 2)).unbind(2)  # [B, seq_len, Hkv, D]
        else:
            start = 0
            pieces = tuple(Piece(p.start, p.end, p.doc, p.start, p.end) for p in pieces)
    outputs = []
    for p in pieces:
        known = slice(p.doc_start, start + p.end)
        outputs.append(_attend(q[:, p.start : p.end], k[:, known], v[:, known], scale))
    return torch.cat(outputs, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Queries [B, n, Hq, D] at the end of m >= n keys [B, m, Hkv, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    n, m = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda and q.element_size() > 2:
        # Wide dtypes run in the memory-efficient kernel, which wants as many key as query heads.
        group = q.shape[1] // k.shape[1]
        k, v, gqa = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), False
    if n == m:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    elif q.is_cuda:
        corner = causal_lower_right(n, m)
        o = F.scaled_dot_product_attention(q, k, v, corner, scale=scale, enable_gqa=gqa)
    else:
        blocks: list[Tensor] = []
        for rows in q.split(_CPU_BLOCK, 2):
            seen = m - n + sum(b.shape[2] for b in blocks) + rows.shape[2]
            mask = torch.ones(rows.shape[2], seen, dtype=torch.bool).tril(seen - rows.shape[2])
            keys, values = k[:, :, :seen], v[:, :, :seen]
            blocks.append(
                F.scaled_dot_product_attention(
                    rows, keys, values, mask, scale=scale, enable_gqa=gqa
                )
            )
        o = torch.cat(blocks, 2)
    return o.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, context: CPContext | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected "
            "[B, T, Hq, D] and twice [B, T, Hkv, D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads and {k.shape[2]} key heads; Hq must be a multiple of Hkv"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must agree: cast them"
        )
    if context is not None:
        context.check_tokens(q)
