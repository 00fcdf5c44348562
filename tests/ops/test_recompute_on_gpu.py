"""Activation checkpointing on the Hopper kernels: the second forward keeps what the backward would replay."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cp_gdn import (
    CPGatedDeltaNet,
    build_cp_context,
    chunk_gated_delta_rule,
    run_virtual_ranks,
)
from cp_gdn.ops.recompute import checkpoint_contexts, keep_states

from ..cases import make_case

pytestmark = pytest.mark.gpu
pytest.importorskip("tilelang")


@pytest.fixture
def replayed(monkeypatch):
    """Backwards that replay; keeping pays however small the call."""
    from cp_gdn.kernels import backward, backward_walk

    seen = []

    def replay(*args):
        seen.append(args)
        return backward_walk.replay_states(*args)

    monkeypatch.setattr(backward, "replay_states", replay)
    monkeypatch.setattr(backward, "keeping_pays", lambda opened: True)
    return seen


def run(function, x, recompute):
    if not recompute:
        return function(x)
    return checkpoint(function, x, use_reentrant=False, context_fn=checkpoint_contexts)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 10, 75, 76, 150, 290, 300]])
def test_a_checkpointed_call_has_the_gradients_of_one_that_replays(cu_seqlens, replayed):
    case, found = make_case(300, 2, 4, 128, 128), []
    dtypes = 3 * [torch.bfloat16] + 2 * [torch.float32]
    do = case.do.to("cuda", torch.bfloat16)
    for recompute in (False, True):
        inputs = [
            x.to("cuda", d).requires_grad_() for x, d in zip(case.inputs[:5], dtypes, strict=True)
        ]

        def call(q, rest=inputs[1:]):
            return chunk_gated_delta_rule(
                q, *rest, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens, engine="tilelang"
            )[0]

        replayed.clear()
        run(call, inputs[0], recompute).backward(do)
        assert bool(replayed) != recompute
        found.append([x.grad for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_checkpointed_layer(replayed):
    """Which saves tensors behind the rule's, too. Outputs of the second forward differ by rounding, so do gradients."""
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(256, 2, 4, head_k_dim=128, head_v_dim=128, engine="tilelang").cuda()
    context = build_cp_context(seq_len=300, device="cuda")
    found = []
    for recompute in (False, True):
        x = torch.randn(
            1, 300, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
        )
        layer.zero_grad()
        replayed.clear()
        with torch.autocast("cuda", torch.bfloat16):
            y = run(lambda x: layer(x, cp_context=context), x.requires_grad_(), recompute)
        y.float().square().sum().backward()
        assert bool(replayed) != recompute
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    for replaying, keeping in zip(*found, strict=True):
        assert (keeping - replaying).norm() < 1e-2 * replaying.norm()


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 200, 201, 470, 640]])
def test_kept_states_over_virtual_ranks(cu_seqlens, replayed):
    """Shards whose first states come from other ranks: the gradients of a replay, bit for bit."""
    case, found = make_case(640, 2, 4, 128, 128), []
    dtypes = 3 * [torch.bfloat16] + 2 * [torch.float32]
    whole = [x.to("cuda", d) for x, d in zip(case.inputs[:5], dtypes, strict=True)]
    do = case.do.to("cuda", torch.bfloat16)

    def step(group, keep):
        context = build_cp_context(group, seq_len=640, cu_seqlens=cu_seqlens, exchange="ring")
        inputs = [context.shard(x).contiguous().requires_grad_() for x in whole]
        with keep_states() if keep else nullcontext():
            o, _ = chunk_gated_delta_rule(
                *inputs, use_qk_l2norm_in_kernel=True, cp_context=context, engine="tilelang"
            )
        return torch.autograd.grad(o, inputs, context.shard(do))

    for keep in (False, True):
        replayed.clear()
        found.append(run_virtual_ranks(3, step, keep, device="cuda"))
        assert bool(replayed) != keep
    for replaying, keeping in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(replaying, keeping, strict=True))
