"""Inputs, comparisons and the cuts that every test of the operator uses.

Heads differ in decay on purpose: almost none (g to -1e-4), moderate, strong (g to -5) and exactly none (g ==
0). A dropped
state is invisible behind strong decay, so no comparison may be blind to the slow heads: errors are taken per head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DECAYS = (1e-4, 1.0, 5.0, 0.0)
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")


class Case(NamedTuple):
    """Inputs of the operator in its own order, and the gradients fed into its two outputs."""

    inputs: tuple[Tensor, ...]  # q, k, v, g, beta, initial_state
    do: Tensor
    dfinal: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(
            tuple(x.to(dtype) for x in self.inputs), self.do.to(dtype), self.dfinal.to(dtype)
        )


def make_case(
    T: int, Hk: int, Hv: int, K: int, V: int, *, B: int = 1, N: int | None = None, seed: int = 0
) -> Case:
    """fp64 inputs with slow, moderate, strong and absent decay side by side, repeated keys and beta exactly 0 and 1."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=torch.float64)

    q, k, v = normal(B, T, Hk, K), normal(B, T, Hk, K), normal(B, T, Hv, V)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    k[:, T // 3 : T // 3 + 5] = k[:, T // 3 : T // 3 + 1]
    decay = torch.tensor([DECAYS[h % len(DECAYS)] for h in range(Hv)], dtype=torch.float64)
    g = -uniform(B, T, Hv) * decay
    beta = uniform(B, T, Hv)
    beta[:, ::7], beta[:, 3::11] = 0.0, 1.0
    N = B if N is None else N
    return Case((q, k, v, g, beta, normal(N, Hv, K, V)), normal(B, T, Hv, V), normal(N, Hv, K, V))


def outputs_and_gradients(fn: Callable, case: Case) -> list[Tensor]:
    """[o, final_state, dq, dk, dv, dg, dbeta, dinitial_state] of ``fn(*inputs) -> (o, final_state)``."""
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    o, final = fn(*inputs)
    loss = (o * case.do).sum() + (final * case.dfinal).sum()
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, inputs)]


def relative_error(x: Tensor, ref: Tensor) -> float:
    """||x - ref|| / ||ref||, the worst head where there is a head dimension (2 of [B, T, H, ...]); NaN counts
    as infinite."""
    assert x.shape == ref.shape, f"shapes differ: {tuple(x.shape)} and {tuple(ref.shape)}"
    x, ref = x.double(), ref.double()
    dims = [d for d in range(ref.ndim) if d != 2] if ref.ndim >= 3 else list(range(ref.ndim))
    error = (x - ref).square().sum(dims).sqrt()
    size = ref.square().sum(dims).sqrt()
    floor = 1e-2 * ref.norm().item() / max(size.numel(), 1)
    worst = (error / size.clamp_min(max(floor, 1e-30))).max()
    return float("inf") if worst.isnan() else worst.item()


def assert_close(
    got: list[Tensor], ref: list[Tensor], tolerance: float, names: tuple[str, ...] = NAMES
) -> None:
    assert len(got) == len(ref) == len(names)
    errors = {n: relative_error(a, b) for n, a, b in zip(names, got, ref, strict=True)}
    assert max(errors.values()) <= tolerance, {
        n: f"{e:.1e}" for n, e in errors.items() if e > tolerance
    }


def assert_equal(got: list[Tensor], ref: list[Tensor], names: tuple[str, ...] = NAMES) -> None:
    """Bit for bit, with the first difference in the message."""
    for name, a, b in zip(names, got, ref, strict=True):
        if not torch.equal(a, b):
            place = (a != b).nonzero()[0].tolist()
            raise AssertionError(
                f"{name} differs in {(a != b).sum()} of {a.numel()} entries, first at {place}: "
                f"{a[tuple(place)].item()!r} and {b[tuple(place)].item()!r}"
            )
