"""CPGatedDeltaNet against the layers of transformers: outputs and every parameter gradient."""

import itertools
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import cp_gdn
from cp_gdn import boundary
from cp_gdn.layers import gated_delta_net
from tests.distributed import run_ranks
from tests.layers.common import (
    hf_delta_net,
    in_float64,
    parameter_gradients,
    relative,
    total,
    worst,
)

TOLERANCE = 1e-5
SHAPES = {"gva": ((2, 4), (16, 8)), "equal": ((2, 2), (8, 8)), "wide": ((1, 4), (8, 24))}


def interleaved_rows(hf: nn.Module) -> dict[str, torch.Tensor]:
    """Where the rows of the flat projections lie in Qwen3-Next's, told by its own reordering."""
    qkvz = torch.arange(hf.in_proj_qkvz.weight.shape[0]).view(1, 1, -1)
    ba = torch.arange(hf.in_proj_ba.weight.shape[0]).view(1, 1, -1)
    q, k, v, z, b, a = (x.flatten() for x in hf.fix_query_key_value_ordering(qkvz, ba))
    return {"in_proj_qkv": torch.cat((q, k, v)), "in_proj_z": z, "in_proj_b": b, "in_proj_a": a}


def flat_gradients(hf: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a transformers layer under the names of CPGatedDeltaNet."""
    grads = parameter_gradients(hf)
    if hasattr(hf, "in_proj_qkvz"):
        qkvz, ba = grads.pop("in_proj_qkvz.weight"), grads.pop("in_proj_ba.weight")
        for name, rows in interleaved_rows(hf).items():
            source = qkvz if name in ("in_proj_qkv", "in_proj_z") else ba
            grads[f"{name}.weight"] = source[rows]
    return grads


def run(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor, context=None):
    """Output, gradient of x, parameter gradients of sum(weights * layer(x)); all of x is given."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    local, w = (x, weights) if context is None else (context.shard(x), context.shard(weights))
    y = layer(local, cp_context=context)
    (y * w).sum().backward()
    return y.detach(), x.grad, parameter_gradients(layer)


def reference(hf: nn.Module, x: torch.Tensor, weights: torch.Tensor, cu_seqlens=None):
    """The same of the transformers layer, document by document."""
    x = x.clone().requires_grad_()
    hf.zero_grad()
    cuts = cu_seqlens or (0, x.shape[1])
    parts = [hf(x[:, low:high]) for low, high in itertools.pairwise(cuts)]
    y = torch.cat(parts, 1)
    (y * weights).sum().backward()
    return y.detach(), x.grad, flat_gradients(hf)


def ranks_run(layer, x, weights, sizes, cu_seqlens=None, exchange="auto", mutation=None):
    """Run over len(sizes) ranks; the whole output, gradients summed over the ranks."""

    def rank_main(rank, size):
        context = cp_gdn.build_cp_context(
            dist.group.WORLD,
            seq_len=x.shape[1],
            shard_sizes=sizes,
            cu_seqlens=cu_seqlens,
            exchange=exchange,
        )
        if mutation is None:
            return run(layer, x, weights, context)
        with patch.object(boundary, *mutation):
            return run(layer, x, weights, context)

    outs = run_ranks(len(sizes), rank_main)
    y = torch.cat([o[0] for o in outs], 1)
    return y, torch.stack([o[1] for o in outs]).sum(0), total([o[2] for o in outs])


def errors(ours, theirs, uncancelled=None) -> tuple[float, str]:
    """The worst relative L2 error, and of what: output, input gradient, parameter gradients.

    The gradients of A_log, dt_bias and in_proj_a add terms of both signs over all tokens. In fp32
    they are measured against the sum of the terms' magnitudes (``uncancelled``): measured against
    their own norm transformers itself misses float64 by up to 1e-4.
    """
    found = [(relative(ours[0], theirs[0]), "y"), (relative(ours[1], theirs[1]), "dx")]
    for name in theirs[2]:
        scale = None if uncancelled is None else uncancelled.get(name)
        found.append((relative(ours[2][name], theirs[2][name], scale), name))
    assert ours[2].keys() == theirs[2].keys()
    return max(found)


def uncancelled(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict:
    """Sums over tokens of the magnitudes of the terms in the gradients of the gate's parameters."""
    kept = []

    def spy(q, k, v, g, beta, **kwargs):
        g.retain_grad()
        kept.append(g)
        return cp_gdn.chunk_gated_delta_rule(q, k, v, g, beta, **kwargs)

    with patch.object(gated_delta_net, "chunk_gated_delta_rule", spy):
        run(layer, x, weights)
    (g,) = kept
    slope = layer.A_log.exp() * torch.sigmoid(layer.in_proj_a(x) + layer.dt_bias)
    da = (g.grad * slope).detach().abs()
    return {
        "A_log": (g.grad * g).detach().abs().sum((0, 1)),
        "dt_bias": da.sum((0, 1)),
        "in_proj_a.weight": torch.einsum("bth,btd->hd", da, x.abs()),
    }


def batch(B: int, T: int, hidden: int = 32):
    return torch.randn(B, T, hidden), torch.randn(B, T, hidden)


@pytest.mark.parametrize("decay", ["random", "slow"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_one_rank_equals_transformers(kind, shape, decay):
    torch.manual_seed(1)
    heads, dims = SHAPES[shape]
    hf = hf_delta_net(kind, decay=decay, heads=heads, dims=dims)
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
    x, weights = batch(2, 150)
    theirs = reference(hf, x, weights)
    error = errors(run(layer, x, weights), theirs, uncancelled(layer, x, weights))
    assert error < (TOLERANCE, ""), error


@pytest.mark.parametrize("decay", ["random", "slow"])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "serial"])
def test_three_ranks_equal_transformers(kind, decay, exchange):
    torch.manual_seed(2)
    hf = hf_delta_net(kind, decay=decay)
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
    x, weights = batch(2, 170)
    theirs = reference(hf, x, weights)
    ours = ranks_run(layer, x, weights, (70, 2, 98), exchange=exchange)
    error = errors(ours, theirs, uncancelled(layer, x, weights))
    assert error < (TOLERANCE, ""), error


@pytest.mark.parametrize("sizes", [None, (70, 2, 98)])
@pytest.mark.parametrize("decay", ["random", "slow"])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_equals_transformers_in_float64(kind, decay, sizes):
    """No rounding to hide behind: every gradient relative to its own norm."""
    torch.manual_seed(3)
    hf = hf_delta_net(kind, decay=decay).double()
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
    x, weights = (t.double() for t in batch(2, 170))
    with in_float64():
        theirs = reference(hf, x, weights)
    ours = ranks_run(layer, x, weights, sizes) if sizes else run(layer, x, weights)
    error = errors(ours, theirs)
    assert error < (1e-10, ""), error


@pytest.mark.parametrize("decay", ["random", "slow"])
def test_fp32_is_closer_to_float64_than_transformers(decay):
    """Every gradient relative to its own norm, the worst of some layers."""
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        hf = hf_delta_net("qwen3_5", decay=decay)
        layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
        x, weights = batch(2, 150)
        low, low_hf = run(layer, x, weights), reference(hf, x, weights)
        exact = run(layer.double(), x.double(), weights.double())
        ours.append(errors(low, exact))
        theirs.append(errors(low_hf, exact))
    assert max(ours) < (3e-5, "") and max(ours) < max(theirs), (max(ours), max(theirs))


@pytest.mark.parametrize("cuts", [(60, 61, 140), (30, 190), (3, 60, 62)])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_next"])
def test_packed_documents_equal_transformers_one_by_one(kind, cuts):
    """Documents that end inside a shard, on a cut, after one token, and that span all ranks."""
    torch.manual_seed(4)
    hf = hf_delta_net(kind, decay="slow").double()
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
    x, weights = (t.double() for t in batch(1, 200))
    cuts = (0, *cuts, 200)
    with in_float64():
        theirs = reference(hf, x, weights, cuts)
    error = errors(ranks_run(layer, x, weights, (60, 80, 60), cuts), theirs)
    assert error < (1e-10, ""), error


def no_state(summary, context):
    return (torch.zeros_like(summary.S) if context.crosses_left else None), boundary.Transitions()


MUTATIONS = {
    "states are zeros": ("exchange_states", no_state),
    "gradients of states are zeros": ("exchange_gradients", lambda dS, *_: torch.zeros_like(dS)),
    "halo is zeros": (
        "exchange_halo",
        lambda x, _, width: x.new_zeros(x.shape[0], width, x.shape[2]),
    ),
    "gradient of the halo is dropped": ("return_halo", lambda *_: []),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_parity_sees_a_broken_exchange(name):
    """The comparison of the tests above fails by far when one exchange is broken on purpose."""
    torch.manual_seed(2)
    hf = hf_delta_net("qwen3_5", decay="slow")
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(hf)
    x, weights = batch(2, 170)
    theirs = reference(hf, x, weights)
    ours = ranks_run(layer, x, weights, (70, 2, 98), exchange="ring", mutation=MUTATIONS[name])
    error = errors(ours, theirs, uncancelled(layer, x, weights))
    assert error > (100 * TOLERANCE, ""), error


def test_from_transformers_shares_what_agrees():
    flat = hf_delta_net("qwen3_5", decay="random")
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(flat)
    theirs = dict(flat.named_parameters())
    ours = dict(layer.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    layer.load_state_dict(flat.state_dict())

    mixed = hf_delta_net("qwen3_next", decay="random")
    mixed.in_proj_ba.weight.requires_grad_(False)
    mixed.eval()
    layer = cp_gdn.CPGatedDeltaNet.from_transformers(mixed)
    assert layer.conv1d.weight is mixed.conv1d.weight and layer.A_log is mixed.A_log
    assert layer.norm.weight is mixed.norm.weight and layer.out_proj.weight is mixed.out_proj.weight
    assert layer.dt_bias is mixed.dt_bias and not layer.training
    assert not layer.in_proj_a.weight.requires_grad and layer.in_proj_z.weight.requires_grad
    before = layer.in_proj_z.weight.clone()
    with torch.no_grad():
        mixed.in_proj_qkvz.weight.zero_()
    assert torch.equal(layer.in_proj_z.weight, before)


def test_from_transformers_refuses_others():
    with pytest.raises(ValueError, match="got a Linear; it takes Qwen3_5GatedDeltaNet"):
        cp_gdn.CPGatedDeltaNet.from_transformers(nn.Linear(2, 2))
    hf = hf_delta_net("qwen3_5", decay="random")
    hf.activation = "gelu"
    with pytest.raises(ValueError, match="'gelu'; only silu"):
        cp_gdn.CPGatedDeltaNet.from_transformers(hf)


def test_initial_values_are_those_of_transformers():
    torch.manual_seed(5)
    layer = cp_gdn.CPGatedDeltaNet(32, 64, 512, 4, 4)
    hf = hf_delta_net("qwen3_5", decay="random", heads=(64, 512), dims=(4, 4))
    assert torch.equal(layer.dt_bias, torch.ones(512))
    decay = layer.A_log.exp()
    assert 0.01 <= decay.min() < 1 and 15 < decay.max() <= 16 and abs(decay.mean() - 8) < 0.8
    assert torch.equal(layer.norm.weight, torch.ones(4))
    theirs = dict(hf.named_parameters())
    for name, p in layer.named_parameters():
        assert p.shape == theirs[name].shape, name
        if p.ndim > 1:
            assert relative(p.std(), theirs[name].std()) < 0.05, name


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "parent"])
def test_a_cast_leaves_decay_in_fp32(cast):
    layer = cp_gdn.CPGatedDeltaNet(16, 2, 4, 8, 8)
    before = layer.A_log.clone()
    parent = nn.Sequential(layer)
    target = torch.float16 if cast == "half" else torch.bfloat16
    {
        "to": lambda: layer.to(torch.bfloat16),
        "bfloat16": layer.bfloat16,
        "half": layer.half,
        "parent": lambda: parent.to(dtype=torch.bfloat16),
    }[cast]()
    for name, p in layer.named_parameters():
        assert p.dtype == (torch.float32 if name in ("A_log", "dt_bias") else target), name
    assert torch.equal(layer.A_log, before)
    assert layer.double().A_log.dtype == torch.float64
    assert layer.bfloat16().A_log.dtype == torch.float32


def test_bf16_layer_follows_fp32():
    torch.manual_seed(6)
    layer = cp_gdn.CPGatedDeltaNet(32, 2, 4, 16, 16)
    x, weights = batch(1, 130)
    y, _, grads = run(layer, x, weights)
    layer.to(torch.bfloat16)
    low, _, low_grads = run(layer, x.bfloat16(), weights.bfloat16())
    assert low.dtype == torch.bfloat16 and relative(low, y) < 2e-2
    assert low_grads["A_log"].dtype == torch.float32
    assert worst(low_grads, grads) < (0.1, ""), worst(low_grads, grads)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 50, 130)])
def test_autocast_leaves_the_recurrence_alone(cu_seqlens):
    torch.manual_seed(7)
    layer = cp_gdn.CPGatedDeltaNet(32, 2, 4, 16, 16)
    x, _ = batch(1, 130)
    context = cp_gdn.build_cp_context(seq_len=130, cu_seqlens=cu_seqlens)
    seen = []

    def spy(q, k, v, g, beta, **kwargs):
        seen.append((q.dtype, g.dtype, beta.dtype))
        inside = cp_gdn.chunk_gated_delta_rule(q, k, v, g, beta, **kwargs)
        with torch.autocast("cpu", enabled=False):
            outside = cp_gdn.chunk_gated_delta_rule(q, k, v, g, beta, **kwargs)
        assert torch.equal(inside[0], outside[0])
        return inside

    expected = layer(x, cp_context=context)
    with patch.object(gated_delta_net, "chunk_gated_delta_rule", spy), torch.autocast("cpu"):
        y = layer(x, cp_context=context)
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)]
    assert y.dtype == torch.bfloat16 and relative(y, expected) < 2e-2


@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "all_gather", "serial"])
@pytest.mark.parametrize("sizes", [(170,), (70, 100), (70, 2, 98), (3, 64, 64, 39)])
def test_any_number_of_ranks_gives_the_same_weight_gradients(sizes, exchange):
    torch.manual_seed(8)
    layer = cp_gdn.CPGatedDeltaNet(16, 1, 4, 6, 8).double()
    with torch.no_grad():
        layer.A_log[0], layer.A_log[1] = -9.2, -200.0  # g about -1e-4, and 0
    x, weights = (t.double() for t in batch(1, 170)[:2])
    x, weights = x[..., :16], weights[..., :16]
    for cu_seqlens in (None, (0, 60, 61, 170)):
        context = cp_gdn.build_cp_context(seq_len=170, cu_seqlens=cu_seqlens)
        ours = ranks_run(layer, x, weights, sizes, cu_seqlens, exchange)
        assert errors(ours, run(layer, x, weights, context)) < (1e-10, "")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_v_heads must be a multiple of num_k_heads"):
        cp_gdn.CPGatedDeltaNet(16, 3, 4)
    with pytest.raises(ValueError, match="conv_size is 0; it must be at least 1"):
        cp_gdn.CPGatedDeltaNet(16, 2, 4, conv_size=0)
    layer = cp_gdn.CPGatedDeltaNet(16, 2, 4, 8, 8)
    for shape in ((10, 16), (16,), (1, 10, 17), (1, 0, 16), (0, 10, 16), (1, 1, 10, 16)):
        with pytest.raises(ValueError, match=r"expected \[B, T, hidden_size = 16\]"):
            layer(torch.randn(shape), cp_context=cp_gdn.build_cp_context(seq_len=10))
    with pytest.raises(ValueError, match="got 12 tokens but the context gives rank 0 10 of 10"):
        layer(torch.randn(1, 12, 16), cp_context=cp_gdn.build_cp_context(seq_len=10))
    packed = cp_gdn.build_cp_context(seq_len=10, cu_seqlens=(0, 4, 10))
    with pytest.raises(ValueError, match="batch size 2 with 2 packed documents"):
        layer(torch.randn(2, 10, 16), cp_context=packed)


def _order_of_work(rank, size):
    """What the second rank issues, forward and backward: its halo's messages, and the projections."""
    torch.manual_seed(3)
    layer = cp_gdn.CPGatedDeltaNet(16, 1, 2, head_k_dim=8, head_v_dim=8)
    context = cp_gdn.build_cp_context(dist.group.WORLD, seq_len=40)
    order: list[str] = []

    def named(name, fn):
        return lambda *args: (order.append(name), fn(*args))[1]

    for name in ("in_proj_qkv", "in_proj_z"):
        module = getattr(layer, name)
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        module.weight.register_hook(lambda _, name=name: order.append(f"d {name}"))
    with (
        patch.object(boundary, "exchange_halo", named("halo", boundary.exchange_halo)),
        patch.object(boundary, "return_halo", named("d halo", boundary.return_halo)),
    ):
        x = torch.randn(1, context.num_tokens, 16, requires_grad=True)
        layer(x, cp_context=context).square().sum().backward()
    return order


def test_the_halo_travels_beside_other_projections():
    """There and back: it is sent before work that does not need it, and awaited after."""
    expected = ["in_proj_qkv", "halo", "in_proj_z", "d halo", "d in_proj_z", "d in_proj_qkv"]
    assert run_ranks(2, _order_of_work) == [expected, expected]
