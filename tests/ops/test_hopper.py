"""The plumbing of the tilelang engine without a GPU: its kernels replaced by the torch engine in their place.

What the kernels compute is tested on a GPU; here it is which tokens, states and gradients reach them, over ranks.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from cp_gdn import boundary, build_cp_context, chunk_gated_delta_rule
from cp_gdn.ops import head_dims, hopper
from cp_gdn.ops.recompute import checkpoint_contexts, keep_states
from cp_gdn.ops.reference import recurrent_gated_delta_rule

from ..cases import assert_close, make_case, outputs_and_gradients
from ..distributed import run_ranks

pytest.importorskip("tilelang")
from cp_gdn.kernels import backward as backward_kernels
from cp_gdn.kernels import forward as forward_kernels
from cp_gdn.kernels.inputs import flat, pack

PACKED = [0, 10, 75, 76, 150, 290, 300]


def _torch_rule(q, k, v, g, beta, h0, cu_seqlens, scale, normalize):
    return chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=h0,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
        cu_seqlens=cu_seqlens,
        engine="torch",
    )


class Call(SimpleNamespace):
    """What a stand-in of open_forward or open_backward was given, ``late`` sequences at its ends."""

    @property
    def count(self):
        return self.v.shape[0] if self.cu is None else self.cu.numel() - 1

    def states(self, known, place, late):
        """Known states with the late ones put in; the caller must have left those zero."""
        Hv, K, V = self.v.shape[2], self.k.shape[3], self.v.shape[3]
        states = self.v.new_zeros(self.count, Hv, K, V)
        if known is not None:  # of the first sequences
            states[: len(known)] = known
        if late is not None:
            assert not states[place].any()
            states[place] = late
        return states


def fake_open_forward(
    k, v, g, beta, *, initial_state, cu_seqlens, open_left, open_right, use_qk_l2norm_in_kernel,
    summarise, max_seqlen, order, layout,
):  # fmt: skip
    assert layout in (None, "forward")
    if cu_seqlens is None:
        assert max_seqlen is None and order is None
    else:  # documents, longest first
        lengths = cu_seqlens.diff()[order.long()]
        assert max_seqlen == lengths[0] and lengths.equal(lengths.sort(descending=True).values)
    return Call(
        k=k, v=v, g=g, beta=beta, h0=initial_state, cu=cu_seqlens, left=open_left,
        right=open_right, normalize=use_qk_l2norm_in_kernel, summarise=summarise,
        packed=pack(k, v, g, beta, cu_seqlens), layout="forward",
    )  # fmt: skip


def fake_leaving_summary(call, *, transition):
    assert call.summarise
    tokens = slice(None) if call.cu is None else slice(int(call.cu[-2]), None)
    k, v, g, beta = (x[:, tokens] for x in (call.k, call.v, call.g, call.beta))
    h0 = call.states(call.h0, slice(0, 0), None)[-call.right :]
    S = _torch_rule(k, k, v, g, beta, h0, None, 1.0, call.normalize)[1]
    if not transition:
        return None, S
    K = k.shape[3]
    eye = torch.eye(K).expand(*h0.shape[:2], K, K).contiguous()
    nothing = torch.zeros_like(k[:, :, :1].expand(-1, -1, v.shape[2], -1))
    return _torch_rule(k, k, nothing, g, beta, eye, None, 1.0, call.normalize)[1], S


def fake_leaving_state(call, *, incoming):
    """As kernels that cut their main pass find it: before its outputs."""
    assert (incoming is None) == (call.left == 0)
    if not call.right:
        return None
    h0 = call.states(call.h0, slice(0, call.left), incoming)
    final = _torch_rule(
        call.k, call.k, call.v, call.g, call.beta, h0, call.cu, 1.0, call.normalize
    )[1]
    return final[-call.right :]


def fake_norm_queries(call, q):
    assert q.shape == call.k.shape
    call.q = flat(q)


def fake_close_forward(call, q, *, incoming, scale, output_final_state, keep_states):
    assert (incoming is None) == (call.left == 0)
    call.q = flat(q)
    h0 = call.states(call.h0, slice(0, call.left), incoming)
    o, final = _torch_rule(q, call.k, call.v, call.g, call.beta, h0, call.cu, scale, call.normalize)
    nothing, a = torch.zeros(0), torch.zeros(1, 1)
    cu = torch.zeros(0, dtype=torch.int32) if call.cu is None else call.cu
    saved = forward_kernels.Saved(
        a, nothing, nothing, nothing, nothing, cu, None, nothing, nothing,
        entering=None, vd=None, plan="plan",
    )  # fmt: skip
    if keep_states:
        saved = saved.keeping()
        saved.entering.fill_(1), saved.vd.fill_(1)
    return o, final if output_final_state else None, saved


def fake_layout_for(q, v, g, beta, saved, do, dfinal, *, normalize, whole):
    assert v.shape == do.shape and q.shape[:2] == do.shape[:2] and beta.shape == g.shape
    return "backward"


def fake_open_backward(
    q, k, v, g, beta, saved, do, dfinal, *, scale, initial_state, use_qk_l2norm_in_kernel,
    open_left, open_right, layout,
):  # fmt: skip
    assert saved.plan == "plan" and layout == "backward"
    q, k, v, g, beta = (x.unflatten(0, do.shape[:2]) for x in (q, k, v, g, beta))
    cu = saved.cu_seqlens if saved.cu_seqlens.numel() else None
    return Call(
        q=q, k=k, v=v, g=g, beta=beta, h0=initial_state, cu=cu, left=open_left, right=open_right,
        do=do, dfinal=dfinal, scale=scale, normalize=use_qk_l2norm_in_kernel, replayed=False,
    )  # fmt: skip


def _differentiate(call, incoming):
    late = slice(call.count - call.right, call.count)
    dfinal = call.states(call.dfinal, late, incoming)
    h0 = call.states(call.h0, slice(0, 0), None)
    leaves = [call.q, call.k, call.v, call.g, call.beta, h0]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with torch.enable_grad():
        o, final = _torch_rule(*leaves, call.cu, call.scale, call.normalize)
        return torch.autograd.grad((o * call.do).sum() + (final * dfinal).sum(), leaves)


def fake_entering_summary(call, *, incoming):
    return _differentiate(call, incoming)[5][: call.left]


def fake_replay(call, *, at_once):
    assert not at_once  # messages of gloo
    call.replayed = True


def fake_begin_replay(call, *, at_once):
    assert not at_once and not call.replayed


def fake_backward(*inputs, **keywords):
    return _differentiate(fake_open_backward(*inputs, open_left=0, open_right=0, **keywords), None)


def fake_close_backward(call, *, incoming):
    assert call.replayed
    assert (incoming is None) == (call.right == 0)
    return _differentiate(call, incoming)


@contextmanager
def _kernels_replaced(leaving_state=fake_leaving_state):
    with (
        patch.object(hopper, "obstacle", lambda *args: None),
        patch.object(head_dims, "DIM", 8),  # of the stand-ins: 128 take their time
        patch.multiple(
            forward_kernels,
            create=True,
            open_forward=fake_open_forward,
            leaving_summary=fake_leaving_summary,
            leaving_state=leaving_state,
            norm_queries=fake_norm_queries,
            close_forward=fake_close_forward,
        ),
        patch.multiple(
            backward_kernels,
            create=True,
            layout_for=fake_layout_for,
            chunk_gdn_backward=fake_backward,
            open_backward=fake_open_backward,
            entering_summary=fake_entering_summary,
            replay=fake_replay,
            begin_replay=fake_begin_replay,
            close_backward=fake_close_backward,
        ),
    ):
        yield


def _over_ranks(rank, size, case, cu_seqlens, sizes, exchange, leaving_state=fake_leaving_state):
    context = build_cp_context(
        dist.group.WORLD,
        seq_len=case.do.shape[1],
        cu_seqlens=cu_seqlens,
        shard_sizes=sizes,
        exchange=exchange,
    )
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    with _kernels_replaced(leaving_state):
        o, final = chunk_gated_delta_rule(
            *(context.shard(x) for x in inputs[:5]),
            initial_state=inputs[5],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cp_context=context,
            engine="tilelang",
        )
        loss = (o * context.shard(case.do)).sum() + (final * case.dfinal).sum() * (rank == 0)
        grads = torch.autograd.grad(loss, inputs)
    for grad in grads:
        dist.all_reduce(grad)
    return [x.detach() for x in (context.gather(o), final, *grads)]


def _recurrence(cu_seqlens):
    def oracle(*inputs):
        return recurrent_gated_delta_rule(
            *inputs[:5],
            initial_state=inputs[5],
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=True,
        )

    return oracle


@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "all_gather", "serial"])
@pytest.mark.parametrize(
    ("B", "cu_seqlens", "sizes"),
    [
        (1, None, [100, 130, 70]),
        (2, None, [100, 130, 70]),
        (1, PACKED, [160, 60, 80]),
        (1, PACKED, [75, 75, 150]),
        (1, PACKED, [300]),
    ],
)
def test_the_right_things_reach_the_kernels(exchange, B, cu_seqlens, sizes):
    case = make_case(300, 1, 4, 8, 8, B=B, N=len(cu_seqlens) - 1 if cu_seqlens else B)
    ref = outputs_and_gradients(_recurrence(cu_seqlens), case)
    single = case.to(torch.float32)
    for got in run_ranks(len(sizes), _over_ranks, single, cu_seqlens, sizes, exchange):
        assert_close(got, ref, 1e-5)


@pytest.mark.parametrize("exchange", ["ring", "serial"])
@pytest.mark.parametrize("dims", [(4, 16), (5, 8), (8, 4), (8, 19)], ids=str)
def test_other_head_dimensions(dims, exchange):
    """Heads of 8 columns reach the kernels, and their states the other ranks."""
    case, sizes = make_case(300, 2, 4, *dims, N=6), [160, 60, 80]
    ref = outputs_and_gradients(_recurrence(PACKED), case)
    single = case.to(torch.float32)
    for got in run_ranks(len(sizes), _over_ranks, single, PACKED, sizes, exchange):
        assert_close(got, ref, 1e-5)


@contextmanager
def _backwards_seen(pays=True):
    """What the backwards are handed as saved."""
    seen = []
    with (
        _kernels_replaced(),
        patch.object(
            backward_kernels, "chunk_gdn_backward",
            lambda *given, **how: seen.append(given[5]) or fake_backward(*given, **how),
        ),
        patch.object(backward_kernels, "keeping_pays", lambda opened: pays),
    ):  # fmt: skip
        yield seen


def _call(*inputs):
    return chunk_gated_delta_rule(*inputs, engine="tilelang")[0]


@pytest.mark.parametrize("keep", [False, True])
def test_states_are_kept_where_somebody_says_so(keep):
    """Until the backward."""
    inputs = [x.clone().requires_grad_() for x in make_case(40, 2, 4, 8, 8).inputs[:5]]
    with _backwards_seen() as seen:
        with keep_states() if keep else nullcontext():
            o = _call(*inputs)
        o.sum().backward()
    assert [saved.entering is not None for saved in seen] == [keep]


@pytest.mark.parametrize("pays", [False, True])
def test_a_checkpointed_call_hands_its_backward_what_its_second_forward_kept(pays):
    """Though checkpoints want the same tensors saved in both forwards; and nothing of the stand-ins."""
    case, found = make_case(40, 2, 4, 8, 8), []
    for recompute in (False, True):
        inputs = [x.clone().requires_grad_() for x in case.inputs[:5]]
        with _backwards_seen(pays) as seen:
            if recompute:
                o = checkpoint(_call, *inputs, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                o = _call(*inputs)
            o.backward(case.do)
        found.append([x.grad for x in inputs])
    assert [saved.entering is not None for saved in seen] == [pays]
    assert not pays or (seen[0].entering.eq(1).all() and seen[0].vd.eq(1).all())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_heads_that_fit_go_as_they_are(monkeypatch):
    monkeypatch.setattr(head_dims, "fit", None)
    monkeypatch.setattr(head_dims, "restore", None)
    case = make_case(70, 1, 4, 8, 8)
    (got,) = run_ranks(1, _over_ranks, case.to(torch.float32), None, None, "ring")
    assert_close(got, outputs_and_gradients(_recurrence(None), case), 1e-5)


@pytest.mark.parametrize("direction", ["exchange_states", "exchange_gradients"])
def test_a_broken_exchange_of_other_head_dimensions_is_seen(monkeypatch, direction):
    case, sizes = make_case(300, 2, 4, 4, 16), [100, 130, 70]
    ref = outputs_and_gradients(_recurrence(None), case)
    true = getattr(boundary, direction)

    def dropped(*arguments):
        out = true(*arguments)
        S, *rest = out if isinstance(out, tuple) else (out,)
        S = None if S is None else torch.zeros_like(S)
        return (S, *rest) if rest else S

    monkeypatch.setattr(boundary, direction, dropped)
    got = run_ranks(3, _over_ranks, case.to(torch.float32), None, sizes, "ring")[0]
    with pytest.raises(
        AssertionError, match="'dk'" if direction == "exchange_gradients" else "'o'"
    ):
        assert_close(got, ref, 1e-5)


def _changed_in_place(rank, size, case):
    context = build_cp_context(seq_len=case.do.shape[1])
    with _kernels_replaced():
        inputs = [x.clone().requires_grad_() for x in case.inputs[:5]]
        o, _ = chunk_gated_delta_rule(*inputs, cp_context=context, engine="tilelang")
        with torch.no_grad():
            inputs[2].zero_()
        with pytest.raises(RuntimeError, match="inplace"):
            o.backward(case.do)


def test_an_input_that_changes_before_the_backward_is_noticed():
    """What is kept of it is a view."""
    run_ranks(1, _changed_in_place, make_case(70, 1, 4, 8, 8).to(torch.float32))


def _only_at_close(call, *, incoming):
    """As kernels that do not cut their main pass."""


def test_a_state_that_is_known_at_the_end():
    """In the exchange "serial" it is then sent from there."""
    case = make_case(300, 1, 4, 8, 8)
    ref = outputs_and_gradients(_recurrence(None), case)
    single, sizes = case.to(torch.float32), [100, 130, 70]
    for got in run_ranks(3, _over_ranks, single, None, sizes, "serial", _only_at_close):
        assert_close(got, ref, 1e-5)
