"""Every launch fits its kernel's signature: the host side of forward and backward, run without a GPU.

Instead of being launched a kernel is compared with what it is called with: number, dtypes, ranks and sizes of its
arguments, sizes of the same name being equal, everything contiguous.
"""

import functools

import pytest
import torch

pytest.importorskip("tilelang", reason="tilelang is not installed")
from tilelang import tvm

from cp_gdn.kernels import backward, backward_opened, backward_walk, forward, layout
from cp_gdn.kernels.plan import Plan

pytestmark = pytest.mark.timeout(300)

FACTORIES = {}  # by id: they have no hash
PACKED = [0, 70, 71, 200, 200, 515]


class Nowhere:
    """A stream and an event of no device."""

    device = torch.device("cpu")

    def record(self, stream):
        pass

    def wait(self, stream):
        pass


@functools.cache
def signature(key, **options):
    function = FACTORIES[key].get_tir(**options)
    shapes = {}  # a macro's loop over tensors gives them one name, by which TileLang checks them
    for buffer in function.buffer_map.values():
        shape = str(buffer.shape)
        assert shapes.setdefault(buffer.name, shape) == shape, (buffer.name, shape)
    return [(p, function.buffer_map.get(p)) for p in function.params]


def compare(factory, options, arguments):
    FACTORIES[id(factory)] = factory
    parameters = signature(id(factory), **options)
    assert len(arguments) == len(parameters), (len(arguments), len(parameters))
    sizes = {}
    for value, (parameter, buffer) in zip(arguments, parameters, strict=True):
        name = str(parameter)
        if buffer is None:
            assert isinstance(value, float if parameter.dtype == "float32" else int), (name, value)
            continue
        assert str(value.dtype) == f"torch.{buffer.dtype}", (name, value.dtype, buffer.dtype)
        assert value.is_contiguous(), name
        assert value.dim() == len(buffer.shape), (name, value.shape, buffer.shape)
        for size, expected in zip(value.shape, buffer.shape, strict=True):
            if isinstance(expected, tvm.tirx.Var):
                expected = sizes.setdefault(str(expected), size)
            assert size == int(expected), (name, value.shape, buffer.shape, sizes)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were called."""
    names = []

    def ready(factory, **options):
        def call(*arguments):
            compare(factory, options, arguments)
            names.append(factory.func.__name__)

        return call

    for module in (layout, backward_opened, backward_walk):
        monkeypatch.setattr(module, "ready", ready)
    for module in (layout, backward_opened):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(module, "_layouts", {})
    monkeypatch.setattr(layout, "check", lambda *arguments: None)
    monkeypatch.setattr(backward, "side_stream", lambda device: Nowhere())
    monkeypatch.setattr(backward_opened, "current_stream", lambda device: Nowhere())
    monkeypatch.setattr(torch.cuda, "Event", Nowhere)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    return names


def draw(B, T, Hk, Hv):
    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(B, T, *shape, dtype=dtype)

    gates = zeros(Hv, dtype=torch.float32), zeros(Hv, dtype=torch.float32)
    return [zeros(Hk, 128), zeros(Hk, 128), zeros(Hv, 128), *gates]


def states(count, heads):
    return torch.zeros(count, heads, 128, 128)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("large", [2**30, 2**16], ids=["whole", "in blocks"])
@pytest.mark.parametrize(
    ("B", "T", "heads", "cu_seqlens"),
    [
        (1, 1000, (2, 4), None),
        (3, 200, (2, 4), None),
        (1, PACKED[-1], (1, 4), PACKED),
        (1, 4096, (16, 32), None),
        (1, 1000, (16, 64), None),
    ],
)
def test_one_call(launched, monkeypatch, B, T, heads, cu_seqlens, large, normalize):
    monkeypatch.setattr(backward_opened, "LARGE", large)
    inputs = draw(B, T, *heads)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    initial = states(N, heads[1])
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    how = {"initial_state": initial, "use_qk_l2norm_in_kernel": normalize}
    o, final, saved = forward.chunk_gdn_forward(
        *inputs, cu_seqlens=cu, output_final_state=True, **how
    )
    assert o.shape == inputs[2].shape and final.shape == initial.shape
    assert "prepare" in launched and {"recurrence", "recurrence_alone"} & set(launched)
    assert launched.count("query_norms") == normalize
    gradients = backward.chunk_gdn_backward(*inputs, saved, o, final, **how)
    assert [g.shape for g in gradients] == [*(x.shape for x in inputs), initial.shape]
    assert {"replay", "reverse", "gradients", "beta_gradient"} <= set(launched)


@pytest.mark.parametrize(("longest", "cut"), [(None, True), (315, False), (32000, True)])
def test_documents_of_known_lengths(launched, longest, cut):
    """Neither summaries nor states of segments if none is cut; no gradient of states that were not given."""
    inputs, documents = draw(1, 32768, 2, 4), len(PACKED) - 1
    cu = torch.tensor([*PACKED[:-1], 32768], dtype=torch.int32)
    how = {"max_seqlen": longest, "order": torch.arange(documents, dtype=torch.int32)}
    o, _, saved = forward.chunk_gdn_forward(*inputs, cu_seqlens=cu, **how)
    assert ("summary" in launched) == ("scan" in launched) == cut
    assert (saved.order is None) == cut and (len(saved.states) > 1) == cut
    assert len(backward.chunk_gdn_backward(*inputs, saved, o).dh0) == 0


@pytest.mark.parametrize("plan", [None, (3, 1, False)])
@pytest.mark.parametrize("heads", [(2, 4), (16, 64)])
def test_a_call_that_keeps_states(launched, heads, plan):
    """Nothing is replayed; of one sequence also where the main pass runs in launches one after another."""
    inputs = draw(1, 1000, *heads)
    o, _, saved = forward.chunk_gdn_forward(*inputs, keep_states=True, plan=plan and Plan(*plan))
    assert saved.entering.shape[0] == saved.vd.shape[0] == saved.a.shape[0]
    gradients = backward.chunk_gdn_backward(*inputs, saved, o)
    assert [g.shape for g in gradients[:5]] == [x.shape for x in inputs]
    assert launched.count("recurrence_alone") == (6 if plan else 1)
    assert "reverse" in launched and "replay" not in launched


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("heads", [(2, 4), (16, 64)])
@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 1), (1, 0)])
def test_stages(launched, heads, left, right, normalize, at_once):
    q, *inputs = draw(1, 1000, *heads)
    ends = {"open_left": left, "open_right": right, "use_qk_l2norm_in_kernel": normalize}
    opened = forward.open_forward(*inputs, **ends)
    forward.leaving_summary(opened, transition=bool(left))
    late = states(left, heads[1]) if left else None
    forward.norm_queries(opened, q)
    o, _, saved = forward.close_forward(opened, q, incoming=late)
    begun = backward.open_backward(q, *inputs, saved, o, initial_state=late, **ends)
    backward.begin_replay(begun, at_once=at_once)
    early = launched.count("replay")
    assert early == (heads == (2, 4) and (at_once or not left))
    assert backward.entering_summary(begun).shape[0] == left
    backward.replay(begun)
    assert launched.count("replay") == 1
    incoming = states(right, heads[1]) if right else None
    gradients = backward.close_backward(begun, incoming=incoming)
    assert [g.shape for g in gradients[:5]] == [x.shape for x in (q, *inputs)]
    assert launched.count("query_norms") == normalize


@pytest.mark.parametrize("change", [None, "shape", "dtype", "option", "bad"])
def test_calls_of_the_same_kind_are_checked_once(launched, monkeypatch, change):
    checked = []
    monkeypatch.setattr(layout, "check", lambda *arguments: checked.append(arguments))
    q, k, v, g, beta = draw(1, 100, 2, 4)
    how = {"use_qk_l2norm_in_kernel": True}
    forward.chunk_gdn_forward(q, k, v, g, beta, **how)
    if change == "shape":
        q, k, v, g, beta = draw(1, 101, 2, 4)
    elif change == "dtype":
        g = g.bfloat16()
    elif change == "option":
        how = {}
    elif change == "bad":
        with pytest.raises(ValueError, match="expected"):
            forward.chunk_gdn_forward(q[:, 1:], k, v, g, beta, **how)
        return
    forward.chunk_gdn_forward(q, k, v, g, beta, **how)
    assert len(checked) == 1 + (change is not None)


def test_a_wrong_argument_is_seen(launched, monkeypatch):
    true = forward.pack

    def wrong(*arguments):
        packed = true(*arguments)
        return packed._replace(cu=packed.cu.long())

    monkeypatch.setattr(forward, "pack", wrong)
    with pytest.raises(AssertionError, match="cu"):
        forward.chunk_gdn_forward(*draw(1, 100, 2, 4))
