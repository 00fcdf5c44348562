"""What the warps beside the chain of recurrence_kept.py do: outputs, gate vectors, loads, stores.

Macros; their text is part of its roles' branches.
"""

import tilelang.language as T

from .common import CHUNK, CHUNK_SLOT

C, K, HALF = CHUNK, 128, 64
ROWS = T.GemmWarpPolicy.FullRow


@T.macro
def put_tile(registers, tile, columns, t):
    """64 rows of a fragment in accumulator layout into shared memory, by 128 threads."""
    for x in T.unroll(columns // 16):
        T.call_extern(
            "handle",
            "gdn::store_matrix",
            T.access_ptr(tile[t // 32 * 16 + t % 16, x * 16 + t % 32 // 16 * 8], "r"),
            T.access_ptr(registers[t // 32 * 16 + t % 32 // 4, x * 16 + t % 4 * 2], "r"),
        )


@T.macro
def put_tile_at(registers, tiles, s, columns, t):
    """The same, into one of several tiles."""
    for x in T.unroll(columns // 16):
        T.call_extern(
            "handle",
            "gdn::store_matrix",
            T.access_ptr(tiles[s, t // 32 * 16 + t % 16, x * 16 + t % 32 // 16 * 8], "r"),
            T.access_ptr(registers[t // 32 * 16 + t % 32 // 4, x * 16 + t % 4 * 2], "r"),
        )


@T.macro
def tell(barriers, which, t):
    """What a warp wrote to shared memory is there, for bulk copies and products, too."""
    T.call_extern("handle", "gdn::fence_shared")
    T.call_extern("handle", "__syncwarp")
    if t % 32 == 0:
        T.mbarrier_arrive(barriers[which])


def make_outputs(*, stages, normalize):
    """The loop of warpgroup `w` of two that make outputs of every other chunk, thread `t` of 128."""

    @T.macro
    def run(w, qs, ks, as_, ss, os_, ds, gs, rs, qn, P, Pb, D, O, Ob, X, full, stateful, stateless,
            valued, staged, stored, empty, o, row, full_chunks, end, h, column, n, t, scale):  # fmt: skip
        for i in T.serial((n + 1 - w) // 2):
            c = 2 * i + w
            s = c % stages
            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
            T.wgmma_gemm(
                qs[s, :, :], ks[s, :, :], P, transpose_B=True, clear_accum=True, policy=ROWS
            )
            for x, y in T.Parallel(C, C):
                D[x, y] = T.exp2(T.min(gs[s, x] - gs[s, y], 0.0))
            if normalize:
                for x, y in T.Parallel(C, C):
                    D[x, y] *= scale * qn[s, x] * rs[s, y]
            else:
                for x, y in T.Parallel(C, C):
                    D[x, y] *= scale
            for x, y in T.Parallel(C, C):
                D[x, y] = T.if_then_else(x >= y, D[x, y], 0.0)
            T.wait_wgmma(0)
            for x, y in T.Parallel(C, C):
                P[x, y] *= D[x, y]
            T.copy(P, Pb)
            T.mbarrier_wait_parity(stateful[w], i % 2)
            T.wgmma_gemm(qs[s, :, :], ss, O, transpose_B=True, clear_accum=True, policy=ROWS)
            T.wait_wgmma(0)
            if t % 32 == 0:
                T.mbarrier_arrive(stateless[0])
            if normalize:
                for x, y in T.Parallel(C, HALF):
                    O[x, y] *= T.exp2(gs[s, x]) * (scale * qn[s, x])
            else:
                for x, y in T.Parallel(C, HALF):
                    O[x, y] *= T.exp2(gs[s, x]) * scale
            T.mbarrier_wait_parity(valued[w], i % 2)
            T.wgmma_gemm(Pb, as_[s, :, :], O, transpose_B=True, policy=ROWS)
            T.sync_warp()
            for x in T.unroll(4):
                T.call_extern(
                    "handle",
                    "tl::ptx_ldmatrix_x4_trans",
                    T.access_ptr(
                        as_[
                            s, x * 16 + t % 32 // 16 * 8 + t % 8, t // 32 % 4 * 16 + t % 16 // 8 * 8
                        ],
                        "r",
                    ),
                    T.access_ptr(X[x * 16 + t % 4 * 2, t // 32 * 16 + t % 32 // 4], "w"),
                )
            T.sync_warp()
            T.wait_wgmma(0)
            if t % 32 == 0:
                T.mbarrier_arrive(empty[s])
            T.copy(O, Ob)
            if c > 0:  # the chunk before, of the other warpgroup
                T.mbarrier_wait_parity(stored[1 - w], (c - 1) // 2 % 2)
            T.copy(Ob, os_)
            for x in T.unroll(4):
                T.call_extern(
                    "handle",
                    "gdn::store_matrix",
                    T.access_ptr(ds[t // 32 * 16 + t % 16, x * 16 + t % 32 // 16 * 8], "r"),
                    T.access_ptr(X[x * 16 + t % 4 * 2, t // 32 * 16 + t % 32 // 4], "r"),
                )
            if c >= full_chunks:  # a document's last rows, by ordinary stores
                T.call_extern("handle", "gdn::wait_named", 1 + w)
                for x in T.serial(C // 16):
                    r = x * 16 + t // 8
                    if row + c * C + r < end:
                        for y in T.vectorized(8):
                            o[row + c * C + r, h, column + t % 8 * 8 + y] = os_[r, t % 8 * 8 + y]
            tell(staged, w, t)

    return run


def scaler(*, stages, normalize):
    """The loop of a warp, two tokens a lane `t`."""

    @T.macro
    def run(gs, rs, as_, beta, ein, eout, lost, es, full, scaled, row, end, h, n, t):
        b = T.alloc_local((2,), "float32")
        for c in T.serial(n):
            s = c % stages
            for x in T.unroll(2):
                b[x] = 0.0
                if row + c * C + x * 32 + t < end:
                    b[x] = T.cast(beta[row + c * C + x * 32 + t, h], "float32")
            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
            for x in T.unroll(2):
                i = x * 32 + t
                G = gs[s, i]
                lost[s, i] = b[x] - T.cast(as_[s, i, i], "float32")
                if normalize:
                    ein[s, i] = T.exp2(G) * rs[s, i]
                    eout[s, i] = T.exp2(gs[s, C - 1] - G) * rs[s, i]
                else:
                    ein[s, i] = T.exp2(G)
                    eout[s, i] = T.exp2(gs[s, C - 1] - G)
            if t == 31:
                es[s] = T.exp2(gs[s, C - 1])
            T.call_extern("handle", "__syncwarp")
            if t == 0:
                T.mbarrier_arrive(scaled[s])

    return run


def producer(*, stages, normalize):
    """The loop of the warp that loads."""

    @T.macro
    def run(q, k, v, a, gate, rnorm, qnorm, qs, ks, vs, as_, gs, rs, qn, full, empty, n, row, at, h,
            hk, column):  # fmt: skip
        for c in T.serial(n):
            s = c % stages
            r0 = row + c * C
            T.mbarrier_wait_parity(empty[s], (c // stages) % 2 ^ 1)
            if normalize:
                T.tma_copy(rnorm[at[CHUNK_SLOT] + c, hk, :], rs[s, :], barrier=full[s])
                T.tma_copy(qnorm[at[CHUNK_SLOT] + c, hk, :], qn[s, :], barrier=full[s])
            T.tma_copy(k[r0 : r0 + C, hk, :], ks[s, :, :], barrier=full[s])
            T.tma_copy(q[r0 : r0 + C, hk, :], qs[s, :, :], barrier=full[s])
            T.tma_copy(gate[at[CHUNK_SLOT] + c, h, :], gs[s, :], barrier=full[s])
            T.tma_copy(a[at[CHUNK_SLOT] + c, h, :, :], as_[s, :, :], barrier=full[s])
            T.tma_copy(
                v[r0 : r0 + C, h, column : column + HALF],
                vs[s * C : s * C + C, :],
                barrier=full[s],
            )
            T.mbarrier_arrive(full[s])

    return run


@T.macro
def state_storer(ss, entering, slot, n, h, column, stateful, stateless):
    """The loop of the warp that stores the states."""
    for c in T.serial(n):
        T.mbarrier_wait_parity(stateful[c % 2], c // 2 % 2)
        T.tma_copy(ss, entering[slot + c, h, column : column + HALF, :])
        T.tma_store_wait()
        T.mbarrier_arrive(stateless[0])


@T.macro
def storer(os_, ds, o, vd, row, full_chunks, slot, n, h, column, staged, stored):
    """The loop of the warp that stores Vd, and outputs of chunks that are full."""
    for c in T.serial(n):
        T.mbarrier_wait_parity(staged[c % 2], c // 2 % 2)
        T.tma_copy(ds, vd[slot + c, h, :, column : column + HALF])
        if c < full_chunks:
            T.tma_copy(os_, o[row + c * C : row + c * C + C, h, column : column + HALF])
        T.tma_store_wait()
        T.mbarrier_arrive(stored[c % 2])
