"""The torch engine: Gated DeltaNet in chunks of 64 tokens, with an explicit backward, vectorised over chunks and heads.

Per chunk and value head, G = inclusive cumsum of g, gamma = e^G, r = e^(G_C - G), D_ij = e^(G_i - G_j) for i
>= j, b = beta,
s = scale (the WY form of Yang et al., arXiv 2412.06464; every factor is <= 1, so strong decay cannot overflow):

    KKD = stril(K K^T * D)     A = (I + b KKD)^-1     u = A (b V)     w = A (b gamma K)     P = s tril(Q K^T * D)
    Vd = u - w S               O = s gamma (Q S) + P Vd               S' = gamma_C S + (r K)^T Vd

Only the last line depends on the state, so summarising a stretch (S_ext, and M by running K columns of the
identity) walks that
line alone. The backward walks the gradient of the state in reverse,

    dVd = P^T dO + (r K) dS'   dS = gamma_C dS' + (s gamma Q)^T dO - w^T dVd

and everything else is parallel over chunks: R = b (V - gamma K S) is what A was solved against, so with dR =
A^T dVd the gradient of
the triangular system is dL = -stril(dR Vd^T), no inverse is differentiated, and beta = 0 needs no care. The
gradient of the gates
is pairwise (row sums minus column sums of E = dP * P + dKKD * KKD), which stays exact under strong decay.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import CHUNK, ChunkLayout
from ..scan import Summary


class Terms(NamedTuple):
    """What a chunk needs besides the state. Leading dimensions [n, Hv] (n chunks) unless noted; C = 64."""

    q: Tensor  # [n, Hv, C, K]
    k: Tensor  # [n, Hv, C, K]
    v: Tensor  # [n, Hv, C, V]
    beta: Tensor  # [n, Hv, C, 1]
    gamma: Tensor  # [n, Hv, C, 1]
    rest: Tensor  # [n, Hv, C, 1], decay from a token to the end of its chunk
    gamma_C: Tensor  # [n, Hv, 1, 1]
    D: Tensor  # [n, Hv, C, C]
    KKD: Tensor  # [n, Hv, C, C]
    A: Tensor  # [n, Hv, C, C]
    u: Tensor  # [n, Hv, C, V]
    w: Tensor  # [n, Hv, C, K]
    P: Tensor  # [n, Hv, C, C]
    q_in: Tensor  # [n, Hv, C, K], scale * gamma * q
    k_out: Tensor  # [n, Hv, C, K], rest * k
    scale: float
    groups: int  # value heads a key head


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, layout: ChunkLayout
) -> Terms:
    """Everything of the chunks that no state enters; inputs as in the public function, [B, T, H, ...]."""
    dtype = compute_dtype(q.dtype)
    groups = v.shape[2] // q.shape[2]

    def heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
        return layout.to_chunks(x.to(dtype)).transpose(1, 2).contiguous()

    q, k, v = (heads_first(x, dtype) for x in (q, k, v))
    beta = heads_first(beta, dtype).unsqueeze(-1)
    G = heads_first(g, torch.float64).cumsum(-1)  # [n, Hv, C]
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    D = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill_(upper, float("-inf")).to(dtype).exp_()
    gamma = G.to(dtype).exp().unsqueeze(-1)
    rest = (G[..., -1:] - G).to(dtype).exp_().unsqueeze(-1)

    KK = torch.matmul(k, k.mT).repeat_interleave(groups, 1)
    QK = torch.matmul(q, k.mT).repeat_interleave(groups, 1)
    q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    KKD = KK.mul_(D).tril_(-1)
    eye = torch.eye(CHUNK, dtype=dtype, device=q.device).expand_as(KKD)
    A = torch.linalg.solve_triangular(beta * KKD, eye, upper=False, unitriangular=True)
    return Terms(
        q=q,
        k=k,
        v=v,
        beta=beta,
        gamma=gamma,
        rest=rest,
        gamma_C=gamma[:, :, -1:],
        D=D,
        KKD=KKD,
        A=A,
        u=torch.matmul(A, beta * v),
        w=torch.matmul(A, beta * gamma * k),
        P=QK.mul_(D).mul_(scale),
        q_in=scale * gamma * q,
        k_out=rest * k,
        scale=scale,
        groups=groups,
    )


def final_state(terms: Terms, layout: ChunkLayout, h0: Tensor, first: int, last: int) -> Tensor:
    """State [last - first, Hv, K, V] after the sequences at positions [first, last) that start from ``h0``."""
    S = h0.clone()
    for chunks, active in layout.steps(first, last):
        head = S[:active]
        Vd = terms.u[chunks] - torch.matmul(terms.w[chunks], head)
        S[:active] = terms.gamma_C[chunks] * head + torch.matmul(terms.k_out[chunks].mT, Vd)
    return S


def transition_of(terms: Terms, layout: ChunkLayout, first: int, last: int) -> Tensor:
    """M [last - first, Hv, K, K] of the sequences at positions [first, last)."""
    Hv, K = terms.k.shape[1], terms.k.shape[-1]
    M = torch.eye(K, dtype=terms.k.dtype, device=terms.k.device).repeat(last - first, Hv, 1, 1)
    for chunks, active in layout.steps(first, last):
        head = M[:active]
        M[:active] = terms.gamma_C[chunks] * head - torch.matmul(
            terms.k_out[chunks].mT, torch.matmul(terms.w[chunks], head)
        )
    return M


def forward(terms: Terms, layout: ChunkLayout, h0: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, Hv, V] and final states [N, Hv, K, V] of all sequences; states in the order of
    ``layout.order``."""
    S = h0.clone()
    o, Vd = torch.empty_like(terms.v), torch.empty_like(terms.v)
    for chunks, active in layout.steps():
        head = S[:active]
        Vd[chunks] = terms.u[chunks] - torch.matmul(terms.w[chunks], head)
        o[chunks] = torch.matmul(terms.q_in[chunks], head)
        S[:active] = terms.gamma_C[chunks] * head + torch.matmul(terms.k_out[chunks].mT, Vd[chunks])
    o += torch.matmul(terms.P, Vd)
    return layout.from_chunks(o.transpose(1, 2)), S


def gradient_of_state(
    terms: Terms, layout: ChunkLayout, dO: Tensor, dht: Tensor, first: int, last: int
) -> Tensor:
    """Gradient [last - first, Hv, K, V] of the initial states, from dO [n, Hv, C, V] and the final states' ``dht``."""
    dS = dht.clone()
    for chunks, active in reversed(layout.steps(first, last)):
        head = dS[:active]
        dVd = torch.matmul(terms.P[chunks].mT, dO[chunks]) + torch.matmul(terms.k_out[chunks], head)
        dS[:active] = (
            terms.gamma_C[chunks] * head
            + torch.matmul(terms.q_in[chunks].mT, dO[chunks])
            - torch.matmul(terms.w[chunks].mT, dVd)
        )
    return dS


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    dh0: Tensor


def backward(terms: Terms, layout: ChunkLayout, h0: Tensor, dO: Tensor, dht: Tensor) -> Gradients:
    """All gradients, [B, T, H, ...] in the compute dtype; dO [n, Hv, C, V]; h0, dht and dh0 in the order of
    the layout."""
    t = terms
    states = t.v.new_empty(*t.v.shape[:2], t.k.shape[-1], t.v.shape[-1])  # [n, Hv, K, V]
    dstates = torch.empty_like(states)
    Vd = torch.empty_like(t.v)
    S = h0.clone()
    for chunks, active in layout.steps():
        states[chunks] = S[:active]
        Vd[chunks] = t.u[chunks] - torch.matmul(t.w[chunks], states[chunks])
        S[:active] = t.gamma_C[chunks] * states[chunks] + torch.matmul(
            t.k_out[chunks].mT, Vd[chunks]
        )
    dVd = torch.empty_like(Vd)
    dS = dht.clone()
    for chunks, active in reversed(layout.steps()):
        head = dstates[chunks] = dS[:active]
        dVd[chunks] = torch.matmul(t.P[chunks].mT, dO[chunks]) + torch.matmul(t.k_out[chunks], head)
        dS[:active] = (
            t.gamma_C[chunks] * head
            + torch.matmul(t.q_in[chunks].mT, dO[chunks])
            - torch.matmul(t.w[chunks].mT, dVd[chunks])
        )

    KS = torch.matmul(t.k, states)
    dR = torch.matmul(t.A.mT, dVd)
    dL = torch.matmul(dR, Vd.mT).neg_().tril_(-1)
    dW = t.beta * dR
    dbeta = (dR * (t.v - t.gamma * KS)).sum(-1) + (dL * t.KKD).sum(-1)
    dKKD = t.beta * dL
    dP = torch.matmul(dO, Vd.mT)
    dKK, dQK = dKKD * t.D, dP * t.D * t.scale
    dK_out = t.rest * torch.matmul(Vd, dstates.mT)
    dk = (
        dK_out
        - torch.matmul(t.gamma * dW, states.mT)
        + torch.matmul(dKK + dKK.mT, t.k)
        + torch.matmul(dQK.mT, t.q)
    )
    dq_in = t.gamma * t.scale * torch.matmul(dO, states.mT)
    dq = dq_in + torch.matmul(dQK, t.k)

    # What a pair of tokens adds to one gate it takes from another: summed in fp64, it cancels exactly.
    wide = torch.float64
    E = (dP * t.P + dKKD * t.KKD).tril_(-1)
    out = (dK_out * t.k).sum(-1).to(wide)
    dG = E.sum(-1, dtype=wide) - E.sum(-2, dtype=wide) - out
    dG += (dq_in * t.q).sum(-1) - (t.gamma * dW * KS).sum(-1)
    dG[..., -1] += out.sum(-1) + t.gamma_C[..., 0, 0] * (dstates * states).sum((-1, -2))
    dg = dG.flip(-1).cumsum(-1).flip(-1).to(t.v.dtype)

    def tokens_first(x: Tensor) -> Tensor:
        return layout.from_chunks(x.transpose(1, 2).contiguous())

    def key_heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, t.groups)).sum(2)

    return Gradients(
        dq=tokens_first(key_heads(dq)),
        dk=tokens_first(key_heads(dk)),
        dv=tokens_first(dW),
        dg=tokens_first(dg),
        dbeta=tokens_first(dbeta),
        dh0=dS,
    )


class TorchRun:
    """One call of the operator on this engine, in the steps of sharded.py; states [n, Hv, K, V] in the compute dtype,
    in the sequences' own order.

    ``left`` and ``right`` say how many leading sequences receive their state late, and how many trailing ones pass
    theirs on: 0, 1 or all. ``inputs``, ``kept`` and ``plan`` are what the forward hands to the backward: here the first
    alone, the terms are made again.
    """

    kept: tuple[Tensor, ...] = ()
    plan: Any = None

    def __init__(self, inputs: Sequence[Tensor], scale: float, layout: ChunkLayout):
        self.inputs = q, k, v, g, beta = inputs
        self._terms = prepare(q, k, v, g, beta, scale, layout)
        self._layout, self._dtype = layout, v.dtype
        self.num_sequences = layout.num_sequences

    def some_states(self, count: int) -> Tensor:
        """Zeros [count, Hv, K, V]."""
        return self.room(count).zero_()

    def room(self, count: int) -> Tensor:
        """For states [count, Hv, K, V]; nothing is written there yet."""
        terms = self._terms
        return terms.v.new_empty(count, terms.v.shape[1], terms.k.shape[3], terms.v.shape[3])

    def open(self, h0: Tensor | None, left: int, right: int, *, summarise: bool) -> None:
        """Start the forward from the states ``h0`` that are known: zero (None: all) where they come late. Without
        ``summarise`` nobody will ask for :meth:`leaving`."""
        self._h0 = self.some_states(self.num_sequences) if h0 is None else h0
        self._left, self._right = left, right

    def leaving(self, *, transition: bool) -> Summary:
        """Summary of the trailing sequences."""
        span = self._positions(self.num_sequences - self._right, self._right)
        S = final_state(self._terms, self._layout, self._h0[-self._right :], *span)
        M = transition_of(self._terms, self._layout, *span) if transition else None
        return Summary(M, S)

    def leaving_state(self, incoming: Tensor | None) -> Tensor | None:
        """State of the trailing sequences from the late states of the leading ones, if :meth:`close` would not have it
        as soon: here it has."""
        return None

    def meanwhile(self) -> None:
        """What :meth:`close` can do before late states come: nothing on this engine."""

    def close(self, incoming: Tensor | None, *, final: bool) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, Hv, V] in the dtype of v, and final states, from the late states of the leading sequences."""
        h0 = self._complete(self._h0, slice(0, self._left), incoming)
        o, S = forward(self._terms, self._layout, self._ordered(h0))
        return o.to(self._dtype), S.index_select(0, self._layout.position_index)

    def open_backward(
        self, h0: Tensor | None, do: Tensor, dht: Tensor | None, left: int, right: int
    ) -> None:
        """Start the backward: ``h0`` are the true states, zero where there are none; ``dht`` the gradients of the
        final ones as far as known."""
        rows = self._layout.to_chunks(do.to(self._terms.v.dtype))
        self._dO = rows.transpose(1, 2).contiguous()  # [n, Hv, C, V]
        known = 0 if h0 is None else len(h0)
        if h0 is None or known < self.num_sequences:
            h0, given = self.some_states(self.num_sequences), h0
            if given is not None:
                h0[:known] = given
        self._h0 = h0
        self._dht = self.some_states(self.num_sequences) if dht is None else dht
        self._left, self._right = left, right

    def entering(self) -> Tensor:
        """dS_ext: gradient of the initial states of the leading sequences while the late gradients are zero."""
        return gradient_of_state(
            self._terms,
            self._layout,
            self._dO,
            self._dht[: self._left],
            *self._positions(0, self._left),
        )

    def entering_gradient(self, incoming: Tensor | None) -> Tensor | None:
        """The true gradient of those states, if :meth:`close_backward` would not have it as soon: here it has."""
        return None

    def begin_replay(self, *, at_once: bool) -> None:
        """What :meth:`replay` does, where it runs beside :meth:`entering`: nothing on this engine."""

    def replay(self, *, at_once: bool) -> None:
        """What the backward can do before late gradients come: nothing on this engine."""

    def close_backward(self, incoming: Tensor | None) -> Gradients:
        """All gradients, from the late gradients of the trailing sequences' final states."""
        late = slice(self.num_sequences - self._right, self.num_sequences)
        dht = self._complete(self._dht, late, incoming)
        out = backward(
            self._terms, self._layout, self._ordered(self._h0), self._dO, self._ordered(dht)
        )
        return out._replace(dh0=out.dh0.index_select(0, self._layout.position_index))

    def _complete(self, states: Tensor, place: slice, late: Tensor | None) -> Tensor:
        if late is None:
            return states
        states = states.clone()
        states[place] = late
        return states

    def _ordered(self, states: Tensor) -> Tensor:
        return states.index_select(0, self._layout.order_index)

    def _positions(self, first: int, count: int) -> tuple[int, int]:
        """Where sequences [first, first + count) stand in the layout: all of them, or one."""
        position = self._layout.order.index(first)
        return position, position + count
