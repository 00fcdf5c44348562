"""What the operators around the rule do without a GPU: PyTorch's formulas, refusals, and the path to
the kernels on stand-ins of them."""

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cp_gdn import CPGatedDeltaNet, boundary, build_cp_context
from cp_gdn.ops import causal_conv1d as conv_module
from cp_gdn.ops import gated_rms_norm as norm_module
from cp_gdn.ops import gates as gates_module
from cp_gdn.ops.autocast import share_copy
from cp_gdn.ops.causal_conv1d import causal_conv1d
from cp_gdn.ops.gated_rms_norm import gated_rms_norm
from cp_gdn.ops.gates import decay_and_strength

from ..distributed import run_ranks
from ..layers.common import relative


def no_obstacle(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setattr(module, "obstacle", lambda x: None)


def stand_in(monkeypatch, name, **functions):
    module = ModuleType(f"cp_gdn.kernels.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def convolve(x, halo, weight, positions):
    padded, T = torch.cat((halo, x), 1), x.shape[1]
    y = padded[:, 3:] * weight[:, 3]
    for s in range(1, 4):
        tap = padded[:, 3 - s : 3 - s + T]
        inside = True if positions is None else (positions >= s)[None, :, None]
        y = y + torch.where(torch.as_tensor(inside), tap, 0) * weight[:, 3 - s]
    return F.silu(y)


def conv_kernels(monkeypatch):
    def forward(x, halo, weight, positions, sizes):
        y = convolve(x.float(), halo.float(), weight, positions).to(x.dtype)
        return tuple(part.contiguous() for part in y.split(sizes, -1))

    def backward(x, halo, weight, positions, grads):
        with torch.enable_grad():
            leaves = [t.detach().float().requires_grad_() for t in (x, halo, weight)]
            y = convolve(*leaves, positions)
            dx, dhalo, dw = torch.autograd.grad(y, leaves, torch.cat(grads, -1).float())
        return dx.to(x.dtype), dhalo.to(x.dtype), dw

    stand_in(monkeypatch, "conv", causal_conv_silu=forward)
    stand_in(monkeypatch, "conv_backward", causal_conv_silu_backward=backward)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 3, 20, 40)])
def test_convolution_through_the_kernels_path(monkeypatch, cu_seqlens):
    """Against the path in PyTorch: results, gradients, and what the halo's gradient comes back to."""
    context = build_cp_context(seq_len=40, cu_seqlens=cu_seqlens)
    halo = torch.randn(1, 3, 24) * (cu_seqlens is None)
    monkeypatch.setattr(type(context), "any_crossing", property(lambda self: True))
    monkeypatch.setattr(boundary, "exchange_halo", lambda x, context, width: halo.to(x.dtype))
    returned = []

    def give_back(dhalo, context, width):
        returned.append(dhalo)
        return [(slice(37, 40), 2 * torch.ones_like(dhalo))]

    monkeypatch.setattr(boundary, "return_halo", give_back)
    conv_kernels(monkeypatch)
    x, weight, dy = torch.randn(1, 40, 24), torch.randn(24, 1, 4), torch.randn(1, 40, 24)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        parts = causal_conv1d(*leaves, split=(4, 8, 12), cp_context=context)
        assert [part.shape[2] for part in parts] == [4, 8, 12]
        return [*parts, *torch.autograd.grad(parts, leaves, dy.split((4, 8, 12), -1))]

    eager = run()
    no_obstacle(monkeypatch, conv_module)
    fused = run()
    assert all(part.is_contiguous() for part in fused[:3])
    assert all(relative(a, b) < 1e-6 for a, b in zip(fused, eager, strict=True))
    assert len(returned) == 2 and torch.allclose(*returned, atol=1e-6)


def _on_ranks(rank, size, x, weight, dy, cu_seqlens, sizes):
    """Parts of this rank, and gradients summed over the ranks."""
    context = build_cp_context(
        dist.group.WORLD, seq_len=x.shape[1], cu_seqlens=cu_seqlens, shard_sizes=sizes
    )
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    parts = causal_conv1d(context.shard(leaves[0]), leaves[1], split=(4, 4, 4), cp_context=context)
    grads = torch.autograd.grad(parts, leaves, context.shard(dy).split((4, 4, 4), -1))
    for grad in grads:
        dist.all_reduce(grad)
    return [context.gather(part).detach() for part in parts], grads


@pytest.mark.parametrize(
    ("B", "cu_seqlens", "sizes"),
    [(2, None, (20, 20)), (1, None, (1, 2, 37)), (1, (0, 19, 22, 40), (20, 1, 19))],
)
@pytest.mark.parametrize("broken", [False, True])
def test_halos_between_ranks_through_the_kernels_path(monkeypatch, B, cu_seqlens, sizes, broken):
    """Shards shorter than the filter, documents that end at a cut; a halo that is dropped is seen."""
    x, weight, dy = torch.randn(B, 40, 12), torch.randn(12, 4), torch.randn(B, 40, 12)
    alone = build_cp_context(seq_len=40, cu_seqlens=cu_seqlens)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    ref = causal_conv1d(*leaves, split=(4, 4, 4), cp_context=alone)
    ref_grads = torch.autograd.grad(ref, leaves, dy.split((4, 4, 4), -1))
    conv_kernels(monkeypatch)
    no_obstacle(monkeypatch, conv_module)
    if broken:
        monkeypatch.setattr(boundary, "return_halo", lambda *args: [])
    for parts, grads in run_ranks(len(sizes), _on_ranks, x, weight, dy, cu_seqlens, sizes):
        assert all(relative(a, b) < 1e-6 for a, b in zip(parts, ref, strict=True))
        assert (relative(grads[0], ref_grads[0]) < 1e-6) != broken
        assert relative(grads[1], ref_grads[1]) < 1e-6


def test_what_the_convolution_kernel_does_not_take(monkeypatch):
    no_obstacle(monkeypatch, conv_module)
    x, w = torch.randn(1, 5, 12), torch.randn(12, 4)
    for kwargs in (
        {},
        {"split": (6, 6)},
        {"split": (2, 2, 8)},
        {"split": (4, 4, 4), "activation": None},
        {"split": (4, 4, 4), "bias": torch.zeros(12)},
    ):
        bias = kwargs.pop("bias", None)
        causal_conv1d(x, w, bias, **kwargs)
        with pytest.raises(
            ValueError, match="it takes W = 4, SiLU, no bias and a split into three"
        ):
            causal_conv1d(x, w, bias, engine="tilelang", **kwargs)
    with pytest.raises(ValueError, match=r"split=\(4, 4\) of 12 channels"):
        causal_conv1d(x, w, split=(4, 4))


def test_gates_and_norm_through_the_kernels_path(monkeypatch):
    stand_in(
        monkeypatch,
        "gates",
        decay_and_strength=lambda a, b, A, dt: (a.float() * A, b.float() * dt),
        decay_and_strength_backward=lambda a, b, A, dt, dg, db: (
            (dg * A).to(a.dtype), (db * dt).to(b.dtype), (dg * a).sum((0, 1)), (db * b).sum((0, 1)),
        ),
    )  # fmt: skip
    stand_in(
        monkeypatch,
        "norm",
        gated_norm=lambda x, z, w, eps: (x * z * w).to(x.dtype),
        gated_norm_backward=lambda x, z, w, dy, eps: (
            (dy * z * w).to(x.dtype), (dy * x * w).to(x.dtype), (dy * x * z).sum((0, 1)).float(),
        ),
    )  # fmt: skip
    no_obstacle(monkeypatch, gates_module, norm_module)
    a, b = (torch.randn(2, 3, 4).bfloat16().requires_grad_() for _ in range(2))
    A, dt = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g, beta = decay_and_strength(a, b, A, dt, engine="tilelang")
    assert torch.equal(g, a.float() * A.float())
    (g.sum() + 2 * beta.sum()).backward()
    assert torch.equal(b.grad, (2 * dt.float()).bfloat16().expand(2, 3, 4))
    assert A.grad.dtype == torch.float64 and torch.allclose(A.grad, a.double().sum((0, 1)))

    w = torch.randn(4, requires_grad=True)
    gated_rms_norm(a[..., None].expand(2, 3, 4, 4), a[..., None].expand(2, 3, 4, 4), w)  # D = 4
    x, z = (torch.randn(2, 3, 64).bfloat16().requires_grad_() for _ in range(2))
    w = torch.randn(64, requires_grad=True)
    y = gated_rms_norm(x, z, w, engine="tilelang")
    y.sum().backward()
    assert torch.equal(y, (x * z * w).bfloat16())
    assert torch.equal(z.grad, (x * w).bfloat16()) and w.grad.dtype == torch.float32


def test_formulas():
    a, b = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    A, dt = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    g, beta = decay_and_strength(a, b, A, dt)
    assert torch.allclose(g, -A.exp() * torch.log1p((a + dt).exp()))
    assert torch.allclose(beta, 1 / (1 + (-b).exp()))
    x, z, w = (torch.randn(*s, dtype=torch.float64) for s in ((2, 7, 5), (2, 7, 5), (5,)))
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(gated_rms_norm(x, z, w), x / rms * w * z / (1 + (-z).exp()))
    low = decay_and_strength(a.bfloat16(), b.bfloat16(), A.float(), dt.float())
    assert [t.dtype for t in low] == [torch.float32] * 2
    assert gated_rms_norm(x.bfloat16(), z.bfloat16(), w.float()).dtype == torch.bfloat16


def test_refusals():
    x = torch.randn(1, 4, 12)
    for call in (
        lambda engine: causal_conv1d(x, torch.randn(12, 4), split=(4, 4, 4), engine=engine),
        lambda engine: decay_and_strength(x, x, x[0, 0], x[0, 0], engine=engine),
        lambda engine: gated_rms_norm(x, x, x[0, 0], engine=engine),
    ):
        with pytest.raises(ValueError, match="engine='cuda' is unknown; choose torch, tilelang"):
            call("cuda")
        with pytest.raises(ValueError, match="cannot take this call: it runs on Hopper GPUs"):
            call("tilelang")
    with pytest.raises(ValueError, match=r"expected \[B, T, Hv\] twice"):
        decay_and_strength(x, x[:, :2], x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match=r"expected \[\.\.\., D\] twice"):
        gated_rms_norm(x, x, x[0, 0, :3])


def test_a_layer_passes_its_engine_on():
    with pytest.raises(ValueError, match="engine='fast' is unknown"):
        CPGatedDeltaNet(16, 2, 4, 8, 8, engine="fast")
    x = torch.randn(1, 10, 16)
    torch.manual_seed(0)
    plain = CPGatedDeltaNet(16, 2, 4, 8, 8)
    torch.manual_seed(0)
    asked = CPGatedDeltaNet(16, 2, 4, 8, 8, engine="torch")
    assert plain.engine == "auto" and torch.equal(plain(x), asked(x))
    with pytest.raises(ValueError, match='engine="tilelang" cannot take this call'):
        CPGatedDeltaNet(16, 2, 4, 8, 8, engine="tilelang")(x)


def test_a_shared_copy_is_autocast_s_own():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    layers = [torch.nn.Linear(16, n) for n in (4, 8, 3)]

    def run(shared: bool):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = 1 * leaf  # as in a model: autocast caches its copies of leaves
            copies = share_copy(hidden, 3) if shared else (hidden,) * 3
            outputs = [layer(copy) for layer, copy in zip(layers, copies, strict=True)]
        grads = torch.autograd.grad(
            sum(y.float().square().sum() for y in outputs), [leaf, *(m.weight for m in layers)]
        )
        return [*outputs, *grads]

    ours, theirs = run(True), run(False)
    assert ours[3].dtype == torch.float32
    assert all(relative(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))
    assert all(copy is x for copy in share_copy(x, 2))
    with torch.autocast("cpu", torch.bfloat16):
        first, second = share_copy(x, 2)
        assert first.dtype == torch.bfloat16 and first.data_ptr() == second.data_ptr()
        low = x.bfloat16()
        assert share_copy(low, 2)[1] is low
