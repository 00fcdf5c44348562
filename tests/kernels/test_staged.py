"""The forward in stages: a batch cut into virtual shards on one GPU, states carried between them.

What leaves shard r by leaving_summary enters shard r + 1; the whole must be the float64 token
recurrence. Memory that nobody wrote is NaN, as in test_forward.py.
"""

import itertools

import pytest
import torch

from .reference import Inputs, draw, error, recurrent

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def pieces(x: Inputs, start: int, stop: int) -> tuple[list[int], list[int], int, int]:
    """Documents with tokens in [start, stop), their tokens there, open_left, open_right. A document
    that begins at `stop` has an empty piece before it, so that its initial state travels."""
    documents, sizes, left, right = [], [], 0, 0
    for i, (begin, end) in enumerate(itertools.pairwise(x.cu.tolist())):
        last = stop == x.cu[-1]
        if (begin < stop and end > start) or (begin == stop and end > begin and not last):
            documents.append(i)
            sizes.append(max(0, min(end, stop) - max(begin, start)))
            left |= int(begin < start or begin == start > 0)
            right |= int(end > stop)
    return documents, sizes, left, right


def run_in_shards(kernels, x: Inputs, cuts: list[int], *, known=False, normalize=False, plan=None,
                  carry=True):  # fmt: skip
    """o [1, L, Hv, V] and final states [N, Hv, K, V]; without `carry` no state enters a shard."""
    outputs, final, entering = [], torch.zeros_like(x.initial), None
    for start, stop in itertools.pairwise([0, *cuts, x.q.shape[1]]):
        documents, sizes, left, right = pieces(x, start, stop)
        q, k, v, g, beta = (y[:, start:stop] for y in (x.q, x.k, x.v, x.g, x.beta))
        cu = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device="cuda")
        opened = kernels.open_forward(
            k, v, g, beta, initial_state=x.initial[documents], cu_seqlens=cu, open_left=left,
            open_right=right, keys_normalized=known, use_qk_l2norm_in_kernel=normalize, plan=plan,
        )  # fmt: skip
        through = bool(left and right and len(documents) == 1)
        leaving = None
        if right:
            M, leaving = kernels.leaving_summary(opened, transition=through)
            assert leaving.isfinite().all() and (M is None or M.isfinite().all())
            if through:
                leaving = (M.double() @ entering.double() + leaving.double()).float()
        incoming = None
        if left:
            incoming = entering if carry else torch.zeros_like(entering)
        o, states, _ = kernels.close_forward(opened, q, incoming=incoming, output_final_state=True)
        outputs.append(o)
        final[documents] = states
        if right:
            # both by bf16 products and each within 5e-3 of the truth, by different routes
            assert error(leaving, states[-1:].double()) < 7e-3 or not carry
        entering = leaving
    return torch.cat(outputs, 1), final


def check(kernels, x, cuts, *, normalize=False, tolerance=5e-3, **options):
    o_ref, final_ref = recurrent(x, normalize=normalize)
    o, final = run_in_shards(kernels, x, cuts, normalize=normalize, **options)
    for head in range(x.v.shape[2]):
        assert error(o[:, :, head], o_ref[:, :, head]) < tolerance
        assert error(final[:, head], final_ref[:, head]) < tolerance


@pytest.mark.parametrize("gates", ["slow", "zero", "mixed", "random"])
@pytest.mark.parametrize("cuts", [[640], [256, 640], [64, 704, 832]], ids=str)
def test_sequence_in_shards(kernels, gates, cuts):
    """Two to four shards, among them a middle one of many segments and one of a single chunk."""
    x = draw([1000], 2, 4, gates=gates, initial=True, device="cuda")
    check(kernels, x, cuts, plan=kernels.Plan(2, 2, True))


@pytest.mark.parametrize("plan", [(1, 1), (3, 2), (16, 2)], ids=str)
def test_segments_of_a_shard(kernels, plan):
    x = draw([1900], 2, 4, gates="slow", initial=True, device="cuda")
    check(kernels, x, [640, 1280], plan=kernels.Plan(*plan, True))


def test_plans_of_its_own(kernels):
    x = draw([1900], 2, 4, gates="slow", initial=True, device="cuda")
    check(kernels, x, [640, 1280])
    check(kernels, x, [640, 1280], plan=kernels.Plan(32, 2, False))


@pytest.mark.parametrize("gates, known", [("slow", False), ("zero", False), ("mixed", True)])
@pytest.mark.parametrize("summary", [1, 3, 32])
def test_main_passes_that_are_not_cut(kernels, gates, known, summary):
    """Only what leaves is summarised then, in segments of its own; shards of two runs and of one."""
    x = draw([1900], 2, 4, gates=gates, initial=True, device="cuda")
    check(kernels, x, [640, 1280], known=known, plan=kernels.Plan(8, 2, False, summary))


def test_truncated_heads(kernels):
    x = draw([3000], 2, 4, gates="mixed", initial=True, device="cuda")
    check(kernels, x, [960, 1984], known=True, plan=kernels.Plan(4, 2, True))


@pytest.mark.parametrize("cuts", [[400], [64, 128, 700], [300, 301, 1000]], ids=str)
@pytest.mark.parametrize("segment", [1, 3])
def test_packed_documents_with_tails(kernels, cuts, segment):
    x = draw([100, 300, 64, 65, 471, 1, 130], 2, 4, gates="mixed", initial=True, device="cuda")
    check(kernels, x, cuts, known=True, plan=kernels.Plan(segment, 2, True))


def test_normalisation(kernels):
    x = draw([640, 100], 2, 4, gates="mixed", initial=True, norm=False, device="cuda")
    check(kernels, x, [192, 448], normalize=True, plan=kernels.Plan(2, 2, True))


def test_rows_of_a_batch(kernels):
    x = draw([640, 640], 2, 4, gates="slow", initial=True, device="cuda")
    o_ref, final_ref = recurrent(x)
    rows = [y.reshape(2, 640, *y.shape[2:]) for y in (x.q, x.k, x.v, x.g, x.beta)]
    q, k, v, g, beta = ([y[:, :256].contiguous(), y[:, 256:].contiguous()] for y in rows)
    first = kernels.open_forward(k[0], v[0], g[0], beta[0], initial_state=x.initial, open_right=2)
    M, S = kernels.leaving_summary(first, transition=False)
    assert M is None
    second = kernels.open_forward(k[1], v[1], g[1], beta[1], open_left=2)
    o0, _, _ = kernels.close_forward(first, q[0])
    o1, final, _ = kernels.close_forward(second, q[1], incoming=S, output_final_state=True)
    assert error(torch.cat([o0, o1], 1).view(o_ref.shape), o_ref) < 5e-3
    assert error(final, final_ref) < 5e-3


def test_one_go_and_open_ends_agree(kernels):
    """Closed sequences beside open ones come out as without them, bit for bit."""
    x = draw([300, 640, 200], 2, 4, gates="slow", initial=True, device="cuda")
    plan = kernels.Plan(2, 2, True)
    o, final, _ = kernels.chunk_gdn_forward(
        x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial, cu_seqlens=x.cu,
        output_final_state=True, plan=plan,
    )  # fmt: skip
    opened = kernels.open_forward(
        x.k, x.v, x.g, x.beta, initial_state=x.initial, cu_seqlens=x.cu, open_left=1, open_right=1,
        plan=plan,
    )  # fmt: skip
    _, leaving = kernels.leaving_summary(opened, transition=False)
    staged, states, _ = kernels.close_forward(
        opened, x.q, incoming=x.initial[:1], output_final_state=True
    )
    assert torch.equal(staged[:, 300:], o[:, 300:]) and torch.equal(states[1:], final[1:])
    assert error(staged, o.double()) < 4e-3 and error(states, final.double()) < 4e-3
    assert error(leaving, final[2:].double()) < 4e-3


def test_a_broken_exchange_shows(kernels):
    x = draw([1000], 2, 4, gates="slow", initial=True, device="cuda")
    o_ref, _ = recurrent(x)
    o, _ = run_in_shards(kernels, x, [512], carry=False, plan=kernels.Plan(2, 2, True))
    assert error(o[:, :512], o_ref[:, :512]) < 5e-3
    assert error(o[:, 512:], o_ref[:, 512:]) > 0.05


def test_no_host_synchronisation_and_graph_capture(kernels):
    torch.use_deterministic_algorithms(False)
    x = draw([700, 64, 300], 2, 4, gates="mixed", initial=True, device="cuda")
    cu = x.cu

    def run():
        opened = kernels.open_forward(
            x.k, x.v, x.g, x.beta, initial_state=x.initial, cu_seqlens=cu, open_left=1,
            open_right=1, keys_normalized=True, plan=kernels.Plan(2, 2, True),
        )  # fmt: skip
        M, S = kernels.leaving_summary(opened, transition=True)
        return (M, S, *kernels.close_forward(opened, x.q, incoming=x.initial[:1])[:1])

    expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    torch.cuda.synchronize()
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)


def test_bad_input_is_refused(kernels):
    x = draw([100], 2, 4, device="cuda")
    with pytest.raises(ValueError, match="open_left = 2"):
        kernels.open_forward(x.k, x.v, x.g, x.beta, open_left=2)
    opened = kernels.open_forward(x.k, x.v, x.g, x.beta, open_left=1)
    with pytest.raises(ValueError, match="incoming is missing"):
        kernels.close_forward(opened, x.q)
    with pytest.raises(ValueError, match="incoming is"):
        kernels.close_forward(opened, x.q, incoming=torch.zeros(1, 4, 64, 128, device="cuda"))
