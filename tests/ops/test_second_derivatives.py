"""Backwards that are written out, and those that exchange, cannot be differentiated again: they must say so."""

import torch
import torch.distributed as dist

from cp_gdn import build_cp_context, chunk_gated_delta_rule
from cp_gdn.ops.attention import causal_attention
from cp_gdn.ops.causal_conv1d import causal_conv1d

from ..distributed import run_ranks


def _twice(rank, size):
    context = build_cp_context(dist.group.WORLD, seq_len=40)
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        whole = torch.randn(1, 40, *shape, generator=gen, dtype=torch.float64)
        return context.shard(whole).requires_grad_()

    q, k, v = normal(2, 4), normal(2, 4), normal(2, 4)
    x, g, beta = normal(3), -normal(2).abs(), normal(2).sigmoid()
    weight = torch.ones(3, 2, dtype=torch.float64)
    calls = {
        "gather": (lambda: x + context.gather(x)[:, : context.num_tokens], [x]),
        "convolution": (lambda: causal_conv1d(x, weight, cp_context=context), [x]),
        "attention": (lambda: causal_attention(q, k, v, cp_context=context), [q]),
        "rule": (lambda: chunk_gated_delta_rule(q, k, v, g, beta, cp_context=context)[0], [v]),
    }
    outcomes = {}
    for name, (call, inputs) in calls.items():
        (first,) = torch.autograd.grad(call().pow(3).sum(), inputs, create_graph=True)
        try:
            first.square().sum().backward()
            outcomes[name] = "differentiated twice"
        except RuntimeError as error:
            outcomes[name] = str(error)
    return outcomes


def test_second_derivatives_are_refused_instead_of_wrong():
    for outcomes in run_ranks(2, _twice):
        for name, outcome in outcomes.items():
            assert "once_differentiable" in outcome, f"{name}: {outcome}"
