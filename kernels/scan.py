"""Scan over segments, S_s = M_s S_{s-1} + S_ext,s: one CTA a (document, value head, 32 columns).

States stay fp32. M and the state enter the products as two bf16 numbers each, x = high + low: the
three wgmmas [128, 128] x [128, 32] of a step are good to 2^-16. The next M is on its way while a
step runs.

    whole = False   before the main pass, in place: states[s] becomes the state that leaves segment s.
                    A segment whose M vanished (live = 0) needs nothing; the first one is exact already.
    whole = True    a shard's own summary: S_ext and M of every document, from all its segments.
"""

import tilelang
import tilelang.language as T

from .common import CHUNK, FLAGS, TARGET

MOST_SEGMENTS = 4096  # of a document


@tilelang.jit(target=TARGET, pass_configs=FLAGS)
def scan(*, whole=False):
    K, V, COLS = 128, 128, 32
    f32, bf16, i32 = "float32", "bfloat16", "int32"
    NS, Hv, N1, NT = T.dynamic("NS"), T.dynamic("Hv"), T.dynamic("N1"), T.dynamic("NT")
    tiles = (V + K if whole else V) // COLS

    @T.macro
    def fetch(maps, slot, h, stage, Ms, full):
        T.tma_copy(maps[slot, h, 0, :, :], Ms[2 * stage, :, :], barrier=full[stage])
        T.tma_copy(maps[slot, h, 1, :, :], Ms[2 * stage + 1, :, :], barrier=full[stage])
        T.mbarrier_arrive(full[stage])

    @T.prim_func
    def main(
        states: T.Tensor((NS, Hv, K, V), f32),
        maps: T.Tensor((NS, Hv, 2, K, K), bf16),
        live: T.Tensor((NS, Hv), i32),
        cu: T.Tensor((N1,), i32),
        total_state: T.Tensor((NT, Hv, K, V), f32),
        total_map: T.Tensor((NT, Hv, K, K), f32),
        segment: T.int32,
    ):
        with T.Kernel(tiles, Hv, N1 - 1, threads=256) as (tile, h, doc):
            Ms = T.alloc_shared((4, K, K), bf16)  # [stage * 2 + (high, low)]
            Ss = T.alloc_shared((2, COLS, K), bf16)
            acc = T.alloc_fragment((K, COLS), f32)
            S = T.alloc_fragment((K, COLS), f32)
            full = T.alloc_barrier([256] * 2)
            tx = T.get_thread_binding()
            block = segment * CHUNK
            begin, end = cu[doc], cu[doc + 1]
            first = T.truncdiv(begin, block) + doc
            count = T.truncdiv(end - begin + block - 1, block)
            column = tile % (V // COLS) * COLS
            is_map = tile >= V // COLS
            # the steps are segments start .. stop - 1; whole shards step through all of them
            start = 0 if whole else 1
            stop = count if whole else count - 1

            flags = T.alloc_shared((MOST_SEGMENTS,), i32)
            for x in T.serial(T.ceildiv(stop, 256)):
                if x * 256 + tx < stop:
                    flags[x * 256 + tx] = live[first + x * 256 + tx, h]
            used = T.alloc_local((1,), i32)  # products so far; they alternate between two stages
            used[0] = 0
            held = T.alloc_local((1,), i32)  # whether S is in registers
            held[0] = 1 if whole else 0
            if whole:
                for x, y in T.Parallel(K, COLS):
                    S[x, y] = T.if_then_else(is_map and x == column + y, 1.0, 0.0)
            T.sync_threads()
            if stop > start:
                if flags[start] != 0:
                    fetch(maps, first + start, h, 0, Ms, full)
            for step in T.serial(T.max(stop - start, 0)):
                s = start + step
                slot = first + s
                stage = used[0] % 2
                if flags[s] != 0:
                    if s + 1 < stop:
                        if flags[s + 1] != 0:
                            fetch(maps, slot + 1, h, 1 - stage, Ms, full)
                    if held[0] == 0:
                        if whole and is_map:
                            T.clear(S)
                        else:
                            for x, y in T.Parallel(K, COLS):
                                S[x, y] = states[slot - 1, h, x, column + y]
                    for x, y in T.Parallel(K, COLS):
                        high = T.cast(S[x, y], bf16)
                        Ss[0, y, x] = high
                        Ss[1, y, x] = T.cast(S[x, y] - T.cast(high, f32), bf16)
                    T.fence_proxy_async()
                    T.sync_threads()
                    if whole and is_map:
                        T.clear(S)
                    else:
                        for x, y in T.Parallel(K, COLS):
                            S[x, y] = states[slot, h, x, column + y]
                    T.mbarrier_wait_parity(full[stage], used[0] // 2 % 2)
                    T.wgmma_gemm(
                        Ms[2 * stage + 1, :, :],
                        Ss[0, :, :],
                        acc,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    T.wgmma_gemm(
                        Ms[2 * stage, :, :],
                        Ss[1, :, :],
                        acc,
                        transpose_B=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    T.wgmma_gemm(
                        Ms[2 * stage, :, :],
                        Ss[0, :, :],
                        acc,
                        transpose_B=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    T.wait_wgmma(0)
                    for x, y in T.Parallel(K, COLS):
                        S[x, y] += acc[x, y]
                    if not whole:
                        for x, y in T.Parallel(K, COLS):
                            states[slot, h, x, column + y] = S[x, y]
                    T.sync_threads()
                    used[0] += 1
                    held[0] = 1
                else:
                    held[0] = 0
                    if s + 1 < stop:
                        if flags[s + 1] != 0:
                            fetch(maps, slot + 1, h, stage, Ms, full)
            if whole and held[0] == 0:
                if is_map:
                    T.clear(S)
                else:
                    for x, y in T.Parallel(K, COLS):
                        S[x, y] = states[first + stop - 1, h, x, column + y]
            if whole:
                if is_map:
                    for x, y in T.Parallel(K, COLS):
                        total_map[doc, h, x, column + y] = S[x, y]
                else:
                    for x, y in T.Parallel(K, COLS):
                        total_state[doc, h, x, column + y] = S[x, y]

    return main
