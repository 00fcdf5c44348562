"""The serial half of the backward: states replayed, gradients of states walked back, in one launch.

Row vectors per token, G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G), `a`
from prepare.py and P_ij = scale exp(G_i - G_j) q_i k_j, j <= i. Both chains keep their state
transposed, [64 value columns, K], in the accumulators of one warpgroup (recurrence.py).

    replay   U = K S     Vd = a (V - gamma U)        S <- gamma_C S + K^T (r Vd)
             one CTA a (segment, value head, 64 columns), from the states that the forward saved
    reverse  Vn = r (K dS) + P^T dO     dV = a^T Vn
             dS <- gamma_C dS + Q^T (scale gamma dO) - K^T (gamma dV)
             one CTA a (document, value head, 64 columns); what leaves the first chunk is dh0

They leave, for the chunk-parallel half (backward_gradients.py), the state that enters and the
gradient of the state that leaves each chunk, and Vd; dV is an output. Rows of Vd past the end of a
document are zero, because those of `a` are; P and dO of such rows are masked here.

The dS chain on its own, with nothing stored on the way, summarises a shard in reverse: dS_ext, the
gradient of its first state while the gradient of its last one is zero.
"""

import tilelang
import tilelang.language as T

from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    FLAGS,
    MATRIX_COPIES,
    PART,
    ROW,
    TARGET,
    find_segment,
    transposed_layout,
)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def chains(*, dtype="bfloat16", normalize=False, store=True, stages=3):
    C, K, V, HALF = CHUNK, 128, 128, 64
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NF, NR, NO = T.dynamic("N0"), T.dynamic("NF"), T.dynamic("NR"), T.dynamic("NO")
    segments = NS if store else 0

    @T.macro
    def load_transposed(xs, stage, Xf, tx):
        for x in T.unroll(4):
            T.call_extern(
                "handle",
                "tl::ptx_ldmatrix_x4_trans",
                T.access_ptr(
                    xs[
                        stage * C + x * 16 + tx % 32 // 16 * 8 + tx % 8,
                        tx // 32 % 4 * 16 + tx % 16 // 8 * 8,
                    ],
                    "r",
                ),
                T.access_ptr(Xf[x * 16 + tx % 4 * 2, tx // 32 % 4 * 16 + tx % 32 // 4], "w"),
            )

    @T.macro
    def stage_rows(Of, os_, tx):
        for x in T.unroll(4):
            T.call_extern(
                "handle",
                "gdn::store_matrix_trans",
                T.access_ptr(
                    os_[x * 16 + tx % 32 // 16 * 8 + tx % 8, tx // 32 % 4 * 16 + tx % 16 // 8 * 8],
                    "w",
                ),
                T.access_ptr(Of[x * 16 + tx % 4 * 2, tx // 32 % 4 * 16 + tx % 32 // 4], "r"),
            )

    @T.macro
    def store_dv(os_, dv, at, end, h, tile, tx):
        if at + C <= end:
            T.tma_copy(os_, dv[at : at + C, h, tile * HALF : tile * HALF + HALF])
        else:
            for x in T.serial(C // 16):
                if at + x * 16 + tx // 8 < end:
                    for y in T.vectorized(8):
                        dv[at + x * 16 + tx // 8, h, tile * HALF + tx % 8 * 8 + y] = os_[
                            x * 16 + tx // 8, tx % 8 * 8 + y
                        ]

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, V), dtype),
        do: T.Tensor((L, Hv, V), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        cu: T.Tensor((N1,), i32),
        initial: T.Tensor((N0, Hv, K, V), f32),
        states: T.Tensor((NS, Hv, K, V), f32),
        dfinal: T.Tensor((NF, Hv, K, V), f32),
        dinitial: T.Tensor((N1 - 1, Hv, K, V), f32),
        entering: T.Tensor((NO, Hv, V, K), dtype),
        dleaving: T.Tensor((NO, Hv, V, K), dtype),
        vd: T.Tensor((NO, Hv, C, V), dtype),
        dv: T.Tensor((L, Hv, V), dtype),
        scale: T.float32,
        segment: T.int32,
        bits: T.int32,
        has_initial: T.int32,
        has_dfinal: T.int32,
    ):
        with T.Kernel(V // HALF, Hv, segments + N1 - 1, threads=384) as (tile, h, z):
            T.import_source(MATRIX_COPIES)
            ks = T.alloc_shared((stages, C, K), dtype)
            qs = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            xs = T.alloc_shared((stages * C, HALF), dtype)  # v or dO
            ps = T.alloc_shared((2 * C, C), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((2, C), f32)  # gamma
            eout = T.alloc_shared((2, C), f32)  # r
            eq = T.alloc_shared((2, C), f32)  # scale gamma
            if normalize:
                rs = T.alloc_shared((stages, C), f32)
                rq = T.alloc_shared((C,), f32)
                square = T.alloc_local((1,), f32)
            S = T.alloc_fragment((HALF, K), f32)
            Sb = T.alloc_fragment((HALF, K), dtype)
            U = T.alloc_fragment((HALF, C), f32)
            Ub = T.alloc_fragment((HALF, C), dtype)
            W = T.alloc_fragment((HALF, C), f32)
            Wd = T.alloc_fragment((HALF, C), dtype)
            Xb = T.alloc_fragment((HALF, C), dtype)
            Xf = T.alloc_fragment((C, HALF), dtype)
            E = T.alloc_fragment((HALF, C), f32)
            F = T.alloc_fragment((HALF, C), f32)
            P = T.alloc_fragment((C, C), f32)
            Pb = T.alloc_fragment((C, C), dtype)
            layouts = {
                Xf: transposed_layout(Xf),
                xs: tilelang.layout.make_swizzled_layout(xs),
                ps: tilelang.layout.make_swizzled_layout(ps),
            }
            if store:
                Sf = T.alloc_fragment((HALF, K), dtype)
                Of = T.alloc_fragment((C, HALF), dtype)
                ss = T.alloc_shared((HALF, K), dtype)
                os_ = T.alloc_shared((C, HALF), dtype)
                layouts[Of] = transposed_layout(Of)
                layouts[os_] = tilelang.layout.make_swizzled_layout(os_)
                layouts[ss] = tilelang.layout.make_swizzled_layout(ss)
            T.annotate_layout(layouts)
            full = T.alloc_barrier([32] * stages)
            empty = T.alloc_barrier([256] * stages)
            ready = T.alloc_barrier([128] * 2)
            spent = T.alloc_barrier([128] * 2)
            tx = T.get_thread_binding()

            # the documents' reverse chains are the longest and come first
            at = T.alloc_local((7,), i32)
            end = T.alloc_local((1,), i32)
            reverse = z < N1 - 1
            if reverse:
                begin = cu[z]
                end[0] = cu[z + 1]
                at[DOC] = z
                at[ROW] = begin
                at[PART] = 0
                at[CHUNK_SLOT] = T.truncdiv(begin, CHUNK) + z
                at[COUNT] = T.truncdiv(end[0] - begin + CHUNK - 1, CHUNK)
            else:
                find_segment(cu, z - (N1 - 1), segment, N1 - 1, bits, at)
                end[0] = cu[at[DOC] + 1]
            n = at[COUNT]
            row = at[ROW]
            slot = at[CHUNK_SLOT]

            if tx < 128:
                T.set_max_nreg(240, 1)
                T.clear(S)
                if reverse:
                    if has_dfinal != 0:
                        for x, y in T.Parallel(HALF, K):
                            S[x, y] = dfinal[at[DOC], h, y, tile * HALF + x]
                    for i in T.serial(n):
                        c = n - 1 - i
                        s = i % stages
                        b = i % 2
                        T.mbarrier_wait_parity(full[s], (i // stages) % 2)
                        decay = T.exp2(gs[s, C - 1])
                        T.copy(S, Sb)
                        if store:
                            T.copy(S, Sf)
                        for x, y in T.Parallel(HALF, K):
                            S[x, y] *= decay
                        T.wgmma_gemm(Sb, ks[s, :, :], U, transpose_B=True, clear_accum=True)
                        T.mbarrier_wait_parity(ready[b], (i // 2) % 2)
                        T.wgmma_gemm(
                            xs[s * C : (s + 1) * C, :],
                            ps[b * C : (b + 1) * C, :],
                            W,
                            transpose_A=True,
                            clear_accum=True,
                        )
                        if store:
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            T.copy(Sf, ss)
                            if i > 0:
                                stage_rows(Of, os_, tx)
                            T.fence_proxy_async()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            T.tma_copy(
                                ss, dleaving[slot + c, h, tile * HALF : tile * HALF + HALF, :]
                            )
                            if i > 0:
                                store_dv(os_, dv, row + (c + 1) * C, end[0], h, tile, tx)
                        load_transposed(xs, s, Xf, tx)
                        for x, y in T.Parallel(HALF, C):
                            Xb[x, y] = Xf[y, x] * eq[b, y]
                        for x, y in T.Parallel(HALF, C):
                            E[x, y] = eout[b, y]
                        T.wait_wgmma(0)
                        for x, y in T.Parallel(HALF, C):
                            Ub[x, y] = U[x, y] * E[x, y] + W[x, y]
                        T.wgmma_gemm(Ub, as_[s, :, :], U, clear_accum=True)
                        T.wgmma_gemm(Xb, qs[s, :, :], S)
                        for x, y in T.Parallel(HALF, C):
                            F[x, y] = ein[b, y]
                        T.wait_wgmma(1)
                        for x, y in T.Parallel(HALF, C):
                            Wd[x, y] = -U[x, y] * F[x, y]
                        T.wgmma_gemm(Wd, ks[s, :, :], S)
                        if store:
                            for x, y in T.Parallel(HALF, C):
                                Of[y, x] = U[x, y]
                        T.wait_wgmma(0)
                        T.mbarrier_arrive(empty[s])
                        T.mbarrier_arrive(spent[b])
                    if store:
                        if n > 0:
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            stage_rows(Of, os_, tx)
                            T.fence_proxy_async()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            store_dv(os_, dv, row, end[0], h, tile, tx)
                            T.tma_store_wait()
                    for x, y in T.Parallel(HALF, K):
                        dinitial[at[DOC], h, y, tile * HALF + x] = S[x, y]
                else:
                    if store:
                        if at[PART] > 0:
                            if n > 0:
                                for x, y in T.Parallel(HALF, K):
                                    S[x, y] = states[z - (N1 - 1) - 1, h, y, tile * HALF + x]
                        else:
                            if has_initial != 0:
                                for x, y in T.Parallel(HALF, K):
                                    S[x, y] = initial[at[DOC], h, y, tile * HALF + x]
                        for c in T.serial(n):
                            s = c % stages
                            b = c % 2
                            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
                            decay = T.exp2(gs[s, C - 1])
                            T.copy(S, Sb)
                            T.copy(S, Sf)
                            for x, y in T.Parallel(HALF, K):
                                S[x, y] *= decay
                            T.wgmma_gemm(Sb, ks[s, :, :], U, transpose_B=True, clear_accum=True)
                            load_transposed(xs, s, Xf, tx)
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            T.copy(Sf, ss)
                            if c > 0:
                                stage_rows(Of, os_, tx)
                            T.fence_proxy_async()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            T.tma_copy(
                                ss, entering[slot + c, h, tile * HALF : tile * HALF + HALF, :]
                            )
                            if c > 0:
                                T.tma_copy(
                                    os_, vd[slot + c - 1, h, :, tile * HALF : tile * HALF + HALF]
                                )
                            T.mbarrier_wait_parity(ready[b], (c // 2) % 2)
                            for x, y in T.Parallel(HALF, C):
                                E[x, y] = ein[b, y]
                            T.wait_wgmma(0)
                            for x, y in T.Parallel(HALF, C):
                                Ub[x, y] = Xf[y, x] - U[x, y] * E[x, y]
                            T.wgmma_gemm(Ub, as_[s, :, :], W, transpose_B=True, clear_accum=True)
                            for x, y in T.Parallel(HALF, C):
                                F[x, y] = eout[b, y]
                            T.wait_wgmma(0)
                            for x, y in T.Parallel(HALF, C):
                                Wd[x, y] = W[x, y] * F[x, y]
                            T.wgmma_gemm(Wd, ks[s, :, :], S)
                            for x, y in T.Parallel(HALF, C):
                                Of[y, x] = W[x, y]
                            T.wait_wgmma(0)
                            T.mbarrier_arrive(empty[s])
                            T.mbarrier_arrive(spent[b])
                        if n > 0:
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            stage_rows(Of, os_, tx)
                            T.fence_proxy_async()
                            T.call_extern("handle", "gdn::wait_named", 1)
                            T.tma_copy(
                                os_, vd[slot + n - 1, h, :, tile * HALF : tile * HALF + HALF]
                            )
                            T.tma_store_wait()
            else:
                if tx < 256:
                    T.set_max_nreg(104, 0)
                    t = tx - 128
                    for i in T.serial(n):
                        c = T.if_then_else(reverse, n - 1 - i, i)
                        s = i % stages
                        b = i % 2
                        valid = end[0] - row - c * C
                        T.mbarrier_wait_parity(full[s], (i // stages) % 2)
                        if normalize:
                            if reverse:
                                square[0] = 0.0
                                for x in T.serial(K // 2):
                                    square[0] += T.cast(
                                        qs[s, t // 2, t % 2 * (K // 2) + x], f32
                                    ) * (T.cast(qs[s, t // 2, t % 2 * (K // 2) + x], f32))
                                square[0] += T.shfl_xor(square[0], 1)
                                rq[t // 2] = scale * T.rsqrt(square[0] + 1e-6)
                                T.call_extern("handle", "gdn::wait_named", 3)
                        T.mbarrier_wait_parity(spent[b], (i // 2) % 2 ^ 1)
                        if t < C:
                            G = gs[s, t]
                            if normalize:
                                ein[b, t] = T.exp2(G) * rs[s, t]
                                eout[b, t] = T.exp2(gs[s, C - 1] - G) * rs[s, t]
                                eq[b, t] = T.if_then_else(t < valid, T.exp2(G) * rq[t], 0.0)
                            else:
                                ein[b, t] = T.exp2(G)
                                eout[b, t] = T.exp2(gs[s, C - 1] - G)
                                eq[b, t] = T.if_then_else(t < valid, T.exp2(G) * scale, 0.0)
                        if reverse:
                            T.wgmma_gemm(
                                qs[s, :, :], ks[s, :, :], P, transpose_B=True, clear_accum=True
                            )
                            T.wait_wgmma(0)
                            for x, y in T.Parallel(C, C):
                                if normalize:
                                    P[x, y] = T.if_then_else(
                                        x >= y and x < valid,
                                        P[x, y] * (rq[x] * rs[s, y]) * T.exp2(gs[s, x] - gs[s, y]),
                                        0.0,
                                    )
                                else:
                                    P[x, y] = T.if_then_else(
                                        x >= y and x < valid,
                                        P[x, y] * scale * T.exp2(gs[s, x] - gs[s, y]),
                                        0.0,
                                    )
                            T.copy(P, Pb)
                            T.copy(Pb, ps[b * C : (b + 1) * C, :])
                            T.fence_proxy_async()
                            if normalize:  # rq is read before the next chunk writes it
                                T.call_extern("handle", "gdn::wait_named", 3)
                        T.mbarrier_arrive(ready[b])
                        T.mbarrier_arrive(empty[s])
                else:
                    T.set_max_nreg(24, 0)
                    if tx < 288:
                        hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                        for i in T.serial(n):
                            c = T.if_then_else(reverse, n - 1 - i, i)
                            s = i % stages
                            r0 = row + c * C
                            T.mbarrier_wait_parity(empty[s], (i // stages) % 2 ^ 1)
                            T.tma_copy(k[r0 : r0 + C, hk, :], ks[s, :, :], barrier=full[s])
                            T.tma_copy(gate[slot + c, h, :], gs[s, :], barrier=full[s])
                            if normalize:
                                T.tma_copy(rnorm[slot + c, hk, :], rs[s, :], barrier=full[s])
                            if reverse:
                                T.tma_copy(q[r0 : r0 + C, hk, :], qs[s, :, :], barrier=full[s])
                                T.tma_copy(
                                    do[r0 : r0 + C, h, tile * HALF : tile * HALF + HALF],
                                    xs[s * C : (s + 1) * C, :],
                                    barrier=full[s],
                                )
                            else:
                                T.tma_copy(
                                    v[r0 : r0 + C, h, tile * HALF : tile * HALF + HALF],
                                    xs[s * C : (s + 1) * C, :],
                                    barrier=full[s],
                                )
                            T.tma_copy(a[slot + c, h, :, :], as_[s, :, :], barrier=full[s])
                            T.mbarrier_arrive(full[s])

    return main
