"""Other head dimensions on heads of 128: the operator on the mapped inputs is the operator, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from cp_gdn import chunk_gated_delta_rule
from cp_gdn.ops import engines, head_dims

from ..cases import assert_close, make_case, outputs_and_gradients

DIMS = ((64, 64), (128, 256), (64, 128), (128, 64), (128, 192))
PACKED = [0, 10, 75, 76, 150]


def on_kernel_heads(*inputs, **options):
    """The call as the tilelang engine makes it, on the torch engine."""
    q, v = inputs[0], inputs[2]
    *mapped, h0 = head_dims.fit(*inputs)
    assert mapped[0].shape[3] == mapped[2].shape[3] == 128 and h0.shape[2:] == (128, 128)
    o, final = chunk_gated_delta_rule(
        *mapped, q.shape[3] ** -0.5, h0, output_final_state=True, engine="torch", **options
    )
    return head_dims.restore(o, final, q.shape[3], v.shape[3])


def as_it_is(*inputs, **options):
    return chunk_gated_delta_rule(
        *inputs[:5], None, inputs[5], output_final_state=True, engine="torch", **options
    )


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize(
    ("B", "cu_seqlens", "normalize"), [(2, None, True), (1, PACKED, False)], ids=["batch", "packed"]
)
def test_the_mapped_call_is_the_call(dims, B, cu_seqlens, normalize):
    case = make_case(150, 2, 4, *dims, B=B, N=len(cu_seqlens) - 1 if cu_seqlens else B)
    if normalize:
        case = case._replace(inputs=(3 * case.inputs[0], 0.2 * case.inputs[1], *case.inputs[2:]))
    options = {"cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": normalize}
    ref = outputs_and_gradients(lambda *x: as_it_is(*x, **options), case)
    assert_close(outputs_and_gradients(lambda *x: on_kernel_heads(*x, **options), case), ref, 1e-12)


def test_heads_in_another_order_are_seen():
    """Parts of a head beside each other, not the heads of a part: key heads and gates would be wrong."""
    case = make_case(70, 2, 4, 64, 256)
    ref = outputs_and_gradients(as_it_is, case)

    def mixed(*inputs):
        v = inputs[2].unflatten(3, (2, 128)).transpose(2, 3).reshape_as(inputs[2])
        return on_kernel_heads(*inputs[:2], v, *inputs[3:])

    with pytest.raises(AssertionError, match="'o'"):
        assert_close(outputs_and_gradients(mixed, case), ref, 1e-2)


def test_without_states_and_with_16_bit_gates():
    case = make_case(70, 1, 2, 32, 200).to(torch.bfloat16)
    *mapped, h0 = head_dims.fit(*case.inputs[:5], None)
    assert h0 is None and {x.dtype for x in mapped} == {torch.bfloat16}
    o, final = head_dims.restore(mapped[2], None, 32, 200)
    assert final is None and torch.equal(o, case.inputs[2])


def test_what_fits_is_not_copied():
    q, k, v, g, beta, h0 = make_case(10, 1, 2, 128, 256).inputs
    mapped = head_dims.fit(q, k, v, g, beta, h0)
    assert mapped[0] is q and mapped[1] is k and mapped[2].data_ptr() == v.data_ptr()
    assert head_dims.restore(mapped[2], None, 128, 256)[0].data_ptr() == v.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [3, 8, 20, 128, 130, 200])
def test_columns_are_those_of_pad(dtype, columns):
    """Whether 16 bytes can be moved at a time or not: whole rows, odd offsets, parts of a tensor."""
    T = 6
    whole = torch.randn(T + 1, 2, columns).to(dtype)
    for x in (whole, whole[1:], whole.flatten()[1 : 1 + T * columns].view(T, columns), whole.mT):
        x = x.detach().requires_grad_()
        for count in (64, 128, 256):
            got, ref = head_dims._columns(x, count), F.pad(x, (0, count - x.shape[-1]))
            dy = torch.randn_like(ref)
            assert torch.equal(got, ref)
            pair = [torch.autograd.grad(y, x, dy)[0] for y in (got, ref)]
            assert torch.equal(*pair)


def test_wider_keys_are_refused(monkeypatch):
    monkeypatch.setattr(engines, "obstacle", lambda x: None)
    case = make_case(10, 1, 2, 192, 128)
    with pytest.raises(ValueError, match=r"up to 128 columns, not K = 192; use engine=\"torch\""):
        chunk_gated_delta_rule(*case.inputs[:5], engine="tilelang")
    assert chunk_gated_delta_rule(*case.inputs[:5], engine="auto")[0].shape == case.do.shape
