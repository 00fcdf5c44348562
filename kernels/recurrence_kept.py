"""The main pass that keeps what the backward would replay: the state that enters every chunk, and Vd.

The equations of recurrence.py with the replay's correction (backward_replay.py), so that states and Vd
have the bits of a replay:

    U = K S     W = V - gamma U     Vd = a W + (beta - diag a) W
    O = scale gamma (Q S) + P Vd     S <- gamma_C S + K^T (exp(G_C - G) Vd)

One CTA a (segment, value head, 64 value columns), five roles:

    chain       a warpgroup, U to S, in registers; it leaves S, and Vd where `a` lay, in shared memory
    outputs     two warpgroups, every other chunk each: P, Q S, P Vd; and Vd with tokens as rows
    producer    a warp: bulk copies of a chunk's tiles, `stages` ahead
    storers     two warps: bulk copies of states; of outputs and Vd
    scaler      one warp: what scales U and Vd, and what rounding took from a's diagonal

It writes 768 bytes a token and value head more than recurrence.py.
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
    find_segment,
    load_transposed,
    transposed_layout,
)
from .kept_roles import (
    make_outputs,
    producer,
    put_tile,
    put_tile_at,
    scaler,
    state_storer,
    storer,
    tell,
)

ROWS = T.GemmWarpPolicy.FullRow


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def recurrence_kept(*, dtype="bfloat16", beta_dtype="float32", normalize=False, stages=3):
    C, K, V, HALF = CHUNK, 128, 128, 64
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("NS")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    N0, NT, NR = T.dynamic("N0"), T.dynamic("NT"), T.dynamic("NR")
    NI, NQ = T.dynamic("NI"), T.dynamic("NQ")

    outputs = make_outputs(stages=stages, normalize=normalize)
    load = producer(stages=stages, normalize=normalize)
    scale_rows = scaler(stages=stages, normalize=normalize)

    @T.macro
    def read_values(vs, ein, es, Vb, E, decay, t, tx):
        load_transposed(vs, t * C, Vb, tx)
        for x, y in T.Parallel(HALF, C):
            E[x, y] = ein[t, y]
        decay[0] = es[t]

    @T.prim_func
    def main(
        q: T.Tensor((L, Hk, K), dtype),
        k: T.Tensor((L, Hk, K), dtype),
        v: T.Tensor((L, Hv, V), dtype),
        a: T.Tensor((NC, Hv, C, C), dtype),
        gate: T.Tensor((NC, Hv, C), f32),
        rnorm: T.Tensor((NR, Hk, C), f32),
        qnorm: T.Tensor((NQ, Hk, C), f32),
        beta: T.Tensor((L, Hv), beta_dtype),
        cu: T.Tensor((N1,), i32),
        initial: T.Tensor((N0, Hv, K, V), f32),
        incoming: T.Tensor((NI, Hv, K, V), f32),
        states: T.Tensor((NS, Hv, K, V), f32),
        o: T.Tensor((L, Hv, V), dtype),
        final: T.Tensor((NT, Hv, K, V), f32),
        entering: T.Tensor((NC, Hv, V, K), dtype),
        vd: T.Tensor((NC, Hv, C, V), dtype),
        scale: T.float32,
        segment: T.int32,
        bits: T.int32,
        has_initial: T.int32,
        want_final: T.int32,
        open_left: T.int32,
    ):
        with T.Kernel(V // HALF, Hv, NS, threads=512) as (tile, h, slot):
            T.import_source(SOURCE)
            ks = T.alloc_shared((stages, C, K), dtype)
            qs = T.alloc_shared((stages, C, K), dtype)
            as_ = T.alloc_shared((stages, C, C), dtype)
            vs = T.alloc_shared((stages * C, HALF), dtype)
            ss = T.alloc_shared((HALF, K), dtype)
            os_ = T.alloc_shared((C, HALF), dtype)
            ds = T.alloc_shared((C, HALF), dtype)
            gs = T.alloc_shared((stages, C), f32)
            ein = T.alloc_shared((stages, C), f32)
            eout = T.alloc_shared((stages, C), f32)
            lost = T.alloc_shared((stages, C), f32)
            es = T.alloc_shared((stages,), f32)
            rs = T.alloc_shared((stages, C), f32) if normalize else None
            qn = T.alloc_shared((stages, C), f32) if normalize else None

            S = T.alloc_fragment((HALF, K), f32)
            Sb = T.alloc_fragment((HALF, K), dtype)
            Sf = T.alloc_fragment((HALF, K), dtype)
            U = T.alloc_fragment((HALF, C), f32)
            Ub = T.alloc_fragment((HALF, C), dtype)
            W = T.alloc_fragment((HALF, C), f32)
            Wd = T.alloc_fragment((HALF, C), dtype)
            Wf = T.alloc_fragment((HALF, C), dtype)
            Vb = T.alloc_fragment((C, HALF), dtype)
            E = T.alloc_fragment((HALF, C), f32)
            F = T.alloc_fragment((HALF, C), f32)
            P0, P1 = T.alloc_fragment((C, C), f32), T.alloc_fragment((C, C), f32)
            Pb0, Pb1 = T.alloc_fragment((C, C), dtype), T.alloc_fragment((C, C), dtype)
            D0, D1 = T.alloc_fragment((C, C), f32), T.alloc_fragment((C, C), f32)
            O0, O1 = T.alloc_fragment((C, HALF), f32), T.alloc_fragment((C, HALF), f32)
            Ob0, Ob1 = T.alloc_fragment((C, HALF), dtype), T.alloc_fragment((C, HALF), dtype)
            X0, X1 = T.alloc_fragment((HALF, C), dtype), T.alloc_fragment((HALF, C), dtype)
            T.annotate_layout(
                {
                    Vb: transposed_layout(Vb),
                    Sf: accumulator_layout(Sf),
                    Wf: accumulator_layout(Wf),
                    X0: transposed_layout(X0),
                    X1: transposed_layout(X1),
                    vs: tilelang.layout.make_swizzled_layout(vs),
                    ss: tilelang.layout.make_swizzled_layout(ss),
                    os_: tilelang.layout.make_swizzled_layout(os_),
                    ds: tilelang.layout.make_swizzled_layout(ds),
                }
            )
            full = T.alloc_barrier([32] * stages)
            scaled = T.alloc_barrier([1] * stages)
            empty = T.alloc_barrier([8] * stages)
            # one for even and one for odd chunks: each output warpgroup sees every phase of what it waits for
            stateful = T.alloc_barrier([4] * 2)  # S is in shared memory
            stateless = T.alloc_barrier([36])
            valued = T.alloc_barrier([4] * 2)  # Vd lies where `a` lay
            staged = T.alloc_barrier([4] * 2)
            stored = T.alloc_barrier([32] * 2)

            tx = T.get_thread_binding()
            at = T.alloc_local((7,), i32)
            decay = T.alloc_local((1,), f32)
            find_segment(cu, slot, segment, N1 - 1, bits, at)
            n = at[COUNT]
            row = at[ROW]
            full_chunks = T.if_then_else(row + n * C <= at[END], n, n - 1)

            if tx < 128:
                T.set_max_nreg(216, 1)
                T.clear(S)
                if at[PART] == 0:
                    if at[DOC] < open_left:
                        for x, y in T.Parallel(HALF, K):
                            S[x, y] = incoming[at[DOC], h, y, tile * HALF + x]
                    elif has_initial != 0:
                        for x, y in T.Parallel(HALF, K):
                            S[x, y] = initial[at[DOC], h, y, tile * HALF + x]
                else:
                    for x, y in T.Parallel(HALF, K):
                        S[x, y] = states[slot - 1, h, y, tile * HALF + x]
                if n > 0:
                    T.mbarrier_wait_parity(scaled[0], 0)
                    read_values(vs, ein, es, Vb, E, decay, 0, tx)
                for c in T.serial(n):
                    s = c % stages
                    t = (c + 1) % stages
                    T.copy(S, Sb)
                    T.copy(S, Sf)
                    T.mbarrier_wait_parity(stateless[0], c % 2 ^ 1)
                    put_tile(Sf, ss, K, tx)
                    T.sync_warp()
                    T.wgmma_gemm(
                        Sb, ks[s, :, :], U, transpose_B=True, clear_accum=True, policy=ROWS
                    )
                    for x, y in T.Parallel(HALF, K):
                        S[x, y] *= decay[0]
                    tell(stateful, c % 2, tx)
                    T.wait_wgmma(0)
                    for x, y in T.Parallel(HALF, C):
                        F[x, y] = eout[s, y]
                    for x, y in T.Parallel(HALF, C):
                        Ub[x, y] = Vb[y, x] - U[x, y] * E[x, y]
                    T.wgmma_gemm(
                        Ub, as_[s, :, :], W, transpose_B=True, clear_accum=True, policy=ROWS
                    )
                    T.wait_wgmma(0)
                    for x, y in T.Parallel(HALF, C):
                        W[x, y] += Ub[x, y] * lost[s, y]
                    if c + 1 < n:
                        T.mbarrier_wait_parity(scaled[t], ((c + 1) // stages) % 2)
                    # past the last chunk nobody reads what this makes of stale memory
                    read_values(vs, ein, es, Vb, E, decay, t, tx)
                    T.copy(W, Wf)
                    T.call_extern("handle", "gdn::wait_named", 3)  # all warps have multiplied by a
                    put_tile_at(Wf, as_, s, C, tx)
                    for x, y in T.Parallel(HALF, C):
                        Wd[x, y] = W[x, y] * F[x, y]
                    T.wgmma_gemm(Wd, ks[s, :, :], S, policy=ROWS)
                    tell(valued, c % 2, tx)
                    T.wait_wgmma(0)
                    if tx % 32 == 0:
                        T.mbarrier_arrive(empty[s])
                if want_final != 0:
                    if at[PART] == at[LAST]:
                        for x, y in T.Parallel(HALF, K):
                            final[at[DOC], h, y, tile * HALF + x] = S[x, y]
            elif tx < 256:
                T.set_max_nreg(128, 0)
                outputs(
                    0, qs, ks, as_, ss, os_, ds, gs, rs, qn, P0, Pb0, D0, O0, Ob0, X0, full,
                    stateful, stateless, valued, staged, stored, empty, o, row, full_chunks,
                    at[END], h, tile * HALF, n, tx - 128, scale,
                )  # fmt: skip
            elif tx < 384:
                T.set_max_nreg(128, 0)
                outputs(
                    1, qs, ks, as_, ss, os_, ds, gs, rs, qn, P1, Pb1, D1, O1, Ob1, X1, full,
                    stateful, stateless, valued, staged, stored, empty, o, row, full_chunks,
                    at[END], h, tile * HALF, n, tx - 256, scale,
                )  # fmt: skip
            else:
                T.set_max_nreg(40, 0)
                if tx < 416:
                    hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
                    load(
                        q, k, v, a, gate, rnorm, qnorm, qs, ks, vs, as_, gs, rs, qn, full, empty,
                        n, row, at, h, hk, tile * HALF,
                    )  # fmt: skip
                elif tx < 448:
                    state_storer(
                        ss, entering, at[CHUNK_SLOT], n, h, tile * HALF, stateful, stateless
                    )
                elif tx < 480:
                    storer(
                        os_, ds, o, vd, row, full_chunks, at[CHUNK_SLOT], n, h, tile * HALF, staged,
                        stored,
                    )  # fmt: skip
                else:
                    scale_rows(
                        gs, rs, as_, beta, ein, eout, lost, es, full, scaled, row, at[END], h, n,
                        tx - 480,
                    )  # fmt: skip

    return main
