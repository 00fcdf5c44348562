"""The route of the backward kernels in PyTorch: same steps, same roundings, any float dtype.

    prepare      gated inverse `a` and cumulative gates of a chunk
    chains       S replayed and dS walked back; every stored tensor rounded where the kernels store it
    gradients    chunk by chunk, solve-gradient form, dq and dk added up over the value heads

With `round_to` the operands of every product are rounded as the kernels round them; without it the
mirror is exact algebra, to be held against autograd in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import CHUNK, Inputs, l2norm

NAMES = ("dq", "dk", "dv", "dg", "dbeta", "dh0")


@dataclass
class Cotangents:
    do: Tensor  # [1, L, Hv, V]
    dfinal: Tensor | None = None  # [N, Hv, K, V]


def draw_cotangents(x: Inputs, *, final: bool = True, seed: int = 1) -> Cotangents:
    rng = torch.Generator(device=x.v.device).manual_seed(seed)
    do = torch.randn(x.v.shape, generator=rng, device=x.v.device).to(x.v.dtype)
    shape = (len(x.lengths), x.v.shape[2], x.k.shape[3], x.v.shape[3])
    dfinal = torch.randn(shape, generator=rng, device=x.v.device) if final else None
    return Cotangents(do, dfinal)


def recurrent_gradients(x: Inputs, y: Cotangents, *, scale=128**-0.5, normalize=False):
    """dq, dk, dv, dg, dbeta, dh0 by autograd through the float64 token recurrence, token by token."""
    inputs = [t.detach().double().requires_grad_() for t in (x.q, x.k, x.v, x.g, x.beta)]
    q, k, v, g, beta = (t[0] for t in inputs)
    if normalize:
        q, k = l2norm(q), l2norm(k)
    N, Hv, K, V = len(x.lengths), v.shape[1], k.shape[2], v.shape[2]
    ratio = Hv // k.shape[1]
    q, k = q.repeat_interleave(ratio, 1), k.repeat_interleave(ratio, 1)
    h0 = torch.zeros(N, Hv, K, V, dtype=torch.float64, device=v.device)
    if x.initial is not None:
        h0 = x.initial.detach().double().clone()
    h0.requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=v.device)
    start = 0
    for i, n in enumerate(x.lengths):
        S = h0[i]
        for t in range(start, start + n):
            S = S * g[t].exp()[:, None, None]
            error = v[t] - torch.einsum("hk,hkv->hv", k[t], S)
            S = S + torch.einsum("hk,hv->hkv", beta[t][:, None] * k[t], error)
            o = scale * torch.einsum("hk,hkv->hv", q[t], S)
            loss = loss + (o * y.do[0, t].double()).sum()
        if y.dfinal is not None:
            loss = loss + (S * y.dfinal[i].double()).sum()
        start += n
    return torch.autograd.grad(loss, [*inputs, h0])


def mirror_gradients(x: Inputs, y: Cotangents, *, scale=128**-0.5, normalize=False,
                     dtype=torch.float64, round_to=None):  # fmt: skip
    """dq, dk, dv, dg, dbeta, dh0 the kernels' way. dbeta of tokens with beta == 0 takes their second
    route (backward_beta.py)."""

    def rd(t):
        return t if round_to is None else t.to(round_to).to(dtype)

    q, k, v, g, beta, do = (t[0].to(dtype) for t in (x.q, x.k, x.v, x.g, x.beta, y.do))
    ones = torch.ones(q.shape[:2], dtype=dtype, device=q.device)
    rq, rk = ones, ones
    if normalize:
        rq = torch.rsqrt(q.square().sum(-1) + 1e-6)
        rk = torch.rsqrt(k.square().sum(-1) + 1e-6)
    K = k.shape[2]
    Hv, V = v.shape[1:]
    ratio = Hv // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dg, dbeta = torch.zeros_like(g), torch.zeros_like(beta)
    dh0 = torch.zeros(len(x.lengths), Hv, K, V, dtype=dtype, device=q.device)
    start = 0
    for i, n in enumerate(x.lengths):
        for h in range(Hv):
            hk = h // ratio
            S = torch.zeros(K, V, dtype=dtype, device=q.device)
            if x.initial is not None:
                S = x.initial[i, h].to(dtype)
            dS = torch.zeros_like(S)
            if y.dfinal is not None:
                dS = y.dfinal[i, h].to(dtype)
            spans = [slice(start + c, start + min(c + CHUNK, n)) for c in range(0, n, CHUNK)]
            saved = []
            for s in spans:
                c = _chunk(q[s, hk], k[s, hk], g[s, h], beta[s, h], rq[s, hk], rk[s, hk], scale, rd)
                U = k[s, hk] @ rd(S)
                W = rd(v[s, h] - (c.gamma * c.rk)[:, None] * U)
                Vd = c.a @ W
                saved.append((c, rd(S), rd(Vd)))
                S = c.decay * S + k[s, hk].mT @ rd((c.rest * c.rk)[:, None] * Vd)
            for s, (c, Sr, Vd) in zip(reversed(spans), reversed(saved), strict=True):
                Q, Kc, dO = q[s, hk], k[s, hk], do[s, h]
                dSr = rd(dS)
                Vn = rd((c.rest * c.rk)[:, None] * (Kc @ dSr) + rd(c.P).mT @ dO)
                dVf = c.a.mT @ Vn
                dV = rd(dVf)
                dv[s, h] = dV
                dS = (c.decay * dS + Q.mT @ rd((scale * c.gamma * c.rq)[:, None] * dO)
                      - Kc.mT @ rd((c.gamma * c.rk)[:, None] * dVf))  # fmt: skip
                M = dV @ Vd.mT
                dP = (dO @ Vd.mT * (scale * c.rq[:, None] * c.rk) * c.D).tril()
                N = (M * (c.rk[:, None] * c.rk) * c.D).tril(-1)
                E = (dP * c.QK - N * c.KK).tril(-1)
                Iq = (scale * c.gamma * c.rq)[:, None] * (dO @ Sr.mT)
                Iv = (c.gamma * c.rk)[:, None] * (dV @ Sr.mT)
                Id = (c.rest * c.rk)[:, None] * (Vd @ dSr.mT)
                dq[s, hk] += Iq + rd(dP) @ Kc
                dk[s, hk] += Id - Iv + rd(dP).mT @ Q - rd(N) @ Kc - rd(N).mT @ Kc
                dG = (Q * Iq).sum(-1) - (Kc * (Iv + Id)).sum(-1) + E.sum(1) - E.sum(0)
                dG[-1] += (Kc * Id).sum() + c.decay * (Sr * dSr).sum()
                dg[s, h] = dG.flip(0).cumsum(0).flip(0)
                b = beta[s, h]
                direct = _dbeta(c, Kc, v[s, h], dO, Sr, dSr, Vd, dV)
                dbeta[s, h] = torch.where(
                    b == 0, direct, M.diagonal() / torch.where(b == 0, 1, b) ** 2
                )
            dh0[i, h] = dS
        start += n
    if normalize:
        dq -= q * (rq**2 * (q * dq).sum(-1))[..., None]
        dk -= k * (rk**2 * (k * dk).sum(-1))[..., None]
    return (*(t[None] for t in (dq, dk, dv, dg, dbeta)), dh0)


@dataclass
class _Chunk:
    a: Tensor
    P: Tensor
    D: Tensor
    QK: Tensor  # raw q and k: the norms are factors elsewhere
    KK: Tensor
    gamma: Tensor
    rest: Tensor
    decay: Tensor
    rq: Tensor
    rk: Tensor


def _chunk(q, k, g, beta, rq, rk, scale, rd) -> _Chunk:
    G = g.cumsum(0)
    D = (G[:, None] - G).tril().exp().tril()
    QK, KK = q @ k.mT, k @ k.mT
    eye = torch.eye(len(g), dtype=q.dtype, device=q.device)
    L = (beta[:, None] * rk[:, None] * rk * KK).tril(-1)
    inverse = torch.linalg.solve_triangular(eye + L, eye, upper=False, unitriangular=True)
    a = rd(D * inverse * beta).tril(-1) + torch.diag(beta)  # its diagonal's rounding is given back
    return _Chunk(
        a, (scale * rq[:, None] * rk * D * QK).tril(), D, QK, KK, G.exp(),
        (G[-1] - G).exp(), G[-1].exp(), rq, rk,
    )  # fmt: skip


def _dbeta(c, k, v, dO, S, dS, Vd, dV):
    """<dR_i, e_i>: e the error that beta multiplies, dR the gradient of beta e; no division."""
    KKD = (c.rk[:, None] * c.rk * c.D * c.KK).tril(-1)
    e = v - (c.gamma * c.rk)[:, None] * (k @ S) - KKD @ Vd
    dR = (c.rest * c.rk)[:, None] * (k @ dS) + c.P.mT @ dO - KKD.mT @ dV
    return (dR * e).sum(-1)
