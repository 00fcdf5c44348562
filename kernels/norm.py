"""RMSNorm of the rule's outputs times SiLU of the gate, and its gradients.

    n = x / rms(x)     y = n * weight * silu(z)                 rms(x) = sqrt(mean(x^2) + eps)
    h = dy * silu(z)   dx = (h * weight - n mean(h * weight * n)) / rms(x)
                       dz = dy * n * weight * silu'(z)          dweight = sum over rows of h * n

Eight numbers a thread, `dim` / 8 threads a row; all arithmetic is fp32. Every operand is read once:
the backward makes rms(x) again. Each of its CTAs walks rows with a stride and writes one row of
partial sums of dweight, added up afterwards, so that two runs give the same bits.
"""

import tilelang
import tilelang.language as T
import torch

from .common import FLAGS, TARGET
from .inputs import DTYPES

LANES = 8
THREADS = 256
BATCH = 2  # rows whose loads a thread has in flight
BLOCKS = 3  # CTAs of the backward on a multiprocessor


@T.macro
def add_over_row(x, threads):
    """x[0] <- its sum over the `threads` neighbours that share a row."""
    for step in T.unroll(threads.bit_length() - 1):
        x[0] += T.shfl_xor(x[0], 1 << step)


@T.macro
def load_weight(weight, place, w):
    for c in T.vectorized(LANES):
        w[c] = weight[place, c]


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def norm_forward(*, dim, dtype="bfloat16"):
    f32 = "float32"
    R = T.dynamic("R", "int64")
    G = dim // LANES  # threads a row
    PASS = THREADS // G  # rows a CTA holds at a time

    @T.prim_func
    def main(
        x: T.Tensor((R, G, LANES), dtype),
        z: T.Tensor((R, G, LANES), dtype),
        weight: T.Tensor((G, LANES), f32),
        y: T.Tensor((R, G, LANES), dtype),
        eps: T.float32,
    ):
        with T.Kernel(T.ceildiv(R, PASS * BATCH), threads=THREADS) as bx:
            T.annotate_min_blocks_per_sm(4)
            xs = T.alloc_local((BATCH * LANES,), dtype)
            zs = T.alloc_local((BATCH * LANES,), dtype)
            row = T.alloc_local((LANES,), dtype)
            w = T.alloc_local((LANES,), f32)
            f = T.alloc_local((LANES,), f32)
            square = T.alloc_local((1,), f32)
            tx = T.get_thread_binding()
            place = tx % G
            first = bx * (PASS * BATCH) + tx // G
            load_weight(weight, place, w)
            for u in T.unroll(BATCH):
                if first + u * PASS < R:
                    for c in T.vectorized(LANES):
                        xs[u * LANES + c] = x[first + u * PASS, place, c]
                    for c in T.vectorized(LANES):
                        zs[u * LANES + c] = z[first + u * PASS, place, c]
            for u in T.unroll(BATCH):
                square[0] = 0.0
                for c in T.unroll(LANES):
                    f[c] = T.cast(xs[u * LANES + c], f32)
                    square[0] += f[c] * f[c]
                add_over_row(square, G)
                inverse = T.rsqrt(square[0] / dim + eps)
                for c in T.unroll(LANES):
                    gate = T.cast(zs[u * LANES + c], f32)
                    f[c] = f[c] * inverse * w[c] * (gate / (1.0 + T.exp(-gate)))
                for c in T.vectorized(LANES):
                    row[c] = T.cast(f[c], dtype)
                if first + u * PASS < R:
                    for c in T.vectorized(LANES):
                        y[first + u * PASS, place, c] = row[c]

    return main


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def norm_backward(*, dim, dtype="bfloat16"):
    f32 = "float32"
    R, N = T.dynamic("R", "int64"), T.dynamic("N")
    G = dim // LANES
    PASS = THREADS // G
    WARPS = THREADS // 32

    @T.prim_func
    def main(
        x: T.Tensor((R, G, LANES), dtype),
        z: T.Tensor((R, G, LANES), dtype),
        weight: T.Tensor((G, LANES), f32),
        dy: T.Tensor((R, G, LANES), dtype),
        dx: T.Tensor((R, G, LANES), dtype),
        dz: T.Tensor((R, G, LANES), dtype),
        dweight: T.Tensor((N, dim), f32),
        eps: T.float32,
    ):
        with T.Kernel(N, threads=THREADS) as bx:
            T.annotate_min_blocks_per_sm(BLOCKS)
            xs = T.alloc_local((BATCH * LANES,), dtype)
            zs = T.alloc_local((BATCH * LANES,), dtype)
            ys = T.alloc_local((BATCH * LANES,), dtype)
            row = T.alloc_local((LANES,), dtype)
            w = T.alloc_local((LANES,), f32)
            dw = T.alloc_local((LANES,), f32)
            n = T.alloc_local((LANES,), f32)
            h = T.alloc_local((LANES,), f32)
            slope = T.alloc_local((LANES,), f32)
            total = T.alloc_local((1,), f32)
            sums = T.alloc_shared((WARPS, dim), f32)
            tx = T.get_thread_binding()
            place = tx % G
            load_weight(weight, place, w)
            for c in T.unroll(LANES):
                dw[c] = 0.0
            for i in T.serial(T.ceildiv(R, N * (PASS * BATCH))):
                first = (i * N + bx) * (PASS * BATCH) + tx // G
                for u in T.unroll(BATCH):
                    for c in T.vectorized(LANES):
                        xs[u * LANES + c] = 0
                    for c in T.vectorized(LANES):
                        zs[u * LANES + c] = 0
                    for c in T.vectorized(LANES):
                        ys[u * LANES + c] = 0
                    if first + u * PASS < R:
                        for c in T.vectorized(LANES):
                            xs[u * LANES + c] = x[first + u * PASS, place, c]
                        for c in T.vectorized(LANES):
                            zs[u * LANES + c] = z[first + u * PASS, place, c]
                        for c in T.vectorized(LANES):
                            ys[u * LANES + c] = dy[first + u * PASS, place, c]
                for u in T.unroll(BATCH):
                    total[0] = 0.0
                    for c in T.unroll(LANES):
                        n[c] = T.cast(xs[u * LANES + c], f32)
                        total[0] += n[c] * n[c]
                    add_over_row(total, G)
                    inverse = T.rsqrt(total[0] / dim + eps)
                    total[0] = 0.0
                    for c in T.unroll(LANES):
                        n[c] = n[c] * inverse
                        gate = T.cast(zs[u * LANES + c], f32)
                        given = T.cast(ys[u * LANES + c], f32)
                        sigmoid = 1.0 / (1.0 + T.exp(-gate))
                        h[c] = given * gate * sigmoid
                        slope[c] = given * n[c] * w[c] * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                        dw[c] += h[c] * n[c]
                        h[c] = h[c] * w[c]
                        total[0] += h[c] * n[c]
                    add_over_row(total, G)
                    for c in T.unroll(LANES):
                        h[c] = (h[c] - n[c] * (total[0] / dim)) * inverse
                    if first + u * PASS < R:
                        for c in T.vectorized(LANES):
                            row[c] = T.cast(slope[c], dtype)
                        for c in T.vectorized(LANES):
                            dz[first + u * PASS, place, c] = row[c]
                        for c in T.vectorized(LANES):
                            row[c] = T.cast(h[c], dtype)
                        for c in T.vectorized(LANES):
                            dx[first + u * PASS, place, c] = row[c]
            for c in T.unroll(LANES):
                total[0] = dw[c]
                for step in T.unroll((32 // G).bit_length() - 1):
                    total[0] += T.shfl_xor(total[0], G << step)
                if tx % 32 < G:
                    sums[tx // 32, place * LANES + c] = total[0]
            T.sync_threads()
            if tx < dim:
                total[0] = 0.0
                for i in T.serial(WARPS):
                    total[0] += sums[i, tx]
                dweight[bx, tx] = total[0]

    return main


def gated_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """rmsnorm(x) * weight * silu(z), x and z [..., dim] bf16 or fp16 (dim 64, 128 or 256), weight fp32."""
    dim = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kernel = norm_forward(dim=dim, dtype=DTYPES[x.dtype])
    kernel(_rows(x), _rows(z), _rows(weight)[0], _rows(y), eps)
    return y


def gated_norm_backward(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dz in the dtype of x, and dweight [dim] fp32."""
    dim = x.shape[-1]
    dx, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    held = THREADS * LANES * BATCH  # numbers of a CTA at a time
    blocks = min(-(-x.numel() // held), BLOCKS * processors)
    dweight = x.new_empty(blocks, dim, dtype=torch.float32)
    kernel = norm_backward(dim=dim, dtype=DTYPES[x.dtype])
    kernel(*map(_rows, (x, z)), _rows(weight)[0], *map(_rows, (dy, dx, dz)), dweight, eps)
    return dx, dz, dweight.sum(0)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1, x.shape[-1] // LANES, LANES)
