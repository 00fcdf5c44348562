"""The torch engine against the token recurrence, on one rank and sharded, and the proof that these tests can fail."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp_gdn import boundary, build_cp_context, chunk_gated_delta_rule
from cp_gdn.ops.reference import recurrent_gated_delta_rule

from ..cases import Case, assert_close, assert_equal, make_case, outputs_and_gradients
from ..distributed import run_ranks
from .cp_runs import run_sharded

EXCHANGES = ("ring", "all_to_all", "all_gather", "serial")


def oracle(case: Case, cu_seqlens=None, **kwargs):
    def fn(*inputs):
        return recurrent_gated_delta_rule(
            *inputs[:5], initial_state=inputs[5], cu_seqlens=cu_seqlens, **kwargs
        )

    return outputs_and_gradients(fn, case)


def one_rank(case: Case, cu_seqlens=None, **kwargs):
    def fn(*inputs):
        return chunk_gated_delta_rule(
            *inputs[:5],
            initial_state=inputs[5],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )

    return outputs_and_gradients(fn, case)


@pytest.mark.parametrize(
    ("T", "Hk", "Hv", "K", "V", "B", "cu_seqlens"),
    [
        (1, 1, 1, 3, 2, 1, None),
        (63, 4, 4, 8, 8, 1, None),
        (64, 2, 4, 8, 6, 2, None),
        (65, 1, 4, 16, 8, 3, None),
        (200, 2, 8, 8, 16, 1, [0, 1, 3, 64, 128, 193, 200]),
        (150, 4, 4, 8, 8, 1, [0, 149, 150]),
    ],
)
def test_engine_matches_the_recurrence(T, Hk, Hv, K, V, B, cu_seqlens):
    N = len(cu_seqlens) - 1 if cu_seqlens else B
    case = make_case(T, Hk, Hv, K, V, B=B, N=N)
    ref = oracle(case, cu_seqlens)
    assert_close(one_rank(case, cu_seqlens), ref, 1e-10)
    assert_close(one_rank(case.to(torch.float32), cu_seqlens), ref, 1e-5)


@pytest.mark.parametrize("seed", [0, 2, 11])
def test_strong_decay_and_hostile_keys_stay_accurate_in_fp32(seed):
    torch.manual_seed(seed)
    case = make_case(192, 1, 4, 16, 16)
    q, k, v, g, beta, h0 = case.inputs
    k = k[:, :1].expand_as(k).contiguous()  # every key the same
    g = torch.stack(
        (-20 * torch.rand(1, 192).double(), *[torch.full((1, 192), x) for x in (-1e-3, 0, -80)]), -1
    )
    case = Case((q, k, v, g, torch.full_like(beta, 0.835), h0), case.do, case.dfinal)
    ref = oracle(case)
    assert_close(one_rank(case), ref, 1e-10)
    assert_close(one_rank(case.to(torch.float32)), ref, 1e-5)


def test_l2_norm_and_scale():
    case = make_case(70, 2, 4, 8, 8)
    case = Case((3 * case.inputs[0], 0.2 * case.inputs[1], *case.inputs[2:]), case.do, case.dfinal)
    options = {"use_qk_l2norm_in_kernel": True, "scale": 0.3}
    assert_close(one_rank(case, **options), oracle(case, **options), 1e-10)


def test_16_bit_inputs_keep_fp32_states_and_return_their_dtype():
    case = make_case(100, 2, 4, 16, 16)
    ref = oracle(case)
    q, k, v, g, beta, h0 = (x.bfloat16() for x in case.inputs)
    case16 = Case((q, k, v, g.float(), beta, h0.float()), case.do.bfloat16(), case.dfinal.float())
    got = one_rank(case16)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3 + [
        torch.float32,
        torch.bfloat16,
        torch.float32,
    ]
    assert_close([x.double() for x in got], ref, 2e-2)


CUTS = {
    "aligned": (256, None, {1: None, 2: [128, 128], 3: [64, 128, 64], 4: [64] * 4}),
    "uneven": (230, None, {1: None, 2: [101, 129], 3: [7, 200, 23], 4: [1, 2, 3, 224]}),
    "more ranks than blocks": (70, None, {1: None, 2: None, 3: None, 4: None}),
    # documents that end inside a shard, shorter than a chunk, and over three ranks
    "packed": (
        300,
        [0, 10, 75, 76, 150, 290, 300],
        {1: None, 2: [100, 200], 3: [160, 60, 80], 4: [160, 40, 40, 60]},
    ),
    # documents that end on a cut and one token after it
    "packed on cuts": (
        300,
        [0, 10, 75, 76, 150, 290, 300],
        {1: None, 2: [75, 225], 3: [75, 75, 150], 4: [9, 65, 76, 150]},
    ),
    "no document crosses": (128, [0, 64, 128], {1: None, 2: [64, 64], 3: [64, 63, 1], 4: None}),
}


@pytest.fixture(scope="module")
def references():
    cases = {}
    for name, (T, cu_seqlens, _) in CUTS.items():
        N = len(cu_seqlens) - 1 if cu_seqlens else 1
        case = make_case(T, 1, 4, 6, 8, N=N)
        cases[name] = (case, oracle(case, cu_seqlens))
    batch = make_case(150, 2, 2, 5, 7, B=3)
    cases["batch"] = (batch, oracle(batch))
    return cases


def _all_cuts(rank, size, cases, exchange):
    out = {}
    for name, case in cases.items():
        _, cu_seqlens, sizes = CUTS.get(name, (None, None, dict.fromkeys(range(5))))
        for dtype in (torch.float64, torch.float32):
            out[name, dtype] = run_sharded(
                rank, size, case.to(dtype), cu_seqlens, sizes[size], exchange
            )
    return out


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded_matches_the_recurrence(references, size, exchange):
    cases = {name: case for name, (case, _) in references.items()}
    for result in run_ranks(size, _all_cuts, cases, exchange):
        for (name, dtype), got in result.items():
            tolerance = 1e-10 if dtype == torch.float64 else 1e-5
            assert_close(got, references[name][1], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("T", "B", "heads", "cu_seqlens", "sizes"),
    [
        (320, 1, (2, 8, 16, 24), None, [64, 128, 128]),
        (256, 3, (2, 2, 5, 7), None, [64, 64, 128]),
        (384, 1, (1, 4, 64, 64), [0, 64, 100, 384], [164, 64, 156]),
    ],
)
def test_serial_equals_one_rank_bit_for_bit(dtype, T, B, heads, cu_seqlens, sizes):
    case = make_case(T, *heads, B=B, N=len(cu_seqlens) - 1 if cu_seqlens else B).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ref = one_rank(case, cu_seqlens)
    torch.set_num_threads(threads)
    for got in run_ranks(len(sizes), run_sharded, case, cu_seqlens, sizes, "serial"):
        assert_equal(got, ref)
    ring = run_ranks(len(sizes), run_sharded, case, cu_seqlens, sizes, "ring")[0]
    with pytest.raises(AssertionError, match="differs"):
        assert_equal(ring, ref)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_cut_of_any_documents(data):
    size = data.draw(st.integers(1, 4), "ranks")
    T = data.draw(st.integers(max(size, 2), 170), "tokens")
    inner = data.draw(st.lists(st.integers(1, T - 1), max_size=5, unique=True), "documents")
    cuts = data.draw(
        st.lists(st.integers(1, T - 1), min_size=size - 1, max_size=size - 1, unique=True), "cuts"
    )
    bounds = [0, *sorted(cuts), T]
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    Hk, groups = data.draw(st.sampled_from([(1, 1), (1, 4), (2, 2)]), "heads")
    K, V = data.draw(st.integers(1, 9), "K"), data.draw(st.integers(1, 9), "V")
    exchange = data.draw(st.sampled_from(EXCHANGES), "exchange")
    cu_seqlens = [0, *sorted(inner), T]
    case = make_case(T, Hk, Hk * groups, K, V, N=len(cu_seqlens) - 1, seed=T)
    ref = oracle(case, cu_seqlens)
    for got in run_ranks(size, run_sharded, case, cu_seqlens, sizes, exchange):
        assert_close(got, ref, 1e-10)


# ---- the proof that the tests above can fail
# --------------------------------------------------------------------------


def _zero_forward(summary, context):
    S_in, transitions = _true_exchange(summary, context)
    return (None if S_in is None else torch.zeros_like(S_in)), transitions


def _zero_gradient(dS, transitions, context):
    dS_in = _true_gradients(dS, transitions, context)
    return None if dS_in is None else torch.zeros_like(dS_in)


def _zero_receive(like, context, *, reverse=False):
    S = _true_receive(like, context, reverse=reverse)
    return None if S is None else torch.zeros_like(S)


_true_exchange, _true_gradients = boundary.exchange_states, boundary.exchange_gradients
_true_receive = boundary.receive_state

MUTATIONS = {
    "forward state dropped": ("exchange_states", _zero_forward),
    "backward gradient dropped": ("exchange_gradients", _zero_gradient),
    "M left untransposed in the backward": ("transpose", lambda M: M),
}


BROKEN = [
    (m, e) for m in MUTATIONS for e in EXCHANGES if e != "serial" or m[0] != "M"
]  # serial has no M


@pytest.mark.parametrize("name", ["uneven", "packed", "batch"])
@pytest.mark.parametrize(("mutation", "exchange"), BROKEN)
def test_a_broken_exchange_is_seen(monkeypatch, references, mutation, exchange, name):
    attribute, replacement = MUTATIONS[mutation]
    if exchange == "serial":
        attribute, replacement = "receive_state", _zero_receive
    monkeypatch.setattr(boundary, attribute, replacement)
    case, ref = references[name]
    result = run_ranks(3, _all_cuts, {name: case}, exchange)[0]
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(AssertionError):
            assert_close(result[name, dtype], ref, 1e-5)


# ---- contracts
# ---------------------------------------------------------------------------------------------------------


def _initial_state_gradients(rank, size):
    case = make_case(96, 1, 4, 4, 4, N=2)
    context = build_cp_context(
        dist.group.WORLD, seq_len=96, cu_seqlens=[0, 40, 96], shard_sizes=[32] * 3
    )
    h0 = case.inputs[5].requires_grad_()
    o, _ = chunk_gated_delta_rule(
        *(context.shard(x) for x in case.inputs[:5]), initial_state=h0, cp_context=context
    )
    o.sum().backward()
    return h0.grad


def test_initial_state_gradient_lies_on_the_rank_where_the_document_starts():
    grads = run_ranks(3, _initial_state_gradients)
    nonzero = [[bool(g[n].any()) for n in range(2)] for g in grads]
    assert nonzero == [[True, False], [False, True], [False, False]]


def test_without_initial_state_and_final_state():
    case = make_case(90, 2, 4, 6, 6)
    o, final = chunk_gated_delta_rule(*case.inputs[:5])
    ref, _ = recurrent_gated_delta_rule(*case.inputs[:5])
    assert final is None
    assert torch.allclose(o, ref, atol=1e-12)


def test_no_memory_of_the_context_between_batches():
    for T in (64, 65, 64):
        case = make_case(T, 1, 2, 4, 4)
        assert_close(one_rank(case), oracle(case), 1e-10)


BAD = {
    "Hv not a multiple": (
        dict(v=torch.zeros(1, 8, 3, 4), g=torch.zeros(1, 8, 3), beta=torch.zeros(1, 8, 3)),
        "multiple of Hk",
    ),
    "k shape": (dict(k=torch.zeros(1, 8, 2, 5)), "k has shape"),
    "g shape": (dict(g=torch.zeros(1, 8, 2)), "g has shape"),
    "mixed dtypes": (dict(v=torch.zeros(1, 8, 4, 4, dtype=torch.bfloat16)), "must share one"),
    "g dtype": (dict(g=torch.zeros(1, 8, 4, dtype=torch.float16)), "g is torch.float16"),
    "state": (dict(initial_state=torch.zeros(2, 4, 4, 4)), "counting all documents"),
    "no heads": (dict(q=torch.zeros(1, 8, 0, 4), k=torch.zeros(1, 8, 0, 4)), "may be empty"),
    "no columns": (dict(q=torch.zeros(1, 8, 2, 0), k=torch.zeros(1, 8, 2, 0)), "may be empty"),
    "elsewhere": (dict(g=torch.zeros(1, 8, 4, device="meta")), "g is on meta but q on cpu"),
    "a state elsewhere": (
        dict(initial_state=torch.zeros(1, 4, 4, 4, device="meta")),
        "initial_state is on",
    ),
    "offsets not increasing": (dict(cu_seqlens=[0, 5, 5, 8]), "not increasing"),
    "offsets too short": (dict(cu_seqlens=[0, 5]), "must run from 0 to seq_len"),
    "engine": (dict(engine="cuda"), "choose torch, tilelang or auto"),
    "no Hopper GPU": (dict(engine="tilelang"), "runs on Hopper GPUs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    inputs = dict(
        q=torch.zeros(1, 8, 2, 4),
        k=torch.zeros(1, 8, 2, 4),
        v=torch.zeros(1, 8, 4, 4),
        g=torch.zeros(1, 8, 4),
        beta=torch.zeros(1, 8, 4),
    )
    chunk_gated_delta_rule(**inputs)  # what was found to fit makes nothing else fit
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            chunk_gated_delta_rule(**(inputs | changes))


def test_packed_documents_need_one_row():
    x = [torch.zeros(2, 8, 1, 4)] * 3 + [torch.zeros(2, 8, 1)] * 2
    with pytest.raises(ValueError, match="packed documents are one row"):
        chunk_gated_delta_rule(*x, cu_seqlens=[0, 4, 8])
    with pytest.raises(ValueError, match="B = 1"):
        chunk_gated_delta_rule(*x, cp_context=build_cp_context(seq_len=8, cu_seqlens=[0, 4, 8]))


def _debug_errors(rank, size):
    case = make_case(32, 1, 2, 4, 4)
    context = build_cp_context(dist.group.WORLD, seq_len=32)
    messages = []
    for index, value in ((3, 0.5), (3, float("nan")), (4, 3.0)):
        inputs = [context.shard(x).clone() for x in case.inputs[:5]]
        if rank == 1:
            inputs[index][0, 0, 0] = value
        try:
            chunk_gated_delta_rule(*inputs, cp_context=context)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_debug_mode_names_the_rank_on_every_rank(monkeypatch):
    monkeypatch.setenv("CP_GDN_DEBUG", "1")
    results = run_ranks(2, _debug_errors)
    assert results[0] == results[1]
    assert len(results[0]) == 3
    assert all("rank 1" in m for m in results[0])
    monkeypatch.setenv("CP_GDN_DEBUG", "0")
    assert run_ranks(2, _debug_errors) == [[], []]
