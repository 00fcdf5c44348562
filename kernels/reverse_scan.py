"""Reverse scan over segments, dS_{s-1} = M_s^T dS_s + dS_ext,s: one CTA a (value head, 32 columns), or `lanes`.

A CTA takes one document after another. dS_s is the gradient of the state that leaves segment s;
dS_ext,s and M_s come from backward_reverse.py and from the forward's summary. A step is one of
scan.py's, with M transposed. A segment whose M vanished (live = 0) needs nothing of what lies behind it.

    entering = 0   writes `dstates` of all segments but a document's last. `incoming` are gradients of
                   the states that leave the last `open_right` documents, if `has_incoming`; elsewhere a
                   last segment's dS_ext counts dfinal already and its M is not asked for.
    entering = 1   writes `total`, the gradients of the states that enter the first documents, from
                   `incoming`, or while nothing comes in.
"""

import tilelang
import tilelang.language as T

from .backward_common import SOURCE
from .common import CHUNK, FLAGS, TARGET
from .scan import COLUMNS, STAGES, K, V, divide, fetch, find_place, multiply, open_room, write


@T.macro
def find_behind(segment, first, entered, place):
    """place[0] <- where dS_ext of a document's segment lies: with the state that enters it, or at `entered`."""
    place[0] = T.if_then_else(segment > 0, first + segment - 1, entered)


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def reverse_scan(*, entering=False):
    COLS = COLUMNS
    f32, bf16, i32 = "float32", "bfloat16", "int32"
    NS, Hv, N1, NT = T.dynamic("NS"), T.dynamic("Hv"), T.dynamic("N1"), T.dynamic("NT")
    NI, NM, ND = T.dynamic("NI"), T.dynamic("NM"), T.dynamic("ND")
    documents = NT if entering else N1 - 1
    stop = 0 if entering else 1

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
        lanes: T.int32,
        has_incoming: T.int32,
    ):
        with T.Kernel(V // COLS, Hv, lanes, threads=256) as (tile, h, lane):
            T.import_source(SOURCE)
            room = open_room()
            S, flags = room.S, room.flags
            tx = T.get_thread_binding()
            block = segment * CHUNK
            column = tile * COLS
            first = T.alloc_local((1,), i32)  # where the document's first segment lies
            place = T.alloc_local((1,), i32)
            pending = T.alloc_local((1,), i32)  # where S is still to be written
            products = T.alloc_local((1,), i32)  # of the document
            base = T.alloc_local((1,), i32)  # of the documents before
            used = T.alloc_local((1,), i32)  # so far
            used[0] = 0
            pending[0] = -1
            for turn in T.serial(T.ceildiv(documents - lane, lanes)):
                doc = lane + turn * lanes
                begin, end = cu[doc], cu[doc + 1]
                first[0] = T.truncdiv(begin, block)
                count = T.max(T.truncdiv(end - begin + block - 1, block), 1)
                # the steps are segments start - 1, ..., stop: late gradients pass the last one, too
                late = has_incoming != 0 and doc >= N1 - 1 - NI
                start = T.if_then_else(late, count, count - 1)
                last = blocks + doc - (N1 - 1 - NI)  # M of the last segment, where that is open
                if start > 0 or entering:
                    for x in T.serial(T.ceildiv(start, 256)):
                        if x * 256 + tx < start:
                            find_place(x * 256 + tx, first[0], count, last, place)
                            flags[x * 256 + tx] = live[place[0], h]
                    base[0] = used[0]
                    products[0] = 0
                    T.sync_threads()
                    for x in T.serial(start - stop):
                        if flags[start - 1 - x] % 2 != 0:
                            if tx == 0:
                                flags[products[0]] += 2 * (start - 1 - x)
                            products[0] += 1
                    T.sync_threads()
                    for x in T.serial(T.min(products[0], STAGES)):
                        find_place(flags[x] // 2, first[0], count, last, place)
                        fetch(room, maps, place[0], h, (base[0] + x) % STAGES)
                    if late:
                        for x, y in T.Parallel(K, COLS):
                            S[x, y] = incoming[doc - (N1 - 1 - NI), h, x, column + y]
                    else:
                        find_behind(count - 1, first[0], blocks + doc, place)
                        for x, y in T.Parallel(K, COLS):
                            S[x, y] = external[place[0], h, x, column + y]
                        if not entering:
                            pending[0] = first[0] + count - 2
                    for i in T.serial(start - stop):
                        s = start - 1 - i
                        find_behind(s, first[0], blocks + doc, place)
                        if flags[s] % 2 != 0:
                            stage = used[0] % STAGES
                            divide(room, tx)
                            write(room, dstates, pending, h, column)
                            T.sync_threads()
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = external[place[0], h, x, column + y]
                            multiply(room, stage, used[0] // STAGES % 2, True)
                            T.sync_threads()
                            ahead = used[0] - base[0] + STAGES
                            if ahead < products[0]:
                                find_place(flags[ahead] // 2, first[0], count, last, place)
                                fetch(room, maps, place[0], h, stage)
                            used[0] += 1
                        else:
                            write(room, dstates, pending, h, column)
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = external[place[0], h, x, column + y]
                        if not entering:
                            pending[0] = first[0] + s - 1
                    write(room, dstates, pending, h, column)
                    if entering:
                        for x, y in T.Parallel(K, COLS):
                            total[doc, h, x, column + y] = S[x, y]
                    T.sync_threads()  # flags are read

    return main
