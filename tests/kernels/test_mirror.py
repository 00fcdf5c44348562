"""The route that the kernels take, in float64 on the CPU, against the token recurrence."""

import pytest
import torch

from .mirror import forward
from .reference import draw, error, recurrent

CASES = {
    "one document": dict(lengths=[200]),
    "tails and single tokens": dict(lengths=[1, 63, 64, 65, 130], initial=True),
    "slow heads beside fast ones": dict(lengths=[300], gates="mixed", initial=True),
    "no decay": dict(lengths=[200], gates="zero", initial=True),
    "strong decay": dict(lengths=[200], gates="strong"),
    "equal keys": dict(lengths=[200], keys="equal"),
}


def exact(case):
    return draw(key_heads=1, value_heads=3, dtype=torch.float64, gate_dtype=torch.float64, **case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("segment", [None, 1, 2])
def test_algebra_is_exact(case, segment):
    x = exact(case)
    o, final = forward(x, segment=segment)
    o_ref, final_ref = recurrent(x)
    assert error(o, o_ref) < 1e-10
    assert error(final, final_ref) < 1e-10


def test_normalisation():
    x = draw([150], 1, 2, dtype=torch.float64, gate_dtype=torch.float64, norm=False)
    o, final = forward(x, normalize=True)
    o_ref, final_ref = recurrent(x, normalize=True)
    assert error(o, o_ref) < 1e-10
    assert error(final, final_ref) < 1e-10


def test_truncation_drops_only_what_fp32_cannot_show():
    x = exact(dict(lengths=[640, 70], gates="strong", initial=True))
    o, final = forward(x, segment=3, truncate=True)
    o_ref, final_ref = recurrent(x)
    assert 0 < error(o, o_ref) < 2**-23
    assert error(final, final_ref) < 2**-23


def test_segments_need_the_incoming_state():
    """A boundary that drops the state must show, or the tests above prove nothing."""
    x = exact(dict(lengths=[256], gates="slow"))
    o, _ = forward(x, segment=2)
    second = draw([128], 1, 3, dtype=torch.float64, gate_dtype=torch.float64)
    second.q, second.k, second.v = (y[:, 128:] for y in (x.q, x.k, x.v))
    second.g, second.beta = x.g[:, 128:], x.beta[:, 128:]
    dropped, _ = forward(second)
    assert error(dropped, o[:, 128:]) > 0.05


def test_rounding_as_the_kernels_do():
    x = draw([512], 1, 2, gates="slow", dtype=torch.float64, gate_dtype=torch.float64)
    x.q, x.k, x.v = (y.bfloat16().double() for y in (x.q, x.k, x.v))
    o, final = forward(x, segment=2, operand=lambda y: y.bfloat16().double())
    o_ref, final_ref = recurrent(x)
    assert 1e-4 < error(o, o_ref) < 5e-3
    assert 1e-4 < error(final, final_ref) < 5e-3
