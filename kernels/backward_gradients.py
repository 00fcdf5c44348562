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
whose dq and dk add up in accumulators. Two warpgroups hold 64 key columns each of dq and dk and run
one copy of the code. Of a head's [64, 64] matrices the first makes dP and the second N + N^T, and they
meet in shared memory. All operands lie in shared memory, S and dS one buffer a warpgroup. Of a third
warpgroup one warp loads, one sums up dg, one makes dbeta, and two of them <dS, S>.

Normalised queries and keys are never written: the accumulators hold |q|^-1 dq^ and |k|^-1 dk^ of the
unit vectors, for which factors 1/|q_i| and 1/|k_j| on dP, N and the row factors suffice, and
dx = acc - (x / |x|^2) <x, acc> at the end of an item.
"""

import tilelang
import tilelang.language as T

from .backward_accumulators import SOURCE as ACCUMULATORS
from .backward_products import SOURCE as PRODUCTS
from .backward_sums import SOURCE as SUMS
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
    half, norm = str(dtype == "float16").lower(), str(normalize).lower()
    PAIR = f"product<{half}, 0, 0, 8, 1, true>"  # rows times rows, 128 columns
    INTER = f"product<{half}, 0, 1, 8, 1, true>"  # [C, V] times a state's [V, 64]

    def call(name, *arguments):
        return T.call_extern("handle", f"gdn::{name}", *arguments)

    def tile(buffer, i):
        return T.access_ptr(buffer[i, 0, 0], "rw")

    @T.macro
    def find_item(item, first, cu, heads, documents, bits, doc, at):
        """at <- chunk slot from `first` on, key head, first token, tokens of the document from there on."""
        at[0] = T.truncdiv(item, heads)
        at[1] = item - at[0] * heads
        find_document(cu, first + at[0], C, documents, bits, doc)
        at[2] = cu[doc[0]] + (first + at[0] - T.truncdiv(cu[doc[0]], C) - doc[0]) * C
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
    def store_halves(ms, out, row, valid, hk, tx):
        """Each warpgroup its own half: TileLang elects the thread that sends for a whole branch."""
        if tx < 128:
            store_rows(ms, out, row, valid, hk, 0, tx)
        else:
            store_rows(ms, out, row, valid, hk, 1, tx)

    @T.macro
    def consume(w, group, qk, xs, Ss, Ds, ms, gs, rk, logs, sums, traces, diagonal, project, dq, dk, cu,
                scale, bits, first, bx, tx, doc, at, count, fullQ, emptyQ, fullX, emptyX, fullS, emptyS,
                fullD, emptyD, fullV, emptyV):  # fmt: skip
        M = T.alloc_local((32,), f32)
        QK = T.alloc_local((32,), f32)
        Aq = T.alloc_local((32,), f32)
        Ak = T.alloc_local((32,), f32)
        Iq = T.alloc_local((32,), f32)
        Iv = T.alloc_local((32,), f32)
        Id = T.alloc_local((32,), f32)
        rows = T.alloc_local((12,), f32)
        for it in T.serial(T.ceildiv(NC * Hk - bx, processors)):
            find_item(bx + it * processors, first, cu, Hk, N1 - 1, bits, doc, at)
            valid = at[3]
            if valid > 0:
                first = count[0] * R
                call("clear", Aq.data)
                call("clear", Ak.data)
                T.mbarrier_wait_parity(fullX[first % 2], (first // 2) % 2)
                call(PAIR, M.data, tile(xs, first % 2 * 3 + 2 * w), tile(xs, first % 2 * 3 + 2 - w))
                T.mbarrier_wait_parity(fullQ[0], count[0] % 2)
                call(PAIR, QK.data, tile(qk, 2 * w), tile(qk, 2))
                call("commit_products")
                if normalize:
                    call(
                        f"take_logs<{half}>",
                        tile(qk, 0),
                        T.access_ptr(rk[0], "r"),
                        T.access_ptr(logs[0], "w"),
                        w,
                        scale,
                    )
                    call("meet", 1)
                call("wait_products<0>")
                call("settle", QK.data)
                call("settle", M.data)
                call("drop_diagonal", QK.data)
                for g in T.serial(R):
                    group[2] = T.call_extern(i32, "gdn::uniform", count[0] * R + g)
                    hc = group[2]
                    s = hc % 2
                    T.mbarrier_wait_parity(emptyV[s], (hc // 2) % 2 ^ 1)
                    call(
                        f"pair_matrix<{half}, {norm}>",
                        M.data,
                        QK.data,
                        T.access_ptr(gs[s, 0], "r"),
                        T.access_ptr(logs[0], "r"),
                        tile(ms, 0),
                        T.access_ptr(sums[s * 2 + w, 0], "w"),
                        T.access_ptr(sums[s * 2 + w, 64], "w"),
                        T.access_ptr(diagonal[s, 0], "w"),
                        w,
                        group[1],
                        valid,
                        scale,
                    )
                    call(
                        f"row_factors<{norm}>",
                        rows.data,
                        T.access_ptr(gs[s, 0], "r"),
                        T.access_ptr(logs[0], "r"),
                        T.access_ptr(traces[s, 2], "w"),
                        scale,
                    )
                    call("meet", 2)  # dP and N + N^T are there
                    T.mbarrier_wait_parity(fullS[w], hc % 2)
                    call(INTER, Iq.data, tile(xs, s * 3), tile(Ss, w))
                    call("commit_products")
                    call(INTER, Iv.data, tile(xs, s * 3 + 1), tile(Ss, w))
                    T.mbarrier_wait_parity(fullD[w], hc % 2)
                    call(INTER, Id.data, tile(xs, s * 3 + 2), tile(Ds, w))
                    call(f"product<{half}, 1, 1, 4, 1, false>", Ak.data, tile(ms, 0), tile(qk, w))
                    call(
                        f"product<{half}, 0, 1, 4, -1, false>",
                        Ak.data,
                        tile(ms, 1),
                        tile(qk, 2 + w),
                    )
                    call("commit_products")
                    call("wait_products<1>")
                    call("settle", Iq.data)
                    call(f"add_query<{half}>", Aq.data, Iq.data, tile(qk, w), rows.data)
                    # the next head's pair matrix; after the last one, of what lies there
                    last = T.cast(g == R - 1, i32)
                    T.mbarrier_wait_parity(fullX[(hc + 1 - last) % 2], ((hc + 1 - last) // 2) % 2)
                    call(
                        f"product<{half}, 0, 1, 4, 1, false>", Aq.data, tile(ms, 0), tile(qk, 2 + w)
                    )
                    call(PAIR, M.data, tile(xs, (1 - s) * 3 + 2 * w), tile(xs, (1 - s) * 3 + 2 - w))
                    call("commit_products")
                    call("wait_products<1>")
                    call("settle", Iv.data)
                    call("settle", Id.data)
                    call("settle", Ak.data)
                    if tx % 32 == 0:
                        T.mbarrier_arrive(emptyS[w])
                        T.mbarrier_arrive(emptyD[w])
                        T.mbarrier_arrive(emptyX[s])
                    call(f"add_key<{half}>", Ak.data, Iv.data, Id.data, tile(qk, 2 + w), rows.data)
                    call("store_dots", rows.data, T.access_ptr(sums[s * 2 + w, 320], "w"))
                    T.call_extern("handle", "__syncwarp")
                    if tx % 32 == 0:
                        T.mbarrier_arrive(fullV[s])
                    call("wait_products<0>")
                    call("settle", Aq.data)
                    call("settle", M.data)
                if normalize:
                    call(
                        f"project_rows<{half}>",
                        Aq.data,
                        Ak.data,
                        tile(qk, w),
                        tile(qk, 2 + w),
                        T.access_ptr(project[w, 0], "w"),
                    )
                call("meet", 1)
                if normalize:
                    call(
                        f"subtract_rows<{half}>",
                        Aq.data,
                        Ak.data,
                        tile(qk, w),
                        tile(qk, 2 + w),
                        T.access_ptr(project[0, 0], "r"),
                        T.access_ptr(logs[0], "r"),
                        scale,
                    )
                T.mbarrier_arrive(emptyQ[0])
                call(f"stage_rows<{half}>", Aq.data, tile(ms, w))
                call("meet_half", 3 + w)
                store_halves(ms, dq, at[2], valid, at[1], tx)
                call("meet_half", 3 + w)
                call(f"stage_rows<{half}>", Ak.data, tile(ms, w))
                call("meet_half", 3 + w)
                store_halves(ms, dk, at[2], valid, at[1], tx)
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
        first: T.int32,
    ):
        with T.Kernel(processors, threads=384) as bx:
            T.import_source(SUMS + PRODUCTS + ACCUMULATORS)
            qk = T.alloc_shared((4, C, HALF), dtype)  # halves of q, halves of k
            xs = T.alloc_shared((6, C, V), dtype)  # [stage * 3 + (dO, dV, Vd)]
            Ss = T.alloc_shared((2, V, HALF), dtype)
            Ds = T.alloc_shared((2, V, HALF), dtype)
            ms = T.alloc_shared((2, C, C), dtype)  # dP, -N
            gs = T.alloc_shared((2, C), f32)
            rk = T.alloc_shared((C,), f32)
            logs = T.alloc_shared((2 * C,), f32)
            project = T.alloc_shared((2, 2 * C), f32)
            sums = T.alloc_shared((4, 7 * C), f32)  # rows, columns of 4 warps, dots, ends
            traces = T.alloc_shared((2, 8), f32)
            diagonal = T.alloc_shared((2, C), f32)

            betas = T.alloc_local((2,), f32)
            part = T.alloc_local((1,), f32)
            doc = T.alloc_local((1,), i32)
            at = T.alloc_local((4,), i32)
            count = T.alloc_local((1,), i32)  # items so far
            group = T.alloc_local((3,), i32)  # warpgroup, warp in it, heads so far
            T.annotate_layout(
                {x: tilelang.layout.make_swizzled_layout(x) for x in (qk, xs, Ss, Ds, ms)}
            )
            fullQ = T.alloc_barrier([32])
            emptyQ = T.alloc_barrier([256])
            fullX = T.alloc_barrier([32] * 2)
            emptyX = T.alloc_barrier([8] * 2)
            fullS = T.alloc_barrier([32] * 2)
            emptyS = T.alloc_barrier([5] * 2)
            fullD = T.alloc_barrier([32] * 2)
            emptyD = T.alloc_barrier([5] * 2)
            fullV = T.alloc_barrier([10] * 2)
            emptyV = T.alloc_barrier([64] * 2)
            tx = T.get_thread_binding()
            count[0] = 0

            if tx < 256:
                T.set_max_nreg(224, 1)
                group[0] = T.call_extern(i32, "gdn::uniform", tx // 128)
                group[1] = T.call_extern(i32, "gdn::uniform", tx // 32 % 4)
                consume(group[0], group, qk, xs, Ss, Ds, ms, gs, rk, logs, sums, traces, diagonal, project,
                        dq, dk, cu, scale, bits, first, bx, tx, doc, at, count, fullQ, emptyQ, fullX, emptyX,
                        fullS, emptyS, fullD, emptyD, fullV, emptyV)  # fmt: skip
            else:
                T.set_max_nreg(56, 0)
                for it in T.serial(T.ceildiv(NC * Hk - bx, processors)):
                    find_item(bx + it * processors, first, cu, Hk, N1 - 1, bits, doc, at)
                    if at[3] > 0:
                        slot, hk, row = at[0], at[1], at[2]
                        if tx < 288:
                            for g in T.serial(R):
                                hc = count[0] * R + g
                                s = hc % 2
                                h = hk * R + g
                                # states have one buffer: the L2 fetches them while the last ones are in use
                                for states in (entering, dleaving):
                                    call(
                                        "prefetch",
                                        T.access_ptr(states[slot, h, 0, 0], "r"),
                                        V * K * 2,
                                    )
                                if g == 0:
                                    for x in (q, k):
                                        call(
                                            "prefetch_rows",
                                            T.access_ptr(x[row, hk, 0], "r"),
                                            Hk * K * 2,
                                            at[3],
                                        )
                                T.mbarrier_wait_parity(emptyX[s], (hc // 2) % 2 ^ 1)
                                T.tma_copy(
                                    do[row : row + C, h, :], xs[s * 3, :, :], barrier=fullX[s]
                                )
                                T.tma_copy(
                                    dv[row : row + C, h, :],
                                    xs[s * 3 + 1, :, :],
                                    barrier=fullX[s],
                                )
                                T.tma_copy(vd[slot, h, :, :], xs[s * 3 + 2, :, :], barrier=fullX[s])
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
                                    call(
                                        "gate_gradient",
                                        T.access_ptr(sums[s * 2, 0], "r"),
                                        T.access_ptr(traces[s, 0], "r"),
                                        T.access_ptr(dg[row, hk * R + g], "w"),
                                        Hv,
                                        at[3],
                                    )
                                    T.mbarrier_arrive(emptyV[s])
                            else:
                                for g in T.serial(R):
                                    hc = count[0] * R + g
                                    s = hc % 2
                                    h = hk * R + g
                                    half_columns = tx // 32 - 10
                                    for x in T.unroll(2):
                                        betas[x] = 1.0
                                        if tx < 352 and tx % 32 + x * 32 < at[3]:
                                            betas[x] = T.cast(beta[row + tx % 32 + x * 32, h], f32)
                                    T.mbarrier_wait_parity(fullS[half_columns], hc % 2)
                                    T.mbarrier_wait_parity(fullD[half_columns], hc % 2)
                                    part[0] = T.call_extern(
                                        f32,
                                        f"gdn::trace<{half}>",
                                        tile(Ss, half_columns),
                                        tile(Ds, half_columns),
                                    )
                                    T.mbarrier_wait_parity(emptyV[s], (hc // 2) % 2 ^ 1)
                                    if tx % 32 == 0:
                                        T.mbarrier_arrive(emptyS[half_columns])
                                        T.mbarrier_arrive(emptyD[half_columns])
                                        traces[s, half_columns] = part[0]
                                        T.mbarrier_arrive(fullV[s])
                                    if tx < 352:
                                        T.mbarrier_wait_parity(fullV[s], (hc // 2) % 2)
                                        call(
                                            "beta_gradient",
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
