"""The kernels' exact sequence of steps in plain PyTorch, with the roundings they make.

`operand` rounds what enters a product (bf16 in the kernels; the identity shows that the algebra is
exact). Chunk grids restart at documents, tails are padded with beta = g = 0, documents are cut into
segments, gates are truncated: everything that decides what is computed is here.
"""

from dataclasses import dataclass

import torch

from .reference import CHUNK, Inputs, l2norm

LOG2_NEGLIGIBLE = -24.0


@dataclass
class Chunk:
    q: torch.Tensor  # [Hv, C, K]
    k: torch.Tensor
    v: torch.Tensor  # [Hv, C, V]
    a: torch.Tensor  # [Hv, C, C]
    G: torch.Tensor  # [Hv, C] cumulative log gate
    rows: slice


def prepare(x: Inputs, document: int, operand, normalize: bool) -> list[Chunk]:
    begin, end = x.cu[document : document + 2].tolist()
    ratio = x.v.shape[2] // x.k.shape[2]
    chunks = []
    for start in range(begin, end, CHUNK):
        rows = slice(start, min(start + CHUNK, end))

        def tile(y, rows=rows):  # [C, H, ...] with zero rows after the end, as [H, C, ...]
            y = y[0, rows].to(x.q.dtype)
            y = torch.cat([y, y.new_zeros(CHUNK - y.shape[0], *y.shape[1:])])
            return y.transpose(0, 1)

        q, k = (tile(y).repeat_interleave(ratio, 0) for y in (x.q, x.k))
        if normalize:
            q, k = l2norm(q), l2norm(k)
        G = tile(x.g).cumsum(-1)
        beta = tile(x.beta)
        decay = (G[..., :, None] - G[..., None, :]).clamp_max(0).exp().tril()
        lower = (beta[..., None] * (k @ k.mT)).tril(-1)
        eye = torch.eye(CHUNK, dtype=k.dtype)
        inverse = torch.linalg.solve_triangular(eye + lower, eye.expand_as(lower), upper=False)
        a = operand(decay * inverse * beta[..., None, :])
        chunks.append(Chunk(q, k, tile(x.v), a, G, rows))
    return chunks


def step(chunk: Chunk, S, v, operand):
    """State and D = a (V - gamma K S) of a chunk; v is zero for the chain that carries M."""
    gamma, last = chunk.G.exp()[..., None], chunk.G[..., -1:]
    W = operand(v - gamma * (chunk.k @ operand(S)))
    D = chunk.a @ W
    kept = operand((last - chunk.G).exp()[..., None] * D)
    return last.exp()[..., None] * S + chunk.k.mT @ kept, D


def output(chunk: Chunk, S, D, scale, operand):
    decay = (chunk.G[..., :, None] - chunk.G[..., None, :]).clamp_max(0).exp().tril()
    P = operand(scale * (chunk.q @ chunk.k.mT) * decay)
    return scale * chunk.G.exp()[..., None] * (chunk.q @ operand(S)) + P @ operand(D)


def summary(chunks, S, operand, truncate):
    """(S_ext from the entering state S, M or None where it vanished), per head."""
    heads = S.shape[0]
    states, maps, live = S.clone(), torch.zeros(heads, S.shape[1], S.shape[1], dtype=S.dtype), []
    for h in range(heads):
        near, alive = len(chunks), True
        if truncate:
            total = 0.0
            for i, chunk in enumerate(reversed(chunks)):
                total += chunk.G[h, -1].item() * 1.4426950408889634
                if total < LOG2_NEGLIGIBLE:
                    near, alive = i + 1, False
                    break
        live.append(alive)
        s = S[h : h + 1] if near == len(chunks) else torch.zeros_like(S[h : h + 1])
        m = torch.eye(S.shape[1], dtype=S.dtype)[None]
        for chunk in chunks[len(chunks) - near :]:
            c = Chunk(
                *(y[h : h + 1] for y in (chunk.q, chunk.k, chunk.v, chunk.a, chunk.G)), chunk.rows
            )
            s, _ = step(c, s, c.v, operand)
            if alive:
                m, _ = step(c, m, torch.zeros_like(c.v), operand)
        states[h], maps[h] = s[0], m[0] if alive else 0
    return states, maps, live


def forward(x: Inputs, *, scale=128**-0.5, segment=None, truncate=False, normalize=False,
            operand=lambda y: y):  # fmt: skip
    """o [1, L, Hv, V] and final states [N, Hv, K, V], in the dtype of x.q."""
    Hv, K, V = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    o = torch.full(x.v.shape, torch.nan, dtype=x.q.dtype)
    final = torch.zeros(len(x.lengths), Hv, K, V, dtype=x.q.dtype)
    for document in range(len(x.lengths)):
        chunks = prepare(x, document, operand, normalize)
        length = segment or max(1, len(chunks))
        parts = [chunks[i : i + length] for i in range(0, len(chunks), length)] or [[]]
        S = final[document]
        if x.initial is not None:
            S = x.initial[document].to(S)
        entering = [S]
        for i, part in enumerate(parts[:-1]):  # summary, then the scan's step
            if i == 0:
                left, _, _ = summary(part, S, operand, truncate)
            else:
                ext, M, _ = summary(part, torch.zeros_like(S), operand, truncate)
                left = M @ entering[-1] + ext
            entering.append(left)
        for state, part in zip(entering, parts, strict=True):
            S = state
            for chunk in part:
                S_next, D = step(chunk, S, chunk.v, operand)
                n = chunk.rows.stop - chunk.rows.start
                o[0, chunk.rows] = output(chunk, S, D, scale, operand)[:, :n].transpose(0, 1)
                S = S_next
        final[document] = S
    return o, final
