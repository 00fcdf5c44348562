"""The parallel half of the backward: gradients of a chunk, from the states around it.

Row vectors per token, G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G),
D_ij = exp(G_i - G_j). With S the state that enters the chunk, dS the gradient of the one that leaves
it, Vd and dV from backward_replay.py and backward_reverse.py,

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
whose dq and dk add up in accumulators: two warpgroups, backward_consumers.py. Of a third one warp loads
heads, one sums up dg, one divides for dbeta, and one loads items' q and k and stores the dq and dk that
take their place. After the last item the loading warp announces an empty one, for consumers look ahead.

Normalised queries and keys are never written: the accumulators hold |q|^-1 dq^ and |k|^-1 dk^ of the
unit vectors, for which factors 1/|q_i| and 1/|k_j| on dP, N and the row factors suffice, and
dx = acc - (x / |x|^2) <x, acc> at the end of an item.
"""

import tilelang
import tilelang.language as T

from .backward_accumulators import SOURCE as ACCUMULATORS
from .backward_consumers import Ring, Room, call, consumer, tile
from .backward_products import SOURCE as PRODUCTS
from .backward_sums import SOURCE as SUMS
from .common import CHUNK, FLAGS, SEARCH, TARGET, find_document

SMALLEST_BETA = {
    "bfloat16": 2.0**-40,
    "float16": 2.0**-7,
}  # below, dbeta comes from backward_beta.py


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def gradients(*, ratio, dtype="bfloat16", beta_dtype="float32", normalize=False, processors=132):
    C, K, V, HALF, R = CHUNK, 128, 128, 64, ratio
    f32, i32 = "float32", "int32"
    L, NC, Hk, Hv = T.dynamic("L"), T.dynamic("NC"), T.dynamic("Hk"), T.dynamic("Hv")
    N1, NP = T.dynamic("N1"), T.dynamic("NP")
    NR, NQ = T.dynamic("NR"), T.dynamic("NQ")
    smallest = SMALLEST_BETA[dtype]
    consume = consumer(ratio=ratio, dtype=dtype, normalize=normalize)

    @T.macro
    def find_item(item, first, cu, heads, documents, doc, at):
        """at <- chunk slot from `first` on, key head, first token, tokens of the document from there on."""
        at[0] = T.truncdiv(item, heads)
        at[1] = item - at[0] * heads
        find_document(cu, first + at[0], C, documents, doc)
        at[2] = cu[doc[0]] + (first + at[0] - T.truncdiv(cu[doc[0]], C) - doc[0]) * C
        at[3] = cu[doc[0] + 1] - at[2]

    @T.macro
    def load_heads(
        room, ring, q, k, do, vd, dv, entering, dleaving, gate, qnorm, rnorm, at, count, lane
    ):
        for g in T.serial(R):
            hc = count[0] * R + g
            s = hc % 2
            h = at[1] * R + g
            if g == 0:
                for x in (q, k):
                    call(
                        "prefetch_rows",
                        T.access_ptr(x[at[2], at[1], 0], "r"),
                        x.shape[1] * K * 2,
                        at[3],
                    )
            if g == 1:  # q and k are wanted first
                T.mbarrier_wait_parity(ring.sentQ[0], count[0] % 2)
            T.mbarrier_wait_parity(ring.emptyX[s], (hc // 2) % 2 ^ 1)
            for tokens, i in ((do, 0), (dv, 1)):
                T.tma_copy(
                    tokens[at[2] : at[2] + C, h, :], room.xs[s * 3 + i, :, :], barrier=ring.fullX[s]
                )
            T.tma_copy(vd[at[0], h, :, :], room.xs[s * 3 + 2, :, :], barrier=ring.fullX[s])
            T.tma_copy(gate[at[0], h, :], room.gs[s, :], barrier=ring.fullX[s])
            if normalize:
                T.tma_copy(qnorm[at[0], at[1], :], room.norms[s, 0, :], barrier=ring.fullX[s])
                T.tma_copy(rnorm[at[0], at[1], :], room.norms[s, 1, :], barrier=ring.fullX[s])
            if lane == 0:
                room.left[s] = at[3]
            T.mbarrier_arrive(ring.fullX[s])
            for states, tiles, full, empty in (
                (entering, room.Ss, ring.fullS, ring.emptyS),
                (dleaving, room.Ds, ring.fullD, ring.emptyD),
            ):
                for w in range(2):
                    T.mbarrier_wait_parity(empty[w], hc % 2 ^ 1)
                    T.tma_copy(
                        states[at[0], h, :, w * HALF : w * HALF + HALF],
                        tiles[w, :, :],
                        barrier=full[w],
                    )
                    T.mbarrier_arrive(full[w])

    @T.macro
    def move_item(room, ring, q, k, dq, dk, at, count):
        """Loads q and k, and stores the dq and dk that take their place."""
        for x, i in ((q, 0), (k, 2)):
            for w in range(2):
                T.tma_copy(
                    x[at[2] : at[2] + C, at[1], w * HALF : w * HALF + HALF],
                    room.qk[i + w, :, :],
                    barrier=ring.fullQ[0],
                )
        T.mbarrier_arrive(ring.fullQ[0])
        T.mbarrier_arrive(ring.sentQ[0])
        T.mbarrier_wait_parity(ring.emptyQ[0], count[0] % 2)
        if at[3] >= C:
            for rows, i in ((dq, 0), (dk, 2)):
                for w in range(2):
                    T.tma_copy(
                        room.qk[i + w, :, :],
                        rows[at[2] : at[2] + C, at[1], w * HALF : w * HALF + HALF],
                    )
        if at[3] < C:  # in a branch of its own: TileLang elects a lane for all of one that sends
            for rows, i in ((dq, 0), (dk, 2)):
                for w in range(2):
                    call(
                        "copy_rows",
                        tile(room.qk, i + w),
                        T.access_ptr(rows[at[2], at[1], w * HALF], "w"),
                        rows.shape[1] * K * 2,
                        at[3],
                    )
        T.tma_store_wait()
        call("fence_shared")
        T.call_extern("handle", "__syncwarp")

    @T.macro
    def sum_gates(room, ring, dg, at, count):
        for g in T.serial(R):
            hc = count[0] * R + g
            s = hc % 2
            T.mbarrier_wait_parity(ring.fullV[s], (hc // 2) % 2)
            call(
                "gate_gradient",
                T.access_ptr(room.sums[s * 2, 0], "r"),
                T.access_ptr(room.traces[s, 0], "r"),
                T.access_ptr(dg[at[2], at[1] * R + g], "w"),
                dg.shape[1],
                at[3],
            )
            T.mbarrier_arrive(ring.emptyV[s])

    @T.macro
    def divide_betas(room, ring, beta, dbeta, pairs, betas, at, count, lane):
        for g in T.serial(R):
            hc = count[0] * R + g
            s = hc % 2
            h = at[1] * R + g
            for x in T.unroll(2):
                betas[x] = 1.0
                if lane + x * 32 < at[3]:
                    betas[x] = T.cast(beta[at[2] + lane + x * 32, h], f32)
            T.mbarrier_wait_parity(ring.fullV[s], (hc // 2) % 2)
            call(
                "beta_gradient",
                betas[0],
                betas[1],
                T.access_ptr(room.diagonal[s, 0], "r"),
                T.access_ptr(dbeta[at[2], h], "w"),
                T.access_ptr(pairs[0], "rw"),
                at[0] * dbeta.shape[1] + h,
                dbeta.shape[1],
                at[3],
                smallest,
            )
            T.mbarrier_arrive(ring.emptyV[s])

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
        qnorm: T.Tensor((NQ, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        dq: T.Tensor((L, Hk, K), dtype),
        dk: T.Tensor((L, Hk, K), dtype),
        dg: T.Tensor((L, Hv), f32),
        dbeta: T.Tensor((L, Hv), f32),
        pairs: T.Tensor((NP,), i32),
        scale: T.float32,
        first: T.int32,
    ):
        with T.Kernel(processors, threads=384) as bx:
            T.import_source(SEARCH + SUMS + PRODUCTS + ACCUMULATORS)
            qk = T.alloc_shared((4, C, HALF), dtype)  # halves of q, halves of k
            xs = T.alloc_shared((6, C, V), dtype)  # [stage * 3 + (dO, dV, Vd)]
            Ss = T.alloc_shared((2, V, HALF), dtype)
            Ds = T.alloc_shared((2, V, HALF), dtype)
            ms = T.alloc_shared((2, C, C), dtype)  # dP, -N
            gs = T.alloc_shared((2, C), f32)
            norms = T.alloc_shared((2, 2, C), f32)  # [stage, 1 / |q| and 1 / |k|]
            logs = T.alloc_shared((2, 2, 2 * C), f32)  # [item, warpgroup], of norms
            project = T.alloc_shared((2, 2 * C), f32)
            sums = T.alloc_shared((4, 7 * C), f32)  # rows, columns of 4 warps, dots, ends
            traces = T.alloc_shared((2, 72), f32)
            diagonal = T.alloc_shared((2, C), f32)
            left = T.alloc_shared((2,), i32)

            betas = T.alloc_local((2,), f32)
            doc = T.alloc_local((1,), i32)
            at = T.alloc_local((4,), i32)
            count = T.alloc_local((1,), i32)  # items so far
            group = T.alloc_local((3,), i32)  # warpgroup, warp in it, heads so far
            T.annotate_layout(
                {x: tilelang.layout.make_swizzled_layout(x) for x in (qk, xs, Ss, Ds, ms)}
            )
            fullQ = T.alloc_barrier([32])
            emptyQ = T.alloc_barrier([256])
            sentQ = T.alloc_barrier([32])
            fullX = T.alloc_barrier([32] * 2)
            emptyX = T.alloc_barrier([8] * 2)
            fullS = T.alloc_barrier([32] * 2)
            emptyS = T.alloc_barrier([4] * 2)
            fullD = T.alloc_barrier([32] * 2)
            emptyD = T.alloc_barrier([4] * 2)
            fullV = T.alloc_barrier([8] * 2)
            emptyV = T.alloc_barrier([64] * 2)
            fullM = T.alloc_barrier([8])
            emptyM = T.alloc_barrier([8])
            room = Room(qk, xs, Ss, Ds, ms, gs, norms, logs, project, sums, traces, diagonal, left)
            ring = Ring(fullQ, emptyQ, sentQ, fullX, emptyX, fullS, emptyS, fullD, emptyD, fullV, emptyV,
                        fullM, emptyM)  # fmt: skip
            tx = T.get_thread_binding()
            count[0] = 0

            if tx < 256:
                T.set_max_nreg(224, 1)
                group[0] = T.call_extern(i32, "gdn::uniform", tx // 128)
                group[1] = T.call_extern(i32, "gdn::uniform", tx // 32 % 4)
                items = T.ceildiv(NC * Hk - bx, processors)
                consume(group[0], group, room, ring, scale, items, at, count, tx)
            else:
                T.set_max_nreg(56, 0)
                for it in T.serial(T.ceildiv(NC * Hk - bx, processors)):
                    find_item(bx + it * processors, first, cu, Hk, N1 - 1, doc, at)
                    if at[3] > 0:
                        if tx < 288:
                            load_heads(
                                room,
                                ring,
                                q,
                                k,
                                do,
                                vd,
                                dv,
                                entering,
                                dleaving,
                                gate,
                                qnorm,
                                rnorm,
                                at,
                                count,
                                tx % 32,
                            )
                        else:
                            if tx < 320:
                                sum_gates(room, ring, dg, at, count)
                            else:
                                if tx < 352:
                                    divide_betas(
                                        room, ring, beta, dbeta, pairs, betas, at, count, tx % 32
                                    )
                                else:
                                    move_item(room, ring, q, k, dq, dk, at, count)
                        count[0] += 1
                # consumers look one head ahead, past the last one too
                if tx < 288:
                    s = count[0] * R % 2
                    T.mbarrier_wait_parity(emptyX[s], (count[0] * R // 2) % 2 ^ 1)
                    if tx == 256:
                        left[s] = 0
                    T.mbarrier_arrive(fullX[s])

    return main
