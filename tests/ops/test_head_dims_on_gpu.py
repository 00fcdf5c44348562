"""The tilelang engine with heads of other dimensions, against the float64 recurrence of the same numbers."""

import pytest
import torch

from cp_gdn import CPGatedDeltaNet, build_cp_context, chunk_gated_delta_rule

from ..cases import Case, make_case
from .test_fused_on_gpu import draw, layer_run
from .test_head_dims import DIMS
from .test_on_gpu import (
    PACKED,
    gradients_of_the_recurrence,
    gradients_over_virtual_ranks,
    kernel_gradients,
    overall_errors,
)

pytestmark = pytest.mark.gpu


def rounded(dims, *, key_heads=2, B=1, N=None) -> Case:
    """Slow, moderate, strong and no decay; q, k, v as the kernels are given them."""
    case = make_case(300, key_heads, 4, *dims, B=B, N=N)
    q, k, v, *others = case.inputs
    low = [x.bfloat16() for x in (q, k, v)] + [x.float() for x in others]
    return Case(tuple(low), case.do, case.dfinal)


def check(got, ref):
    errors = overall_errors(got, ref)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors["o"], errors["final_state"]) < 5e-3, errors
    assert max(errors.values()) < 8e-3, errors


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(("B", "cu_seqlens"), [(2, None), (1, PACKED)], ids=["batch", "packed"])
def test_against_the_recurrence(dims, B, cu_seqlens):
    case = rounded(dims, B=B, N=len(cu_seqlens) - 1 if cu_seqlens else B)
    got = kernel_gradients(case, cu_seqlens=cu_seqlens)
    assert [x.shape for x in got[2:]] == [x.shape for x in case.inputs]
    check(got, gradients_of_the_recurrence(case, cu_seqlens))


def test_eight_heads_of_128_share_a_key_head():
    case = rounded((128, 256), key_heads=1)
    check(kernel_gradients(case), gradients_of_the_recurrence(case))


def test_auto_takes_the_kernels():
    x = [x.cuda() for x in rounded((64, 256)).inputs[:5]]
    auto, kernels, torch_engine = (
        chunk_gated_delta_rule(*x, engine=engine)[0] for engine in ("auto", "tilelang", "torch")
    )
    assert torch.equal(auto, kernels) and not torch.equal(auto, torch_engine)


def test_wider_keys_are_refused():
    x = [x.cuda() for x in rounded((192, 128)).inputs[:5]]
    with pytest.raises(ValueError, match="up to 128 columns, not K = 192"):
        chunk_gated_delta_rule(*x, engine="tilelang")


@pytest.mark.parametrize("exchange", ["ring", "serial"])
@pytest.mark.parametrize(
    ("cu_seqlens", "sizes"), [(None, [100, 130, 70]), (PACKED, [160, 60, 80])], ids=str
)
def test_over_virtual_ranks(cu_seqlens, sizes, exchange):
    case = rounded((64, 256), N=len(cu_seqlens) - 1 if cu_seqlens else 1)
    ref = gradients_of_the_recurrence(case, cu_seqlens)
    for got in gradients_over_virtual_ranks(case, 3, exchange, cu_seqlens, sizes):
        check(got, ref)


def test_a_layer_takes_them():
    """bf16 autocast over fp32 parameters, the kernels and the torch engine against float64."""
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(256, 2, 4, head_k_dim=64, head_v_dim=256).cuda()
    context = build_cp_context(seq_len=777, cu_seqlens=[0, 1, 3, 64, 500, 777], device="cuda")
    x, dy = draw(1, 777, 256), draw(1, 777, 256, seed=1)
    layer.engine = "tilelang"
    kernels = layer_run(layer, x, dy, context)
    layer.engine = "torch"
    plain = layer_run(layer, x, dy, context)
    exact = layer_run(layer.double(), x.double(), dy.double(), context, autocast=False)
    for i, (a, b, ref) in enumerate(zip(kernels, plain, exact, strict=True)):
        ours, theirs = (((t.double() - ref).norm() / ref.norm()).item() for t in (a, b))
        assert ours < (1.5 * theirs + 8e-3 if ref.numel() > 4 else 5e-2), (i, ours, theirs)
