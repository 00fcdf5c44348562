"""Gradients of states walked back through a segment, the serial half of the backward.

    Vn = r (K dS) + P^T dO     dV = a^T Vn     dS <- gamma_C dS + Q^T (scale gamma dO) - K^T (gamma dV)

with G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G), `a` from prepare.py and
P_ij = scale exp(G_i - G_j) q_i k_j, j <= i. One CTA a (segment, value head, 64 value columns a
warpgroup); dS is kept transposed in a warpgroup's accumulators (recurrence.py), P comes from an
auxiliary warpgroup (backward_supplier.py). P and dO of rows past the end of a document are masked. What
rounding took from the diagonal of `a` is added in fp32 (backward_replay.py). With one warpgroup a CTA,
which has the registers, P^T dO of the next chunk runs with this one's last product (`ahead`).

    store = True    the main pass, from the gradients of the states that leave the segments
                    (reverse_scan.py) and of the final ones: dV, the dS that leaves every chunk, dh0.
                    Of the chunk slots from `first` on, as many as `dleaving` has: a segment that goes
                    on behind them starts from carried[1 - into], one that begins before them ends in
                    carried[into]. `width` CTAs a head share the segments of such a block
    store = False   dS_ext of a segment: the gradient of the state that enters it while nothing comes
                    from behind it (a document's last segment counts dfinal). First segments have one
                    only in the first `open_left` documents. With `truncate` (summary.py) it starts at
                    the last chunk whose gradient the gates let through to the segment's start.
"""

import tilelang
import tilelang.language as T

from .backward_blocks import CHUNKS, COUNTS, FIRST, Spot, walks
from .backward_common import SOURCE, send_state, stage_rows, stage_state
from .backward_supplier import Given, Ring, Room, supplier
from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    END,
    FLAGS,
    LAST,
    PART,
    ROW,
    TARGET,
    accumulator_layout,
    load_transposed,
    transposed_layout,
)  # fmt: skip


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def reverse(*, halves, dtype="bfloat16", beta_dtype="float32", normalize=False, store=True):
    C, K, V, HALF = CHUNK, 128, 128, 64
    BV, workers = HALF * halves, 128 * halves
    stages = 3 if not store or halves == 1 else 2
    ahead = halves == 1  # there are registers for it
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("parts")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    ND, NF, NR, NO = T.dynamic("ND"), T.dynamic("NF"), T.dynamic("NR"), T.dynamic("chunks")
    NB, NQ = T.dynamic("NB"), T.dynamic("NQ")
    find_block, find_walk = walks(store=store, heads=Hv)
    make_pairs, load = supplier(halves, stages, store, normalize, key_heads=Hk, heads=Hv)

    def product(x, y):
        """Not fused with the sum that follows: there is a wait in between where halves == 2."""
        return T.call_extern(f32, "__fmul_rn", x, y)

    @T.macro
    def send_rows(os_, dv, at, end, h, column, w, tx):
        if at + C <= end:
            T.tma_copy(os_[w * C : w * C + C, :], dv[at : at + C, h, column : column + HALF])
        else:
            for x in T.serial(C // 16):
                r = x * 16 + tx % 128 // 8
                if at + r < end:
                    for y in T.vectorized(8):
                        dv[at + r, h, column + tx % 8 * 8 + y] = os_[w * C + r, tx % 8 * 8 + y]

    @T.macro
    def send(ss, os_, dleaving, dv, slot, row, rows, end, h, column, tx):
        """A warpgroup's half of a state, and of the rows before it if there are."""
        if tx < 128:
            send_state(ss, dleaving, slot, h, column, 0)
            if rows > 0:
                send_rows(os_, dv, row, end, h, column, 0, tx)
        else:
            send_state(ss, dleaving, slot, h, column + BV - HALF, halves - 1)
            if rows > 0:
                send_rows(os_, dv, row, end, h, column + BV - HALF, halves - 1, tx)

    @T.macro
    def take_rows(xs, Xf, Xa, full, ready, j, tx):
        """dO of a CTA's j-th chunk into registers, until its P is there, too."""
        if ahead:
            T.mbarrier_wait_parity(full[j % stages], (j // stages) % 2)
        load_transposed(xs, (j % stages * halves + tx // 128) * C, Xf, tx)
        for x, y in T.Parallel(BV, C):
            Xa[x, y] = Xf[y, x]
        T.mbarrier_wait_parity(ready[j % 2], (j // 2) % 2)

    @T.macro
    def multiply_rows(Xa, ps, W, j):
        """W = dO^T P."""
        T.wgmma_gemm(
            Xa,
            ps[j % 2 * C : (j % 2 + 1) * C, :],
            W,
            clear_accum=True,
            policy=T.GemmWarpPolicy.FullRow,
        )

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        do: T.Tensor((L, Hv, V), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        qnorm: T.Tensor((NQ, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        dstates: T.Tensor((NS, Hv, K, V), f32),
        dfinal: T.Tensor((NF, Hv, K, V), f32),
        dinitial: T.Tensor((ND, Hv, K, V), f32),
        carried: T.Tensor((NB, Hv, K, V), f32),
        dleaving: T.Tensor((NO, Hv, V, K), dtype),
        dv: T.Tensor((L, Hv, V), dtype),
        scale: T.float32,
        width: T.int32,
        first: T.int32,
        into: T.int32,
        segment: T.int32,
        bits: T.int32,
        has_dfinal: T.int32,
        truncate: T.int32,
        open_left: T.int32,
    ):
        with T.Kernel(V // BV, Hv, width, threads=workers + 256) as (tile, h, z):
            T.import_source(SOURCE)
            ks = T.alloc_shared((stages, C, K), dtype)
            qs = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            xs = T.alloc_shared((stages * halves * C, HALF), dtype)
            ps = T.alloc_shared((2 * C, C), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((2, C), f32)  # -gamma
            eout = T.alloc_shared((2, C), f32)  # r
            eq = T.alloc_shared((2, C), f32)  # scale gamma
            lost = T.alloc_shared((2, C), f32)  # beta - a_ii
            if normalize:
                rs = T.alloc_shared((stages, C), f32)
                qn = T.alloc_shared((stages, C), f32)
            S = T.alloc_fragment((BV, K), f32)
            Sb = T.alloc_fragment((BV, K), dtype)
            U = T.alloc_fragment((BV, C), f32)
            Ub = T.alloc_fragment((BV, C), dtype)
            W = T.alloc_fragment((BV, C), f32)
            Wd = T.alloc_fragment((BV, C), dtype)
            Xa = T.alloc_fragment((BV, C), dtype)
            Xb = T.alloc_fragment((BV, C), dtype)
            Xf = T.alloc_fragment((C, BV), dtype)
            E = T.alloc_fragment((BV, C), f32)
            F = T.alloc_fragment((BV, C), f32)
            P = T.alloc_fragment((C, C), f32)
            Pb = T.alloc_fragment((C, C), dtype)
            layouts = {
                Xf: transposed_layout(Xf),
                xs: tilelang.layout.make_swizzled_layout(xs),
                ps: tilelang.layout.make_swizzled_layout(ps),
            }
            if store:
                Sf = T.alloc_fragment((BV, K), dtype)
                Of = T.alloc_fragment((C, BV), dtype)
                ss = T.alloc_shared((halves * 2 * HALF, HALF), dtype)
                os_ = T.alloc_shared((halves * C, HALF), dtype)
                layouts[Sf] = accumulator_layout(Sf)
                layouts[Of] = transposed_layout(Of)
                layouts[os_] = tilelang.layout.make_swizzled_layout(os_)
                layouts[ss] = tilelang.layout.make_swizzled_layout(ss)
            T.annotate_layout(layouts)
            full = T.alloc_barrier([32] * stages)
            empty = T.alloc_barrier([workers + 128] * stages)
            ready = T.alloc_barrier([128] * 2)
            spent = T.alloc_barrier([workers] * 2)
            tx = T.get_thread_binding()

            at = T.alloc_local((7,), i32)
            walk = T.alloc_local((3,), i32)
            done = T.alloc_local((1,), i32)  # chunks so far
            span = T.alloc_local((2,), i32)  # segments of the block

            given = Given(q, k, do, a, gate, rnorm, qnorm, beta, cu)
            room = Room(ks, qs, as_, xs, ps, gs, ein, eout, eq, lost, P, Pb)
            if normalize:
                room = room._replace(rs=rs, qn=qn)
            ring = Ring(full, empty, ready, spent)
            spot = Spot(tile, h, z, width, first, segment, bits, truncate, open_left, NO, NS, N1, at,
                        walk, done, span)  # fmt: skip

            if tx < workers:
                T.set_max_nreg(208 if halves == 2 else 240, 1)
                find_block(cu, spot)
                for turn in T.serial(T.ceildiv(span[1] + 1 - span[0] - z, width)):
                    part = span[0] + z + turn * width
                    find_walk(given, part, spot)
                    n = walk[CHUNKS]
                    row = at[ROW] + walk[FIRST] * C
                    slot = at[CHUNK_SLOT] + walk[FIRST]
                    T.clear(S)
                    goes_on = at[CHUNK_SLOT] + at[COUNT] > first + NO if store else False
                    if goes_on:
                        for x, y in T.Parallel(BV, K):
                            S[x, y] = carried[1 - into, h, y, tile * BV + x]
                    elif at[PART] == at[LAST]:
                        if has_dfinal != 0 and walk[COUNTS] != 0:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = dfinal[at[DOC], h, y, tile * BV + x]
                    elif store:
                        if n > 0:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = dstates[part, h, y, tile * BV + x]
                    if ahead:
                        if n > 0:
                            take_rows(xs, Xf, Xa, full, ready, done[0], tx)
                            multiply_rows(Xa, ps, W, done[0])
                    for i in T.serial(n):
                        c = n - 1 - i
                        s = (done[0] + i) % stages
                        b = (done[0] + i) % 2
                        if not ahead:
                            T.mbarrier_wait_parity(full[s], ((done[0] + i) // stages) % 2)
                        decay = T.exp2(gs[s, C - 1])
                        T.copy(S, Sb)
                        if store:
                            T.copy(S, Sf)
                        if not ahead:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] *= decay
                        T.wgmma_gemm(
                            Sb,
                            ks[s, :, :],
                            U,
                            transpose_B=True,
                            clear_accum=True,
                            policy=T.GemmWarpPolicy.FullRow,
                        )
                        if ahead:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] *= decay
                        if store:
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                            stage_state(Sf, ss, tx)
                            if i > 0:
                                stage_rows(Of, os_, tx)
                            T.call_extern("handle", "gdn::fence_shared")
                            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                            send(ss, os_, dleaving, dv, slot - first + c, row + (c + 1) * C, i, at[END],
                                 h, tile * BV, tx)  # fmt: skip
                        if ahead:
                            for x, y in T.Parallel(BV, C):
                                Xb[x, y] = Xf[y, x] * eq[b, y]
                            for x, y in T.Parallel(BV, C):
                                E[x, y] = eout[b, y]
                            T.wait_wgmma(0)
                            for x, y in T.Parallel(BV, C):
                                U[x, y] = product(U[x, y], E[x, y])
                        else:
                            take_rows(xs, Xf, Xa, full, ready, done[0] + i, tx)
                            multiply_rows(Xa, ps, W, done[0] + i)
                            T.wait_wgmma(1)
                            for x, y in T.Parallel(BV, C):
                                U[x, y] *= eout[b, y]
                            T.wait_wgmma(0)
                        for x, y in T.Parallel(BV, C):
                            Ub[x, y] = U[x, y] + W[x, y]
                        T.wgmma_gemm(
                            Ub, as_[s, :, :], U, clear_accum=True, policy=T.GemmWarpPolicy.FullRow
                        )
                        if not ahead:
                            for x, y in T.Parallel(BV, C):
                                Xb[x, y] = Xf[y, x] * eq[b, y]
                        T.wgmma_gemm(Xb, qs[s, :, :], S, policy=T.GemmWarpPolicy.FullRow)
                        if ahead:
                            for x, y in T.Parallel(BV, C):
                                E[x, y] = lost[b, y]
                            for x, y in T.Parallel(BV, C):
                                F[x, y] = ein[b, y]
                            T.wait_wgmma(1)
                            for x, y in T.Parallel(BV, C):
                                U[x, y] += Ub[x, y] * E[x, y]
                            for x, y in T.Parallel(BV, C):
                                Wd[x, y] = U[x, y] * F[x, y]
                        else:
                            T.wait_wgmma(1)
                            for x, y in T.Parallel(BV, C):
                                U[x, y] += Ub[x, y] * lost[b, y]
                            for x, y in T.Parallel(BV, C):
                                Wd[x, y] = U[x, y] * ein[b, y]
                        T.wgmma_gemm(Wd, ks[s, :, :], S, policy=T.GemmWarpPolicy.FullRow)
                        if store:
                            for x, y in T.Parallel(BV, C):
                                Of[y, x] = U[x, y]
                        if ahead:  # the next chunk's P^T dO needs no state; after the last, this one's again
                            following = done[0] + T.min(i + 1, n - 1)
                            take_rows(xs, Xf, Xa, full, ready, following, tx)
                            multiply_rows(Xa, ps, W, following)
                            T.wait_wgmma(1)
                        else:
                            T.wait_wgmma(0)
                        T.mbarrier_arrive(empty[s])
                        T.mbarrier_arrive(spent[b])
                    if ahead:
                        T.wait_wgmma(0)
                    if store:
                        if n > 0:
                            T.tma_store_wait()
                            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                            stage_rows(Of, os_, tx)
                            T.call_extern("handle", "gdn::fence_shared")
                            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                            if tx < 128:
                                send_rows(os_, dv, row, at[END], h, tile * BV, 0, tx)
                            else:
                                send_rows(
                                    os_, dv, row, at[END], h, tile * BV + BV - HALF, halves - 1, tx
                                )
                            T.tma_store_wait()
                        if walk[FIRST] > 0:
                            if n > 0:
                                for x, y in T.Parallel(BV, K):
                                    carried[into, h, y, tile * BV + x] = S[x, y]
                        elif at[PART] == 0:
                            for x, y in T.Parallel(BV, K):
                                dinitial[at[DOC], h, y, tile * BV + x] = S[x, y]
                    else:
                        if at[PART] <= at[LAST]:
                            if at[PART] > 0 or at[DOC] < open_left:
                                for x, y in T.Parallel(BV, K):
                                    dstates[part, h, y, tile * BV + x] = S[x, y]
                    done[0] += n
            else:
                if tx < workers + 128:
                    T.set_max_nreg(72 if halves == 2 else 104, 0)
                    t = tx - workers
                    make_pairs(given, room, ring, spot, scale, t)
                else:
                    T.set_max_nreg(24, 0)
                    if tx < workers + 160:
                        load(given, room, ring, spot)

    return main
