"""What the warps beside the chain of recurrence_alone.py do: outputs, their stores, and gate vectors.

Macros; their text is part of its roles' branches.

    outputs     two warpgroups, chunks in turn: P_ij = scale exp(G_i - G_j) q_i k_j for j <= i, and
                O = scale gamma (Q S) + P D of the S and D that the chain left
    storer      a warp: bulk copies of them
    vectors     two warps: what scales U and D, and the decay of a chunk
"""

import tilelang.language as T

from .common import CHUNK
from .recurrence_kept import rows_of_values
from .recurrence_roles import pair_scaler

C, HALF = CHUNK, 64
ROWS = T.GemmWarpPolicy.FullRow


def outputs(*, stages, normalize, keep=False):
    """The loop of warpgroup `w` of two, thread `t` of 128.

    Q K^T begins when D of the chunk before is there: products of outputs then run while the chain
    computes on registers, not beside its own."""
    scale_pairs = pair_scaler(normalize=normalize)

    @T.macro
    def run(w, qs, ks, as_, ss, os_, gs, rs, qn, P, Pb, D, O, Ob, full, stateful, stateless, valued,
            staged, stored, empty, n, t, scale, vs, X):  # fmt: skip
        for i in T.serial((n + 1 - w) // 2):
            c = 2 * i + w
            s = c % stages
            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
            for x, y in T.Parallel(C, C):
                D[x, y] = T.exp2(T.min(gs[s, x] - gs[s, y], 0.0))
            scale_pairs(D, qn, rs, s, scale)
            if w == 1 or i > 0:
                T.mbarrier_wait_parity(valued[1 - w], (i + w) % 2 ^ 1)
            T.wgmma_gemm(
                qs[s, :, :], ks[s, :, :], P, transpose_B=True, clear_accum=True, policy=ROWS
            )
            T.mbarrier_wait_parity(stateful[w], i % 2)
            T.call_extern("handle", "gdn::fence_shared")
            T.wgmma_gemm(qs[s, :, :], ss, O, transpose_B=True, clear_accum=True, policy=ROWS)
            T.wait_wgmma(1)
            for x, y in T.Parallel(C, C):
                P[x, y] *= D[x, y]
            T.copy(P, Pb)
            T.wait_wgmma(0)
            if t % 32 == 0:
                T.mbarrier_arrive(stateless[0])
            if normalize:
                for x, y in T.Parallel(C, HALF):
                    O[x, y] *= T.exp2(gs[s, x]) * (scale * qn[s, x])
            else:
                for x, y in T.Parallel(C, HALF):
                    O[x, y] *= T.exp2(gs[s, x]) * scale
            T.mbarrier_wait_parity(valued[w], i % 2)
            T.call_extern("handle", "gdn::fence_shared")
            T.wgmma_gemm(Pb, as_[s, :, :], O, transpose_B=True, policy=ROWS)
            if keep:
                rows_of_values(as_, vs, X, s, t)
            T.wait_wgmma(0)
            if t % 32 == 0:
                T.mbarrier_arrive(empty[s])
            T.copy(O, Ob)
            T.mbarrier_wait_parity(stored[1 - w], (i + w) % 2 ^ 1)
            T.copy(Ob, os_)
            T.call_extern("handle", "gdn::fence_shared")
            T.call_extern("handle", "__syncwarp")
            if t % 32 == 0:
                T.mbarrier_arrive(staged[0])

    return run


@T.macro
def store_tail(w, os_, o, first, end, h, column, t):
    """The rows of a document's last chunk that are there, by the warpgroup that made them."""
    T.call_extern("handle", "gdn::wait_named", 1 + w)
    for x in T.serial(C // 16):
        r = x * 16 + t // 8
        if first + r < end:
            for y in T.vectorized(8):
                o[first + r, h, column + t % 8 * 8 + y] = os_[r, t % 8 * 8 + y]


@T.macro
def storer(os_, o, row, chunks, h, column, staged, stored):
    """The loop of the warp that stores `chunks` chunks of outputs."""
    for c in T.serial(chunks):
        T.mbarrier_wait_parity(staged[0], c % 2)
        T.tma_copy(os_, o[row + c * C : row + c * C + C, h, column : column + HALF])
        T.tma_store_wait()
        T.mbarrier_arrive(stored[c % 2])


def vectors(*, stages, normalize):
    """The loop of two warps, thread `t` of 64."""

    @T.macro
    def run(gs, rs, ein, eout, es, full, scaled, n, t):
        for c in T.serial(n):
            s = c % stages
            T.mbarrier_wait_parity(full[s], (c // stages) % 2)
            G = gs[s, t]
            if t == C - 1:
                es[s] = T.exp2(G)
            if normalize:
                ein[s, t] = T.exp2(G) * rs[s, t]
                eout[s, t] = T.exp2(gs[s, C - 1] - G) * rs[s, t]
            else:
                ein[s, t] = T.exp2(G)
                eout[s, t] = T.exp2(gs[s, C - 1] - G)
            T.call_extern("handle", "__syncwarp")
            if t % 32 == 0:
                T.mbarrier_arrive(scaled[s])

    return run
