"""The token recurrence of Gated DeltaNet, as the oracle that everything else is measured against.

Yang et al., Gated Delta Networks (arXiv 2412.06464), per value head, state S [K, V], a_t = exp(g_t):

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t

One Python step a token, differentiable by autograd, any dtype: use it in float64.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, Hv, V] and final states [N, Hv, K, V] (N = B, or the documents of ``cu_seqlens`` with B = 1).

    Shapes as in :func:`cp_gdn.chunk_gated_delta_rule`; computed in the dtype of ``q``.
    """
    B, T, Hk, K = q.shape
    Hv, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    if use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    q = q.repeat_interleave(Hv // Hk, 2)  # [B, T, Hv, K]
    k = k.repeat_interleave(Hv // Hk, 2)
    offsets = [0, T] if cu_seqlens is None else list(cu_seqlens)
    spans = [(b, low, high) for b in range(B) for low, high in itertools.pairwise(offsets)]
    outputs, finals = [], []
    for sequence, (b, low, high) in enumerate(spans):
        S = q.new_zeros(Hv, K, V) if initial_state is None else initial_state[sequence].to(q.dtype)
        for t in range(low, high):
            S = g[b, t].exp()[:, None, None] * S
            error = v[b, t] - torch.einsum("hkv,hk->hv", S, k[b, t])
            S = S + k[b, t, :, :, None] * (beta[b, t, :, None] * error)[:, None, :]
            outputs.append(scale * torch.einsum("hkv,hk->hv", S, q[b, t]))
        finals.append(S)
    return torch.stack(outputs).view(B, T, Hv, V), torch.stack(finals)
