"""Reverse scan over segments, dS_{s-1} = M_s^T dS_s + dS_ext,s: one CTA a (document, value head, 64 columns).

dS_s is the gradient of the state that leaves segment s; dS_ext,s and M_s come from
backward_reverse.py and from the forward's summary. Gradients stay fp32 and transposed in the
accumulators of one warpgroup; they and M enter the products as two bf16 numbers each, good to 2^-16
(scan.py). A segment whose M vanished (live = 0) needs nothing of what lies behind it.

    entering = 0   writes `dstates` of all segments but a document's last. `incoming` are gradients of
                   the states that leave the last `open_right` documents, if `has_incoming`; elsewhere a
                   last segment's dS_ext counts dfinal already and its M is not asked for.
    entering = 1   writes `total`, the gradients of the states that enter the first documents, from
                   `incoming`, or while nothing comes in.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, FLAGS, TARGET
from .scan import find_place

MOST_SEGMENTS = 4096  # of a document
STAGES = 3


@T.macro
def find_behind(segment, first, entered, place):
    """place[0] <- where dS_ext of a document's segment lies: with the state that enters it, or at `entered`."""
    place[0] = T.if_then_else(segment > 0, first + segment - 1, entered)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def reverse_scan(*, entering=False):
    K, V, COLS = 128, 128, 64
    f32, bf16, i32 = "float32", "bfloat16", "int32"
    NS, Hv, N1, NT = T.dynamic("NS"), T.dynamic("Hv"), T.dynamic("N1"), T.dynamic("NT")
    NI, NM, ND = T.dynamic("NI"), T.dynamic("NM"), T.dynamic("ND")
    documents = NT if entering else N1 - 1

    @T.macro
    def fetch(maps, slot, h, stage, Ms, full):
        T.tma_copy(maps[slot, h, 0, :, :], Ms[2 * stage, :, :], barrier=full[stage])
        T.tma_copy(maps[slot, h, 1, :, :], Ms[2 * stage + 1, :, :], barrier=full[stage])
        T.mbarrier_arrive(full[stage])

    @T.prim_func
    def main(
        external: T.Tensor((NS, Hv, K, V), f32),
        maps: T.Tensor((NM, Hv, 2, K, K), bf16),
        live: T.Tensor((NM, Hv), i32),
        cu: T.Tensor((N1,), i32),
        incoming: T.Tensor((NI, Hv, K, V), f32),
        dstates: T.Tensor((ND, Hv, K, V), f32),
        total: T.Tensor((NT, Hv, K, V), f32),
        segment: T.int32,
        blocks: T.int32,
        has_incoming: T.int32,
    ):
        with T.Kernel(V // COLS, Hv, documents, threads=128) as (tile, h, doc):
            Ms = T.alloc_shared((2 * STAGES, K, K), bf16)  # [stage * 2 + (high, low)]
            order = T.alloc_shared((MOST_SEGMENTS,), i32)  # the steps with a product
            flags = T.alloc_shared((MOST_SEGMENTS,), i32)
            S = T.alloc_fragment((COLS, K), f32)
            acc = T.alloc_fragment((COLS, K), f32)
            high = T.alloc_fragment((COLS, K), bf16)
            low = T.alloc_fragment((COLS, K), bf16)
            full = T.alloc_barrier([128] * STAGES)
            tx = T.get_thread_binding()
            block = segment * CHUNK
            begin, end = cu[doc], cu[doc + 1]
            first = T.alloc_local((1,), i32)  # where the document's first segment lies
            place = T.alloc_local((1,), i32)
            first[0] = T.truncdiv(begin, block)
            count = T.max(T.truncdiv(end - begin + block - 1, block), 1)
            column = tile * COLS
            # the steps are segments start - 1, ..., stop: late gradients pass the last one, too
            late = has_incoming != 0 and doc >= N1 - 1 - NI
            start = T.if_then_else(late, count, count - 1)
            last = blocks + doc - (N1 - 1 - NI)  # M of the last segment, where that is open
            stop = 0 if entering else 1
            for x in T.serial(T.ceildiv(start, 128)):
                if x * 128 + tx < start:
                    find_place(x * 128 + tx, first[0], count, last, place)
                    flags[x * 128 + tx] = live[place[0], h]
            products = T.alloc_local((1,), i32)
            products[0] = 0
            T.sync_threads()
            for x in T.serial(start - stop):
                if flags[start - 1 - x] != 0:
                    if tx == 0:
                        order[products[0]] = start - 1 - x
                    products[0] += 1
            T.sync_threads()
            for x in T.serial(T.min(products[0], STAGES)):
                find_place(order[x], first[0], count, last, place)
                fetch(maps, place[0], h, x, Ms, full)
            if late:
                for x, y in T.Parallel(COLS, K):
                    S[x, y] = incoming[doc - (N1 - 1 - NI), h, y, column + x]
            else:
                if count > 1 or entering:
                    find_behind(count - 1, first[0], blocks + doc, place)
                    for x, y in T.Parallel(COLS, K):
                        S[x, y] = external[place[0], h, y, column + x]
                if not entering:
                    if count > 1:
                        for x, y in T.Parallel(COLS, K):
                            dstates[first[0] + count - 2, h, y, column + x] = S[x, y]
            used = T.alloc_local((1,), i32)  # products so far
            used[0] = 0
            for i in T.serial(start - stop):
                s = start - 1 - i
                find_behind(s, first[0], blocks + doc, place)
                for x, y in T.Parallel(COLS, K):
                    acc[x, y] = external[place[0], h, y, column + x]
                if flags[s] != 0:
                    stage = used[0] % STAGES
                    for x, y in T.Parallel(COLS, K):
                        high[x, y] = T.cast(S[x, y], bf16)
                    for x, y in T.Parallel(COLS, K):
                        low[x, y] = T.cast(S[x, y] - T.cast(high[x, y], f32), bf16)
                    T.mbarrier_wait_parity(full[stage], used[0] // STAGES % 2)
                    T.wgmma_gemm(low, Ms[2 * stage, :, :], acc)
                    T.wgmma_gemm(high, Ms[2 * stage + 1, :, :], acc)
                    T.wgmma_gemm(high, Ms[2 * stage, :, :], acc)
                    T.wait_wgmma(0)
                    T.sync_threads()
                    if used[0] + STAGES < products[0]:
                        find_place(order[used[0] + STAGES], first[0], count, last, place)
                        fetch(maps, place[0], h, stage, Ms, full)
                    used[0] += 1
                for x, y in T.Parallel(COLS, K):
                    S[x, y] = acc[x, y]
                if not entering:
                    for x, y in T.Parallel(COLS, K):
                        dstates[first[0] + s - 1, h, y, column + x] = S[x, y]
            if entering:
                for x, y in T.Parallel(COLS, K):
                    total[doc, h, y, column + x] = S[x, y]

    return main
