"""The kernels on a Hopper GPU against the float64 token recurrence.

Uninitialised memory is filled with NaN (torch.use_deterministic_algorithms), so that an element
which nobody wrote shows; every case runs twice and must repeat bit for bit.
"""

import pytest
import torch

from .reference import Inputs, draw, error, recurrent

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def plan(kernels, segment, halves):
    return kernels.Plan(segment, halves, True)


def check(kernels, x, *, tolerance=5e-3, batch=None, normalize=False, known=False, plan=None):
    o_ref, final_ref = recurrent(x, normalize=normalize)
    arguments, cu = (x.q, x.k, x.v, x.g, x.beta), x.cu
    if batch:
        arguments = [y.reshape(batch, -1, *y.shape[2:]) for y in arguments]
        cu = None
    results = [
        kernels.chunk_gdn_forward(
            *arguments,
            initial_state=x.initial,
            cu_seqlens=cu,
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalize,
            keys_normalized=known,
            plan=plan,
        )[:2]
        for _ in range(2)
    ]
    (o, final), (o_again, final_again) = results
    assert torch.equal(o, o_again) and torch.equal(final, final_again)
    for head in range(x.v.shape[2]):
        assert error(o.view(o_ref.shape)[:, :, head], o_ref[:, :, head]) < tolerance
        assert error(final[:, head], final_ref[:, head]) < tolerance


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("gates", ["random", "slow", "zero", "strong", "mixed"])
def test_gates(kernels, gates, halves):
    x = draw([1000], 2, 4, gates=gates, initial=True, device="cuda")
    check(kernels, x, plan=plan(kernels, 3, halves))


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_value_heads(kernels, ratio):
    check(kernels, draw([300], 2, 2 * ratio, device="cuda"))


def test_batch(kernels):
    check(kernels, draw([300, 300], 2, 4, initial=True, device="cuda"), batch=2)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("segment", [1, 2, 16])
def test_packed_documents(kernels, segment, halves):
    lengths = [1, 63, 64, 65, 200, 0, 130, 129, 700]
    x = draw(lengths, 2, 4, gates="mixed", initial=True, device="cuda")
    check(kernels, x, plan=plan(kernels, segment, halves))


def test_truncated_gates(kernels):
    x = draw([3000, 130, 64, 65, 700], 2, 4, gates="mixed", initial=True, device="cuda")
    check(kernels, x, known=True, plan=plan(kernels, 12, 2))


@pytest.mark.parametrize("halves", [1, 2])
def test_normalisation(kernels, halves):
    x = draw([640, 100], 2, 4, gates="mixed", initial=True, norm=False, device="cuda")
    check(kernels, x, normalize=True, plan=plan(kernels, 4, halves))


def test_half_precision_and_bf16_gates(kernels):
    x = draw([640, 100], 2, 4, gates="slow", dtype=torch.float16, gate_dtype=torch.bfloat16,
             device="cuda")  # fmt: skip
    check(kernels, x, tolerance=1e-3)


def test_beta_zero_writes_nothing(kernels):
    x = draw([300], 2, 4, gates="slow", initial=True, device="cuda")
    x.beta.zero_()
    check(kernels, x)


def test_correlated_keys(kernels):
    check(kernels, draw([1024], 2, 4, keys="near", gates="slow", device="cuda"), tolerance=6e-3)


def test_equal_keys_stay_finite(kernels):
    """bf16 operands cancel here, in every implementation that has them: 7 % in FlashQLA."""
    x = draw([1024], 2, 4, keys="equal", device="cuda")
    check(kernels, x, tolerance=0.2)


@pytest.mark.parametrize("lengths", [[1000], [2000, 100, 0, 65]])
def test_summary(kernels, lengths):
    x = draw(lengths, 2, 4, gates="mixed", device="cuda")
    known = len(lengths) > 1
    M, S = kernels.chunk_gdn_summary(x.k, x.v, x.g, x.beta, cu_seqlens=x.cu, keys_normalized=known)
    identity = torch.eye(128, device="cuda").expand(len(lengths), 4, 128, 128).contiguous()
    _, S_ref = recurrent(x)
    _, M_ref = recurrent(Inputs(x.q, x.k, torch.zeros_like(x.v), x.g, x.beta, x.lengths, identity))
    assert error(S, S_ref) < 5e-3
    for head in (0, 2):  # the slow ones; the others have decayed to nothing
        assert error(M[:, head], M_ref[:, head]) < 8e-3
    assert M.isfinite().all()


def test_summary_continues_a_sequence(kernels):
    """S_out = M S_in + S_ext, with S_in from another shard."""
    x = draw([640], 2, 4, gates="slow", initial=True, device="cuda")
    M, S = kernels.chunk_gdn_summary(x.k, x.v, x.g, x.beta)
    _, final_ref = recurrent(x)
    assert error(M.double() @ x.initial.double() + S.double(), final_ref) < 5e-3
    assert error(S, final_ref) > 0.05


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
def test_summary_has_the_bits_of_the_main_pass(kernels, halves, normalize):
    """A state handed over by a summary equals that of a main pass which never stopped."""
    x = draw([1000], 2, 4, gates="slow", initial=True, norm=not normalize, device="cuda")
    uncut = kernels.Plan(16, halves, False)
    options = {"initial_state": x.initial, "use_qk_l2norm_in_kernel": normalize, "plan": uncut}
    _, final, _ = kernels.chunk_gdn_forward(
        x.q, x.k, x.v, x.g, x.beta, output_final_state=True, **options
    )
    opened = kernels.open_forward(x.k, x.v, x.g, x.beta, open_right=1, **options)
    _, state = kernels.leaving_summary(opened, transition=False)
    assert torch.equal(final, state)


def test_summaries_in_halves_have_the_same_bits(kernels, monkeypatch):
    """Whether one CTA takes all columns of a chain or two take half of them each."""
    from cp_gdn.kernels import layout

    x = draw([1000], 2, 4, gates="mixed", initial=True, device="cuda")

    def run(entire):
        monkeypatch.setattr(layout, "entire_jobs", lambda jobs, processors: min(jobs, entire))
        monkeypatch.setattr(layout, "_layouts", {})
        return kernels.chunk_gdn_forward(
            x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial, output_final_state=True,
            keys_normalized=True, plan=plan(kernels, 3, 2),
        )[:2]  # fmt: skip

    whole = run(1000)
    for entire in (0, 17):
        assert all(torch.equal(a, b) for a, b in zip(run(entire), whole, strict=True))


def test_no_host_synchronisation_and_graph_capture(kernels):
    torch.use_deterministic_algorithms(False)
    x = draw([700, 64, 300], 2, 4, gates="mixed", initial=True, device="cuda")
    cu = x.cu

    def run():
        return kernels.chunk_gdn_forward(
            x.q, x.k, x.v, x.g, x.beta, initial_state=x.initial, cu_seqlens=cu,
            output_final_state=True, keys_normalized=True, plan=plan(kernels, 2, 2),
        )  # fmt: skip

    expected = run()[:2]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, final, _ = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, expected[0]) and torch.equal(final, expected[1])


def test_bad_input_is_refused(kernels):
    x = draw([100], 2, 4, device="cuda")
    with pytest.raises(ValueError, match="K = V = 128"):
        kernels.chunk_gdn_summary(x.k[..., :64], x.v, x.g, x.beta)
    with pytest.raises(ValueError, match="multiple"):
        kernels.chunk_gdn_summary(x.k, x.v[:, :, :3], x.g[..., :3], x.beta[..., :3])
    with pytest.raises(ValueError, match="int32"):
        kernels.chunk_gdn_forward(x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu.long())
