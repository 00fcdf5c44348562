"""The main pass: states and outputs, one CTA a (segment, value head), two chains in it.

With row vectors per token, G the cumulative log gate in the chunk, gamma = exp(G), and
a_ij = exp(G_i - G_j) beta_j (I + tril(diag(beta) K K^T, -1))^-1_ij from prepare.py, a chunk does

    U = K S              W = V - gamma U            D = a W
    O = scale gamma (Q S) + P D                     P_ij = scale exp(G_i - G_j) q_i k_j, j <= i
    S <- gamma_C S + K^T (exp(G_C - G) D)

(kernels of FlashQLA and of flash-linear-attention solve the same equations; the order is the
"W-form" of docs/kernels.md). The state is kept transposed, [value columns, key columns], as the
fp32 accumulator of a warpgroup for every 64 value columns. Its bf16 copy is the A operand of the
next products straight from registers, so a chunk has no shared-memory round trip on its serial
chain and no barrier between warpgroups. Roles in a CTA:

    consumers   2 warpgroups, 64 value columns each: the chain and the output; they issue their
                products in turn, one computes on registers while the other's run
    auxiliary   1 warpgroup, a chunk ahead: P, and the gate vectors of the chunk. Consumers wait
                for it alone: what it waited for has arrived
    producer    1 warp: bulk copies of q, k, v, a and the gates, `stages` chunks deep
    storer      1 warp a consumer: bulk copies of the outputs that it left in shared memory

With one chain a CTA the work is divided otherwise: recurrence_alone.py. `persistent`: a CTA takes one
segment after another (tickets.py), for short documents; one warp more finds them.

L2-normalised queries and keys are never written: 1/|k| and 1/|q| (prepare.py, qnorm.py) scale the
gate vectors and P.
"""

import tilelang
import tilelang.language as T

from .common import (
    CHUNK,
    COUNT,
    DOC,
    END,
    FLAGS,
    LAST,
    MATRIX_COPIES,
    PART,
    ROW,
    TARGET,
    find_sequence,
    load_transposed,
    store_transposed,
    transposed_layout,
)
from .recurrence_roles import Given, Room, beside, enter
from .tickets import (
    HEAD,
    TICKETS,
    TILE,
    Line,
    follow,
    leave_place,
    look,
    open_line,
    take_all,
)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def recurrence(*, dtype="bfloat16", value_dim=128, normalize=False, persistent=False):
    C, K, HALF = CHUNK, 128, 64
    ROWS = T.GemmWarpPolicy.FullRow
    halves, stages = 2, 3
    registers = (208, 72)
    BV = HALF * halves
    tiles = value_dim // BV
    workers = 128 * halves
    movers = workers + 128  # first thread of the warps that copy
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NT, NR = T.dynamic("N0"), T.dynamic("NT"), T.dynamic("NR")
    NI, NQ, NG = T.dynamic("NI"), T.dynamic("NQ"), T.dynamic("NG")

    @T.macro
    def leave(Ob, os_, staged, stored, c, tx):
        T.mbarrier_wait_parity(stored[tx // 128], c % 2)
        store_transposed(Ob, os_, tx // 128 * C, tx)
        T.fence_proxy_async()
        T.mbarrier_arrive(staged[tx // 128])

    @T.macro
    def load_values(vs, ein, Vb, E, s, e, tx):
        load_transposed(vs, (s * halves + tx // 128) * C, Vb, tx)
        for x, y in T.Parallel(BV, C):
            E[x, y] = ein[e, y]

    @T.macro
    def wait_turn(tx):
        T.call_extern("handle", "gdn::wait_turn", tx // 128)

    @T.macro
    def pass_turn(tx):
        T.call_extern("handle", "gdn::pass_turn", tx // 128)

    @T.macro
    def run_chain(given, room, line, at, begun, tx):
        """A segment, after `begun` chunks of others."""
        n = at[COUNT]
        enter(
            room.S, given.incoming, given.initial, given.states, at, given.segment, at[HEAD], at[TILE],
            BV, given.open_left, given.has_initial,
        )  # fmt: skip
        if n > 0:
            T.mbarrier_wait_parity(room.ready[begun % 2], (begun // 2) % 2)
            if tx >= 128:
                T.call_extern("handle", "gdn::pass_turn", 1)
        for i in T.serial(n):
            c = begun + i
            s = c % stages
            b = c % 2
            room.decay[0] = T.exp2(room.gs[s, C - 1]) if normalize else room.es[b]
            T.copy(room.S, room.Sb)
            for x, y in T.Parallel(BV, K):
                room.S[x, y] *= room.decay[0]
            wait_turn(tx)
            T.wgmma_gemm(
                room.Sb, room.ks[s, :, :], room.U, transpose_B=True, clear_accum=True, policy=ROWS
            )
            pass_turn(tx)
            T.sync_warp()  # else the loads of v, and their wait, part the products
            load_values(room.vs, room.ein, room.Vb, room.E, s, b, tx)
            T.wait_wgmma(0)
            for x, y in T.Parallel(BV, C):
                room.Ub[x, y] = room.Vb[y, x] - room.U[x, y] * room.E[x, y]
            wait_turn(tx)
            T.wgmma_gemm(
                room.Ub, room.as_[s, :, :], room.W, transpose_B=True, clear_accum=True, policy=ROWS
            )
            T.wgmma_gemm(
                room.Sb, room.qs[s, :, :], room.O, transpose_B=True, clear_accum=True, policy=ROWS
            )
            pass_turn(tx)
            if i > 0:
                leave(room.Ob, room.os_, room.staged, room.stored, c, tx)
            for x, y in T.Parallel(BV, C):
                room.F[x, y] = room.eout[b, y]
            T.wait_wgmma(1)
            for x, y in T.Parallel(BV, C):
                room.Wd[x, y] = room.W[x, y] * room.F[x, y]
            T.copy(room.W, room.Wb)
            T.wait_wgmma(0)
            for x, y in T.Parallel(BV, C):
                room.O[x, y] *= room.eq[b, y]
            wait_turn(tx)
            T.wgmma_gemm(room.Wd, room.ks[s, :, :], room.S, policy=ROWS)
            T.wgmma_gemm(
                room.Wb, room.ps[b * C : (b + 1) * C, :], room.O, transpose_B=True, policy=ROWS
            )
            if i + 1 < n or tx < 128:
                pass_turn(tx)
            if i + 1 < n:
                T.mbarrier_wait_parity(room.ready[1 - b], ((c + 1) // 2) % 2)
            T.wait_wgmma(0)
            T.mbarrier_arrive(room.empty[s])
            T.mbarrier_arrive(room.spent[b])
            for x, y in T.Parallel(BV, C):
                room.Ob[y, x] = room.O[x, y]
        if persistent:
            look(line, at)  # again: no registers while chunks last
        h, tile = at[HEAD], at[TILE]
        if n > 0:
            last = at[ROW] + (n - 1) * C
            T.mbarrier_wait_parity(room.stored[tx // 128], (begun + n) % 2)
            store_transposed(room.Ob, room.os_, tx // 128 * C, tx)
            if last + C <= at[END]:
                T.fence_proxy_async()
            else:
                T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
                for x in T.serial(C // 16):
                    r = x * 16 + tx % 128 // 8
                    if last + r < at[END]:
                        for y in T.vectorized(8):
                            given.o[
                                last + r,
                                h,
                                tile * BV + tx // 128 * HALF + tx % 8 * 8 + y,
                            ] = room.os_[tx // 128 * C + r, tx % 8 * 8 + y]
            T.mbarrier_arrive(room.staged[tx // 128])
        if given.want_final != 0:
            if at[PART] == at[LAST]:
                for x, y in T.Parallel(BV, K):
                    given.final[at[DOC], h, y, tile * BV + x] = room.S[x, y]

    make_all, load_all, store_all = beside(
        Hk, Hv, stages=stages, halves=halves, normalize=normalize, persistent=persistent
    )
    kept = T.Tensor if persistent else lambda *_: False  # TileLang makes no argument of a constant

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, value_dim), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        qnorm: T.Tensor((NQ, Hk, C), f32),
        cu: T.Tensor((N1,), i32),
        order: T.Tensor((NG,), i32),
        initial: T.Tensor((N0, Hv, K, value_dim), f32),
        incoming: T.Tensor((NI, Hv, K, value_dim), f32),
        states: T.Tensor((NS, Hv, K, value_dim), f32),
        o: T.Tensor((L, Hv, value_dim), dtype),
        final: T.Tensor((NT, Hv, K, value_dim), f32),
        tickets: kept((1,), i32),
        scale: T.float32,
        segment: T.int32,
        width: T.int32,
        ordered: T.int32,
        has_initial: T.int32,
        want_final: T.int32,
        open_left: T.int32,
        ctas: T.int32,
    ):
        grid = (ctas, 1, 1) if persistent else (tiles, Hv, width)
        with T.Kernel(*grid, threads=movers + 128) as (bx, by, bz):
            T.import_source(MATRIX_COPIES + TICKETS)
            items = tiles * Hv * width
            ks = T.alloc_shared((stages, C, K), dtype)
            qs = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            vs = T.alloc_shared((stages * halves * C, HALF), dtype)
            ps = T.alloc_shared((2 * C, C), dtype)
            os_ = T.alloc_shared((halves * C, HALF), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((2, C), f32)
            eout = T.alloc_shared((2, C), f32)
            eq = T.alloc_shared((2, C), f32)
            es = T.alloc_shared((2,), f32)
            rs = T.alloc_shared((stages, C), f32) if normalize else None
            qn = T.alloc_shared((stages, C), f32) if normalize else None

            S = T.alloc_fragment((BV, K), f32)
            Sb = T.alloc_fragment((BV, K), dtype)
            U = T.alloc_fragment((BV, C), f32)
            Ub = T.alloc_fragment((BV, C), dtype)
            W = T.alloc_fragment((BV, C), f32)
            Wd = T.alloc_fragment((BV, C), dtype)
            Wb = T.alloc_fragment((BV, C), dtype)
            O = T.alloc_fragment((BV, C), f32)
            Ob = T.alloc_fragment((C, BV), dtype)
            Vb = T.alloc_fragment((C, BV), dtype)
            E = T.alloc_fragment((BV, C), f32)
            F = T.alloc_fragment((BV, C), f32)
            P = T.alloc_fragment((C, C), f32)
            Pb = T.alloc_fragment((C, C), dtype)
            T.annotate_layout(
                {
                    Ob: transposed_layout(Ob),
                    Vb: transposed_layout(Vb),
                    vs: tilelang.layout.make_swizzled_layout(vs),
                    os_: tilelang.layout.make_swizzled_layout(os_),
                    ps: tilelang.layout.make_swizzled_layout(ps),
                }
            )
            full = T.alloc_barrier([32] * stages)
            empty = T.alloc_barrier([workers + 128] * stages)
            ready = T.alloc_barrier([128] * 2)
            spent = T.alloc_barrier([workers] * 2)
            staged = T.alloc_barrier([128] * halves)
            stored = T.alloc_barrier([32] * halves)
            tx = T.get_thread_binding()
            at = T.alloc_local((9,), i32)
            decay = T.alloc_local((1,), f32)
            done = T.alloc_local((1,), i32)  # chunks so far
            done[0] = 0
            line = Line(done)
            if persistent:
                line = open_line(done, 4 * halves + 5 + halves)
            else:
                find_sequence(cu, order, ordered, bz, segment, N1 - 1, at)
                at[HEAD] = by
                at[TILE] = bx
            given = Given(q, k, v, a, gate, rnorm, qnorm, incoming, initial, states, o, final, segment,
                          has_initial, want_final, open_left)  # fmt: skip
            room = Room(ks, qs, as_, vs, ps, os_, gs, rs, qn, ein, eout, eq, es, S, Sb, U, Ub, W, Wd, Wb, O,
                        Ob, Vb, E, F, P, Pb, decay, full, empty, ready, spent, staged, stored)  # fmt: skip

            if tx < workers:
                T.set_max_nreg(registers[0], 1)
                if persistent:
                    follow(line, at)
                    while at[COUNT] >= 0:
                        run_chain(given, room, line, at, done[0], tx)
                        look(line, at)
                        done[0] += at[COUNT]
                        leave_place(line, tx)
                        follow(line, at)
                else:
                    run_chain(given, room, line, at, 0, tx)
            elif tx < movers:
                T.set_max_nreg(registers[1], 0)
                make_all(room, line, at, scale, tx - workers)
            else:
                T.set_max_nreg(24, 0)
                if tx < movers + 32:
                    load_all(given, room, line, at, tx)
                elif tx < movers + 64:
                    store_all(o, room, line, 0, at, tx)
                elif tx < movers + 96:
                    store_all(o, room, line, 1, at, tx)
                elif persistent:
                    take_all(
                        line, cu, order, ordered, tickets, 0, segment, N1 - 1, bx, ctas, items, tiles,
                        Hv, at, tx % 32,
                    )  # fmt: skip

    return main
