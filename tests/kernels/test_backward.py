"""The backward kernels against autograd through the float64 token recurrence, on a Hopper GPU."""

import pytest
import torch

from .backward_reference import NAMES, draw_cotangents, recurrent_gradients
from .reference import draw, error, recurrent

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
    """Without an initial state nobody asks for its gradient."""
    pairs = zip(NAMES, got, want, strict=True)
    return {n: error(a.reshape(b.shape), b) for n, a, b in pairs if n != "dh0" or len(a)}


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


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("heads, times", [((2, 4), 3), ((16, 32), 1)])
def test_documents_of_known_lengths(heads, times, initial):
    """None is cut, and the longest are begun first: with the bits of documents begun in their order."""
    lengths = [70, 1, 640, 64, 3, 128, 65, 300, 1, 130, 0, 257] * times
    x = draw(lengths, *heads, gates="mixed", initial=initial, device="cuda")
    y = draw_cotangents(x, final=initial)
    order = torch.tensor(lengths).argsort(descending=True).to("cuda", torch.int32)
    got = check(x, y, max_seqlen=640, order=order)
    assert len(got.dh0) == (len(lengths) if initial else 0)
    in_order = forward_and_backward(x, y, max_seqlen=640)
    assert all(torch.equal(a, b) for a, b in zip(got, in_order, strict=True))


def test_batch():
    x = draw([300, 300], 2, 6, initial=True, device="cuda")
    check(x, draw_cotangents(x), batch=2)


@pytest.mark.parametrize("gates, normalize", [("slow", False), ("mixed", False), ("mixed", True)])
def test_segments_of_the_forward(gates, normalize):
    """Normalised: fast heads are truncated, in both directions."""
    from cp_gdn.kernels.plan import Plan

    x = draw([700, 130, 65], 2, 4, gates=gates, initial=True, norm=not normalize, device="cuda")
    check(x, draw_cotangents(x), normalize=normalize, plan=Plan(3, 2, True))


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


@pytest.mark.parametrize("gates", ["slow", "mixed"])
@pytest.mark.parametrize("halves, segment", [(1, 100), (2, 100), (2, 2)])
def test_stages_over_shards(gates, halves, segment):
    """Three shards of packed documents, the middle one with neither end of its only document."""
    from cp_gdn.kernels import backward
    from cp_gdn.kernels.forward import close_forward, leaving_summary, open_forward
    from cp_gdn.kernels.plan import Plan

    plan = Plan(segment, halves, segment < 10)
    x = draw([100, 700, 90], 2, 4, gates=gates, initial=True, device="cuda")
    y = draw_cotangents(x)
    want = recurrent_gradients(x, y)
    cuts = [0, 300, 600, 890]
    pieces = [[100, 200], [300], [200, 90]]
    documents = [slice(0, 2), slice(1, 2), slice(1, 3)]
    opens = [(0, 1), (1, 1), (1, 0)]  # on the left, on the right

    def cut(t, i):
        return t[:, cuts[i] : cuts[i + 1]].contiguous()

    state, opened = None, []
    for i in range(3):
        left, right = opens[i]
        q, *rest = (cut(t, i) for t in (x.q, x.k, x.v, x.g, x.beta))
        cu = torch.tensor([0, *pieces[i]], device="cuda").cumsum(0).int()
        initial = x.initial[documents[i]].clone()
        forward = open_forward(
            *rest, initial_state=initial, cu_seqlens=cu, open_left=left, open_right=right, plan=plan
        )
        M, leaving = leaving_summary(forward, transition=True)
        if left:
            initial[:1] = state
        saved = close_forward(forward, q, incoming=state if left else None)[2]
        if right:
            state = leaving + (M @ state if left else 0)
        dfinal = y.dfinal[documents[i]].clone()
        if right:
            dfinal[-1] = 0
        arguments = (q, *rest, saved, cut(y.do, i), dfinal)
        options = dict(initial_state=initial, open_left=left, open_right=right)
        opened.append((backward.open_backward(*arguments, **options), M))
    gradient, parts = None, [None] * 3
    for i in (2, 1, 0):
        left, right = opens[i]
        entering = backward.entering_summary(opened[i][0])
        assert entering.shape[0] == left
        backward.replay(opened[i][0])
        parts[i] = backward.close_backward(opened[i][0], incoming=gradient if right else None)
        if left:
            gradient = entering + (opened[i][1].mT @ gradient if right else 0)
            assert error(parts[i].dh0[:1], gradient.double()) < TOLERANCE
    got = [torch.cat([p[n] for p in parts], 1) for n in range(5)]
    got.append(torch.cat([parts[0].dh0, parts[2].dh0[1:]]))
    found = errors(got, want)
    assert max(found.values()) < TOLERANCE, found


def test_late_gradients_of_a_batch():
    """All rows open on both sides; a late gradient in two parts gives what it gives at once."""
    from cp_gdn.kernels import backward
    from cp_gdn.kernels.forward import close_forward, leaving_summary, open_forward
    from cp_gdn.kernels.plan import Plan

    x = draw([320, 320], 2, 4, gates="mixed", initial=True, device="cuda")
    y = draw_cotangents(x)
    q, *rest = (t.view(2, 320, *t.shape[2:]) for t in (x.q, x.k, x.v, x.g, x.beta))
    forward = open_forward(*rest, open_left=2, open_right=2, plan=Plan(2, 2, True))
    leaving_summary(forward, transition=True)
    saved = close_forward(forward, q, incoming=x.initial)[2]
    opened = backward.open_backward(
        q, *rest, saved, y.do.view_as(rest[1]), initial_state=x.initial, open_left=2, open_right=2
    )
    assert backward.entering_summary(opened).shape == x.initial.shape
    backward.replay(opened)
    with pytest.raises(ValueError, match="expected"):
        backward.close_backward(opened, incoming=y.dfinal[:1])
    found = errors(backward.close_backward(opened, incoming=y.dfinal), recurrent_gradients(x, y))
    assert max(found.values()) < TOLERANCE, found


PACKED = [1, 63, 64, 65, 200, 0, 130, 129, 700]


@pytest.mark.parametrize("lengths, plan", [
    (PACKED, (100, 1, False)), (PACKED, (4, 2, True)), ([700], (100, 1, False)), ([700], (3, 2, True)),
    ([0, 0, 400, 0], (2, 1, True)),
])  # fmt: skip
@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize("halves", [1, 2])
def test_blocks_of_time(monkeypatch, poison, lengths, plan, block, halves):
    """A dS chain that goes on in the next block has the bits of one that does not, and so do both halves
    of the columns together and apart."""
    from cp_gdn.kernels import backward_opened, backward_walk
    from cp_gdn.kernels.plan import Plan

    x = draw(lengths, 2, 4, gates="mixed", initial=True, device="cuda")
    x.beta[:, ::9] = 0
    y, plan = draw_cotangents(x), Plan(*plan)
    want = forward_and_backward(x, y, plan=plan)
    size = block * plan.segment if plan.split and len(lengths) == 1 else block
    monkeypatch.setattr(backward_opened, "block_length", lambda *_: size)
    monkeypatch.setattr(backward_opened, "halves_of", lambda *_: halves)
    monkeypatch.setattr(backward_walk, "halves_of", lambda *_: halves)
    monkeypatch.setattr(backward_opened, "_layouts", {})
    got = forward_and_backward(x, y, plan=plan)
    assert not [n for n, a, b in zip(NAMES, got, want, strict=True) if not torch.equal(a, b)]


def test_a_lost_carry_shows(monkeypatch):
    """What goes on from one block to the next is what the test above is about."""
    from cp_gdn.kernels import backward_opened, backward_walk
    from cp_gdn.kernels.plan import Plan

    x = draw([400], 2, 4, gates="slow", initial=True, device="cuda")
    y, plan = draw_cotangents(x), Plan(100, 1, False)
    want = forward_and_backward(x, y, plan=plan)
    walk_block = backward_walk.walk_block

    def forgetful(x, walk, *rest):
        walk.carried.zero_()
        walk_block(x, walk, *rest)

    monkeypatch.setattr(backward_opened, "block_length", lambda *_: 3)
    monkeypatch.setattr(backward_opened, "_layouts", {})
    monkeypatch.setattr(backward_walk, "walk_block", forgetful)
    got = forward_and_backward(x, y, plan=plan)
    assert error(got.dh0, want.dh0.double()) > 0.05


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


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", [[1000], [1, 63, 64, 65, 200, 0, 130, 129]])
@pytest.mark.parametrize("plan", [None, (3, 1, True), (4, 1, False)])
def test_states_kept_by_the_forward_are_those_of_a_replay(lengths, normalize, plan):
    """The same gradients bit for bit, and outputs as good; with segments side by side and one after another."""
    from cp_gdn.kernels.backward import chunk_gdn_backward
    from cp_gdn.kernels.forward import chunk_gdn_forward
    from cp_gdn.kernels.plan import Plan

    x = draw(lengths, 2, 4, gates="mixed", initial=True, norm=not normalize, device="cuda")
    y = draw_cotangents(x)
    inputs = [x.q, x.k, x.v, x.g, x.beta]
    keywords = dict(initial_state=x.initial, use_qk_l2norm_in_kernel=normalize)
    got = []
    for keep in (False, True):
        o, final, saved = chunk_gdn_forward(
            *inputs, cu_seqlens=x.cu, output_final_state=True, keep_states=keep,
            plan=plan and Plan(*plan), **keywords,
        )  # fmt: skip
        assert (saved.entering is not None) == keep
        got.append((o, final, chunk_gdn_backward(*inputs, saved, y.do, y.dfinal, **keywords)))
    want = recurrent(x, normalize=normalize)
    for o, final, _ in got:
        assert error(o, want[0]) < 5e-3
        assert error(final, want[1]) < 5e-3
    found = errors(got[1][2], recurrent_gradients(x, y, normalize=normalize))
    assert max(found.values()) < TOLERANCE, found
    if plan is None or plan[2]:  # else the states between segments are the main pass's own
        for name, replayed, kept in zip(NAMES, got[0][2], got[1][2], strict=True):
            assert torch.equal(replayed, kept), name
