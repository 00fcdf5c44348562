"""Summaries compose like the maps they stand for."""

import torch

from cp_gdn.scan import Summary, apply, compose, scan, transpose


def _summary(seed, M=True):
    gen = torch.Generator().manual_seed(seed)
    return Summary(
        torch.randn(2, 3, 3, generator=gen, dtype=torch.float64) if M else None,
        torch.randn(2, 3, 4, generator=gen, dtype=torch.float64),
    )


S0 = _summary(9).S


def test_compose_is_apply_after_apply_and_associative():
    a, b, c = _summary(0), _summary(1), _summary(2)
    assert torch.allclose(apply(compose(b, a), S0), apply(b, apply(a, S0)))
    left, right = compose(c, compose(b, a)), compose(compose(c, b), a)
    assert torch.allclose(left.M, right.M) and torch.allclose(left.S, right.S)
    assert not torch.allclose(compose(a, b).S, compose(b, a).S)


def test_a_start_forgets_what_comes_in():
    start = _summary(3, M=False)
    assert torch.equal(apply(start, S0), start.S)
    assert compose(_summary(1), start).M is None


def test_scan_breaks_at_missing_links():
    parts = [_summary(0, M=False), _summary(1), _summary(2), _summary(3)]
    incoming = scan(parts, [True, False, True])
    assert incoming[0] is None and incoming[2] is None
    assert torch.allclose(incoming[1], parts[0].S)
    assert torch.allclose(incoming[3], parts[2].S)
    assert torch.allclose(
        scan(parts, [True] * 3)[3], apply(compose(parts[2], parts[1]), parts[0].S)
    )


def test_transpose_is_the_adjoint():
    a, dS = _summary(0), _summary(5).S
    assert torch.allclose(
        (torch.matmul(a.M, S0) * dS).sum(), (S0 * torch.matmul(transpose(a.M), dS)).sum()
    )
    assert transpose(None) is None
