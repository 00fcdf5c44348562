"""The plumbing of the tilelang engine without a GPU: its kernels replaced by the torch engine in their place.

What the kernels compute is tested on a GPU; here it is which tokens, states and gradients reach them, over ranks.
"""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from cp_gdn import build_cp_context, chunk_gated_delta_rule
from cp_gdn.ops import hopper
from cp_gdn.ops.reference import recurrent_gated_delta_rule

from ..cases import assert_close, make_case, outputs_and_gradients
from ..distributed import run_ranks

pytest.importorskip("tilelang")
from cp_gdn.kernels import backward as backward_kernels
from cp_gdn.kernels import forward as forward_kernels

PACKED = [0, 10, 75, 76, 150, 290, 300]


def _torch_rule(q, k, v, g, beta, h0, cu_seqlens, scale, normalize):
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=h0,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
        cu_seqlens=cu_seqlens,
        engine="torch",
    )


def fake_forward(
    q,
    k,
    v,
    g,
    beta,
    *,
    scale,
    initial_state,
    cu_seqlens,
    output_final_state,
    use_qk_l2norm_in_kernel,
):
    o, final = _torch_rule(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel
    )
    nothing = torch.zeros(0)
    cu = torch.zeros(0, dtype=torch.int32) if cu_seqlens is None else cu_seqlens
    saved = forward_kernels.Saved(
        nothing, nothing, nothing, nothing, cu, nothing, nothing, plan="plan"
    )
    return o, final, saved


def fake_summary(k, v, g, beta, *, use_qk_l2norm_in_kernel):
    B, Hv, K = v.shape[0], v.shape[2], k.shape[3]
    S = _torch_rule(k, k, v, g, beta, None, None, 1.0, use_qk_l2norm_in_kernel)[1]
    eye = torch.eye(K).expand(B, Hv, K, K).contiguous()
    M = _torch_rule(k, k, torch.zeros_like(v), g, beta, eye, None, 1.0, use_qk_l2norm_in_kernel)[1]
    return M, S


def _differentiate(q, k, v, g, beta, saved, do, dfinal, h0, scale, normalize):
    assert saved.plan == "plan"
    cu = saved.cu_seqlens if saved.cu_seqlens.numel() else None
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, g, beta, h0)]
    with torch.enable_grad():
        o, final = _torch_rule(*leaves, cu, scale, normalize)
        return torch.autograd.grad((o * do).sum() + (final * dfinal).sum(), leaves)


def fake_backward(
    q, k, v, g, beta, saved, do, dfinal, *, scale, initial_state, use_qk_l2norm_in_kernel
):
    return _differentiate(
        q, k, v, g, beta, saved, do, dfinal, initial_state, scale, use_qk_l2norm_in_kernel
    )


def _over_ranks(rank, size, case, cu_seqlens, sizes, exchange):
    def fake_reverse(q, k, saved, do, dfinal, *, scale, use_qk_l2norm_in_kernel):
        v, g, beta = (context.shard(x) for x in case.inputs[2:5])  # not needed by the kernel
        h0 = torch.zeros_like(dfinal)
        return _differentiate(
            q, k, v, g, beta, saved, do, dfinal, h0, scale, use_qk_l2norm_in_kernel
        )[5]

    context = build_cp_context(
        dist.group.WORLD,
        seq_len=case.do.shape[1],
        cu_seqlens=cu_seqlens,
        shard_sizes=sizes,
        exchange=exchange,
    )
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    with (
        patch.object(hopper, "obstacle", lambda *args: None),
        patch.object(forward_kernels, "chunk_gdn_forward", fake_forward),
        patch.object(forward_kernels, "chunk_gdn_summary", fake_summary),
        patch.object(backward_kernels, "chunk_gdn_backward", fake_backward),
        patch.object(backward_kernels, "chunk_gdn_reverse_summary", fake_reverse),
    ):
        o, final = chunk_gated_delta_rule(
            *(context.shard(x) for x in inputs[:5]),
            initial_state=inputs[5],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cp_context=context,
            engine="tilelang",
        )
        loss = (o * context.shard(case.do)).sum() + (final * case.dfinal).sum() * (rank == 0)
        grads = torch.autograd.grad(loss, inputs)
    for grad in grads:
        dist.all_reduce(grad)
    return [x.detach() for x in (context.gather(o), final, *grads)]


@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "all_gather", "serial"])
@pytest.mark.parametrize(
    ("B", "cu_seqlens", "sizes"),
    [
        (1, None, [100, 130, 70]),
        (2, None, [100, 130, 70]),
        (1, PACKED, [160, 60, 80]),
        (1, PACKED, [75, 75, 150]),
        (1, PACKED, [300]),
    ],
)
def test_the_right_things_reach_the_kernels(exchange, B, cu_seqlens, sizes):
    case = make_case(300, 1, 4, 8, 8, B=B, N=len(cu_seqlens) - 1 if cu_seqlens else B)

    def oracle(*inputs):
        return recurrent_gated_delta_rule(
            *inputs[:5],
            initial_state=inputs[5],
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True,
        )

    ref = outputs_and_gradients(oracle, case)
    single = case.to(torch.float32)
    for got in run_ranks(len(sizes), _over_ranks, single, cu_seqlens, sizes, exchange):
        assert_close(got, ref, 1e-5)
