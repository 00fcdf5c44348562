"""What the warps beside the chains of recurrence.py do: P and gate vectors, loads, stores.

Macros, made for a variant of that kernel; their text is part of its roles' branches.

    enter       of a chain: the state that its segment begins with
    auxiliary   a chunk ahead of the chains: P_ij = scale exp(G_i - G_j) q_i k_j for j <= i, and what
                scales U, D and Q S, a vector each
    producer    bulk copies into `stages` slots, refilled as chains and auxiliary leave them
    storer      bulk copies of the outputs that a chain left in shared memory
    beside      the last three, for one segment or for all that a CTA takes (tickets.py)
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .common import CHUNK, CHUNK_SLOT, COUNT, DOC, END, PART, ROW, find_boundary
from .tickets import HEAD, TILE, follow, leave_place, loaded_all

C, K, HALF = CHUNK, 128, 64


class Given(NamedTuple):
    """Of a kernel's arguments, those of the chains and of what is loaded for them."""

    q: Any
    k: Any
    v: Any
    a: Any
    gate: Any
    rnorm: Any
    qnorm: Any
    incoming: Any
    initial: Any
    states: Any
    o: Any
    final: Any
    segment: Any
    has_initial: Any
    want_final: Any
    open_left: Any


class Room(NamedTuple):
    """Shared memory, registers and barriers of the chains and of the auxiliary warpgroup."""

    ks: Any
    qs: Any
    as_: Any
    vs: Any
    ps: Any
    os_: Any
    gs: Any
    rs: Any
    qn: Any
    ein: Any
    eout: Any
    eq: Any
    es: Any
    S: Any
    Sb: Any
    U: Any
    Ub: Any
    W: Any
    Wd: Any
    Wb: Any
    O: Any
    Ob: Any
    Vb: Any
    E: Any
    F: Any
    P: Any
    Pb: Any
    decay: Any
    full: Any
    empty: Any
    ready: Any
    spent: Any
    staged: Any
    stored: Any


@T.macro
def enter(S, incoming, initial, states, at, segment, h, tile, BV, open_left, has_initial):
    """The transposed state that enters a segment: block `tile` of BV of its value columns."""
    T.clear(S)
    if at[PART] == 0:
        if at[DOC] < open_left:
            for x, y in T.Parallel(BV, K):
                S[x, y] = incoming[at[DOC], h, y, tile * BV + x]
        elif has_initial != 0:
            for x, y in T.Parallel(BV, K):
                S[x, y] = initial[at[DOC], h, y, tile * BV + x]
    elif at[COUNT] > 0:
        place = T.alloc_local((1,), "int32")
        find_boundary(at, segment, place)
        for x, y in T.Parallel(BV, K):
            S[x, y] = states[place[0] - 1, h, y, tile * BV + x]


def pair_scaler(*, normalize):
    """For what becomes P, [C, C]."""

    @T.macro
    def run(X, qn, rs, s, scale):
        """The scale, the norms, and the mask, which comes after the arithmetic: branches there cost more than exps."""
        if normalize:
            for x, y in T.Parallel(C, C):
                X[x, y] *= scale * qn[s, x] * rs[s, y]
        else:
            for x, y in T.Parallel(C, C):
                X[x, y] *= scale
        for x, y in T.Parallel(C, C):
            X[x, y] = T.if_then_else(x >= y, X[x, y], 0.0)

    return run


def auxiliary(*, stages, normalize):
    """The loop of the auxiliary warpgroup, thread `t` of 128."""

    scale_pairs = pair_scaler(normalize=normalize)

    @T.macro
    def run(room, base, n, t, scale):
        P, Pb, ps, gs = room.P, room.Pb, room.ps, room.gs
        for i in T.serial(n):
            c = base + i
            s = c % stages
            b = c % 2
            T.mbarrier_wait_parity(room.full[s], (c // stages) % 2)
            if not normalize:
                T.wgmma_gemm(
                    room.qs[s, :, :], room.ks[s, :, :], P, transpose_B=True, clear_accum=True
                )
            T.mbarrier_wait_parity(room.spent[b], (c // 2) % 2 ^ 1)
            if t < C:
                G = gs[s, t]
                if normalize:
                    room.ein[b, t] = T.exp2(G) * room.rs[s, t]
                    room.eout[b, t] = T.exp2(gs[s, C - 1] - G) * room.rs[s, t]
                    room.eq[b, t] = T.exp2(G) * (scale * room.qn[s, t])
                else:
                    if t == C - 1:
                        room.es[b] = T.exp2(G)
                    room.ein[b, t] = T.exp2(G)
                    room.eout[b, t] = T.exp2(gs[s, C - 1] - G)
                    room.eq[b, t] = T.exp2(G) * scale
            if normalize:
                T.wgmma_gemm(
                    room.qs[s, :, :], room.ks[s, :, :], P, transpose_B=True, clear_accum=True
                )
            T.wait_wgmma(0)
            for x, y in T.Parallel(C, C):
                P[x, y] *= T.exp2(T.min(gs[s, x] - gs[s, y], 0.0))
            scale_pairs(P, room.qn, room.rs, s, scale)
            T.copy(P, Pb)
            T.copy(Pb, ps[b * C : (b + 1) * C, :])
            T.fence_proxy_async()
            T.mbarrier_arrive(room.ready[b])
            T.mbarrier_arrive(room.empty[s])

    return run


def producer(*, stages, halves, normalize):
    """The loop of the warp that loads: chunks from `at` on, after `done` others."""

    @T.macro
    def run(q, k, v, a, gate, rnorm, qnorm, qs, ks, vs, as_, gs, rs, qn, full, empty, done, at, h, hk,
            column):  # fmt: skip
        while at[COUNT] > 0:
            s = done[0] % stages
            r0 = at[ROW]
            T.mbarrier_wait_parity(empty[s], (done[0] // stages) % 2 ^ 1)
            if normalize:
                T.tma_copy(rnorm[at[CHUNK_SLOT], hk, :], rs[s, :], barrier=full[s])
                T.tma_copy(qnorm[at[CHUNK_SLOT], hk, :], qn[s, :], barrier=full[s])
            T.tma_copy(k[r0 : r0 + C, hk, :], ks[s, :, :], barrier=full[s])
            T.tma_copy(q[r0 : r0 + C, hk, :], qs[s, :, :], barrier=full[s])
            T.tma_copy(gate[at[CHUNK_SLOT], h, :], gs[s, :], barrier=full[s])
            T.tma_copy(a[at[CHUNK_SLOT], h, :, :], as_[s, :, :], barrier=full[s])
            for half in range(halves):
                T.tma_copy(
                    v[r0 : r0 + C, h, column + half * HALF : column + (half + 1) * HALF],
                    vs[(s * halves + half) * C : (s * halves + half + 1) * C, :],
                    barrier=full[s],
                )
            T.mbarrier_arrive(full[s])
            done[0] += 1
            at[COUNT] -= 1
            at[ROW] += C
            at[CHUNK_SLOT] += 1

    return run


@T.macro
def storer(os_, o, half, done, at, BV, staged, stored):
    """The loop of the warp that stores a chain's outputs, but a tail, which the chain has stored."""
    while at[COUNT] > 0:
        T.mbarrier_wait_parity(staged[half], done[0] % 2)
        if at[ROW] + C <= at[END]:
            T.tma_copy(
                os_[half * C : half * C + C, :],
                o[
                    at[ROW] : at[ROW] + C,
                    at[HEAD],
                    at[TILE] * BV + half * HALF : at[TILE] * BV + (half + 1) * HALF,
                ],
            )
            T.tma_store_wait()
        T.mbarrier_arrive(stored[half])
        done[0] += 1
        at[COUNT] -= 1
        at[ROW] += C


def beside(Hk, Hv, *, stages, halves, normalize, persistent):
    """The macros of the auxiliary warpgroup, of the warp that loads and of those that store, for the
    segment of a CTA or for all that it takes."""
    make_products = auxiliary(stages=stages, normalize=normalize)
    load = producer(stages=stages, halves=halves, normalize=normalize)
    BV = HALF * halves

    @T.macro
    def store_all(o, room, line, half, at, tx):
        """A branch for each of the warps: TileLang elects one thread of a branch."""
        if persistent:
            follow(line, at)
            while at[COUNT] >= 0:
                storer(room.os_, o, half, line.done, at, BV, room.staged, room.stored)
                leave_place(line, tx)
                follow(line, at)
        else:
            storer(room.os_, o, half, line.done, at, BV, room.staged, room.stored)

    @T.macro
    def make_all(room, line, at, scale, t):
        if persistent:
            follow(line, at)
            while at[COUNT] >= 0:
                make_products(room, line.done[0], at[COUNT], t, scale)
                line.done[0] += at[COUNT]
                leave_place(line, t)
                follow(line, at)
        else:
            make_products(room, 0, at[COUNT], t, scale)

    @T.macro
    def load_segment(given, room, line, at):
        h = at[HEAD]
        hk = T.truncdiv(h, T.truncdiv(Hv, Hk))
        load(
            given.q, given.k, given.v, given.a, given.gate, given.rnorm, given.qnorm, room.qs, room.ks,
            room.vs, room.as_, room.gs, room.rs, room.qn, room.full, room.empty, line.done, at, h, hk,
            at[TILE] * BV,
        )  # fmt: skip

    @T.macro
    def load_all(given, room, line, at, tx):
        if persistent:
            follow(line, at)
            while at[COUNT] >= 0:
                load_segment(given, room, line, at)
                loaded_all(line, tx)
                leave_place(line, tx)
                follow(line, at)
        else:
            load_segment(given, room, line, at)

    return make_all, load_all, store_all
