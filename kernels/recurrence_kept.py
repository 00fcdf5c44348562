"""What recurrence_alone.py does besides where it keeps what the backward would replay.

The equations are those of the replay (backward_replay.py), and so are the bits:

    U = K S     W = V - gamma U     Vd = a W + (beta - diag a) W     S <- gamma_C S + K^T (r Vd)

The state that enters a chunk lies in shared memory as it is sent. Vd lies there with value columns as
rows; whoever multiplies by it leaves it with tokens as rows where the chunk's v lay, which the chain
has read, and the slot is free when it is sent. 768 bytes a token and value head are written more.

    rows_of_values    of the outputs' warpgroups: Vd with tokens as rows
    keepers           the warps beside the producer: one stores outputs and Vd, one states, and one
                      makes what scales U and Vd, and what rounding took from a's diagonal

Macros; their text is part of the roles' branches.
"""

import tilelang.language as T

from .common import CHUNK

C, HALF = CHUNK, 64


@T.macro
def rows_of_values(as_, vs, X, s, t):
    """Vd of slot s from where `a` lay to where v lay, by thread `t` of 128."""
    T.sync_warp()
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "tl::ptx_ldmatrix_x4_trans",
            T.access_ptr(
                as_[s, x * 16 + t % 32 // 16 * 8 + t % 8, t // 32 % 4 * 16 + t % 16 // 8 * 8], "r"
            ),
            T.access_ptr(X[x * 16 + t % 4 * 2, t // 32 * 16 + t % 32 // 4], "w"),
        )
    for x in T.unroll(4):
        T.call_extern(
            "handle",
            "gdn::store_matrix",
            T.access_ptr(vs[s * C + t // 32 * 16 + t % 16, x * 16 + t % 32 // 16 * 8], "r"),
            T.access_ptr(X[x * 16 + t % 4 * 2, t // 32 * 16 + t % 32 // 4], "r"),
        )
    T.sync_warp()


@T.macro
def storer(os_, vs, o, vd, row, chunks, slot, n, h, column, staged, stored, empty, stages):
    """The loop of the warp that stores Vd of `n` chunks, and outputs of `chunks`, which are full."""
    for c in T.serial(n):
        s = c % stages
        T.mbarrier_wait_parity(staged[0], c % 2)
        T.tma_copy(vs[s * C : s * C + C, :], vd[slot + c, h, :, column : column + HALF])
        if c < chunks:
            T.tma_copy(os_, o[row + c * C : row + c * C + C, h, column : column + HALF])
        T.tma_store_wait()
        T.mbarrier_arrive(stored[c % 2])
        T.mbarrier_arrive(empty[s])


@T.macro
def state_storer(ss, entering, slot, n, h, column, stateful, stateless):
    """The loop of the warp that stores the states."""
    for c in T.serial(n):
        T.mbarrier_wait_parity(stateful[c % 2], (c // 2) % 2)
        T.call_extern("handle", "gdn::fence_shared")
        T.tma_copy(ss, entering[slot + c, h, column : column + HALF, :])
        T.tma_store_wait()
        T.mbarrier_arrive(stateless[0])


def vectors(*, stages, normalize):
    """The loop of a warp, two tokens a lane `t`."""

    @T.macro
    def run(gs, rs, as_, beta, ein, eout, lost, es, full, scaled, row, end, h, n, t):
        b = T.alloc_local((2,), "float32")
        for c in T.serial(n):
            s = c % stages
            for x in T.unroll(2):
                b[x] = 0.0
                if row + c * C + x * 32 + t < end:
                    b[x] = T.cast(beta[row + c * C + x * 32 + t, h], "float32")
            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
            for x in T.unroll(2):
                i = x * 32 + t
                G = gs[s, i]
                lost[s, i] = b[x] - T.cast(as_[s, i, i], "float32")
                if normalize:
                    ein[s, i] = T.exp2(G) * rs[s, i]
                    eout[s, i] = T.exp2(gs[s, C - 1] - G) * rs[s, i]
                else:
                    ein[s, i] = T.exp2(G)
                    eout[s, i] = T.exp2(gs[s, C - 1] - G)
            if t == 31:
                es[s] = T.exp2(gs[s, C - 1])
            T.call_extern("handle", "__syncwarp")
            if t == 0:
                T.mbarrier_arrive(scaled[s])

    return run


def keepers(*, stages, normalize):
    """Threads `tx` 416 to 511 of a CTA."""
    make_vectors = vectors(stages=stages, normalize=normalize)

    @T.macro
    def run(as_, vs, ss, os_, gs, rs, ein, eout, es, lost, beta, o, entering, vd, full, scaled,
            empty, stateful, stateless, staged, stored, n, row, full_chunks, slot, end, h, column,
            tx):  # fmt: skip
        if tx < 448:
            storer(
                os_, vs, o, vd, row, full_chunks, slot, n, h, column, staged, stored, empty, stages
            )
        elif tx < 480:
            state_storer(ss, entering, slot, n, h, column, stateful, stateless)
        else:
            make_vectors(
                gs, rs, as_, beta, ein, eout, lost, es, full, scaled, row, end, h, n, tx - 480
            )

    return run
