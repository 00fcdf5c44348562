"""The main pass with one chain a CTA: a segment, a value head, 64 of its value columns.

The equations and the transposed state are those of recurrence.py, and so are the bits. A chain that
shares its multiprocessor with no other one does only what the next chunk waits for, and hands on the
rest through shared memory. Roles in a CTA:

    chain       1 warpgroup: U, W, D and S of every chunk. It leaves S as it enters a chunk in `ss`,
                and D where `a` of the chunk lay
    outputs     2 warpgroups in turn, a chunk each: P, Q S and P D (recurrence_outputs.py)
    producer    1 warp: bulk copies of q, k, v, a and the gates, `stages` chunks deep
    storer      1 warp: bulk copies of the outputs
    vectors     2 warps: what scales U and D

What a chunk waits for in shared memory is read a product ahead. Whoever multiplies by what the chain
left fences it, not the chain; and its addresses are found once (recurrence_addresses.py).

With `keep` it also leaves what the backward would replay, bit for bit (recurrence_kept.py).
"""

import tilelang
import tilelang.language as T

from .backward_common import SOURCE
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
    find_sequence,
    transposed_layout,
)
from .recurrence_addresses import HELD, arrive, put, read_values, wait
from .recurrence_kept import keepers
from .recurrence_outputs import outputs, store_tail, storer, vectors
from .recurrence_roles import enter, producer

C, K, BV = CHUNK, 128, 64
ROWS = T.GemmWarpPolicy.FullRow
STAGES = 4  # even: the output warpgroups take chunks, and with them slots, in turn
REGISTERS = (208, 136, 32)  # of chain, outputs and movers: 4 * 128 as launched, in all
VALUES_READ = 3  # named barrier of the chain; 1 and 2 are the outputs'


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def recurrence_alone(
    *, dtype="bfloat16", beta_dtype="float32", value_dim=128, normalize=False, keep=False
):
    tiles = value_dim // BV
    f32, i32, u32 = "float32", "int32", "uint32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NT, NR = T.dynamic("N0"), T.dynamic("NT"), T.dynamic("NR")
    NI, NQ, NG = T.dynamic("NI"), T.dynamic("NQ"), T.dynamic("NG")

    make_outputs = outputs(stages=STAGES, normalize=normalize, keep=keep)
    load = producer(stages=STAGES, halves=1, normalize=normalize)
    make_vectors = vectors(stages=STAGES, normalize=normalize)
    keep_all = keepers(stages=STAGES, normalize=normalize)
    kept = T.Tensor if keep else lambda *_: False  # TileLang makes no argument of a constant
    ends = (lambda at: at[DOC] >= 0) if keep else (lambda at: at[PART] == at[LAST])

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, value_dim), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        qnorm: T.Tensor((NQ, Hk, C), f32),
        beta: kept((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        order: T.Tensor((NG,), i32),
        initial: T.Tensor((N0, Hv, K, value_dim), f32),
        incoming: T.Tensor((NI, Hv, K, value_dim), f32),
        states: T.Tensor((NS, Hv, K, value_dim), f32),
        o: T.Tensor((L, Hv, value_dim), dtype),
        final: T.Tensor((NT, Hv, K, value_dim), f32),
        entering: kept((NC, Hv, value_dim, K), dtype),
        vd: kept((NC, Hv, C, value_dim), dtype),
        scale: T.float32,
        segment: T.int32,
        width: T.int32,
        ordered: T.int32,
        has_initial: T.int32,
        want_final: T.int32,
        open_left: T.int32,
    ):
        with T.Kernel(tiles, Hv, width, threads=512) as (tile, h, slot):
            T.import_source(SOURCE + HELD)
            ks = T.alloc_shared((STAGES, C, K), dtype)
            qs = T.alloc_shared((STAGES, C, K), dtype)
            as_ = T.alloc_shared((STAGES, C, C), dtype)
            vs = T.alloc_shared((STAGES * C, BV), dtype)
            ss = T.alloc_shared((BV, K), dtype)
            os_ = T.alloc_shared((C, BV), dtype)
            gs = T.alloc_shared((STAGES, C), f32)
            ein = T.alloc_shared((STAGES, C), f32)
            eout = T.alloc_shared((STAGES, C), f32)
            es = T.alloc_shared((STAGES,), f32)
            rs = T.alloc_shared((STAGES, C), f32) if normalize else None
            qn = T.alloc_shared((STAGES, C), f32) if normalize else None
            lost = T.alloc_shared((STAGES, C), f32) if keep else None

            S = T.alloc_fragment((BV, K), f32)
            Sb = T.alloc_fragment((BV, K), dtype)
            Sf = T.alloc_fragment((BV, K), dtype)
            U = T.alloc_fragment((BV, C), f32)
            Ub = T.alloc_fragment((BV, C), dtype)
            W = T.alloc_fragment((BV, C), f32)
            Wd = T.alloc_fragment((BV, C), dtype)
            Wf = T.alloc_fragment((BV, C), dtype)
            Vb = T.alloc_fragment((C, BV), dtype)
            E = T.alloc_fragment((BV, C), f32)
            F = T.alloc_fragment((BV, C), f32)
            # of each of the two output warpgroups
            P0 = T.alloc_fragment((C, C), f32)
            Pb0 = T.alloc_fragment((C, C), dtype)
            D0 = T.alloc_fragment((C, C), f32)
            O0 = T.alloc_fragment((C, BV), f32)
            Ob0 = T.alloc_fragment((C, BV), dtype)
            P1 = T.alloc_fragment((C, C), f32)
            Pb1 = T.alloc_fragment((C, C), dtype)
            D1 = T.alloc_fragment((C, C), f32)
            O1 = T.alloc_fragment((C, BV), f32)
            Ob1 = T.alloc_fragment((C, BV), dtype)
            R = T.alloc_fragment((BV, C), f32) if keep else None
            X0 = T.alloc_fragment((BV, C), dtype) if keep else None
            X1 = T.alloc_fragment((BV, C), dtype) if keep else None
            T.annotate_layout(
                {
                    Vb: transposed_layout(Vb),
                    Sf: accumulator_layout(Sf),
                    Wf: accumulator_layout(Wf),
                    vs: tilelang.layout.make_swizzled_layout(vs),
                    ss: tilelang.layout.make_swizzled_layout(ss),
                    os_: tilelang.layout.make_swizzled_layout(os_),
                }
                | ({X0: transposed_layout(X0), X1: transposed_layout(X1)} if keep else {})
            )
            full = T.alloc_barrier([32] * STAGES)
            scaled = T.alloc_barrier([1 if keep else 2] * STAGES)
            empty = T.alloc_barrier([8 + 32 * keep] * STAGES)
            stateful = T.alloc_barrier([4] * 2)  # S is in shared memory, for either warpgroup
            stateless = T.alloc_barrier([4 + 32 * keep])
            valued = T.alloc_barrier([4] * 2)  # so is D
            staged = T.alloc_barrier([4])
            stored = T.alloc_barrier([32] * 2)

            tx = T.get_thread_binding()
            at = T.alloc_local((7,), i32)
            decay = T.alloc_local((1,), f32)
            find_sequence(cu, order, ordered, slot, segment, N1 - 1, at, halving=True)
            n = at[COUNT]
            row = at[ROW]
            full_chunks = T.if_then_else(row + n * C <= at[END], n, n - 1)

            if tx < 128:
                T.set_max_nreg(REGISTERS[0], 1)
                rows = T.alloc_local((4,), u32)
                column = T.alloc_local((1,), u32)
                values = T.alloc_local((1,), u32)  # from the state's place to those of D
                scaled_at = T.alloc_local((1,), u32)
                empty_at = T.alloc_local((1,), u32)
                stateful_at = T.alloc_local((1,), u32)
                stateless_at = T.alloc_local((1,), u32)
                valued_at = T.alloc_local((1,), u32)
                for x in T.unroll(4):
                    rows[x] = T.call_extern(u32, "gdn::row_address", T.access_ptr(ss[0, 0], "r"), x)
                column[0] = T.call_extern(u32, "gdn::column_address", T.access_ptr(vs[0, 0], "r"))
                values[0] = T.call_extern(
                    u32, "gdn::held_address", T.access_ptr(as_[0, 0, 0], "r")
                ) - T.call_extern(u32, "gdn::held_address", T.access_ptr(ss[0, 0], "r"))
                scaled_at[0] = T.call_extern(u32, "gdn::held_address", scaled.data)
                empty_at[0] = T.call_extern(u32, "gdn::held_address", empty.data)
                stateful_at[0] = T.call_extern(u32, "gdn::held_address", stateful.data)
                stateless_at[0] = T.call_extern(u32, "gdn::held_address", stateless.data)
                valued_at[0] = T.call_extern(u32, "gdn::held_address", valued.data)
                enter(
                    S, incoming, initial, states, at, segment, h, tile, BV, open_left, has_initial
                )
                if keep:  # one register instead of three while chunks last
                    at[DOC] = T.if_then_else(at[PART] == at[LAST], at[DOC], -1)
                if n > 0:
                    wait(scaled_at, 0, 0)
                    read_values(column, ein, es, Vb, E, decay, 0, tx)
                for c in T.serial(n):
                    s = c % STAGES
                    t = (c + 1) % STAGES
                    T.copy(S, Sb)
                    T.copy(S, Sf)
                    put(Sf, rows, T.uint32(0), K, tx)
                    arrive(stateful_at, c % 2, tx)
                    T.sync_warp()
                    T.wgmma_gemm(
                        Sb, ks[s, :, :], U, transpose_B=True, clear_accum=True, policy=ROWS
                    )
                    for x, y in T.Parallel(BV, K):
                        S[x, y] *= decay[0]
                    if c + 1 < n:
                        wait(scaled_at, t, ((c + 1) // STAGES) % 2)
                    T.wait_wgmma(0)
                    for x, y in T.Parallel(BV, C):
                        F[x, y] = eout[s, y]
                    if keep:
                        for x, y in T.Parallel(BV, C):
                            R[x, y] = lost[s, y]
                    for x, y in T.Parallel(BV, C):
                        Ub[x, y] = Vb[y, x] - U[x, y] * E[x, y]
                    # past the last chunk nobody reads what this makes of stale memory
                    read_values(column, ein, es, Vb, E, decay, t, tx)
                    T.sync_warp()
                    T.wgmma_gemm(
                        Ub, as_[s, :, :], W, transpose_B=True, clear_accum=True, policy=ROWS
                    )
                    T.wait_wgmma(0)
                    if keep:
                        for x, y in T.Parallel(BV, C):
                            W[x, y] += Ub[x, y] * R[x, y]
                    T.copy(W, Wf)
                    T.call_extern("handle", "gdn::wait_named", VALUES_READ)  # nobody reads a
                    put(Wf, rows, values[0] + T.Cast(u32, s * 8192), C, tx)
                    arrive(valued_at, c % 2, tx)
                    for x, y in T.Parallel(BV, C):
                        Wd[x, y] = W[x, y] * F[x, y]
                    T.wgmma_gemm(Wd, ks[s, :, :], S, policy=ROWS)
                    wait(stateless_at, 0, c % 2)
                    T.wait_wgmma(0)
                    arrive(empty_at, s, tx)
                if want_final != 0:
                    if ends(at):
                        for x, y in T.Parallel(BV, K):
                            final[at[DOC], h, y, tile * BV + x] = S[x, y]
            elif tx < 256:
                T.set_max_nreg(REGISTERS[1], 1)
                make_outputs(
                    0, qs, ks, as_, ss, os_, gs, rs, qn, P0, Pb0, D0, O0, Ob0, full, stateful,
                    stateless, valued, staged, stored, empty, n, tx - 128, scale, vs, X0,
                )  # fmt: skip
                if n > 0 and full_chunks < n and n % 2 == 1:
                    store_tail(0, os_, o, row + (n - 1) * C, at[END], h, tile * BV, tx - 128)
            elif tx < 384:
                T.set_max_nreg(REGISTERS[1], 1)
                make_outputs(
                    1, qs, ks, as_, ss, os_, gs, rs, qn, P1, Pb1, D1, O1, Ob1, full, stateful,
                    stateless, valued, staged, stored, empty, n, tx - 256, scale, vs, X1,
                )  # fmt: skip
                if n > 0 and full_chunks < n and n % 2 == 0:
                    store_tail(1, os_, o, row + (n - 1) * C, at[END], h, tile * BV, tx - 256)
            else:
                T.set_max_nreg(REGISTERS[2], 0)
                if tx < 416:
                    hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                    loaded = T.alloc_local((1,), i32)
                    loaded[0] = 0
                    load(
                        q, k, v, a, gate, rnorm, qnorm, qs, ks, vs, as_, gs, rs, qn, full, empty,
                        loaded, at, h, hk, tile * BV,
                    )  # fmt: skip
                elif keep:
                    keep_all(
                        as_, vs, ss, os_, gs, rs, ein, eout, es, lost, beta, o, entering, vd, full,
                        scaled, empty, stateful, stateless, staged, stored, n, row, full_chunks,
                        at[CHUNK_SLOT], at[END], h, tile * BV, tx,
                    )  # fmt: skip
                elif tx < 448:
                    storer(os_, o, row, full_chunks, h, tile * BV, staged, stored)
                else:
                    make_vectors(gs, rs, ein, eout, es, full, scaled, n, tx - 448)

    return main
