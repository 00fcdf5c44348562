"""The two warpgroups of backward_gradients.py that make dq and dk, 64 key columns each: one copy of the code.

Of a head's [64, 64] matrices the first makes dP and the second N + N^T, and they meet in shared memory:
full once both have written, empty once both have multiplied. A head's pair matrix is a product made
ahead, with the last ones of the head before; it needs neither S and dS nor, but for the sums of E, q and
k, which therefore may come late. What the loading warp may overwrite is let go before the next head is
waited for. Rows of q and k that dots need are asked for before a wait: with products under way shared
memory takes some hundred cycles to answer.
"""

from typing import Any, NamedTuple

import tilelang.language as T


def call(name, *arguments):
    return T.call_extern("handle", f"gdn::{name}", *arguments)


def tile(buffer, i):
    return T.access_ptr(buffer[i, 0, 0], "rw")


class Room(NamedTuple):
    """Shared memory of a CTA."""

    qk: Any  # halves of q, halves of k
    xs: Any  # [stage * 3 + (dO, dV, Vd)]
    Ss: Any
    Ds: Any
    ms: Any  # dP, N + N^T
    gs: Any
    norms: Any  # [stage, 1 / |q| and 1 / |k|]
    logs: Any  # [item, warpgroup], of norms
    project: Any
    sums: Any  # rows, columns of 4 warps, dots, ends
    traces: Any
    diagonal: Any
    left: Any  # tokens of the document from a head's chunk on


class Ring(NamedTuple):
    """Barriers: of an item's q and k, a head's dO, dV, Vd, its S and dS, its sums, its pair matrices."""

    fullQ: Any
    emptyQ: Any
    sentQ: Any
    fullX: Any
    emptyX: Any
    fullS: Any
    emptyS: Any
    fullD: Any
    emptyD: Any
    fullV: Any
    emptyV: Any
    fullM: Any
    emptyM: Any


def consumer(*, ratio, dtype, normalize):
    """The macro `consume`: all items of a CTA, at most `items`, for warpgroup w = group[0]."""
    R, f32, i32 = ratio, "float32", "int32"
    half, norm = str(dtype == "float16").lower(), str(normalize).lower()
    PAIR = f"product<{half}, 0, 0, 8, 1, true>"  # rows times rows, 128 columns
    INTER = f"product<{half}, 0, 1, 8, 1, true>"  # [C, V] times a state's [V, 64]

    @T.macro
    def multiply_keys(w, room, ring, QK, count):
        T.mbarrier_wait_parity(ring.fullQ[0], count[0] % 2)
        call(PAIR, QK.data, tile(room.qk, 2 * w), tile(room.qk, 2))
        call("commit_products")
        call("wait_products<0>")
        call("settle", QK.data)
        call("drop_diagonal", QK.data)

    @T.macro
    def consume(w, group, room, ring, scale, items, at, count, tx):
        M = T.alloc_local((32,), f32)
        QK = T.alloc_local((32,), f32)
        Aq = T.alloc_local((32,), f32)
        Ak = T.alloc_local((32,), f32)
        Iq = T.alloc_local((32,), f32)
        Iv = T.alloc_local((32,), f32)
        Id = T.alloc_local((32,), f32)
        rows = T.alloc_local((12,), f32)
        packed = T.alloc_local((16,), "uint32")
        words = T.alloc_local((8,), "uint32")
        kept = T.alloc_local((32,), "uint32")
        at[3] = 1
        # the first head's pair matrix: every head makes the next one's
        T.mbarrier_wait_parity(ring.fullX[0], 0)
        call(PAIR, M.data, tile(room.xs, 2 * w), tile(room.xs, 2 - w))
        call("commit_products")
        call("wait_products<0>")
        call("settle", M.data)
        for _ in T.serial(items):
            if at[3] > 0:
                at[3] = room.left[count[0] * R % 2]
            valid = at[3]
            if valid > 0:
                call("clear", Aq.data)
                call("clear", Ak.data)
                if normalize:  # those of the last item may still be read
                    call(
                        "take_logs",
                        T.access_ptr(room.norms[count[0] * R % 2, 0, 0], "r"),
                        T.access_ptr(room.logs[count[0] % 2, w, 0], "w"),
                        w,
                        scale,
                    )
                for g in T.serial(R):
                    group[2] = T.call_extern(i32, "gdn::uniform", count[0] * R + g)
                    hc = group[2]
                    s = hc % 2
                    T.mbarrier_wait_parity(ring.emptyV[s], (hc // 2) % 2 ^ 1)
                    call(
                        f"pair_matrix<{half}, {norm}>",
                        M.data,
                        T.access_ptr(room.gs[s, 0], "r"),
                        T.access_ptr(room.logs[count[0] % 2, w, 0], "r"),
                        T.access_ptr(room.diagonal[s, 0], "w"),
                        packed.data,
                        w,
                        group[1],
                        valid,
                        scale,
                    )
                    T.mbarrier_wait_parity(ring.emptyM[0], hc % 2 ^ 1)
                    call("store_pairs", packed.data, tile(room.ms, 0), w, group[1])
                    if tx % 32 == 0:
                        T.mbarrier_arrive(ring.fullM[0])
                    if g == 0:
                        multiply_keys(w, room, ring, QK, count)
                    T.mbarrier_wait_parity(ring.fullS[w], hc % 2)
                    call(INTER, Iq.data, tile(room.xs, s * 3), tile(room.Ss, w))
                    call("commit_products")
                    call(
                        "sum_products",
                        M.data,
                        QK.data,
                        T.access_ptr(room.sums[s * 2 + w, 0], "w"),
                        T.access_ptr(room.sums[s * 2 + w, 64], "w"),
                        w,
                        group[1],
                    )
                    call(INTER, Iv.data, tile(room.xs, s * 3 + 1), tile(room.Ss, w))
                    T.mbarrier_wait_parity(ring.fullD[w], hc % 2)
                    call(
                        f"trace<{half}>",
                        tile(room.Ss, w),
                        tile(room.Ds, w),
                        T.access_ptr(room.traces[s, w * 32], "w"),
                        group[1],
                    )
                    call(INTER, Id.data, tile(room.xs, s * 3 + 2), tile(room.Ds, w))
                    call("commit_products")
                    call("load_rows", tile(room.qk, w), words.data)
                    T.mbarrier_wait_parity(ring.fullM[0], hc % 2)  # dP and N + N^T are there
                    call(
                        f"product<{half}, 1, 1, 4, 1, false>",
                        Ak.data,
                        tile(room.ms, 0),
                        tile(room.qk, w),
                    )
                    call(
                        f"product<{half}, 0, 1, 4, -1, false>",
                        Ak.data,
                        tile(room.ms, 1),
                        tile(room.qk, 2 + w),
                    )
                    call("commit_products")
                    call(
                        f"row_factors<{norm}>",
                        rows.data,
                        T.access_ptr(room.gs[s, 0], "r"),
                        T.access_ptr(room.logs[count[0] % 2, w, 0], "r"),
                        T.access_ptr(room.traces[s, 64], "w"),
                        scale,
                    )
                    call("wait_products<2>")
                    call("settle", Iq.data)
                    call(
                        f"add_query<{half}>",
                        Aq.data,
                        Iq.data,
                        tile(room.qk, w),
                        words.data,
                        rows.data,
                    )
                    call("wait_products<1>")
                    call("settle", Iv.data)
                    call("settle", Id.data)
                    if tx % 32 == 0:
                        T.mbarrier_arrive(ring.emptyS[w])
                        T.mbarrier_arrive(ring.emptyD[w])
                        T.mbarrier_arrive(ring.emptyX[s])
                    call("load_rows", tile(room.qk, 2 + w), words.data)
                    T.mbarrier_wait_parity(ring.fullX[1 - s], ((hc + 1) // 2) % 2)
                    call(
                        f"product<{half}, 0, 1, 4, 1, false>",
                        Aq.data,
                        tile(room.ms, 0),
                        tile(room.qk, 2 + w),
                    )
                    call(
                        PAIR,
                        M.data,
                        tile(room.xs, (1 - s) * 3 + 2 * w),
                        tile(room.xs, (1 - s) * 3 + 2 - w),
                    )
                    call("commit_products")
                    call("wait_products<1>")
                    call("settle", Ak.data)
                    call(
                        f"add_key<{half}>",
                        Ak.data,
                        Iv.data,
                        Id.data,
                        tile(room.qk, 2 + w),
                        words.data,
                        rows.data,
                    )
                    call("store_dots", rows.data, T.access_ptr(room.sums[s * 2 + w, 320], "w"))
                    T.call_extern("handle", "__syncwarp")
                    if tx % 32 == 0:
                        T.mbarrier_arrive(ring.fullV[s])
                    call("wait_products<0>")
                    call("settle", Aq.data)
                    call("settle", M.data)
                    if tx % 32 == 0:
                        T.mbarrier_arrive(ring.emptyM[0])
                if normalize:
                    call(
                        f"project_rows<{half}>",
                        Aq.data,
                        Ak.data,
                        tile(room.qk, w),
                        tile(room.qk, 2 + w),
                        kept.data,
                        T.access_ptr(room.project[w, 0], "w"),
                    )
                    call("meet", 1)
                    call(
                        f"subtract_rows<{half}>",
                        Aq.data,
                        Ak.data,
                        kept.data,
                        T.access_ptr(room.project[0, 0], "r"),
                        T.access_ptr(room.logs[count[0] % 2, w, 0], "r"),
                        scale,
                    )
                # both warpgroups' products with q and k are through: their place is that of dq and dk
                T.mbarrier_wait_parity(ring.emptyM[0], (count[0] * R + R - 1) % 2)
                call(f"stage_rows<{half}>", Aq.data, tile(room.qk, w))
                call(f"stage_rows<{half}>", Ak.data, tile(room.qk, 2 + w))
                T.mbarrier_arrive(ring.emptyQ[0])
                count[0] += 1

    return consume
