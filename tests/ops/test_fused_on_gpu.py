"""The layer's own kernels on a GPU: against float64 autograd of the formulas, the same bits twice,
no host synchronisation, CUDA graphs; and the layer on them against the layer in PyTorch."""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from cp_gdn import CPGatedDeltaNet, boundary, build_cp_context, chunk_gated_delta_rule
from cp_gdn.layers import gated_delta_net
from cp_gdn.ops import causal_conv1d as conv_module
from cp_gdn.ops import gated_rms_norm as norm_module
from cp_gdn.ops import gates as gates_module
from cp_gdn.ops.causal_conv1d import causal_conv1d
from cp_gdn.ops.gated_rms_norm import gated_rms_norm
from cp_gdn.ops.gates import decay_and_strength

pytestmark = pytest.mark.gpu

# Half a unit in the last place: what a 16-bit result may differ from the exact one.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SPLIT = (256, 128, 320)  # no multiple of what a CTA holds


def draw(*shape, dtype=torch.float32, seed=0):
    gen = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=gen, device="cuda").to(dtype)


def gradients(fn, inputs, grads):
    """Outputs and gradients of sum(outputs * grads)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def assert_rounded(got, ref, name):
    """fp32 by the norm; 16 bits number by number, to rounding and the error of the fp32 sums."""
    assert got.shape == ref.shape, name
    if got.dtype == torch.float32:
        error = ((got.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()
        assert error < 2e-6, (name, error)
        return
    excess = (got.double() - ref).abs() - ROUNDING[got.dtype] * ref.abs()
    assert excess.max() < 1e-5 * ref.abs().max(), (name, excess.max().item())


def check(fn, oracle, inputs, grads):
    """`fn` against `oracle` in float64, and against itself."""
    got = gradients(fn, inputs, grads)
    again = gradients(fn, inputs, grads)
    assert all(map(torch.equal, got, again))
    wide = gradients(oracle, [x.double() for x in inputs], [g.double() for g in grads])
    for i, (x, ref) in enumerate(zip(got, wide, strict=True)):
        assert x.is_contiguous()
        assert_rounded(x, ref, i)


def conv_oracle(x, weight, halo=None, positions=None):
    T = x.shape[1]
    halo = x.new_zeros(x.shape[0], 3, x.shape[2]) if halo is None else halo
    padded, y = torch.cat((halo, x), 1), 0
    for s in range(4):
        tap = padded[:, 3 - s : 3 - s + T]
        if positions is not None:
            tap = torch.where((positions >= s)[None, :, None], tap, 0)
        y = y + tap * weight[:, 3 - s]
    return F.silu(y).split(SPLIT, -1)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 3), (1, 127), (3, 131), (1, 777)])
def test_convolution(B, T, dtype):
    D = sum(SPLIT)
    grads = [draw(B, T, n, dtype=dtype, seed=1) for n in SPLIT]
    inputs = [draw(B, T, D, dtype=dtype), draw(D, 4)]

    def fused(x, weight):
        return causal_conv1d(x, weight, split=SPLIT, engine="tilelang")

    check(fused, conv_oracle, inputs, grads)


@pytest.mark.parametrize("lengths", [[1] * 5 + [2, 3, 122, 1, 130, 64], [200, 1, 1, 55, 3]])
def test_convolution_of_packed_documents(lengths):
    T, D, dtype = sum(lengths), sum(SPLIT), torch.bfloat16
    offsets = torch.tensor([0, *lengths]).cumsum(0).tolist()
    context = build_cp_context(seq_len=T, cu_seqlens=offsets, device="cuda")
    grads = [draw(1, T, n, dtype=dtype, seed=1) for n in SPLIT]

    def fused(x, weight):
        return causal_conv1d(x, weight, split=SPLIT, cp_context=context, engine="tilelang")

    def oracle(x, weight):
        return conv_oracle(x, weight, positions=context.position_ids)

    check(fused, oracle, [draw(1, T, D, dtype=dtype), draw(D, 4)], grads)


@pytest.mark.parametrize("reach", [1, 2, 3, None])
@pytest.mark.parametrize("T", [2, 260])
def test_halo_from_a_left_neighbour(T, reach, monkeypatch):
    """`reach` tokens of the halo belong to the document that enters (None: one unpacked document)."""
    D, dtype = sum(SPLIT), torch.bfloat16
    halo = draw(1, 3, D, dtype=dtype, seed=2)
    positions = None
    if reach is not None:
        halo[:, : 3 - reach] = 0
        positions = torch.arange(T, device="cuda") + reach
        positions[T // 2 :] -= reach + T // 2
    context = build_cp_context(seq_len=T, device="cuda")
    if positions is not None:
        context = build_cp_context(seq_len=T, cu_seqlens=[0, T // 2, T], device="cuda")
        object.__setattr__(context, "position_ids", positions)
    returned, successor = [], 0.0

    def give_back(dhalo, context, width):
        returned.append(dhalo)
        return [(slice(T - 1, T), torch.full_like(dhalo[:, :1], successor))]

    monkeypatch.setattr(type(context), "any_crossing", property(lambda self: True))
    monkeypatch.setattr(boundary, "exchange_halo", lambda x, context, width: halo)
    monkeypatch.setattr(boundary, "return_halo", give_back)
    inputs = [draw(1, T, D, dtype=dtype), draw(D, 4)]
    grads = [draw(1, T, n, dtype=dtype, seed=1) for n in SPLIT]

    def fused(x, weight):
        return causal_conv1d(x, weight, split=SPLIT, cp_context=context, engine="tilelang")

    def oracle(x, weight, halo):
        return conv_oracle(x, weight, halo, positions)

    *outputs, dx, dweight = gradients(fused, inputs, grads)
    *expected, dx_ref, dweight_ref, dhalo_ref = gradients(
        oracle, [t.double() for t in (*inputs, halo)], [g.double() for g in grads]
    )
    (dhalo,) = returned
    expected += [dx_ref, dhalo_ref, dweight_ref]
    for i, (x, ref) in enumerate(zip([*outputs, dx, dhalo, dweight], expected, strict=True)):
        assert_rounded(x, ref, i)
    successor = 1.0  # what the right neighbour returns is added to the last tokens
    again = gradients(fused, inputs, grads)[3]
    dx[:, T - 1] += 1
    assert torch.equal(again, dx)


def gates_oracle(a, b, A_log, dt_bias):
    return -A_log.exp() * F.softplus(a + dt_bias), b.sigmoid()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("B", "T", "heads"), [(1, 1, 32), (2, 333, 32), (1, 1001, 6)])
def test_gates(B, T, heads, dtype):
    """Heads from no decay at all (g about -1e-6) to a strong one."""
    bias = torch.linspace(-14, 4, heads, device="cuda")
    inputs = [draw(B, T, heads, dtype=dtype), draw(B, T, heads, dtype=dtype, seed=1)]
    inputs += [draw(heads), bias]
    grads = [draw(B, T, heads, seed=2), draw(B, T, heads, seed=3)]

    def fused(*inputs):
        return decay_and_strength(*inputs, engine="tilelang")

    check(fused, gates_oracle, inputs, grads)
    g = fused(*inputs)[0]
    ref = gates_oracle(*(x.double() for x in inputs))[0]
    assert ((g - ref) / ref).abs().max() < 2e-6  # every head by its own measure


def norm_oracle(x, gate, weight):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight * F.silu(gate),)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 128), (2, 37, 5, 128), (1, 999, 4, 128), (1, 7, 3, 64)]
)
def test_gated_norm(shape, dtype):
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1])]

    def fused(x, gate, weight):
        return (gated_rms_norm(x, gate, weight, engine="tilelang"),)

    check(fused, norm_oracle, inputs, [draw(*shape, dtype=dtype, seed=2)])


@contextmanager
def in_pytorch():
    """Convolution, gates and norm of a layer as on a CPU."""
    with ExitStack() as stack:
        for module in (conv_module, gates_module, norm_module):
            stack.enter_context(patch.object(module, "obstacle", lambda x: "a test forbids it"))
        yield


def layer_run(layer, x, dy, context, autocast=True):
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = layer(x, cp_context=context)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))
    return [y.detach(), *grads]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 3, 64, 500, 501, 777]])
def test_the_layer_is_as_near_to_float64_as_in_pytorch(cu_seqlens):
    """bf16 autocast over fp32 parameters; the recurrence in fp32 in both."""
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(256, 2, 4).cuda()
    context = build_cp_context(seq_len=777, cu_seqlens=cu_seqlens, device="cuda")
    x, dy = draw(1, 777, 256), draw(1, 777, 256, seed=1)

    def in_fp32(*inputs, **options):
        return chunk_gated_delta_rule(*inputs, **{**options, "engine": "torch"})

    with patch.object(gated_delta_net, "chunk_gated_delta_rule", in_fp32):
        fused = layer_run(layer, x, dy, context)
        with in_pytorch():
            eager = layer_run(layer, x, dy, context)
        exact = layer_run(layer.double(), x.double(), dy.double(), context, autocast=False)
    for i, (a, b, ref) in enumerate(zip(fused, eager, exact, strict=True)):
        ours, theirs = (((t.double() - ref).norm() / ref.norm()).item() for t in (a, b))
        # dt_bias and A_log: four sums of both signs, a few draws of the noise of all that is before
        bound = 1.1 * theirs + 1e-4 if ref.numel() > 4 else 5e-2
        assert a.dtype == b.dtype and ours < bound, (i, ours, theirs)


@pytest.mark.parametrize("dims", [(128, 128), (64, 256)], ids=str)
def test_a_step_of_the_layer_never_waits_and_is_captured(dims):
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(256, 2, 4, *dims, engine="tilelang").cuda()
    context = build_cp_context(seq_len=500, cu_seqlens=[0, 3, 200, 500], device="cuda")
    x, dy = draw(1, 500, 256), draw(1, 500, 256, seed=1)
    torch.cuda.synchronize()  # another stream does not wait for what fills these
    with torch.cuda.stream(torch.cuda.Stream()):
        expected = layer_run(layer, x, dy, context)
        assert all(t.isfinite().all() for t in expected)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = layer_run(layer, x, dy, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, expected, again))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = layer_run(layer, x, dy, context)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, expected, captured))
