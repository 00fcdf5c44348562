"""CPAttention against transformers' Qwen3_5Attention: outputs and every parameter gradient."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5TextRotaryEmbedding,
)

import cp_gdn
from cp_gdn import comm
from cp_gdn.layers.attention import CPAttention, apply_rotary
from tests.distributed import run_ranks
from tests.layers.common import parameter_gradients, relative, total, worst

TOLERANCE = 1e-5
HIDDEN = 32


def make_pair(partial_rotary_factor: float = 0.25):
    """transformers' layer with its rotary embedding, and ours with the same parameters."""
    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        partial_rotary_factor=partial_rotary_factor,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": partial_rotary_factor,
        },
        num_hidden_layers=1,
        layer_types=["full_attention"],
        attn_implementation="eager",
    )
    hf, rotary = Qwen3_5Attention(config, 0), Qwen3_5TextRotaryEmbedding(config)
    with torch.no_grad():
        hf.q_norm.weight.normal_(0, 0.3)
        hf.k_norm.weight.normal_(0, 0.3)
    ours = CPAttention(
        HIDDEN, 4, 2, 16, rope_theta=1e4, partial_rotary_factor=partial_rotary_factor
    )
    ours.load_state_dict(hf.state_dict())
    return hf, rotary, ours


def reference(hf, rotary, x, weights, cu_seqlens):
    """Document by document through transformers, positions from 0."""
    hf.zero_grad()
    parts = []
    for low, high in pairwise(cu_seqlens):
        piece, T = x[:, low:high], high - low
        mask = torch.full((T, T), -torch.inf).triu(1)
        parts.append(hf(piece, rotary(piece, torch.arange(T)[None]), mask)[0])
    y = torch.cat(parts, 1)
    (y * weights).sum().backward()
    return y.detach(), parameter_gradients(hf)


def run(layer, x, weights, context):
    layer.zero_grad()
    y = layer(context.shard(x), cp_context=context)
    (y * context.shard(weights)).sum().backward()
    return y.detach(), parameter_gradients(layer)


def on_ranks(layer, x, weights, sizes, cu_seqlens, mutation=None):
    def rank_main(rank, size):
        context = cp_gdn.build_cp_context(
            dist.group.WORLD, seq_len=x.shape[1], shard_sizes=sizes, cu_seqlens=cu_seqlens
        )
        if mutation is None:
            return run(layer, x, weights, context)
        with patch.object(comm, *mutation):
            return run(layer, x, weights, context)

    outs = run_ranks(len(sizes), rank_main)
    return torch.cat([y for y, _ in outs], 1), total([grads for _, grads in outs])


def error(ours, theirs) -> tuple[float, str]:
    return max((relative(ours[0], theirs[0]), "y"), worst(ours[1], theirs[1]))


@pytest.mark.parametrize("partial_rotary_factor", [0.25, 1.0])
def test_one_rank_equals_transformers(partial_rotary_factor):
    torch.manual_seed(0)
    hf, rotary, layer = make_pair(partial_rotary_factor)
    x, weights = torch.randn(2, 50, HIDDEN), torch.randn(2, 50, HIDDEN)
    theirs = reference(hf, rotary, x, weights, (0, 50))
    layer.zero_grad()
    y = layer(x)
    (y * weights).sum().backward()
    found = error((y.detach(), parameter_gradients(layer)), theirs)
    assert found < (TOLERANCE, ""), found


CASES = [(2, None), (1, (0, 40, 41, 70, 100)), (1, (0, 10, 95, 100)), (1, (0, 40, 70, 100))]


@pytest.mark.parametrize(("B", "cu_seqlens"), CASES)
def test_three_ranks_equal_transformers(B, cu_seqlens):
    torch.manual_seed(1)
    hf, rotary, layer = make_pair()
    x, weights = torch.randn(B, 100, HIDDEN), torch.randn(B, 100, HIDDEN)
    theirs = reference(hf, rotary, x, weights, cu_seqlens or (0, 100))
    found = error(on_ranks(layer, x, weights, (40, 5, 55), cu_seqlens), theirs)
    assert found < (TOLERANCE, ""), found


def test_parity_sees_a_broken_gather():
    torch.manual_seed(2)
    hf, rotary, layer = make_pair()
    x, weights = torch.randn(1, 100, HIDDEN), torch.randn(1, 100, HIDDEN)
    theirs = reference(hf, rotary, x, weights, (0, 100))
    sum_parts = comm.sum_parts

    def own_parts(parts, rows):
        return sum_parts([part for part in parts if part[0] == dist.get_rank()], rows)

    forgetful = ("sum_parts", own_parts)
    found = error(on_ranks(layer, x, weights, (40, 5, 55), None, forgetful), theirs)
    assert found > (100 * TOLERANCE, ""), found


def test_rotary_depends_on_distance_only():
    torch.manual_seed(3)
    q, k = (torch.randn(1, 1, 2, 16, dtype=torch.float64) for _ in range(2))

    def score(t, s):
        at = [apply_rotary(x, torch.tensor([p]), 8, 1e4) for x, p in ((q, t), (k, s))]
        return (at[0] * at[1]).sum(-1)

    assert torch.allclose(score(7, 3), score(1007, 1003), rtol=1e-12)
    assert not torch.allclose(score(7, 3), score(8, 3), rtol=1e-3)
    assert torch.equal(apply_rotary(q, torch.tensor([9]), 8, 1e4)[..., 8:], q[..., 8:])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
        CPAttention(32, 4, 3, 16)
    with pytest.raises(ValueError, match="turns 3 features"):
        CPAttention(32, 4, 2, 12)
    layer = CPAttention(32, 4, 2, 16)
    with pytest.raises(ValueError, match="got 12 tokens but the context gives rank 0 10 of 10"):
        layer(torch.randn(1, 12, 32), cp_context=cp_gdn.build_cp_context(seq_len=10))
