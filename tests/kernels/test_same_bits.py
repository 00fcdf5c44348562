"""Two shards give the bits of one call, forward and backward, where they are whole segments of it."""

import pytest
import torch

from .backward_reference import draw_cotangents
from .reference import draw, error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dh0")
CUT = 512


def in_one_call(kernels, x, y, plan, known):
    from cp_gdn.kernels.backward import chunk_gdn_backward

    inputs = (x.q, x.k, x.v, x.g, x.beta)
    options = dict(initial_state=x.initial, keys_normalized=known)
    o, final, saved = kernels.chunk_gdn_forward(
        *inputs, cu_seqlens=x.cu, output_final_state=True, plan=plan, **options
    )
    return o, final, *chunk_gdn_backward(*inputs, saved, y.do, y.dfinal, **options)


def in_two_shards(kernels, x, y, plan, known, *, summaries, carry=True):
    """With `summaries` the second shard gets what a summary of the first one says, and the other way
    round in the backward; otherwise what the first one found from what entered it."""
    from cp_gdn.kernels import backward

    inputs = (x.q, x.k, x.v, x.g, x.beta, y.do)
    first = [t[:, :CUT].contiguous() for t in inputs]
    second = [t[:, CUT:].contiguous() for t in inputs]
    forward = dict(keys_normalized=known, plan=plan, summarise=summaries)
    a = kernels.open_forward(*first[1:5], initial_state=x.initial, open_right=1, **forward)
    b = kernels.open_forward(*second[1:5], open_left=1, **forward)
    state = kernels.leaving_summary(a, transition=False)[1] if summaries else None
    if not summaries:
        state = kernels.leaving_state(a)
    o_a, final_a, saved_a = kernels.close_forward(a, first[0], output_final_state=True)
    state = final_a if state is None else state
    state = state if carry else torch.zeros_like(state)
    o_b, final, saved_b = kernels.close_forward(
        b, second[0], incoming=state, output_final_state=True
    )
    known_ends = dict(keys_normalized=known, open_left=1, initial_state=state)
    b = backward.open_backward(*second[:5], saved_b, second[5], y.dfinal, **known_ends)
    a = backward.open_backward(
        *first[:5], saved_a, first[5], keys_normalized=known, open_right=1, initial_state=x.initial
    )
    late = backward.entering_summary(b)
    parts = []
    for opened, incoming in ((a, late if carry else torch.zeros_like(late)), (b, None)):
        backward.replay(opened)
        parts.append(backward.close_backward(opened, incoming=incoming))
    joined = [torch.cat(pair, 1) for pair in zip(parts[0][:5], parts[1][:5], strict=True)]
    return torch.cat([o_a, o_b], 1), final, *joined, parts[0].dh0


def different(got, want):
    return [n for n, a, b in zip(NAMES, got, want, strict=True) if not torch.equal(a, b)]


@pytest.mark.parametrize("summaries", [True, False])
@pytest.mark.parametrize("gates", ["slow", "zero", "mixed"])
@pytest.mark.parametrize("plan", [(2, 2, True), (4, 1, True), (8, 1, False, 8), (4, 2, False, 8)])
def test_the_bits_of_one_call(kernels, plan, gates, summaries):
    """Cut into segments, truncated heads among them; and not cut, in one or two runs a shard."""
    plan = kernels.Plan(*plan)
    x = draw([1024], 2, 4, gates=gates, initial=True, device="cuda")
    y = draw_cotangents(x)
    known = plan.split
    want = in_one_call(kernels, x, y, plan, known)
    assert not different(in_two_shards(kernels, x, y, plan, known, summaries=summaries), want)


@pytest.mark.parametrize("plan", [(2, 2, True), (8, 1, False, 8)])
def test_a_broken_exchange_shows(kernels, plan):
    plan = kernels.Plan(*plan)
    x = draw([1024], 2, 4, gates="slow", initial=True, device="cuda")
    y = draw_cotangents(x)
    want = in_one_call(kernels, x, y, plan, True)
    got = in_two_shards(kernels, x, y, plan, True, summaries=True, carry=False)
    assert set(different(got, want)) == set(NAMES)
    assert error(got[0], want[0].double()) > 0.05 and error(got[3], want[3].double()) > 0.05


@pytest.mark.parametrize("gates", ["slow", "mixed"])
def test_summaries_in_segments_of_their_own(kernels, gates):
    """To the tolerance of bf16: composed summaries are another route to the same state."""
    plan = kernels.Plan(8, 1, False, 2)
    x = draw([1024], 2, 4, gates=gates, initial=True, device="cuda")
    y = draw_cotangents(x)
    want = in_one_call(kernels, x, y, plan, True)
    got = in_two_shards(kernels, x, y, plan, True, summaries=True)
    found = {n: error(a, b.double()) for n, a, b in zip(NAMES, got, want, strict=True)}
    assert max(found.values()) < 8e-3, found
