"""The parallel half of the backward: gradients of a chunk, from the states around it.

Row vectors per token, G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G),
D_ij = exp(G_i - G_j). With S the state that enters the chunk, dS the gradient of the one that leaves
it, Vd and dV from backward_chains.py,

    dP = scale D (dO Vd^T), j <= i        N = D (dV Vd^T), j < i
    dq = scale gamma (dO S^T) + dP K
    dk = r (Vd dS^T) - gamma (dV S^T) + dP^T Q - (N + N^T) K
    dbeta = rowsum(Vd dV) / beta^2
    dG = <q, scale gamma dO S^T> - <k, r Vd dS^T> - <k, gamma dV S^T> + rowsum(E) - colsum(E)
    E = dP (Q K^T) - N (K K^T), j < i     dG_C += sum <k, r Vd dS^T> + gamma_C <dS, S>

and dg is the reverse cumulative sum of dG. No inverse is differentiated: N is the gradient of the
triangular system, written with its two solutions. E is pairwise, its diagonal cancels and is left
out, and its sums are fp32: under strong decay nothing else keeps dg exact.

An item is a (chunk, key head); a CTA walks items and, within one, the value heads of the key head,
whose dq and dk add up in accumulators. Two warpgroups hold 64 key columns each of dq and dk. Of a
head's [64, 64] matrices the first makes dP and the second -N, from the same instructions, and they
meet in shared memory. All operands lie in shared memory, S and dS one buffer a warpgroup. A third
warpgroup loads, and sums up dg.

Normalised queries and keys are never written: the accumulators hold |q|^-1 dq^ and |k|^-1 dk^ of the
unit vectors, for which factors 1/|q_i| and 1/|k_j| on dP, N and the row factors suffice, and
dx = acc - (x / |x|^2) <x, acc> at the end of an item.
"""

import tilelang
import tilelang.language as T

from .backward_sums import SOURCE
from .common import CHUNK, FLAGS, TARGET, find_document

SMALLEST_BETA = {
    "bfloat16": 2.0**-40,
    "float16": 2.0**-7,
}  # below, dbeta comes from backward_beta.py


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def gradients(*, ratio, dtype="bfloat16", beta_dtype="float32", normalize=False, processors=132):
    C, K, V, HALF, R = CHUNK, 128, 128, 64, ratio
    f32, i32 = "float32", "int32"
    L, NC, Hk, Hv = T.dynamic("L"), T.dynamic("NC"), T.dynamic("Hk"), T.dynamic("Hv")
    N1, NR, NP = T.dynamic("N1"), T.dynamic("NR"), T.dynamic("NP")
    smallest = SMALLEST_BETA[dtype]

    @T.macro
    def find_item(item, cu, heads, documents, bits, doc, at):
        """at <- chunk slot, key head, first token, tokens of the document from there on."""
        at[0] = T.truncdiv(item, heads)
        at[1] = item - at[0] * heads
        find_document(cu, at[0], C, documents, bits, doc)
        at[2] = cu[doc[0]] + (at[0] - T.truncdiv(cu[doc[0]], C) - doc[0]) * C
        at[3] = cu[doc[0] + 1] - at[2]

    @T.macro
    def store_rows(ms, out, row, valid, hk, w, tx):
        if valid >= C:
            T.tma_copy(ms[w, :, :], out[row : row + C, hk, w * HALF : w * HALF + HALF])
            T.tma_store_wait()
        else:
            for x in T.serial(C // 16):
                if x * 16 + tx % 128 // 8 < valid:
                    for y in T.vectorized(8):
                        out[row + x * 16 + tx % 128 // 8, hk, w * HALF + tx % 8 * 8 + y] = ms[
                            w, x * 16 + tx % 128 // 8, tx % 8 * 8 + y
                        ]

    @T.macro
    def consume(w, qk, xs, Ss, Ds, ms, gs, rk, rq, sums, traces, diagonal, project, dq, dk, cu,
                scale, bits, bx, tx, doc, at, count, fullQ, emptyQ, fullX, emptyX, fullS, emptyS,
                fullD, emptyD, fullV, emptyV):  # fmt: skip
        M = T.alloc_fragment((C, C), f32)
        QK = T.alloc_fragment((C, C), f32)
        Mb = T.alloc_fragment((C, C), dtype)
        Aq = T.alloc_fragment((C, HALF), f32)
        Ak = T.alloc_fragment((C, HALF), f32)
        Iq = T.alloc_fragment((C, HALF), f32)
        Iv = T.alloc_fragment((C, HALF), f32)
        Id = T.alloc_fragment((C, HALF), f32)
        eq = T.alloc_fragment((C,), f32)
        ein = T.alloc_fragment((C,), f32)
        eout = T.alloc_fragment((C,), f32)
        dots = T.alloc_fragment((C,), f32)
        ends = T.alloc_fragment((C,), f32)
        Of = T.alloc_fragment((C, HALF), dtype)
        part = T.alloc_local((1,), f32)
        lr = T.alloc_local((8,), dtype)
        ls = T.alloc_local((8,), dtype)
        for it in T.serial(T.ceildiv(NC * Hk - bx, processors)):
            find_item(bx + it * processors, cu, Hk, N1 - 1, bits, doc, at)
            valid = at[3]
            if valid > 0:
                T.mbarrier_wait_parity(fullQ[0], count[0] % 2)
                T.wgmma_gemm(qk[2 * w, :, :], qk[2, :, :], QK, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(qk[2 * w + 1, :, :], qk[3, :, :], QK, transpose_B=True)
                T.clear(Aq)
                T.clear(Ak)
                if normalize:
                    if w == 0:
                        part[0] = 0.0
                        for x in T.serial(HALF):
                            part[0] += T.cast(qk[tx % 2, tx // 2, x], f32) * (
                                T.cast(qk[tx % 2, tx // 2, x], f32)
                            )
                        part[0] += T.shfl_xor(part[0], 1)
                        rq[tx // 2] = T.rsqrt(part[0] + 1e-6)
                    T.call_extern("handle", "gdn::meet", 1)
                T.wait_wgmma(0)
                for g in T.serial(R):
                    hc = count[0] * R + g
                    s = hc % 2
                    T.mbarrier_wait_parity(fullX[s], (hc // 2) % 2)
                    T.wgmma_gemm(
                        xs[s * 3 + w, :, :],
                        xs[s * 3 + 2, :, :],
                        M,
                        transpose_B=True,
                        clear_accum=True,
                    )
                    T.mbarrier_wait_parity(fullS[w], hc % 2)
                    T.wgmma_gemm(xs[s * 3, :, :], Ss[w, :, :], Iq, clear_accum=True)
                    T.wait_wgmma(1)
                    T.mbarrier_wait_parity(emptyV[s], (hc // 2) % 2 ^ 1)
                    if w == 1:
                        for x, y in T.Parallel(C, C):
                            if x == y:
                                diagonal[s, x] = M[x, y]
                    # the mask comes after the arithmetic: branches here cost more than exps
                    for x, y in T.Parallel(C, C):
                        M[x, y] *= T.exp2(T.min(gs[s, x] - gs[s, y], 0.0))
                    for x, y in T.Parallel(C, C):
                        if w == 0:
                            if normalize:
                                M[x, y] *= scale * rq[x] * rk[y]
                            else:
                                M[x, y] *= scale
                        else:
                            if normalize:
                                M[x, y] *= -rk[x] * rk[y]
                            else:
                                M[x, y] *= -1.0
                    for x, y in T.Parallel(C, C):
                        M[x, y] = T.if_then_else(x >= y + w, M[x, y], 0.0)
                    if valid < C:
                        for x, y in T.Parallel(C, C):
                            M[x, y] = T.if_then_else(x < valid, M[x, y], 0.0)
                    T.copy(M, Mb)
                    T.call_extern("handle", "gdn::meet", 1)  # the last head's products are through
                    T.copy(Mb, ms[w, :, :])
                    T.call_extern("handle", "gdn::fence_shared")
                    for x, y in T.Parallel(C, C):
                        M[x, y] *= QK[x, y]
                    if w == 0:  # N has no diagonal to leave out
                        for x, y in T.Parallel(C, C):
                            M[x, y] = T.if_then_else(x > y, M[x, y], 0.0)
                    T.call_extern(
                        "handle",
                        "gdn::pair_sums",
                        M.data,
                        T.access_ptr(sums[s * 2 + w, 0], "w"),
                        T.access_ptr(sums[s * 2 + w, 64], "w"),
                    )
                    T.wgmma_gemm(xs[s * 3 + 1, :, :], Ss[w, :, :], Iv, clear_accum=True)
                    T.mbarrier_wait_parity(fullD[w], hc % 2)
                    T.wgmma_gemm(xs[s * 3 + 2, :, :], Ds[w, :, :], Id, clear_accum=True)
                    # a row of S and of dS a thread
                    part[0] = 0.0
                    for x in T.unroll(HALF // 8):
                        for y in T.vectorized(8):
                            ls[y] = Ss[w, tx % 128, x * 8 + y]
                        for y in T.vectorized(8):
                            lr[y] = Ds[w, tx % 128, x * 8 + y]
                        for y in T.unroll(8):
                            part[0] += T.cast(ls[y], f32) * T.cast(lr[y], f32)
                    part[0] = T.warp_reduce_sum(part[0]) * T.exp2(gs[s, C - 1])
                    if tx % 32 == 0:
                        traces[s, tx // 32] = part[0]
                    T.wait_wgmma(1)
                    T.mbarrier_arrive(emptyS[w])
                    for x in T.Parallel(C):
                        if normalize:
                            eq[x] = T.exp2(gs[s, x]) * (scale * rq[x])
                            ein[x] = T.exp2(gs[s, x]) * rk[x]
                            eout[x] = T.exp2(gs[s, C - 1] - gs[s, x]) * rk[x]
                        else:
                            eq[x] = T.exp2(gs[s, x]) * scale
                            ein[x] = T.exp2(gs[s, x])
                            eout[x] = T.exp2(gs[s, C - 1] - gs[s, x])
                    for x, y in T.Parallel(C, HALF):
                        Iq[x, y] *= eq[x]
                    for x, y in T.Parallel(C, HALF):
                        Iv[x, y] *= ein[x]
                    for x, y in T.Parallel(C, HALF):
                        Aq[x, y] += Iq[x, y]
                    T.wait_wgmma(0)
                    T.mbarrier_arrive(emptyD[w])
                    T.mbarrier_arrive(emptyX[s])
                    for x, y in T.Parallel(C, HALF):
                        Id[x, y] *= eout[x]
                    for x, y in T.Parallel(C, HALF):
                        Ak[x, y] += Id[x, y] - Iv[x, y]
                    T.call_extern("handle", "gdn::meet", 2)  # dP and -N are there
                    T.wgmma_gemm(ms[0, :, :], qk[2 + w, :, :], Aq)
                    T.wgmma_gemm(ms[0, :, :], qk[w, :, :], Ak, transpose_A=True)
                    T.wgmma_gemm(ms[1, :, :], qk[2 + w, :, :], Ak)
                    T.wgmma_gemm(ms[1, :, :], qk[2 + w, :, :], Ak, transpose_A=True)
                    for x, y in T.Parallel(C, HALF):
                        Iq[x, y] = Iq[x, y] * qk[w, x, y] - (Iv[x, y] + Id[x, y]) * qk[2 + w, x, y]
                    for x, y in T.Parallel(C, HALF):
                        Id[x, y] *= qk[2 + w, x, y]
                    T.reduce_sum(Iq, dots, dim=1, clear=True)
                    T.reduce_sum(Id, ends, dim=1, clear=True)
                    for x in T.Parallel(C):
                        sums[s * 2 + w, 320 + x] = dots[x]
                    for x in T.Parallel(C):
                        sums[s * 2 + w, 384 + x] = ends[x]
                    T.mbarrier_arrive(fullV[s])
                    T.wait_wgmma(0)
                if normalize:
                    for x, y in T.Parallel(C, HALF):
                        Iq[x, y] = Aq[x, y] * qk[w, x, y]
                    for x, y in T.Parallel(C, HALF):
                        Id[x, y] = Ak[x, y] * qk[2 + w, x, y]
                    T.reduce_sum(Iq, dots, dim=1, clear=True)
                    T.reduce_sum(Id, ends, dim=1, clear=True)
                    for x in T.Parallel(C):
                        project[w, x] = dots[x]
                    for x in T.Parallel(C):
                        project[w, C + x] = ends[x]
                T.call_extern("handle", "gdn::meet", 1)
                if normalize:
                    for x in T.Parallel(C):
                        eq[x] = (project[0, x] + project[1, x]) * rq[x] * rq[x]
                        eout[x] = (project[0, C + x] + project[1, C + x]) * rk[x] * rk[x]
                    for x, y in T.Parallel(C, HALF):
                        Aq[x, y] -= eq[x] * qk[w, x, y]
                    for x, y in T.Parallel(C, HALF):
                        Ak[x, y] -= eout[x] * qk[2 + w, x, y]
                T.mbarrier_arrive(emptyQ[0])
                T.copy(Aq, Of)
                T.copy(Of, ms[w, :, :])
                T.call_extern("handle", "gdn::fence_shared")
                T.call_extern("handle", "gdn::meet_half", 3 + w)
                store_rows(ms, dq, at[2], valid, at[1], w, tx)
                T.call_extern("handle", "gdn::meet_half", 3 + w)
                T.copy(Ak, Of)
                T.copy(Of, ms[w, :, :])
                T.call_extern("handle", "gdn::fence_shared")
                T.call_extern("handle", "gdn::meet_half", 3 + w)
                store_rows(ms, dk, at[2], valid, at[1], w, tx)
                count[0] += 1

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        do: T.Tensor((L, Hv, V), dtype),
        vd: T.Tensor((NC, Hv, C, V), dtype),
        dv: T.Tensor((L, Hv, V), dtype),
        entering: T.Tensor((NC, Hv, V, K), dtype),
        dleaving: T.Tensor((NC, Hv, V, K), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        dq: T.Tensor((L, Hk, K), dtype),
        dk: T.Tensor((L, Hk, K), dtype),
        dg: T.Tensor((L, Hv), f32),
        dbeta: T.Tensor((L, Hv), f32),
        pairs: T.Tensor((NP,), i32),
        scale: T.float32,
        bits: T.int32,
    ):
        with T.Kernel(processors, threads=384) as bx:
            T.import_source(SOURCE)
            qk = T.alloc_shared((4, C, HALF), dtype)  # halves of q, halves of k
            xs = T.alloc_shared((6, C, V), dtype)  # [stage * 3 + (dO, dV, Vd)]
            Ss = T.alloc_shared((2, V, HALF), dtype)
            Ds = T.alloc_shared((2, V, HALF), dtype)
            ms = T.alloc_shared((2, C, C), dtype)  # dP, -N
            gs = T.alloc_shared((2, C), f32)
            rk = T.alloc_shared((C,), f32)
            rq = T.alloc_shared((C,), f32)
            project = T.alloc_shared((2, 2 * C), f32)
            sums = T.alloc_shared((4, 7 * C), f32)  # rows, columns of 4 warps, dots, ends
            traces = T.alloc_shared((2, 8), f32)
            diagonal = T.alloc_shared((2, C), f32)

            betas = T.alloc_local((2,), f32)
            doc = T.alloc_local((1,), i32)
            at = T.alloc_local((4,), i32)
            count = T.alloc_local((1,), i32)  # items so far
            T.annotate_layout(
                {x: tilelang.layout.make_swizzled_layout(x) for x in (qk, xs, Ss, Ds, ms)}
            )
            fullQ = T.alloc_barrier([32])
            emptyQ = T.alloc_barrier([256])
            fullX = T.alloc_barrier([32] * 2)
            emptyX = T.alloc_barrier([256] * 2)
            fullS = T.alloc_barrier([32] * 2)
            emptyS = T.alloc_barrier([128] * 2)
            fullD = T.alloc_barrier([32] * 2)
            emptyD = T.alloc_barrier([128] * 2)
            fullV = T.alloc_barrier([256] * 2)
            emptyV = T.alloc_barrier([64] * 2)
            tx = T.get_thread_binding()
            count[0] = 0

            if tx < 128:
                T.set_max_nreg(232, 1)
                consume(0, qk, xs, Ss, Ds, ms, gs, rk, rq, sums, traces, diagonal, project, dq, dk,
                        cu, scale, bits, bx, tx, doc, at, count, fullQ, emptyQ, fullX, emptyX, fullS,
                        emptyS, fullD, emptyD, fullV, emptyV)  # fmt: skip
            else:
                if tx < 256:
                    T.set_max_nreg(232, 1)
                    consume(1, qk, xs, Ss, Ds, ms, gs, rk, rq, sums, traces, diagonal, project, dq, dk,
                            cu, scale, bits, bx, tx, doc, at, count, fullQ, emptyQ, fullX, emptyX, fullS,
                            emptyS, fullD, emptyD, fullV, emptyV)  # fmt: skip
                else:
                    T.set_max_nreg(40, 0)
                    for it in T.serial(T.ceildiv(NC * Hk - bx, processors)):
                        find_item(bx + it * processors, cu, Hk, N1 - 1, bits, doc, at)
                        if at[3] > 0:
                            slot, hk, row = at[0], at[1], at[2]
                            if tx < 288:
                                for g in T.serial(R):
                                    hc = count[0] * R + g
                                    s = hc % 2
                                    h = hk * R + g
                                    T.mbarrier_wait_parity(emptyX[s], (hc // 2) % 2 ^ 1)
                                    T.tma_copy(
                                        do[row : row + C, h, :], xs[s * 3, :, :], barrier=fullX[s]
                                    )
                                    T.tma_copy(
                                        dv[row : row + C, h, :],
                                        xs[s * 3 + 1, :, :],
                                        barrier=fullX[s],
                                    )
                                    T.tma_copy(
                                        vd[slot, h, :, :], xs[s * 3 + 2, :, :], barrier=fullX[s]
                                    )
                                    T.tma_copy(gate[slot, h, :], gs[s, :], barrier=fullX[s])
                                    T.mbarrier_arrive(fullX[s])
                                    for w in range(2):
                                        T.mbarrier_wait_parity(emptyS[w], hc % 2 ^ 1)
                                        T.tma_copy(
                                            entering[slot, h, :, w * HALF : w * HALF + HALF],
                                            Ss[w, :, :],
                                            barrier=fullS[w],
                                        )
                                        T.mbarrier_arrive(fullS[w])
                                    if g == 0:
                                        T.mbarrier_wait_parity(emptyQ[0], count[0] % 2 ^ 1)
                                        for w in range(2):
                                            T.tma_copy(
                                                q[row : row + C, hk, w * HALF : w * HALF + HALF],
                                                qk[w, :, :],
                                                barrier=fullQ[0],
                                            )
                                            T.tma_copy(
                                                k[row : row + C, hk, w * HALF : w * HALF + HALF],
                                                qk[2 + w, :, :],
                                                barrier=fullQ[0],
                                            )
                                        if normalize:
                                            T.tma_copy(rnorm[slot, hk, :], rk, barrier=fullQ[0])
                                        T.mbarrier_arrive(fullQ[0])
                                    for w in range(2):
                                        T.mbarrier_wait_parity(emptyD[w], hc % 2 ^ 1)
                                        T.tma_copy(
                                            dleaving[slot, h, :, w * HALF : w * HALF + HALF],
                                            Ds[w, :, :],
                                            barrier=fullD[w],
                                        )
                                        T.mbarrier_arrive(fullD[w])
                            else:
                                if tx < 320:
                                    for g in T.serial(R):
                                        hc = count[0] * R + g
                                        s = hc % 2
                                        T.mbarrier_wait_parity(fullV[s], (hc // 2) % 2)
                                        T.call_extern(
                                            "handle",
                                            "gdn::gate_gradient",
                                            T.access_ptr(sums[s * 2, 0], "r"),
                                            T.access_ptr(traces[s, 0], "r"),
                                            T.access_ptr(dg[row, hk * R + g], "w"),
                                            Hv,
                                            at[3],
                                        )
                                        T.mbarrier_arrive(emptyV[s])
                                else:
                                    if tx < 352:
                                        for g in T.serial(R):
                                            hc = count[0] * R + g
                                            s = hc % 2
                                            h = hk * R + g
                                            for x in T.unroll(2):
                                                betas[x] = 1.0
                                                if tx % 32 + x * 32 < at[3]:
                                                    betas[x] = T.cast(
                                                        beta[row + tx % 32 + x * 32, h], f32
                                                    )
                                            T.mbarrier_wait_parity(fullV[s], (hc // 2) % 2)
                                            T.call_extern(
                                                "handle",
                                                "gdn::beta_gradient",
                                                betas[0],
                                                betas[1],
                                                T.access_ptr(diagonal[s, 0], "r"),
                                                T.access_ptr(dbeta[row, h], "w"),
                                                T.access_ptr(pairs[0], "rw"),
                                                slot * Hv + h,
                                                Hv,
                                                at[3],
                                                smallest,
                                            )
                                            T.mbarrier_arrive(emptyV[s])
                            count[0] += 1

    return main
