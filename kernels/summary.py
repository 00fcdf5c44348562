"""Segment summaries, S_out = M S_in + S_ext: one CTA a (segment, value head, S_ext or M).

The chain of recurrence.py without outputs, on 128 columns: for S_ext the value columns, from the
state that enters (zero, or the initial state at a document's first segment, whose summary is then
its outgoing state and needs no M); for M the 128 columns of the identity, with V = 0. Operands of
the serial chain stay in registers, two warpgroups of 64 columns each.

Which work is done is decided on the device, a (segment, head) at a time:
    first, last     neither S_ext nor M of a document's last segment, no M of its first: the main
                    pass begins with a known state and nobody asks for what leaves
    open_left       documents, the first ones, whose state arrives later from another rank: their
                    first segment counts as one in the middle
    open_right      documents, the last ones, whose state goes to another rank: so does their last
    truncate        where the keys have unit norm and beta lies in [0, 1], |M| <= exp(sum of log
                    gates). Below 2^-24 (an fp32 state cannot show it) M is not computed and S_ext
                    starts at the first chunk from the end before which the gates decay that far.
`live` says whether M was written, of the segments that are summarised. M leaves as two bf16 numbers,
M = high + low, for scan.py.

At most `blocks` segments are not the last of their document (common.py); those that are open on the
right are one more each and lie behind them. Each is two jobs a head, but for `known` first ones that
need no M. Jobs from `entire` on have a CTA for either half of their columns: where few are left when
all multiprocessors have had one, they take two thirds of the time so.
"""

import tilelang
import tilelang.language as T

from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    FLAGS,
    LAST,
    MATRIX_COPIES,
    PART,
    ROW,
    TARGET,
    find_token,
    load_transposed,
    place_segment,
    transposed_layout,
)

LOG2_NEGLIGIBLE = -24.0  # log2 of the decay below which a state is dropped: exp(-16.6)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def summary(*, dtype="bfloat16", normalize=False, stages=4):
    C, K, V = CHUNK, 128, 128
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NR = T.dynamic("N0"), T.dynamic("NR")

    @T.prim_func
    def main(
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, V), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        cu: T.Tensor((N1,), i32),
        initial: T.Tensor((N0, Hv, K, V), f32),
        states: T.Tensor((NS, Hv, K, V), f32),
        maps: T.Tensor((NS, Hv, 2, K, K), "bfloat16"),
        live: T.Tensor((NS, Hv), i32),
        segment: T.int32,
        has_initial: T.int32,
        truncate: T.int32,
        open_left: T.int32,
        open_right: T.int32,
        blocks: T.int32,
        known: T.int32,
        jobs: T.int32,
        entire: T.int32,
    ):
        with T.Kernel(2 * jobs - entire, threads=384) as cta:
            T.import_source(MATRIX_COPIES)
            ks = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            vs = T.alloc_shared((stages * 2 * C, 64), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((stages, C), f32)
            eout = T.alloc_shared((stages, C), f32)
            es = T.alloc_shared((stages,), f32)
            if normalize:
                rs = T.alloc_shared((stages, C), f32)
            S = T.alloc_fragment((128, K), f32)
            Sb = T.alloc_fragment((128, K), dtype)
            U = T.alloc_fragment((128, C), f32)
            Ub = T.alloc_fragment((128, C), dtype)
            W = T.alloc_fragment((128, C), f32)
            Wd = T.alloc_fragment((128, C), dtype)
            Vb = T.alloc_fragment((C, 128), dtype)
            E = T.alloc_fragment((128, C), f32)
            F = T.alloc_fragment((128, C), f32)
            T.annotate_layout(
                {Vb: transposed_layout(Vb), vs: tilelang.layout.make_swizzled_layout(vs)}
            )
            full = T.alloc_barrier([32] * stages)
            scaled = T.alloc_barrier([64] * stages)
            empty = T.alloc_barrier([256] * stages)
            tx = T.get_thread_binding()

            place = T.alloc_local((3,), i32)  # job, the half of its columns or -1, past `known`
            place[0] = cta
            place[1] = -1
            if cta >= entire:
                place[0] = entire + T.truncdiv(cta - entire, 2)
                place[1] = T.truncmod(cta - entire, 2)
            place[2] = place[0] - known * Hv
            kind = T.if_then_else(place[2] < 0, 0, T.truncmod(place[2], 2))
            h = T.if_then_else(place[2] < 0, place[0], T.truncmod(T.truncdiv(place[2], 2), Hv))
            item = T.if_then_else(place[2] < 0, 0, known + T.truncdiv(place[2], 2 * Hv))
            at = T.alloc_local((7,), i32)
            block = segment * CHUNK
            token = (item + 1) * block - 1
            if item < blocks:
                find_token(cu, token, N1 - 1, at)
            else:
                at[DOC] = N1 - 1 - open_right + item - blocks
            begin, end = cu[at[DOC]], cu[at[DOC] + 1]
            if item < blocks:
                at[PART] = T.truncdiv(token - begin, block)
            else:
                at[PART] = T.max(T.truncdiv(end - begin + block - 1, block), 1) - 1
            place_segment(begin, end, segment, at)
            begins = at[PART] == 0 and at[DOC] >= open_left
            ends = item < blocks and at[PART] >= at[LAST]
            near = T.alloc_local((2,), i32)  # chunks that matter, and whether the state before does
            near[0] = at[COUNT]
            near[1] = 1
            if truncate != 0 and at[COUNT] > 0 and not ends:
                T.call_extern(
                    "handle",
                    "gdn::near_chunks",
                    T.access_ptr(gate[at[CHUNK_SLOT] + at[COUNT] - 1, h, C - 1], "r"),
                    Hv * C,
                    at[COUNT],
                    LOG2_NEGLIGIBLE,
                    T.access_ptr(near[0], "w"),
                )
            first = at[COUNT] - near[0]
            n = T.alloc_local((1,), i32)
            n[0] = near[0]
            if begins or ends:
                near[1] = 0
            if ends:
                n[0] = 0
            if kind == 1 and near[1] == 0:
                n[0] = 0
            row = at[ROW] + first * C
            chunk = at[CHUNK_SLOT] + first

            if tx < 256:
                T.set_max_nreg(232, 1)
                # of lane 0: the compiler sees that a warp does not part here
                if (
                    T.shfl_sync(T.if_then_else(place[1] < 0, tx // 128, place[1]) - tx // 128, 0)
                    == 0
                ):
                    if kind == 1 and n[0] > 0:
                        for x in T.serial(stages * C * 64 // 1024):
                            for y in T.vectorized(8):
                                vs[
                                    (x // (C // 16) * 2 + tx // 128) * C
                                    + x % (C // 16) * 16
                                    + tx % 128 // 8,
                                    tx % 8 * 8 + y,
                                ] = 0
                        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                        for x, y in T.Parallel(128, K):
                            S[x, y] = T.if_then_else(x == y, 1.0, 0.0)
                    else:
                        T.clear(S)
                        if has_initial != 0 and begins and first == 0:
                            for x, y in T.Parallel(128, K):
                                S[x, y] = initial[at[DOC], h, y, x]
                    if n[0] > 0:
                        T.mbarrier_wait_parity(scaled[0], 0)
                    for c in T.serial(n[0]):
                        s = c % stages
                        gamma = es[s]
                        T.copy(S, Sb)
                        for x, y in T.Parallel(128, K):
                            S[x, y] *= gamma
                        T.wgmma_gemm(
                            Sb,
                            ks[s, :, :],
                            U,
                            transpose_B=True,
                            clear_accum=True,
                            policy=T.GemmWarpPolicy.FullRow,
                        )
                        load_transposed(vs, (s * 2 + tx // 128) * C, Vb, tx)
                        for x, y in T.Parallel(128, C):
                            E[x, y] = ein[s, y]
                        T.wait_wgmma(0)
                        for x, y in T.Parallel(128, C):
                            Ub[x, y] = Vb[y, x] - U[x, y] * E[x, y]
                        T.wgmma_gemm(
                            Ub,
                            as_[s, :, :],
                            W,
                            transpose_B=True,
                            clear_accum=True,
                            policy=T.GemmWarpPolicy.FullRow,
                        )
                        for x, y in T.Parallel(128, C):
                            F[x, y] = eout[s, y]
                        T.wait_wgmma(0)
                        for x, y in T.Parallel(128, C):
                            Wd[x, y] = W[x, y] * F[x, y]
                        T.wgmma_gemm(Wd, ks[s, :, :], S, policy=T.GemmWarpPolicy.FullRow)
                        if c + 1 < n[0]:
                            T.mbarrier_wait_parity(
                                scaled[(c + 1) % stages], ((c + 1) // stages) % 2
                            )
                        T.wait_wgmma(0)
                        T.mbarrier_arrive(empty[s])
                    if kind == 0:
                        if at[COUNT] > 0 and not ends:
                            for x, y in T.Parallel(128, K):
                                states[item, h, y, x] = S[x, y]
                        if tx == 0 and not ends:
                            live[item, h] = near[1]
                    else:
                        if near[1] != 0 and at[COUNT] > 0:
                            for x, y in T.Parallel(128, K):
                                high = T.cast(S[x, y], "bfloat16")
                                maps[item, h, 0, y, x] = high
                                maps[item, h, 1, y, x] = T.cast(
                                    S[x, y] - T.cast(high, f32), "bfloat16"
                                )
                else:
                    for c in T.serial(n[0]):
                        s = c % stages
                        T.mbarrier_wait_parity(scaled[s], (c // stages) % 2)
                        T.mbarrier_arrive(empty[s])
            else:
                T.set_max_nreg(40, 0)
                if tx < 288:
                    hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                    for c in T.serial(n[0]):
                        s = c % stages
                        r0 = row + c * C
                        T.mbarrier_wait_parity(empty[s], (c // stages) % 2 ^ 1)
                        T.tma_copy(k[r0 : r0 + C, hk, :], ks[s, :, :], barrier=full[s])
                        T.tma_copy(gate[chunk + c, h, :], gs[s, :], barrier=full[s])
                        if normalize:
                            T.tma_copy(rnorm[chunk + c, hk, :], rs[s, :], barrier=full[s])
                        T.tma_copy(a[chunk + c, h, :, :], as_[s, :, :], barrier=full[s])
                        if kind == 0:
                            for half in range(2):
                                if place[1] != 1 - half:
                                    T.tma_copy(
                                        v[r0 : r0 + C, h, half * 64 : half * 64 + 64],
                                        vs[(s * 2 + half) * C : (s * 2 + half + 1) * C, :],
                                        barrier=full[s],
                                    )
                        T.mbarrier_arrive(full[s])
                else:
                    if tx >= 320:
                        t = tx - 320
                        for c in T.serial(n[0]):
                            s = c % stages
                            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
                            G = gs[s, t]
                            if t == C - 1:
                                es[s] = T.exp2(G)
                            if normalize:
                                ein[s, t] = T.exp2(G) * rs[s, t]
                                eout[s, t] = T.exp2(gs[s, C - 1] - G) * rs[s, t]
                            else:
                                ein[s, t] = T.exp2(G)
                                eout[s, t] = T.exp2(gs[s, C - 1] - G)
                            T.mbarrier_arrive(scaled[s])

    return main
