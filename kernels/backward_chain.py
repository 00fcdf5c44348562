"""What a dS chain does with a chunk (backward_reverse.py): alone in its CTA, or as one of two.

Alone it has the registers and warps to be left with little but products and the arithmetic between
them. P^T dO of the next chunk runs with this one's last product, and what products read late or not at
all is read before they are issued: shared memory answers in turn, a warp's products included. What
leaves (dS, dV) it leaves in shared memory, to be sent by a warp of its own (backward_supplier.py).
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .backward_common import send_rows, send_state, stage_rows, stage_state
from .common import CHUNK, END, load_transposed

C, K, HALF = CHUNK, 128, 64
ROWS = T.GemmWarpPolicy.FullRow


class Held(NamedTuple):
    """Registers of a chain: value columns by keys or tokens, Xf and Of transposed."""

    S: Any  # dS
    Sb: Any
    Sf: Any  # Sb, as it is staged
    U: Any  # K dS, then dV
    Ub: Any
    W: Any  # P^T dO
    Wd: Any
    Xf: Any  # dO
    Xa: Any
    Xb: Any
    Of: Any  # dV
    decay: Any
    r: Any  # factors of the tokens
    gamma: Any
    scaled: Any
    lost: Any


class Panels(NamedTuple):
    """Shared memory that tiles leave from: dS, dV."""

    ss: Any = None
    os_: Any = None


class Out(NamedTuple):
    dleaving: Any
    dv: Any


def alone(stages, store):
    """The macros `begin`, what a walk's first chunk needs, and `step`."""

    def product(x, y):
        """Not fused with the sum that follows: a chain that is one of two waits in between."""
        return T.call_extern("float32", "__fmul_rn", x, y)

    @T.macro
    def begin(held, room, ring, j, tx):
        """dO and factors of a CTA's j-th chunk into registers, and W = dO^T P."""
        T.mbarrier_wait_parity(ring.full[j % stages], (j // stages) % 2)
        load_transposed(room.xs, j % stages * C, held.Xf, tx)
        for x, y in T.Parallel(HALF, C):
            held.Xa[x, y] = held.Xf[y, x]
        T.mbarrier_wait_parity(ring.ready[j % 2], (j // 2) % 2)
        for x, y in T.Parallel(HALF, C):
            held.scaled[x, y] = room.eq[j % 2, y]
        for x, y in T.Parallel(HALF, C):
            held.r[x, y] = room.eout[j % 2, y]
        T.wgmma_gemm(
            held.Xa,
            room.ps[j % 2 * C : (j % 2 + 1) * C, :],
            held.W,
            clear_accum=True,
            policy=ROWS,
        )

    @T.macro
    def step(held, room, ring, panels, j, following, tx):
        """The j-th chunk; `following` is the next one of the walk, after the last one itself."""
        s = j % stages
        b = j % 2
        held.decay[0] = T.exp2(room.gs[s, C - 1])
        T.copy(held.S, held.Sb)
        if store:
            T.copy(held.S, held.Sf)
        T.wgmma_gemm(
            held.Sb, room.ks[s, :, :], held.U, transpose_B=True, clear_accum=True, policy=ROWS
        )
        for x, y in T.Parallel(HALF, K):
            held.S[x, y] *= held.decay[0]
        if store:
            stage_state(held.Sf, panels.ss, tx)
            T.mbarrier_arrive(ring.staged[0])
        for x, y in T.Parallel(HALF, C):
            held.Xb[x, y] = held.Xf[y, x] * held.scaled[x, y]
        T.wait_wgmma(0)
        for x, y in T.Parallel(HALF, C):
            held.lost[x, y] = room.lost[b, y]
        for x, y in T.Parallel(HALF, C):
            held.gamma[x, y] = room.ein[b, y]
        T.sync_warp()
        for x, y in T.Parallel(HALF, C):
            held.U[x, y] = product(held.U[x, y], held.r[x, y])
        for x, y in T.Parallel(HALF, C):
            held.Ub[x, y] = held.U[x, y] + held.W[x, y]
        T.wgmma_gemm(held.Ub, room.as_[s, :, :], held.U, clear_accum=True, policy=ROWS)
        T.wgmma_gemm(held.Xb, room.qs[s, :, :], held.S, policy=ROWS)
        T.wait_wgmma(1)
        for x, y in T.Parallel(HALF, C):
            held.U[x, y] += held.Ub[x, y] * held.lost[x, y]
        for x, y in T.Parallel(HALF, C):
            held.Wd[x, y] = held.U[x, y] * held.gamma[x, y]
        T.wgmma_gemm(held.Wd, room.ks[s, :, :], held.S, policy=ROWS)
        if store:
            for x, y in T.Parallel(HALF, C):
                held.Of[y, x] = held.U[x, y]
        begin(held, room, ring, following, tx)  # needs no state
        if store:
            T.mbarrier_wait_parity(ring.stored[1], j % 2 ^ 1)
            stage_rows(held.Of, panels.os_, tx)
            T.mbarrier_arrive(ring.staged[1])
            T.mbarrier_wait_parity(ring.stored[0], j % 2)
        T.wait_wgmma(1)
        T.mbarrier_arrive(ring.empty[s])
        T.mbarrier_arrive(ring.spent[b])

    return begin, step


def one_of_two(stages, store):
    """The macros `step`, and `finish`, which sends the rows of a walk's last chunk."""

    @T.macro
    def send(panels, out, spot, slot, row, states, rows, tx):
        """A warpgroup's half of a state, and of the rows before it, if there are such."""
        if tx < 128:
            if states:
                send_state(panels.ss, out.dleaving, slot, spot.h, 0, 0)
            if rows > 0:
                send_rows(panels.os_, out.dv, row, spot.at[END], spot.h, 0, 0, tx, 128)
        else:
            if states:
                send_state(panels.ss, out.dleaving, slot, spot.h, HALF, 1)
            if rows > 0:
                send_rows(panels.os_, out.dv, row, spot.at[END], spot.h, HALF, 1, tx, 128)

    @T.macro
    def step(held, room, ring, panels, out, spot, j, i, slot, row, tx):
        """The j-th chunk of a CTA and the i-th of a walk; `row` is where the rows before it begin."""
        s = j % stages
        b = j % 2
        T.mbarrier_wait_parity(ring.full[s], (j // stages) % 2)
        decay = T.exp2(room.gs[s, C - 1])
        T.copy(held.S, held.Sb)
        if store:
            T.copy(held.S, held.Sf)
        for x, y in T.Parallel(2 * HALF, K):
            held.S[x, y] *= decay
        T.wgmma_gemm(
            held.Sb, room.ks[s, :, :], held.U, transpose_B=True, clear_accum=True, policy=ROWS
        )
        if store:
            T.tma_store_wait()
            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
            stage_state(held.Sf, panels.ss, tx)
            if i > 0:
                stage_rows(held.Of, panels.os_, tx)
            T.call_extern("handle", "gdn::fence_shared")
            T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
            send(panels, out, spot, slot, row, True, i, tx)
        load_transposed(room.xs, (s * 2 + tx // 128) * C, held.Xf, tx)
        for x, y in T.Parallel(2 * HALF, C):
            held.Xa[x, y] = held.Xf[y, x]
        T.mbarrier_wait_parity(ring.ready[b], (j // 2) % 2)
        T.wgmma_gemm(
            held.Xa, room.ps[b * C : (b + 1) * C, :], held.W, clear_accum=True, policy=ROWS
        )
        T.wait_wgmma(1)
        for x, y in T.Parallel(2 * HALF, C):
            held.U[x, y] *= room.eout[b, y]
        T.wait_wgmma(0)
        for x, y in T.Parallel(2 * HALF, C):
            held.Ub[x, y] = held.U[x, y] + held.W[x, y]
        T.wgmma_gemm(held.Ub, room.as_[s, :, :], held.U, clear_accum=True, policy=ROWS)
        for x, y in T.Parallel(2 * HALF, C):
            held.Xb[x, y] = held.Xf[y, x] * room.eq[b, y]
        T.wgmma_gemm(held.Xb, room.qs[s, :, :], held.S, policy=ROWS)
        T.wait_wgmma(1)
        for x, y in T.Parallel(2 * HALF, C):
            held.U[x, y] += held.Ub[x, y] * room.lost[b, y]
        for x, y in T.Parallel(2 * HALF, C):
            held.Wd[x, y] = held.U[x, y] * room.ein[b, y]
        T.wgmma_gemm(held.Wd, room.ks[s, :, :], held.S, policy=ROWS)
        if store:
            for x, y in T.Parallel(2 * HALF, C):
                held.Of[y, x] = held.U[x, y]
        T.wait_wgmma(0)
        T.mbarrier_arrive(ring.empty[s])
        T.mbarrier_arrive(ring.spent[b])

    @T.macro
    def finish(held, panels, out, spot, row, tx):
        T.tma_store_wait()
        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
        stage_rows(held.Of, panels.os_, tx)
        T.call_extern("handle", "gdn::fence_shared")
        T.call_extern("handle", "gdn::wait_named", tx // 128 + 1)
        send(panels, out, spot, 0, row, False, 1, tx)
        T.tma_store_wait()

    return step, finish
