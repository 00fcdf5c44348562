"""What serves the warpgroups of the dS chain (backward_reverse.py), roles of its auxiliary warps.

    make_pairs    P_ij = scale exp(G_i - G_j) q_i k_j, j <= i, and the factors of a chunk's rows
    load          a chunk's q, k, dO, `a` and gates into shared memory
    send          dS and dV out of it, where a chain is alone in its CTA

All walk the chunks that the chain walks, a few ahead of it.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .backward_blocks import CHUNKS, FIRST, walks
from .backward_common import send_rows, send_state
from .common import CHUNK, CHUNK_SLOT, END, ROW


class Given(NamedTuple):
    """Inputs of the kernel."""

    q: Any
    k: Any
    do: Any
    a: Any
    gate: Any
    rnorm: Any
    qnorm: Any
    beta: Any
    cu: Any
    order: Any


class Room(NamedTuple):
    """Shared memory of a CTA, and the auxiliary warpgroup's P."""

    ks: Any
    qs: Any
    as_: Any
    xs: Any  # dO
    ps: Any  # P
    gs: Any
    bs: Any  # beta
    ein: Any  # -gamma
    eout: Any  # r
    eq: Any  # scale gamma
    lost: Any  # beta - a_ii
    P: Any
    Pb: Any
    D: Any  # the decay between two tokens, where there are registers to have it early
    rs: Any = None  # 1 / |k| and 1 / |q|, where the kernels normalise
    qn: Any = None


class Ring(NamedTuple):
    """Barriers: of a chunk's tiles, and of its P and row factors."""

    full: Any
    empty: Any
    ready: Any
    spent: Any
    staged: Any = None  # a chain's dS and dV, where a warp sends them
    stored: Any = None


def supplier(halves, stages, store, normalize, *, key_heads, heads):
    """The macros `make_pairs`, `load` and `send`."""
    C, HALF, f32 = CHUNK, 64, "float32"
    BV = HALF * halves
    find_block, find_walk = walks(store=store, heads=heads)

    @T.macro
    def make_pairs(given, room, ring, spot, scale, t):
        find_block(given.cu, spot)
        for turn in T.serial(T.ceildiv(spot.span[1] + 1 - spot.span[0] - spot.z, spot.width)):
            part = spot.span[0] + spot.z + turn * spot.width
            find_walk(given, part, spot)
            n = spot.walk[CHUNKS]
            row = spot.at[ROW] + spot.walk[FIRST] * C
            for i in T.serial(n):
                c = n - 1 - i
                s = (spot.done[0] + i) % stages
                b = (spot.done[0] + i) % 2
                valid = spot.at[END] - row - c * C
                T.mbarrier_wait_parity(ring.full[s], ((spot.done[0] + i) // stages) % 2)
                if halves == 1:  # there are registers for it
                    T.wgmma_gemm(
                        room.qs[s, :, :],
                        room.ks[s, :, :],
                        room.P,
                        transpose_B=True,
                        clear_accum=True,
                    )
                    for x, y in T.Parallel(C, C):
                        room.D[x, y] = T.exp2(T.min(room.gs[s, x] - room.gs[s, y], 0.0))
                T.mbarrier_wait_parity(ring.spent[b], ((spot.done[0] + i) // 2) % 2 ^ 1)
                if halves == 2:
                    T.wgmma_gemm(
                        room.qs[s, :, :],
                        room.ks[s, :, :],
                        room.P,
                        transpose_B=True,
                        clear_accum=True,
                    )
                if t < C:
                    G = room.gs[s, t]
                    room.lost[b, t] = room.bs[s, t] - T.cast(room.as_[s, t, t], f32)
                    if normalize:
                        room.ein[b, t] = -T.exp2(G) * room.rs[s, t]
                        room.eout[b, t] = T.exp2(room.gs[s, C - 1] - G) * room.rs[s, t]
                        room.eq[b, t] = T.exp2(G) * (scale * room.qn[s, t])  # zero past the end
                    else:
                        room.ein[b, t] = -T.exp2(G)
                        room.eout[b, t] = T.exp2(room.gs[s, C - 1] - G)
                        room.eq[b, t] = T.if_then_else(t < valid, T.exp2(G) * scale, 0.0)
                T.wait_wgmma(0)
                # the mask comes after the arithmetic: branches here cost more than exps
                if halves == 1:
                    for x, y in T.Parallel(C, C):
                        room.P[x, y] *= room.D[x, y]
                else:
                    for x, y in T.Parallel(C, C):
                        room.P[x, y] *= T.exp2(T.min(room.gs[s, x] - room.gs[s, y], 0.0))
                if normalize:
                    for x, y in T.Parallel(C, C):
                        room.P[x, y] *= scale * room.qn[s, x] * room.rs[s, y]
                else:
                    for x, y in T.Parallel(C, C):
                        room.P[x, y] *= scale
                for x, y in T.Parallel(C, C):
                    room.P[x, y] = T.if_then_else(x >= y, room.P[x, y], 0.0)
                if valid < C:
                    for x, y in T.Parallel(C, C):
                        room.P[x, y] = T.if_then_else(x < valid, room.P[x, y], 0.0)
                T.copy(room.P, room.Pb)
                T.copy(room.Pb, room.ps[b * C : (b + 1) * C, :])
                T.call_extern("handle", "gdn::fence_shared")
                T.mbarrier_arrive(ring.ready[b])
                T.mbarrier_arrive(ring.empty[s])
            spot.done[0] += n

    @T.macro
    def load(given, room, ring, spot, lane):
        beta = T.alloc_local((2,), f32)
        hk = T.truncdiv(spot.h, T.truncdiv(heads, key_heads))
        find_block(given.cu, spot)
        for turn in T.serial(T.ceildiv(spot.span[1] + 1 - spot.span[0] - spot.z, spot.width)):
            part = spot.span[0] + spot.z + turn * spot.width
            find_walk(given, part, spot)
            n = spot.walk[CHUNKS]
            row = spot.at[ROW] + spot.walk[FIRST] * C
            slot = spot.at[CHUNK_SLOT] + spot.walk[FIRST]
            for i in T.serial(n):
                c = n - 1 - i
                s = (spot.done[0] + i) % stages
                r0 = row + c * C
                for x in T.unroll(2):
                    beta[x] = 0.0
                    if r0 + x * 32 + lane < spot.at[END]:
                        beta[x] = T.cast(given.beta[r0 + x * 32 + lane, spot.h], f32)
                T.mbarrier_wait_parity(ring.empty[s], ((spot.done[0] + i) // stages) % 2 ^ 1)
                T.tma_copy(given.k[r0 : r0 + C, hk, :], room.ks[s, :, :], barrier=ring.full[s])
                T.tma_copy(given.q[r0 : r0 + C, hk, :], room.qs[s, :, :], barrier=ring.full[s])
                T.tma_copy(given.gate[slot + c, spot.h, :], room.gs[s, :], barrier=ring.full[s])
                if normalize:
                    T.tma_copy(given.rnorm[slot + c, hk, :], room.rs[s, :], barrier=ring.full[s])
                    T.tma_copy(given.qnorm[slot + c, hk, :], room.qn[s, :], barrier=ring.full[s])
                for half in range(halves):
                    T.tma_copy(
                        given.do[
                            r0 : r0 + C,
                            spot.h,
                            spot.tile * BV + half * HALF : spot.tile * BV + half * HALF + HALF,
                        ],
                        room.xs[(s * halves + half) * C : (s * halves + half + 1) * C, :],
                        barrier=ring.full[s],
                    )
                T.tma_copy(given.a[slot + c, spot.h, :, :], room.as_[s, :, :], barrier=ring.full[s])
                for x in T.unroll(2):
                    room.bs[s, x * 32 + lane] = beta[x]
                T.mbarrier_arrive(ring.full[s])
            spot.done[0] += n

    @T.macro
    def send(given, ring, spot, panels, out, tx):
        """What the chain of a CTA leaves. The fence stands here, between the barrier and the copies: a chain
        would wait at it for what it wrote behind its products."""
        find_block(given.cu, spot)
        for turn in T.serial(T.ceildiv(spot.span[1] + 1 - spot.span[0] - spot.z, spot.width)):
            part = spot.span[0] + spot.z + turn * spot.width
            find_walk(given, part, spot)
            n = spot.walk[CHUNKS]
            row = spot.at[ROW] + spot.walk[FIRST] * C
            slot = spot.at[CHUNK_SLOT] + spot.walk[FIRST] - spot.first
            for i in T.serial(n):
                c = n - 1 - i
                T.mbarrier_wait_parity(ring.staged[0], (spot.done[0] + i) % 2)
                T.call_extern("handle", "gdn::fence_shared")
                send_state(panels.ss, out.dleaving, slot + c, spot.h, spot.tile * BV, 0)
                T.tma_store_wait()
                T.mbarrier_arrive(ring.stored[0])
                T.mbarrier_wait_parity(ring.staged[1], (spot.done[0] + i) % 2)
                T.call_extern("handle", "gdn::fence_shared")
                send_rows(
                    panels.os_, out.dv, row + c * C, spot.at[END], spot.h, spot.tile * BV, 0, tx, 32
                )
                T.tma_store_wait()
                T.mbarrier_arrive(ring.stored[1])
            spot.done[0] += n

    return make_pairs, load, send
