"""Scan over segments, S_s = M_s S_{s-1} + S_ext,s: one CTA a (value head, 32 columns), or `lanes`.

A CTA takes one of the `jobs` documents after another. `listed`: only those that are open on the left,
those open on the right, and those that hold a token whose number is -1 modulo two segments, among
them all of three segments and more; the others need no scan.

States stay fp32. M and the state enter the products as two bf16 numbers each, x = high + low: the
three wgmmas [128, 128] x [128, 32] of a step are good to 2^-16. The next Ms are on their way while
a step runs. A segment whose M vanished (live = 0) needs no step.

    closing = 1   before the main pass, in place: states[s] becomes the state that leaves segment s.
                  A document's first one is exact already, unless the document is among the first
                  `open_left`: these begin with their `incoming` state.
    closing = 0   what leaves the last `open_right` documents: `total_state` and, with eight tiles
                  instead of four, `total_map`, composed of all their segments. Documents that
                  begin here are scanned in place on the way and need no closing.
    closing = 2   both in one go, `total_state` from the true `incoming` ones.
"""

from typing import Any, NamedTuple

import tilelang
import tilelang.language as T

from .backward_common import SOURCE
from .common import CHUNK, FLAGS, TARGET, accumulator_layout, find_token

MOST_SEGMENTS = 4096  # of a document
K = V = 128
COLUMNS = 32
STAGES = 3


@T.macro
def find_place(segment, first, count, late, place):
    """place[0] <- where M of a document's segment lies, and the state that leaves it (common.py, summary.py)."""
    place[0] = T.if_then_else(segment < count - 1, first + segment, late)


class Room(NamedTuple):
    """What a step works in, of a scan in either direction."""

    Ms: Any  # M, [stage * 2 + (high, low)]
    Ss: Any  # S [columns, K], high and low
    S: Any
    acc: Any
    high: Any
    low: Any
    full: Any
    flags: Any  # live, and twice the number of the i-th segment with a product


def open_room() -> Room:
    Ms = T.alloc_shared((2 * STAGES, K, K), "bfloat16")
    Ss = T.alloc_shared((2, COLUMNS, K), "bfloat16")
    S, acc = (T.alloc_fragment((K, COLUMNS), "float32") for _ in range(2))
    high, low = (T.alloc_fragment((K, COLUMNS), "bfloat16") for _ in range(2))
    T.annotate_layout({high: accumulator_layout(high), low: accumulator_layout(low)})
    full = T.alloc_barrier([256] * STAGES)
    return Room(Ms, Ss, S, acc, high, low, full, T.alloc_shared((MOST_SEGMENTS,), "int32"))


@T.macro
def fetch(room, maps, slot, h, stage):
    """M into a stage: its high and its low numbers."""
    T.tma_copy(maps[slot, h, 0, :, :], room.Ms[2 * stage, :, :], barrier=room.full[stage])
    T.tma_copy(maps[slot, h, 1, :, :], room.Ms[2 * stage + 1, :, :], barrier=room.full[stage])
    T.mbarrier_arrive(room.full[stage])


@T.macro
def put(fragment, Ss, i, tx):
    """[K, COLUMNS] -> Ss[i], [COLUMNS, K]."""
    for x in T.unroll(COLUMNS // 16):
        T.call_extern(
            "handle",
            "gdn::store_matrix_trans",
            T.access_ptr(
                Ss[i, x * 16 + tx % 32 // 16 * 8 + tx % 8, tx // 32 * 16 + tx % 16 // 8 * 8], "r"
            ),
            T.access_ptr(fragment[tx // 32 * 16 + tx % 32 // 4, x * 16 + tx % 4 * 2], "r"),
        )


@T.macro
def divide(room, tx):
    """S into shared memory as two bf16 numbers each, for products."""
    for x, y in T.Parallel(K, COLUMNS):
        room.high[x, y] = T.cast(room.S[x, y], "bfloat16")
    for x, y in T.Parallel(K, COLUMNS):
        room.low[x, y] = T.cast(room.S[x, y] - T.cast(room.high[x, y], "float32"), "bfloat16")
    put(room.high, room.Ss, 0, tx)
    put(room.low, room.Ss, 1, tx)
    T.call_extern("handle", "gdn::fence_shared")


@T.macro
def write(room, states, pending, h, column):
    """The state of the step before, if it is to be written: behind a fence, which would wait for it."""
    if pending[0] >= 0:
        for x, y in T.Parallel(K, COLUMNS):
            states[pending[0], h, x, column + y] = room.S[x, y]
    pending[0] = -1


@T.macro
def multiply(room, stage, parity, transpose):
    """S += M S or M^T S, without low times low."""
    options = {"transpose_A": transpose, "transpose_B": True, "policy": T.GemmWarpPolicy.FullRow}
    T.mbarrier_wait_parity(room.full[stage], parity)
    T.wgmma_gemm(
        room.Ms[2 * stage + 1, :, :], room.Ss[0, :, :], room.acc, clear_accum=True, **options
    )
    T.wgmma_gemm(room.Ms[2 * stage, :, :], room.Ss[1, :, :], room.acc, **options)
    T.wgmma_gemm(room.Ms[2 * stage, :, :], room.Ss[0, :, :], room.acc, **options)
    T.wait_wgmma(0)
    for x, y in T.Parallel(K, COLUMNS):
        room.S[x, y] += room.acc[x, y]


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def scan():
    COLS = COLUMNS
    f32, bf16, i32 = "float32", "bfloat16", "int32"
    NS, Hv, N1, NT = T.dynamic("NS"), T.dynamic("Hv"), T.dynamic("N1"), T.dynamic("NT")
    N0, NI, NM = T.dynamic("N0"), T.dynamic("NI"), T.dynamic("NM")

    @T.prim_func
    def main(
        states: T.Tensor((NS, Hv, K, V), f32),
        maps: T.Tensor((NS, Hv, 2, K, K), bf16),
        live: T.Tensor((NS, Hv), i32),
        cu: T.Tensor((N1,), i32),
        initial: T.Tensor((N0, Hv, K, V), f32),
        incoming: T.Tensor((NI, Hv, K, V), f32),
        total_state: T.Tensor((NT, Hv, K, V), f32),
        total_map: T.Tensor((NM, Hv, K, K), f32),
        segment: T.int32,
        tiles: T.int32,
        lanes: T.int32,
        jobs: T.int32,
        listed: T.int32,
        blocks: T.int32,
        has_initial: T.int32,
        open_left: T.int32,
        open_right: T.int32,
        closing: T.int32,
    ):
        with T.Kernel(tiles, Hv, lanes, threads=256) as (tile, h, lane):
            T.import_source(SOURCE)
            room = open_room()
            S, flags = room.S, room.flags
            tx = T.get_thread_binding()
            block = segment * CHUNK
            which = T.alloc_local((1,), i32)
            mine = T.alloc_local((1,), i32)  # else another CTA's
            writes = T.alloc_local((1,), i32)  # states below this segment are replaced
            stop = T.alloc_local((1,), i32)
            used = T.alloc_local((1,), i32)  # products so far
            held = T.alloc_local((1,), i32)  # whether S is in registers
            base = T.alloc_local((1,), i32)  # products of the documents before
            products = T.alloc_local((1,), i32)
            first = T.alloc_local((1,), i32)  # where the document's first segment lies
            late = T.alloc_local((1,), i32)  # and the last one of a document that leaves
            place = T.alloc_local((1,), i32)
            slot = T.alloc_local((1,), i32)
            pending = T.alloc_local((1,), i32)  # where S is still to be written
            used[0] = 0
            pending[0] = -1
            for turn in T.serial(T.ceildiv(jobs - lane, lanes)):
                job = lane + turn * lanes
                which[0] = job
                token = (job - open_left - open_right + 1) * 2 * block - 1
                if listed != 0 and job >= open_left:
                    if job < open_left + open_right:
                        which[0] = N1 - 1 - open_right + job - open_left
                    else:
                        find_token(cu, token, N1 - 1, which)
                doc = which[0]
                begin, end = cu[doc], cu[doc + 1]
                mine[0] = 1
                if listed != 0 and job >= open_left:
                    if doc < open_left:
                        mine[0] = 0
                    elif job >= open_left + open_right:
                        if doc >= N1 - 1 - open_right or token - begin >= 2 * block:
                            mine[0] = 0
                first[0] = T.truncdiv(begin, block)
                count = T.truncdiv(end - begin + block - 1, block)
                column = tile % (V // COLS) * COLS
                is_map = tile >= V // COLS
                arrives = doc < open_left
                leaves = closing != 1 and doc >= N1 - 1 - open_right and mine[0] != 0
                out = doc - (N1 - 1 - open_right)
                late[0] = blocks + out
                writes[0] = count - 1
                if is_map or (arrives and closing == 0):
                    writes[0] = 0
                # the steps are segments start .. stop - 1
                start = T.if_then_else(arrives and closing != 0, 0, 1)
                stop[0] = writes[0]
                if leaves:
                    stop[0] = count
                if mine[0] == 0:
                    stop[0] = 0

                for x in T.serial(T.ceildiv(stop[0], 256)):
                    if x * 256 + tx < stop[0]:
                        find_place(x * 256 + tx, first[0], count, late[0], place)
                        flags[x * 256 + tx] = live[place[0], h]
                base[0] = used[0]
                held[0] = 0
                T.clear(S)
                T.sync_threads()
                if start == 0:
                    held[0] = 1
                    for x, y in T.Parallel(K, COLS):
                        S[x, y] = incoming[doc, h, x, column + y]
                if is_map and count > 0:
                    if flags[0] % 2 != 0:
                        held[0] = 1
                        find_place(0, first[0], count, late[0], place)
                        for x, y in T.Parallel(K, COLS):
                            S[x, y] = T.cast(maps[place[0], h, 0, x, column + y], f32) + T.cast(
                                maps[place[0], h, 1, x, column + y], f32
                            )
                    for x in T.serial(stop[0]):  # one M that vanished, and so does the product
                        if flags[x] % 2 == 0:
                            held[0] = 0
                    if held[0] == 0:
                        stop[0] = 0
                products[0] = 0
                for x in T.serial(T.max(stop[0] - start, 0)):
                    if flags[start + x] % 2 != 0:
                        if tx == 0:
                            flags[products[0]] += 2 * (start + x)
                        products[0] += 1
                T.sync_threads()
                for x in T.serial(T.min(products[0], STAGES)):
                    find_place(flags[x] // 2, first[0], count, late[0], place)
                    fetch(room, maps, place[0], h, (base[0] + x) % STAGES)
                for step in T.serial(T.max(stop[0] - start, 0)):
                    s = start + step
                    find_place(s, first[0], count, late[0], slot)
                    stage = used[0] % STAGES
                    if flags[s] % 2 != 0:
                        if held[0] == 0:
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = states[first[0] + s - 1, h, x, column + y]
                        divide(room, tx)
                        write(room, states, pending, h, column)
                        T.sync_threads()
                        if is_map:
                            T.clear(S)
                        else:
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = states[slot[0], h, x, column + y]
                        multiply(room, stage, used[0] // STAGES % 2, False)
                        if s < writes[0]:
                            pending[0] = slot[0]
                        T.sync_threads()
                        ahead = used[0] - base[0] + STAGES
                        if ahead < products[0]:
                            find_place(flags[ahead] // 2, first[0], count, late[0], place)
                            fetch(room, maps, place[0], h, stage)
                        used[0] += 1
                        held[0] = 1
                    else:
                        write(room, states, pending, h, column)
                        held[0] = 0
                write(room, states, pending, h, column)
                if leaves:
                    if held[0] == 0:
                        if count == 0:  # nothing happens to the state
                            T.clear(S)
                            if is_map:
                                if arrives:
                                    for x, y in T.Parallel(K, COLS):
                                        S[x, y] = T.if_then_else(x == column + y, 1.0, 0.0)
                            elif has_initial != 0 and not arrives:
                                for x, y in T.Parallel(K, COLS):
                                    S[x, y] = initial[doc, h, x, column + y]
                        elif is_map:
                            T.clear(S)
                        else:
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = states[late[0], h, x, column + y]
                    if is_map:
                        for x, y in T.Parallel(K, COLS):
                            total_map[out, h, x, column + y] = S[x, y]
                    else:
                        for x, y in T.Parallel(K, COLS):
                            total_state[out, h, x, column + y] = S[x, y]
                T.sync_threads()  # flags are read

    return main
