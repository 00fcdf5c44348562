"""States replayed for the backward: what enters each chunk, and Vd, from the states the forward saved.

    U = K S     Vd = a (V - gamma U)     S <- gamma_C S + K^T (r Vd)

with G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G), `a` from prepare.py. One
CTA a (segment, value head, 64 value columns a warpgroup); as in recurrence.py the state is kept
transposed in a warpgroup's accumulators. Rows of Vd past the end of a document are zero, because
those of `a` are. It needs no gradient: a late one can travel meanwhile. Of one sequence, `width`
segments from the `first` one on can be replayed alone.

The diagonal of `a` is beta, and its rounding the largest error of the gates' gradients: what it lost,
beta - a_ii, is added in fp32.
"""

import tilelang
import tilelang.language as T

from .backward_common import SOURCE, send_state, stage_rows, stage_state
from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    END,
    FLAGS,
    PART,
    ROW,
    TARGET,
    accumulator_layout,
    find_boundary,
    load_transposed,
    transposed_layout,
)
from .tickets import HEAD, TICKETS, TILE, follow, leave_place, loaded_all, open_line, take_all


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def replay(*, halves, dtype="bfloat16", beta_dtype="float32", normalize=False, stages=4):
    C, K, V, HALF = CHUNK, 128, 128, 64
    BV, workers = HALF * halves, 128 * halves
    ROWS = T.GemmWarpPolicy.FullRow
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NR, NO = T.dynamic("N0"), T.dynamic("NR"), T.dynamic("NO")
    NG = T.dynamic("NG")

    @T.macro
    def send_rows(os_, vd, slot, h, column, w):
        begin = column + w * HALF
        T.tma_copy(os_[w * C : w * C + C, :], vd[slot, h, :, begin : begin + HALF])

    @T.macro
    def send(ss, os_, entering, vd, slot, i, h, column, w):
        """Warpgroup `w`: its part of the state that enters the i-th chunk, and of Vd of the chunk before."""
        send_state(ss, entering, slot, h, column + w * HALF, w)
        if i > 0:
            send_rows(os_, vd, slot - 1, h, column, w)

    @T.prim_func
    def main(
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, V), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        order: T.Tensor((NG,), i32),
        initial: T.Tensor((N0, Hv, K, V), f32),
        states: T.Tensor((NS, Hv, K, V), f32),
        entering: T.Tensor((NO, Hv, V, K), dtype),
        vd: T.Tensor((NO, Hv, C, V), dtype),
        tickets: T.Tensor((1,), i32),
        width: T.int32,
        first: T.int32,
        segment: T.int32,
        ordered: T.int32,
        initials: T.int32,
        ctas: T.int32,
    ):
        with T.Kernel(ctas, threads=workers + 128) as cta:
            T.import_source(SOURCE + TICKETS)
            items = V // BV * Hv * width
            ks = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            xs = T.alloc_shared((stages * halves * C, HALF), dtype)
            ss = T.alloc_shared((halves * 2 * HALF, HALF), dtype)
            os_ = T.alloc_shared((halves * C, HALF), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((stages, C), f32)  # gamma
            eout = T.alloc_shared((stages, C), f32)  # r
            lost = T.alloc_shared((stages, C), f32)  # beta - a_ii
            if normalize:
                rs = T.alloc_shared((stages, C), f32)
            S = T.alloc_fragment((BV, K), f32)
            Sb = T.alloc_fragment((BV, K), dtype)
            Sf = T.alloc_fragment((BV, K), dtype)
            U = T.alloc_fragment((BV, C), f32)
            Ub = T.alloc_fragment((BV, C), dtype)
            W = T.alloc_fragment((BV, C), f32)
            Wd = T.alloc_fragment((BV, C), dtype)
            Xf = T.alloc_fragment((C, BV), dtype)
            Of = T.alloc_fragment((C, BV), dtype)
            E = T.alloc_fragment((BV, C), f32)
            F = T.alloc_fragment((BV, C), f32)
            T.annotate_layout(
                {
                    Xf: transposed_layout(Xf),
                    Of: transposed_layout(Of),
                    Sf: accumulator_layout(Sf),
                    xs: tilelang.layout.make_swizzled_layout(xs),
                    os_: tilelang.layout.make_swizzled_layout(os_),
                    ss: tilelang.layout.make_swizzled_layout(ss),
                }
            )
            full = T.alloc_barrier([32] * stages)
            scaled = T.alloc_barrier([64] * stages)
            empty = T.alloc_barrier([workers] * stages)
            tx = T.get_thread_binding()
            at = T.alloc_local((9,), i32)
            done = T.alloc_local((1,), i32)  # chunks so far
            done[0] = 0
            line = open_line(done, 4 * halves + 3)

            if tx < workers:
                T.set_max_nreg(224, 1)
                follow(line, at)
                while at[COUNT] >= 0:
                    n = at[COUNT]
                    h, column = at[HEAD], at[TILE] * BV
                    kept = at[CHUNK_SLOT] - first * segment  # of one document
                    T.clear(S)
                    if at[PART] > 0:
                        if n > 0:
                            place = T.alloc_local((1,), i32)
                            find_boundary(at, segment, place)
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = states[place[0] - 1, h, y, column + x]
                    else:
                        if at[DOC] < initials:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = initial[at[DOC], h, y, column + x]
                    for i in T.serial(n):
                        c = done[0] + i
                        s = c % stages
                        T.mbarrier_wait_parity(full[s], (c // stages) % 2)
                        decay = T.exp2(gs[s, C - 1])
                        T.copy(S, Sb)
                        T.copy(S, Sf)
                        for x, y in T.Parallel(BV, K):
                            S[x, y] *= decay
                        T.wgmma_gemm(
                            Sb, ks[s, :, :], U, transpose_B=True, clear_accum=True, policy=ROWS
                        )
                        load_transposed(xs, (s * halves + tx // 128) * C, Xf, tx)
                        T.tma_store_wait()
                        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                        stage_state(Sf, ss, tx)
                        if i > 0:
                            stage_rows(Of, os_, tx)
                        T.call_extern("handle", "gdn::fence_shared")
                        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                        if tx < 128:
                            send(ss, os_, entering, vd, kept + i, i, h, column, 0)
                        else:
                            send(ss, os_, entering, vd, kept + i, i, h, column, halves - 1)
                        T.mbarrier_wait_parity(scaled[s], (c // stages) % 2)
                        for x, y in T.Parallel(BV, C):
                            E[x, y] = ein[s, y]
                        T.wait_wgmma(0)
                        for x, y in T.Parallel(BV, C):
                            Ub[x, y] = Xf[y, x] - U[x, y] * E[x, y]
                        T.wgmma_gemm(
                            Ub, as_[s, :, :], W, transpose_B=True, clear_accum=True, policy=ROWS
                        )
                        for x, y in T.Parallel(BV, C):
                            F[x, y] = eout[s, y]
                        T.wait_wgmma(0)
                        for x, y in T.Parallel(BV, C):
                            W[x, y] += Ub[x, y] * lost[s, y]
                        for x, y in T.Parallel(BV, C):
                            Wd[x, y] = W[x, y] * F[x, y]
                        T.wgmma_gemm(Wd, ks[s, :, :], S, policy=ROWS)
                        for x, y in T.Parallel(BV, C):
                            Of[y, x] = W[x, y]
                        T.wait_wgmma(0)
                        T.mbarrier_arrive(empty[s])
                    if n > 0:
                        T.tma_store_wait()
                        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                        stage_rows(Of, os_, tx)
                        T.call_extern("handle", "gdn::fence_shared")
                        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                        if tx < 128:
                            send_rows(os_, vd, kept + n - 1, h, column, 0)
                        else:
                            send_rows(os_, vd, kept + n - 1, h, column, halves - 1)
                    done[0] += n
                    leave_place(line, tx)
                    follow(line, at)
                T.tma_store_wait()
            else:
                T.set_max_nreg(56, 0)
                if tx < workers + 32:
                    follow(line, at)
                    while at[COUNT] >= 0:
                        h = at[HEAD]
                        hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                        column = at[TILE] * BV
                        while at[COUNT] > 0:
                            s = done[0] % stages
                            r0 = at[ROW]
                            slot = at[CHUNK_SLOT]
                            T.mbarrier_wait_parity(empty[s], (done[0] // stages) % 2 ^ 1)
                            T.tma_copy(k[r0 : r0 + C, hk, :], ks[s, :, :], barrier=full[s])
                            T.tma_copy(gate[slot, h, :], gs[s, :], barrier=full[s])
                            if normalize:
                                T.tma_copy(rnorm[slot, hk, :], rs[s, :], barrier=full[s])
                            for half in range(halves):
                                T.tma_copy(
                                    v[
                                        r0 : r0 + C,
                                        h,
                                        column + half * HALF : column + half * HALF + HALF,
                                    ],
                                    xs[(s * halves + half) * C : (s * halves + half + 1) * C, :],
                                    barrier=full[s],
                                )
                            T.tma_copy(a[slot, h, :, :], as_[s, :, :], barrier=full[s])
                            T.mbarrier_arrive(full[s])
                            done[0] += 1
                            at[COUNT] -= 1
                            at[ROW] += C
                            at[CHUNK_SLOT] += 1
                        loaded_all(line, tx)
                        leave_place(line, tx)
                        follow(line, at)
                elif tx < workers + 64:
                    take_all(
                        line, cu, order, ordered, tickets, first, segment, N1 - 1, cta, ctas, items,
                        V // BV, Hv, at, tx % 32,
                    )  # fmt: skip
                else:
                    t = tx - workers - 64
                    b = T.alloc_local((1,), f32)
                    follow(line, at)
                    while at[COUNT] >= 0:
                        for i in T.serial(at[COUNT]):
                            c = done[0] + i
                            s = c % stages
                            b[0] = 0.0
                            if at[ROW] + i * C + t < at[END]:
                                b[0] = T.cast(beta[at[ROW] + i * C + t, at[HEAD]], f32)
                            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
                            G = gs[s, t]
                            lost[s, t] = b[0] - T.cast(as_[s, t, t], f32)
                            if normalize:
                                ein[s, t] = T.exp2(G) * rs[s, t]
                                eout[s, t] = T.exp2(gs[s, C - 1] - G) * rs[s, t]
                            else:
                                ein[s, t] = T.exp2(G)
                                eout[s, t] = T.exp2(gs[s, C - 1] - G)
                            T.mbarrier_arrive(scaled[s])
                        done[0] += at[COUNT]
                        leave_place(line, tx)
                        follow(line, at)

    return main
