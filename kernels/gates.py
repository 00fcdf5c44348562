"""Log decay and write strength of the rule from their projections, and the gradients.

    g = -exp(A_log) softplus(a + dt_bias)        beta = sigmoid(b)
    da = -exp(A_log) sigmoid(a + dt_bias) dg     db = beta (1 - beta) dbeta
    dA_log = sum over tokens of g dg             ddt_bias = sum over tokens of da

All in fp32 with the accurate exp and log1p: the decay of a slow head is a small softplus, and its
error grows with the sequence. A thread keeps `LANES` heads and walks tokens; the CTAs' partial sums
for A_log and dt_bias are added up afterwards, so that two runs give the same bits.
"""

import tilelang
import tilelang.language as T
import torch

from .common import FLAGS, TARGET
from .inputs import DTYPES

THREADS = 256
ACCURATE = {**FLAGS, tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: False}


def lanes(heads: int) -> int:
    """Heads a thread holds."""
    return next(n for n in (4, 2, 1) if heads % n == 0)


@T.macro
def load_parameters(A_log, dt_bias, place, width, decay, bias):
    for c in T.unroll(width):
        decay[c] = -T.exp(A_log[place, c])
        bias[c] = dt_bias[place, c]


@tilelang.jit(target=TARGET, pass_configs=ACCURATE)
def gates_forward(*, heads, dtype="bfloat16"):
    f32 = "float32"
    L = T.dynamic("L")
    W = lanes(heads)
    G = heads // W  # threads a token
    PASS = THREADS // G  # tokens a CTA holds at a time

    @T.prim_func
    def main(
        a: T.Tensor((L, G, W), dtype),
        b: T.Tensor((L, G, W), dtype),
        A_log: T.Tensor((G, W), f32),
        dt_bias: T.Tensor((G, W), f32),
        g: T.Tensor((L, G, W), f32),
        beta: T.Tensor((L, G, W), f32),
    ):
        with T.Kernel(T.ceildiv(L, PASS), threads=THREADS) as bx:
            xs = T.alloc_local((W,), dtype)
            out = T.alloc_local((W,), f32)
            decay = T.alloc_local((W,), f32)
            bias = T.alloc_local((W,), f32)
            tx = T.get_thread_binding()
            place = tx % G
            token = bx * PASS + tx // G
            if tx < PASS * G:
                load_parameters(A_log, dt_bias, place, W, decay, bias)
                if token < L:
                    for c in T.vectorized(W):
                        xs[c] = a[token, place, c]
                    for c in T.unroll(W):
                        x = T.cast(xs[c], f32) + bias[c]
                        out[c] = decay[c] * T.if_then_else(x > 20.0, x, T.log1p(T.exp(x)))
                    for c in T.vectorized(W):
                        g[token, place, c] = out[c]
                    for c in T.vectorized(W):
                        xs[c] = b[token, place, c]
                    for c in T.unroll(W):
                        out[c] = 1.0 / (1.0 + T.exp(-T.cast(xs[c], f32)))
                    for c in T.vectorized(W):
                        beta[token, place, c] = out[c]

    return main


@tilelang.jit(target=TARGET, pass_configs=ACCURATE)
def gates_backward(*, heads, dtype="bfloat16"):
    f32 = "float32"
    L, N = T.dynamic("L"), T.dynamic("N")
    W = lanes(heads)
    G = heads // W
    PASS = THREADS // G

    @T.prim_func
    def main(
        a: T.Tensor((L, G, W), dtype),
        b: T.Tensor((L, G, W), dtype),
        A_log: T.Tensor((G, W), f32),
        dt_bias: T.Tensor((G, W), f32),
        dg: T.Tensor((L, G, W), f32),
        dbeta: T.Tensor((L, G, W), f32),
        da: T.Tensor((L, G, W), dtype),
        db: T.Tensor((L, G, W), dtype),
        partial: T.Tensor((N, 2, heads), f32),
    ):
        with T.Kernel(N, threads=THREADS) as bx:
            xs = T.alloc_local((W,), dtype)
            given = T.alloc_local((W,), f32)
            decay = T.alloc_local((W,), f32)
            bias = T.alloc_local((W,), f32)
            dA = T.alloc_local((W,), f32)
            ddt = T.alloc_local((W,), f32)
            total = T.alloc_local((1,), f32)
            sums = T.alloc_shared((2, PASS, heads), f32)
            tx = T.get_thread_binding()
            place = tx % G
            if tx < PASS * G:
                load_parameters(A_log, dt_bias, place, W, decay, bias)
                for c in T.unroll(W):
                    dA[c] = 0.0
                    ddt[c] = 0.0
                for i in T.serial(T.ceildiv(L, N * PASS)):
                    token = (i * N + bx) * PASS + tx // G
                    if token < L:
                        for c in T.vectorized(W):
                            xs[c] = a[token, place, c]
                        for c in T.vectorized(W):
                            given[c] = dg[token, place, c]
                        for c in T.unroll(W):
                            x = T.cast(xs[c], f32) + bias[c]
                            softplus = T.if_then_else(x > 20.0, x, T.log1p(T.exp(x)))
                            slope = T.if_then_else(x > 20.0, 1.0, 1.0 / (1.0 + T.exp(-x)))
                            given[c] = given[c] * decay[c]
                            dA[c] += given[c] * softplus
                            given[c] = given[c] * slope
                            ddt[c] += given[c]
                        for c in T.vectorized(W):
                            xs[c] = T.cast(given[c], dtype)
                        for c in T.vectorized(W):
                            da[token, place, c] = xs[c]
                        for c in T.vectorized(W):
                            xs[c] = b[token, place, c]
                        for c in T.vectorized(W):
                            given[c] = dbeta[token, place, c]
                        for c in T.unroll(W):
                            beta = 1.0 / (1.0 + T.exp(-T.cast(xs[c], f32)))
                            given[c] = given[c] * beta * (1.0 - beta)
                        for c in T.vectorized(W):
                            xs[c] = T.cast(given[c], dtype)
                        for c in T.vectorized(W):
                            db[token, place, c] = xs[c]
                for c in T.unroll(W):
                    sums[0, tx // G, place * W + c] = dA[c]
                    sums[1, tx // G, place * W + c] = ddt[c]
            T.sync_threads()
            for i in T.serial(T.ceildiv(heads, THREADS)):
                head = i * THREADS + tx
                if head < heads:
                    for which in T.serial(2):
                        total[0] = 0.0
                        for r in T.serial(PASS):
                            total[0] += sums[which, r, head]
                        partial[bx, which, head] = total[0]

    return main


def decay_and_strength(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """g and beta [..., H] fp32 of a and b [..., H] bf16 or fp16; A_log and dt_bias [H] fp32."""
    heads = a.shape[-1]
    g, beta = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
    kernel = gates_forward(heads=heads, dtype=DTYPES[a.dtype])
    kernel(*(_tokens(t) for t in (a, b)), *_heads(A_log, dt_bias), *(_tokens(t) for t in (g, beta)))
    return g, beta


def decay_and_strength_backward(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    dg: torch.Tensor,
    dbeta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """da, db in the dtype of a; dA_log and ddt_bias [H] fp32. dg and dbeta are fp32."""
    heads = a.shape[-1]
    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count
    held = THREADS // (heads // lanes(heads))
    blocks = min(-(-a.numel() // (heads * held)), 4 * processors)
    partial = torch.empty(blocks, 2, heads, dtype=torch.float32, device=a.device)
    kernel = gates_backward(heads=heads, dtype=DTYPES[a.dtype])
    kernel(
        *(_tokens(t) for t in (a, b)),
        *_heads(A_log, dt_bias),
        *(_tokens(t) for t in (dg, dbeta, da, db)),
        partial,
    )
    dA_log, ddt_bias = partial.sum(0)
    return da, db, dA_log, ddt_bias


def _tokens(x: torch.Tensor) -> torch.Tensor:
    width = lanes(x.shape[-1])
    return x.contiguous().view(-1, x.shape[-1] // width, width)


def _heads(*parameters: torch.Tensor) -> list[torch.Tensor]:
    return [_tokens(p)[0] for p in parameters]
