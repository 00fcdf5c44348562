"""Heads of any size on kernels that take K = V = 128.

    S_t = e^{g_t} (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

A column of v meets its own column of S and no other, so a value head of n * 128 columns is n value
heads with the same keys, gate and write strength. Zero columns add nothing: those of q and k change
neither products nor norms and keep their rows of S zero, those of v keep theirs of S and o zero.
Scale is the caller's, who knows K. Everything is differentiable: gradients of the gates are summed
over the heads that share them, and those of zeros are dropped.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

DIM = 128  # columns of the kernels' heads
_WIDE = torch.complex128  # 16 bytes, what a thread of a GPU moves at a time


def parts(value_dim: int) -> int:
    """Heads of the kernels that hold a value head of ``value_dim`` columns."""
    return -(-value_dim // DIM)


def fit(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs of :func:`cp_gdn.chunk_gated_delta_rule` as heads of DIM columns, K <= DIM.

    With n = parts(V): q, k [B, T, Hk, DIM], v [B, T, Hv n, DIM], g, beta [B, T, Hv n], states
    [N, Hv n, DIM, DIM]. Value head h becomes the heads from h n on, so that all keep their key head.
    What has the right size is not copied, but for gates and states of heads that are taken apart.
    """
    n = parts(v.shape[3])
    q, k, v = _columns(q, DIM), _columns(k, DIM), _columns(v, n * DIM)
    if initial_state is not None:
        initial_state = _state(initial_state, DIM, n * DIM)
    if n > 1:
        v = v.unflatten(3, (n, DIM)).flatten(2, 3)  # [B, T, Hv * n, DIM]
        g, beta = (x.unsqueeze(3).expand(-1, -1, -1, n).flatten(2) for x in (g, beta))
        if initial_state is not None:  # [N, Hv * n, DIM, DIM]
            initial_state = initial_state.unflatten(3, (n, DIM)).transpose(2, 3).flatten(1, 2)
    return q, k, v, g, beta, initial_state


def restore(
    o: Tensor, final: Tensor | None, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, Hv, V] and states [N, Hv, K, V] of what the kernels return for :func:`fit`."""
    n = parts(value_dim)
    if n > 1:
        o = o.unflatten(2, (-1, n)).flatten(3)
        if final is not None:
            final = final.unflatten(1, (-1, n)).transpose(2, 3).flatten(3)
    if final is not None:
        final = _state(final, key_dim, value_dim)
    return _columns(o, value_dim), final


def _state(S: Tensor, rows: int, columns: int) -> Tensor:
    """``S`` [..., K, V] with rows and columns filled up with zeros or cut."""
    missing = rows - S.shape[-2], columns - S.shape[-1]
    return F.pad(S, (0, missing[1], 0, missing[0])) if any(missing) else S


def _columns(x: Tensor, count: int) -> Tensor:
    """``x`` with ``count`` columns: filled up with zeros or cut, then contiguous."""
    return x if x.shape[-1] == count else _Columns.apply(x, count)


class _Columns(torch.autograd.Function):
    """F.pad in moves of 16 bytes, which takes less than half of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = x.shape[-1]
        return _copied(x, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _copied(grads[0], ctx.count), None


def _copied(x: Tensor, count: int) -> Tensor:
    out = x.new_empty(*x.shape[:-1], count)
    whole = 16 // x.itemsize
    target = out
    if x.is_contiguous() and not any(n % whole for n in (x.shape[-1], count, x.storage_offset())):
        x, target = x.view(_WIDE), out.view(_WIDE)
    kept = min(x.shape[-1], target.shape[-1])
    target[..., :kept] = x[..., :kept]
    target[..., kept:] = 0
    return out
