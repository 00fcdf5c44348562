"""Attention of n queries to the m >= n keys that end with their own.

    o_t = sum_{s <= m - n + t} softmax_s(scale q_t . k_s) v_s

cuDNN's kernels, the fastest of PyTorch's on Hopper, and those for the CPU know whole rectangles and causal squares
only. So two calls: the m - n keys before the first query, which every query sees, and the n keys of the queries
themselves. Either gives an output and l = log sum_s exp(scale q . k_s), which join as

    l = log(e^l1 + e^l2)        o = e^(l1 - l) o1 + e^(l2 - l) o2

and the gradients of either part are what its kernel's backward makes of the joint o and l: P = exp(s - l) and
dS = P (dP - rowsum(dO o)) need no more of the other part (Dao, FlashAttention-2, arXiv 2307.08691).
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

# cuDNN sets up every new shape, 0.04 s a kernel on an H200. From so many products on (B Hq D times scores) it has made
# up for that in one forward and backward, against the flash kernels; causal squares of so many queries go to it padded.
_CUDNN_WORK = 2**43
_CUDNN_QUERIES = 1024

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, new_shape: bool) -> Tensor:
    """Queries [B, n, Hq, D] at the end of m >= n keys and values [B, m, Hkv, D]; [B, n, Hq, D].

    ``new_shape``: n and m are not those of the steps before, as with packed documents.
    """
    n, m, gqa = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    cudnn = q.is_cuda and _choose_cudnn(q, k, v, new_shape)
    if n == m and cudnn and new_shape:
        pad = (0, 0, 0, 0, 0, _padded(n) - n)
        q, k, v = (F.pad(x, pad) for x in (q, k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if gqa and q.is_cuda and q.element_size() > 2:
        # Wide dtypes run in the memory-efficient kernel, which wants as many key as query heads.
        group = q.shape[1] // k.shape[1]
        k, v, gqa = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), False
    if n == m:
        kernels = sdpa_kernel(_OTHERS) if q.is_cuda and not cudnn else nullcontext()
        with kernels:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    elif cudnn or not q.is_cuda:
        o = _TwoParts.apply(q, k, v, scale)
    else:
        corner = causal_lower_right(n, m)
        o = F.scaled_dot_product_attention(q, k, v, corner, scale=scale, enable_gqa=gqa)
    return o.transpose(1, 2)[:, :n]


_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _choose_cudnn(q: Tensor, k: Tensor, v: Tensor, new_shape: bool) -> bool:
    """Whether PyTorch would run the unmasked call in cuDNN, and the shape is worth setting up."""
    n, m = q.shape[1], k.shape[1]
    few = n < _CUDNN_QUERIES if n == m else q.numel() * (m - n / 2) < _CUDNN_WORK
    if new_shape and few:
        return False
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    choice = torch._fused_sdp_choice(
        q, k, v, None, 0.0, n == m, scale=None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _padded(n: int) -> int:
    """The next of 8 sizes to an octave: few shapes to set up, and a causal square ignores what follows its queries."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> list[Tensor]:
    """o, lse [B, Hq, n] and what the backward wants of the random numbers that no dropout drew."""
    if q.is_cuda:
        o, lse, _, _, _, _, *seed, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return [o, lse.view(q.shape[:3]), *seed]
    return list(aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale))


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    seed: tuple[Tensor, ...],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one part."""
    if q.is_cuda:
        return aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse.unsqueeze(-1), *seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
        )  # fmt: skip
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=scale
    )


class _TwoParts(torch.autograd.Function):
    """[B, Hq, n, D] at the end of [B, Hkv, m, D], m > n."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        sizes = k.shape[2] - q.shape[2], q.shape[2]
        (k1, k2), (v1, v2) = k.split(sizes, 2), v.split(sizes, 2)
        o1, lse1, *seed = _forward(q, k1, v1, False, scale)
        o2, lse2, *_ = _forward(q, k2, v2, True, scale)
        lse = torch.logaddexp(lse1, lse2)
        share = (lse2 - lse).exp_().unsqueeze(-1)
        o = (o1 * (1 - share)).addcmul_(o2, share).to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse, *seed)
        ctx.scale, ctx.sizes = scale, sizes
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, *seed = ctx.saved_tensors
        (k1, k2), (v1, v2) = k.split(ctx.sizes, 2), v.split(ctx.sizes, 2)
        dq1, dk1, dv1 = _backward(grads[0], q, k1, v1, o, lse, seed, False, ctx.scale)
        dq2, dk2, dv2 = _backward(grads[0], q, k2, v2, o, lse, seed, True, ctx.scale)
        return dq1 + dq2, torch.cat((dk1, dk2), 2), torch.cat((dv1, dv2), 2), None
