"""The backward kernels against autograd through the float64 token recurrence, on a Hopper GPU."""

import pytest
import torch

from .backward_reference import NAMES, draw_cotangents, recurrent_gradients
from .reference import draw, error

pytestmark = pytest.mark.gpu

TOLERANCE = 8e-3


def forward_and_backward(x, y, *, batch=None, cu=None, normalize=False, **options):
    from cp_gdn.kernels.backward import chunk_gdn_backward
    from cp_gdn.kernels.forward import chunk_gdn_forward

    inputs = [x.q, x.k, x.v, x.g, x.beta]
    do, cu = y.do, x.cu if cu is None else cu
    if batch:
        inputs = [t.view(batch, -1, *t.shape[2:]) for t in inputs]
        do, cu = do.view(batch, -1, *do.shape[2:]), None
    keywords = dict(initial_state=x.initial, use_qk_l2norm_in_kernel=normalize)
    saved = chunk_gdn_forward(*inputs, cu_seqlens=cu, **keywords, **options)[2]
    return chunk_gdn_backward(*inputs, saved, do, y.dfinal, **keywords)


def errors(got, want):
    return {n: error(a.reshape(b.shape), b) for n, a, b in zip(NAMES, got, want, strict=True)}


def check(x, y, **options):
    got = forward_and_backward(x, y, **options)
    want = recurrent_gradients(x, y, normalize=options.get("normalize", False))
    found = errors(got, want)
    assert max(found.values()) < TOLERANCE, found
    return got


@pytest.mark.parametrize("gates", ["random", "slow", "zero", "strong", "mixed"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 6)])
def test_gradients(gates, heads):
    x = draw([320], *heads, gates=gates, device="cuda")
    check(x, draw_cotangents(x, final=False))


@pytest.mark.parametrize("normalize", [False, True])
def test_packed_documents_with_states(normalize):
    lengths = [1, 63, 64, 65, 200, 0, 130, 129]
    x = draw(lengths, 2, 4, gates="mixed", initial=True, norm=not normalize, device="cuda")
    check(x, draw_cotangents(x), normalize=normalize)


def test_batch():
    x = draw([300, 300], 2, 6, initial=True, device="cuda")
    check(x, draw_cotangents(x), batch=2)


@pytest.mark.parametrize("gates", ["slow", "mixed"])
def test_segments_of_the_forward(gates):
    from cp_gdn.kernels.plan import Plan

    x = draw([700, 130, 65], 2, 4, gates=gates, initial=True, device="cuda")
    check(x, draw_cotangents(x), plan=Plan(3, 2, True))


def test_half_precision_and_gates_in_bf16():
    x = draw([200, 100], 2, 4, dtype=torch.float16, gate_dtype=torch.bfloat16, device="cuda")
    check(x, draw_cotangents(x))


def test_beta_zero():
    x = draw([200, 70], 2, 4, gates="slow", device="cuda")
    x.beta[:, ::5] = 0
    x.beta[:, 64:128] = 0
    y = draw_cotangents(x)
    got = check(x, y)
    want = recurrent_gradients(x, y)[4]
    assert error(got.dbeta[:, ::5], want[:, ::5]) < TOLERANCE


@pytest.mark.parametrize("keys", ["near", "equal"])
def test_correlated_keys_stay_finite(keys):
    x = draw([640], 2, 4, keys=keys, device="cuda")
    assert all(t.isfinite().all() for t in forward_and_backward(x, draw_cotangents(x)))


def test_two_runs_give_the_same_bits():
    x = draw([500, 200], 2, 8, initial=True, device="cuda")
    x.beta[:, ::9] = 0
    y = draw_cotangents(x)
    first, second = forward_and_backward(x, y), forward_and_backward(x, y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_reverse_summary_carries_the_final_gradient_through():
    """dh0 = M^T dfinal + dS_ext."""
    from cp_gdn.kernels.backward import chunk_gdn_reverse_summary
    from cp_gdn.kernels.forward import chunk_gdn_forward, chunk_gdn_summary

    x = draw([300, 64], 2, 4, gates="slow", device="cuda")
    y = draw_cotangents(x)
    inputs = (x.q, x.k, x.v, x.g, x.beta)
    saved = chunk_gdn_forward(*inputs, cu_seqlens=x.cu)[2]
    external = chunk_gdn_reverse_summary(x.q, x.k, saved, y.do)
    transition = chunk_gdn_summary(*inputs[1:], cu_seqlens=x.cu)[0]
    dh0 = recurrent_gradients(x, y)[5]
    assert error(transition.double().mT @ y.dfinal.double() + external.double(), dh0) < TOLERANCE


def test_capture_in_a_graph():
    x = draw([256, 100], 2, 4, device="cuda")
    y = draw_cotangents(x)
    cu = x.cu  # copied from the host, which a capture would refuse
    want = forward_and_backward(x, y, cu=cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_and_backward(x, y, cu=cu)
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
