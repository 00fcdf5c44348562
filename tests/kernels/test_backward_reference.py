"""The mirror of the backward kernels against autograd through the token recurrence. No GPU."""

import pytest
import torch

from cp_gdn.ops.reference import recurrent_gated_delta_rule
from tests.cases import make_case

from .backward_reference import (
    NAMES,
    Cotangents,
    draw_cotangents,
    mirror_gradients,
    recurrent_gradients,
)
from .reference import Inputs, draw, error


def small(lengths, key_heads=1, value_heads=2, K=16, V=8, **options):
    """draw() on few dimensions: the algebra does not depend on them."""
    x = draw(
        lengths, key_heads, value_heads, dtype=torch.float64, gate_dtype=torch.float64, **options
    )
    x.q, x.k, x.v = x.q[..., :K].clone(), x.k[..., :K].clone(), x.v[..., :V].clone()
    if x.initial is not None:
        x.initial = x.initial[..., :K, :V].double()
    return x


def check(x, y, tolerance, **options):
    got = mirror_gradients(x, y, **options)
    options.pop("round_to", None)
    want = recurrent_gradients(x, y, **options)
    errors = {n: error(a, b) for n, a, b in zip(NAMES, got, want, strict=True)}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("gates", ["random", "slow", "zero", "strong", "mixed"])
@pytest.mark.parametrize("normalize", [False, True])
def test_exact(gates, normalize):
    x = small([70, 130, 1, 64], gates=gates, initial=True, norm=not normalize)
    check(x, draw_cotangents(x), 1e-10, normalize=normalize)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (1, 4), (2, 6)])
def test_value_heads_of_a_key_head_add_up(heads):
    x = small([100], *heads)
    check(x, draw_cotangents(x, final=False), 1e-10)


@pytest.mark.parametrize("keys", ["near", "equal"])
def test_correlated_keys(keys):
    x = small([150], keys=keys)
    check(x, draw_cotangents(x), 1e-10)


def test_beta_zero_has_its_gradient():
    x = small([90], gates="slow")
    x.beta[:, ::3] = 0
    x.beta[:, 64:80] = 0
    y = draw_cotangents(x)
    dbeta = mirror_gradients(x, y)[4]
    want = recurrent_gradients(x, y)[4]
    assert want[:, ::3].abs().min() > 0
    assert error(dbeta[:, ::3], want[:, ::3]) < 1e-10


def test_cases_of_the_operator():
    """The library's own hard case, and its own recurrence as the oracle."""
    case = make_case(100, 2, 8, 16, 8, N=1)
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    q, k, v, g, beta, h0 = inputs
    o, final = recurrent_gated_delta_rule(q, k, v, g, beta, scale=0.25, initial_state=h0)
    want = torch.autograd.grad((o * case.do).sum() + (final * case.dfinal).sum(), inputs)
    x = Inputs(*case.inputs[:5], [100], case.inputs[5])
    got = mirror_gradients(x, Cotangents(case.do, case.dfinal), scale=0.25)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert error(a, b) < 1e-10, name


def test_gradcheck():
    class Mirrored(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            o, final = recurrent_gated_delta_rule(*inputs[:5], initial_state=inputs[5], scale=0.5)
            return o, final

        @staticmethod
        def backward(ctx, do, dfinal):
            *inputs, h0 = ctx.saved_tensors
            x = Inputs(*inputs, [inputs[0].shape[1]], h0)
            return mirror_gradients(x, Cotangents(do, dfinal), scale=0.5)

    case = make_case(67, 1, 1, 2, 2, N=1, seed=3)
    g = case.inputs[3] - 0.05
    inputs = [t.clone().requires_grad_() for t in (*case.inputs[:3], g, *case.inputs[4:])]
    assert torch.autograd.gradcheck(Mirrored.apply, inputs, fast_mode=True, atol=1e-7)


@pytest.mark.parametrize("gates", ["random", "slow", "zero", "strong"])
def test_rounding_of_the_kernels_stays_within_8e_3(gates):
    x = draw([200], 1, 2, gates=gates, dtype=torch.bfloat16)
    check(x, draw_cotangents(x), 8e-3, round_to=torch.bfloat16)


def test_repeated_keys_stay_finite():
    x = draw([200], 1, 2, keys="equal", dtype=torch.bfloat16)
    got = mirror_gradients(x, draw_cotangents(x), round_to=torch.bfloat16)
    assert all(t.isfinite().all() for t in got)
