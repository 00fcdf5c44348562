"""Gradients of the convolution of conv.py.

    e_t = silu'(p_t) [dq dk dv]_t  dx_t = sum_s w_s e_{t+s}          dw_s = sum_t e_t x_{t-s}

with the taps that conv.py leaves out left out here. p is computed again. Every strip writes its part of
dw in fp32 and a sum over strips follows, so that two runs give the same bits.
"""

import tilelang
import tilelang.language as T
import torch

from .common import FLAGS, TARGET
from .conv import (
    BATCH,
    LANES,
    TAPS,
    THREADS,
    channels,
    convolve,
    load_history,
    load_weight,
    placeholder,
)
from .inputs import DTYPES

STRIP = 256  # tokens of a CTA


@T.macro
def backward_tokens(
    x, positions, dy, dx, dhalo, w, dw, raw, draw, row, rows, drows, e, position,
    b, by, start, offset, left, column, group, count, packed, tail,
):  # fmt: skip
    """`count` tokens from the strip's `offset` on; drows[0 .. 2] is dx of the three before them, as
    far as it is known. In the tail tokens are the next strip's, or past the end."""
    for u in T.unroll(count):
        position[u] = 0
        if tail:
            for c in T.vectorized(LANES):
                raw[u * LANES + c] = 0
            for c in T.vectorized(LANES):
                draw[u * LANES + c] = 0
            if offset + u < left:
                for c in T.vectorized(LANES):
                    raw[u * LANES + c] = x[b, start + offset + u, group, c]
                for c in T.vectorized(LANES):
                    draw[u * LANES + c] = dy[b, start + offset + u, column, c]
                if packed:
                    position[u] = T.cast(T.min(positions[start + offset + u], TAPS), "int32")
        else:
            for c in T.vectorized(LANES):
                raw[u * LANES + c] = x[b, start + offset + u, group, c]
            for c in T.vectorized(LANES):
                draw[u * LANES + c] = dy[b, start + offset + u, column, c]
            if packed:
                position[u] = T.cast(T.min(positions[start + offset + u], TAPS), "int32")
    for u in T.unroll(count):
        for c in T.unroll(LANES):
            rows[(u + TAPS - 1) * LANES + c] = T.cast(raw[u * LANES + c], "float32")
        convolve(w, rows, u, packed, position[u], e)
        for c in T.unroll(LANES):
            sigmoid = 1.0 / (1.0 + T.exp(-e[c]))
            given = T.cast(draw[u * LANES + c], "float32")
            e[c] = given * sigmoid * (1.0 + e[c] * (1.0 - sigmoid))
        for c in T.unroll(LANES):
            drows[(u + TAPS - 1) * LANES + c] = w[c * TAPS + TAPS - 1] * e[c]
        if not tail:
            for c in T.unroll(LANES):
                dw[c * TAPS + TAPS - 1] += e[c] * rows[(u + TAPS - 1) * LANES + c]
        for s in T.unroll(1, TAPS):
            if packed:
                if position[u] >= s:
                    backward_tap(w, dw, rows, drows, e, u, s, tail)
            else:
                backward_tap(w, dw, rows, drows, e, u, s, tail)
        # the token three back is complete
        for c in T.vectorized(LANES):
            row[c] = T.cast(drows[u * LANES + c], dx.dtype)
        if offset + u >= TAPS - 1:
            if tail:
                if offset + u < left + (TAPS - 1):
                    for c in T.vectorized(LANES):
                        dx[b, start + offset + u - (TAPS - 1), group, c] = row[c]
            else:
                for c in T.vectorized(LANES):
                    dx[b, start + offset + u - (TAPS - 1), group, c] = row[c]
        else:
            if by == 0:
                for c in T.vectorized(LANES):
                    dhalo[b, offset + u, group, c] = row[c]
    for c in T.unroll((TAPS - 1) * LANES):
        rows[c] = rows[count * LANES + c]
        drows[c] = drows[count * LANES + c]


@T.macro
def backward_tap(w, dw, rows, drows, e, u, s, tail):
    for c in T.unroll(LANES):
        drows[(u + TAPS - 1 - s) * LANES + c] += w[c * TAPS + TAPS - 1 - s] * e[c]
    if not tail:
        for c in T.unroll(LANES):
            dw[c * TAPS + TAPS - 1 - s] += e[c] * rows[(u + TAPS - 1 - s) * LANES + c]


@T.macro
def walk_backward(
    x, halo, weight, positions, dy, dx, dhalo, dweight, w, dw, raw, draw, row, rows, drows, e, position,
    b, by, start, left, column, first_group, packed,
):  # fmt: skip
    """The channels of one part, given `dy`; from `start` on there are `left` tokens."""
    group = first_group + column
    load_weight(weight, group, w)
    load_history(x, halo, b, start, group, row, rows)
    for c in T.unroll(LANES * TAPS):
        dw[c] = 0.0
    for c in T.unroll((TAPS - 1) * LANES):
        drows[c] = 0.0
    own = T.min(left, STRIP)
    whole = T.truncdiv(own, BATCH)
    for i in T.serial(whole):
        backward_tokens(
            x, positions, dy, dx, dhalo, w, dw, raw, draw, row, rows, drows, e, position,
            b, by, start, i * BATCH, left, column, group, BATCH, packed, False,
        )  # fmt: skip
    for i in T.serial(own - whole * BATCH):
        backward_tokens(
            x, positions, dy, dx, dhalo, w, dw, raw, draw, row, rows, drows, e, position,
            b, by, start, whole * BATCH + i, left, column, group, 1, packed, False,
        )  # fmt: skip
    backward_tokens(
        x, positions, dy, dx, dhalo, w, dw, raw, draw, row, rows, drows, e, position,
        b, by, start, own, left, column, group, TAPS - 1, packed, True,
    )  # fmt: skip
    for c in T.unroll(LANES):
        for s in T.vectorized(TAPS):
            dweight[b, by, group, c, s] = dw[c * TAPS + s]


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def conv_backward(*, sizes, dtype="bfloat16", packed=False):
    f32 = "float32"
    B, L, P, NS = T.dynamic("B"), T.dynamic("L", "int64"), T.dynamic("P"), T.dynamic("NS")
    Q, K, V = (size // LANES for size in sizes)
    D = Q + K + V

    @T.prim_func
    def main(
        x: T.Tensor((B, L, D, LANES), dtype),
        halo: T.Tensor((B, TAPS - 1, D, LANES), dtype),
        weight: T.Tensor((D, LANES, TAPS), f32),
        positions: T.Tensor((P,), "int64"),
        dq: T.Tensor((B, L, Q, LANES), dtype),
        dk: T.Tensor((B, L, K, LANES), dtype),
        dv: T.Tensor((B, L, V, LANES), dtype),
        dx: T.Tensor((B, L, D, LANES), dtype),
        dhalo: T.Tensor((B, TAPS - 1, D, LANES), dtype),
        dweight: T.Tensor((B, NS, D, LANES, TAPS), f32),
    ):
        with T.Kernel(T.ceildiv(D, THREADS), T.ceildiv(L, STRIP), B, threads=THREADS) as (
            bx, by, b,
        ):  # fmt: skip
            T.annotate_min_blocks_per_sm(4)
            w = T.alloc_local((LANES * TAPS,), f32)
            dw = T.alloc_local((LANES * TAPS,), f32)
            raw = T.alloc_local((BATCH * LANES,), dtype)
            draw = T.alloc_local((BATCH * LANES,), dtype)
            row = T.alloc_local((LANES,), dtype)
            rows = T.alloc_local(((BATCH + TAPS - 1) * LANES,), f32)
            drows = T.alloc_local(((BATCH + TAPS - 1) * LANES,), f32)  # dx of the same tokens
            e = T.alloc_local((LANES,), f32)
            position = T.alloc_local((BATCH,), "int32")
            group = bx * THREADS + T.get_thread_binding()
            start = by * STRIP
            left = T.cast(T.min(L - start, STRIP + TAPS - 1), "int32")
            if group < Q:
                walk_backward(
                    x, halo, weight, positions, dq, dx, dhalo, dweight, w, dw, raw, draw, row, rows, drows, e, position,
                    b, by, start, left, group, 0, packed,
                )  # fmt: skip
            else:
                if group < Q + K:
                    walk_backward(
                        x, halo, weight, positions, dk, dx, dhalo, dweight,
                        w, dw, raw, draw, row, rows, drows, e, position,
                        b, by, start, left, group - Q, Q, packed,
                    )  # fmt: skip
                else:
                    if group < D:
                        walk_backward(
                            x, halo, weight, positions, dv, dx, dhalo, dweight,
                            w, dw, raw, draw, row, rows, drows, e, position,
                            b, by, start, left, group - Q - K, Q + K, packed,
                        )  # fmt: skip

    return main


def causal_conv_silu_backward(
    x: torch.Tensor,
    halo: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx [B, T, D], dhalo [B, 3, D] in the dtype of x, and dweight [D, 4] fp32, from dq, dk, dv."""
    B, L, D = x.shape
    sizes = tuple(grad.shape[2] for grad in grads)
    kernel = conv_backward(sizes=sizes, dtype=DTYPES[x.dtype], packed=positions is not None)
    dx, dhalo = x.new_empty(B, L, D), x.new_empty(B, TAPS - 1, D)
    dweight = x.new_empty(B, -(-L // STRIP), D, TAPS, dtype=torch.float32)
    kernel(
        *(channels(t) for t in (x, halo)),
        weight.contiguous().view(-1, LANES, TAPS),
        placeholder(x) if positions is None else positions,
        *(channels(t) for t in (*grads, dx, dhalo)),
        dweight.view(B, -1, D // LANES, LANES, TAPS),
    )
    return dx, dhalo, dweight.sum((0, 1))
