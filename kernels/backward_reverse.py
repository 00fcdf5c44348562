"""Gradients of states walked back through a segment, the serial half of the backward.

    Vn = r (K dS) + P^T dO     dV = a^T Vn     dS <- gamma_C dS + Q^T (scale gamma dO) - K^T (gamma dV)

with G the cumulative log gate of a chunk, gamma = exp(G), r = exp(G_C - G), `a` from prepare.py and
P_ij = scale exp(G_i - G_j) q_i k_j, j <= i. One CTA a (segment, value head, 64 value columns a
warpgroup); dS is kept transposed in a warpgroup's accumulators (recurrence.py), P comes from an
auxiliary warpgroup (backward_supplier.py). P and dO of rows past the end of a document are masked. What
rounding took from the diagonal of `a` is added in fp32 (backward_replay.py). What a chain does with a
chunk is in backward_chain.py, for one that is alone in its CTA and for one of two.

    store = True    the main pass, from the gradients of the states that leave the segments
                    (reverse_scan.py) and of the final ones: dV, the dS that leaves every chunk, dh0.
                    Of the chunk slots from `first` on, as many as `dleaving` has: a segment that goes
                    on behind them starts from carried[1 - into], one that begins before them ends in
                    carried[into]. `width` CTAs a head share the segments of such a block. dh0 is that of
                    the first `initials` documents
    store = False   dS_ext of a segment: the gradient of the state that enters it while nothing comes
                    from behind it (a last segment of the last `finals` documents counts dfinal). First
                    segments have one only in the first `open_left` documents. With `truncate`
                    (summary.py) it starts at the last chunk whose gradient the gates let through to the
                    segment's start.
"""

import tilelang
import tilelang.language as T

from .backward_blocks import CHUNKS, COUNTS, FIRST, Spot, walks
from .backward_chain import Held, Out, Panels, alone, one_of_two
from .backward_common import SOURCE
from .backward_supplier import Given, Ring, Room, supplier
from .common import (
    CHUNK,
    CHUNK_SLOT,
    COUNT,
    DOC,
    FLAGS,
    LAST,
    PART,
    ROW,
    TARGET,
    accumulator_layout,
    find_boundary,
    transposed_layout,
)  # fmt: skip


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def reverse(*, halves, dtype="bfloat16", beta_dtype="float32", normalize=False, store=True):
    C, K, V, HALF = CHUNK, 128, 128, 64
    BV, workers = HALF * halves, 128 * halves
    stages = 3 if not store or halves == 1 else 2
    f32, i32 = "float32", "int32"
    L, NC, NS = T.dynamic("L"), T.dynamic("NC"), T.dynamic("parts")
    Hk, Hv, N1 = T.dynamic("Hk"), T.dynamic("Hv"), T.dynamic("N1")
    ND, NF, NR, NO = T.dynamic("ND"), T.dynamic("NF"), T.dynamic("NR"), T.dynamic("chunks")
    NB, NQ, NG = T.dynamic("NB"), T.dynamic("NQ"), T.dynamic("NG")
    find_block, find_walk = walks(store=store, heads=Hv)
    make_pairs, load, send = supplier(halves, stages, store, normalize, key_heads=Hk, heads=Hv)

    if halves == 1:
        begin, step = alone(stages, store)
    else:
        step, finish = one_of_two(stages, store)

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
        order: T.Tensor((NG,), i32),
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
        ordered: T.int32,
        blocks: T.int32,
        initials: T.int32,
        finals: T.int32,
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
            bs = T.alloc_shared((stages, C), f32)
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
            factors = [T.alloc_fragment((BV, C), f32) for _ in range(4)]
            P = T.alloc_fragment((C, C), f32)
            Pb = T.alloc_fragment((C, C), dtype)
            D = T.alloc_fragment((C, C), f32)
            layouts = {
                Xf: transposed_layout(Xf),
                xs: tilelang.layout.make_swizzled_layout(xs),
                ps: tilelang.layout.make_swizzled_layout(ps),
            }
            Sf = T.alloc_fragment((BV, K), dtype)
            Of = T.alloc_fragment((C, BV), dtype)
            panels = Panels()
            if store:
                ss = T.alloc_shared((halves * 2 * HALF, HALF), dtype)
                os_ = T.alloc_shared((halves * C, HALF), dtype)
                layouts[Sf] = accumulator_layout(Sf)
                layouts[Of] = transposed_layout(Of)
                layouts[os_] = tilelang.layout.make_swizzled_layout(os_)
                panels = Panels(ss, os_)
                layouts[ss] = tilelang.layout.make_swizzled_layout(ss)
            T.annotate_layout(layouts)
            full = T.alloc_barrier([32] * stages)
            empty = T.alloc_barrier([workers + 128] * stages)
            ready = T.alloc_barrier([128] * 2)
            spent = T.alloc_barrier([workers] * 2)
            if halves == 1:
                staged = T.alloc_barrier([workers] * 2)
                stored = T.alloc_barrier([32] * 2)
            tx = T.get_thread_binding()

            at = T.alloc_local((7,), i32)
            walk = T.alloc_local((3,), i32)
            done = T.alloc_local((1,), i32)  # chunks so far
            decay = T.alloc_local((1,), f32)
            span = T.alloc_local((2,), i32)  # segments of the block

            given = Given(q, k, do, a, gate, rnorm, qnorm, beta, cu, order)
            room = Room(ks, qs, as_, xs, ps, gs, bs, ein, eout, eq, lost, P, Pb, D)
            if normalize:
                room = room._replace(rs=rs, qn=qn)
            ring = Ring(full, empty, ready, spent)
            if halves == 1:
                ring = ring._replace(staged=staged, stored=stored)
            held = Held(S, Sb, Sf, U, Ub, W, Wd, Xf, Xa, Xb, Of, decay, *factors)
            out = Out(dleaving, dv)
            spot = Spot(tile, h, z, width, first, segment, ordered, truncate, open_left, NO, N1, at,
                        walk, done, span)  # fmt: skip

            if tx < workers:
                T.set_max_nreg(208 if halves == 2 else 248, 1)
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
                        ending = at[DOC] - (N1 - 1 - finals)
                        if ending >= 0 and walk[COUNTS] != 0:
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = dfinal[ending, h, y, tile * BV + x]
                    elif store:
                        if n > 0:
                            left = T.alloc_local((1,), i32)
                            find_boundary(at, segment, left)
                            for x, y in T.Parallel(BV, K):
                                S[x, y] = dstates[left[0], h, y, tile * BV + x]
                    if halves == 1:
                        if n > 0:
                            begin(held, room, ring, done[0], tx)
                        for i in T.serial(n):
                            step(
                                held,
                                room,
                                ring,
                                panels,
                                done[0] + i,
                                done[0] + T.min(i + 1, n - 1),
                                tx,
                            )
                        T.wait_wgmma(0)
                    else:
                        for i in T.serial(n):
                            c = n - 1 - i
                            step(held, room, ring, panels, out, spot, done[0] + i, i, slot - first + c,
                                 row + (c + 1) * C, tx)  # fmt: skip
                        if store:
                            if n > 0:
                                finish(held, panels, out, spot, row, tx)
                    if store:
                        if walk[FIRST] > 0:
                            if n > 0:
                                for x, y in T.Parallel(BV, K):
                                    carried[into, h, y, tile * BV + x] = S[x, y]
                        elif at[PART] == 0:
                            if at[DOC] < initials:
                                for x, y in T.Parallel(BV, K):
                                    dinitial[at[DOC], h, y, tile * BV + x] = S[x, y]
                    else:
                        if at[PART] <= at[LAST]:
                            if at[PART] > 0 or at[DOC] < open_left:
                                place = T.alloc_local((1,), i32)
                                find_boundary(at, segment, place)
                                place[0] = T.if_then_else(
                                    at[PART] > 0, place[0] - 1, blocks + at[DOC]
                                )
                                for x, y in T.Parallel(BV, K):
                                    dstates[place[0], h, y, tile * BV + x] = S[x, y]
                    done[0] += n
            else:
                if tx < workers + 128:
                    T.set_max_nreg(72 if halves == 2 else 128, 0)
                    t = tx - workers
                    make_pairs(given, room, ring, spot, scale, t)
                else:
                    T.set_max_nreg(24 if halves == 2 else 56, 0)
                    if tx < workers + 160:
                        load(given, room, ring, spot, tx % 32)
                    elif tx < workers + 192:
                        if halves == 1 and store:
                            send(given, ring, spot, panels, out, tx)

    return main
