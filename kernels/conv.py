"""Depthwise causal convolution of four taps with SiLU, its result cut into q, k and v.

    p_t = sum_s w_s x_{t-s}        [q k v]_t = silu(p_t)             s = 0 .. 3, w_s = weight[:, 3 - s]

where x before the row's first token is the halo [B, 3, D], and taps that reach past the start of
their document (packed: positions[t] < s) are left out. The gradients are in conv_backward.py.

A thread holds four channels and walks down a strip of tokens, so that a row is read once: the
three before it are in registers. Strips overlap by three rows, which the neighbour brings into the
L2.
"""

import tilelang
import tilelang.language as T
import torch

from .common import FLAGS, TARGET
from .inputs import DTYPES

TAPS = 4
THREADS = 128
LANES = 4  # channels of a thread
BATCH = 8  # tokens whose loads it has in flight
STRIP = 128  # tokens of a CTA


@T.macro
def load_weight(weight, group, w):
    for c in T.unroll(LANES):
        for s in T.vectorized(TAPS):
            w[c * TAPS + s] = weight[group, c, s]


@T.macro
def load_history(x, halo, b, start, group, row, rows):
    """rows[0 .. 2] <- the three tokens before `start`."""
    for s in T.unroll(TAPS - 1):
        if start + s < TAPS - 1:
            for c in T.vectorized(LANES):
                row[c] = halo[b, start + s, group, c]
        else:
            for c in T.vectorized(LANES):
                row[c] = x[b, start + s - (TAPS - 1), group, c]
        for c in T.unroll(LANES):
            rows[s * LANES + c] = T.cast(row[c], "float32")


@T.macro
def convolve(w, rows, u, packed, position, y):
    """y <- the sum over taps at row u (its own token is rows[u + 3])."""
    for c in T.unroll(LANES):
        y[c] = w[c * TAPS + TAPS - 1] * rows[(u + TAPS - 1) * LANES + c]
    for s in T.unroll(1, TAPS):
        if packed:
            if position >= s:
                for c in T.unroll(LANES):
                    y[c] += w[c * TAPS + TAPS - 1 - s] * rows[(u + TAPS - 1 - s) * LANES + c]
        else:
            for c in T.unroll(LANES):
                y[c] += w[c * TAPS + TAPS - 1 - s] * rows[(u + TAPS - 1 - s) * LANES + c]


@T.macro
def forward_tokens(
    x, positions, y, w, raw, row, rows, p, position,
    b, first, column, group, count, packed,
):  # fmt: skip
    """`count` tokens from `first` on; rows[0 .. 2] are the three before them, and after them."""
    for u in T.unroll(count):
        for c in T.vectorized(LANES):
            raw[u * LANES + c] = x[b, first + u, group, c]
        position[u] = 0
        if packed:
            position[u] = T.cast(T.min(positions[first + u], TAPS), "int32")
    for u in T.unroll(count):
        for c in T.unroll(LANES):
            rows[(u + TAPS - 1) * LANES + c] = T.cast(raw[u * LANES + c], "float32")
        convolve(w, rows, u, packed, position[u], p)
        for c in T.unroll(LANES):
            p[c] = p[c] / (1.0 + T.exp(-p[c]))
        for c in T.vectorized(LANES):
            row[c] = T.cast(p[c], y.dtype)
        for c in T.vectorized(LANES):
            y[b, first + u, column, c] = row[c]
    for c in T.unroll((TAPS - 1) * LANES):
        rows[c] = rows[count * LANES + c]


@T.macro
def walk_forward(
    x, halo, weight, positions, y, w, raw, row, rows, p, position,
    b, start, left, column, first_group, packed,
):  # fmt: skip
    """`left` tokens of the channels of one part `y`, whose first is number `first_group` of x's."""
    group = first_group + column
    load_weight(weight, group, w)
    load_history(x, halo, b, start, group, row, rows)
    whole = T.truncdiv(left, BATCH)
    for i in T.serial(whole):
        forward_tokens(
            x, positions, y, w, raw, row, rows, p, position,
            b, start + i * BATCH, column, group, BATCH, packed,
        )  # fmt: skip
    for i in T.serial(left - whole * BATCH):
        forward_tokens(
            x, positions, y, w, raw, row, rows, p, position,
            b, start + whole * BATCH + i, column, group, 1, packed,
        )  # fmt: skip


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def conv_forward(*, sizes, dtype="bfloat16", packed=False):
    f32 = "float32"
    B, L, P = T.dynamic("B"), T.dynamic("L", "int64"), T.dynamic("P")
    Q, K, V = (size // LANES for size in sizes)
    D = Q + K + V

    @T.prim_func
    def main(
        x: T.Tensor((B, L, D, LANES), dtype),
        halo: T.Tensor((B, TAPS - 1, D, LANES), dtype),
        weight: T.Tensor((D, LANES, TAPS), f32),
        positions: T.Tensor((P,), "int64"),
        q: T.Tensor((B, L, Q, LANES), dtype),
        k: T.Tensor((B, L, K, LANES), dtype),
        v: T.Tensor((B, L, V, LANES), dtype),
    ):
        with T.Kernel(T.ceildiv(D, THREADS), T.ceildiv(L, STRIP), B, threads=THREADS) as (
            bx, by, b,
        ):  # fmt: skip
            T.annotate_min_blocks_per_sm(8)
            w = T.alloc_local((LANES * TAPS,), f32)
            raw = T.alloc_local((BATCH * LANES,), dtype)
            row = T.alloc_local((LANES,), dtype)
            rows = T.alloc_local(((BATCH + TAPS - 1) * LANES,), f32)
            p = T.alloc_local((LANES,), f32)
            position = T.alloc_local((BATCH,), "int32")
            group = bx * THREADS + T.get_thread_binding()
            start = by * STRIP
            left = T.cast(T.min(L - start, STRIP), "int32")
            if group < Q:
                walk_forward(
                    x, halo, weight, positions, q, w, raw, row, rows, p, position,
                    b, start, left, group, 0, packed,
                )  # fmt: skip
            else:
                if group < Q + K:
                    walk_forward(
                        x, halo, weight, positions, k, w, raw, row, rows, p, position,
                        b, start, left, group - Q, Q, packed,
                    )  # fmt: skip
                else:
                    if group < D:
                        walk_forward(
                            x, halo, weight, positions, v, w, raw, row, rows, p, position,
                            b, start, left, group - Q - K, Q + K, packed,
                        )  # fmt: skip

    return main


def channels(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [..., D / LANES, LANES], contiguous."""
    return x.contiguous().unflatten(-1, (-1, LANES))


def placeholder(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64, device=x.device)


def causal_conv_silu(
    x: torch.Tensor,
    halo: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor | None,
    sizes: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, T, sizes[i]], contiguous, of silu(causal_conv(x, weight)).

    Args:
        x: [B, T, D] bf16 or fp16, sizes a cut of D into three multiples of 4.
        halo: [B, 3, D], the tokens before x. weight: [D, 4] fp32.
        positions: [T] int64, places in the documents; None: one document a row, halo included.
    """
    B, L, _ = x.shape
    kernel = conv_forward(sizes=sizes, dtype=DTYPES[x.dtype], packed=positions is not None)
    parts = tuple(x.new_empty(B, L, size) for size in sizes)
    kernel(
        *(channels(t) for t in (x, halo)),
        weight.contiguous().view(-1, LANES, TAPS),
        placeholder(x) if positions is None else positions,
        *(channels(part) for part in parts),
    )
    return parts[0], parts[1], parts[2]
