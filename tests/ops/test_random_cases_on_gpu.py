"""The operator on the kernels in cases that nobody thought of, against the float64 chunked engine (which tests hold to
1e-10 of the token recurrence): lengths, cuts, ranks, heads, gates, strengths and options are drawn. New memory is full
of NaN, every case runs twice, and the bits must be the same."""

import contextlib
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from cp_gdn import build_cp_context, chunk_gated_delta_rule, run_virtual_ranks
from cp_gdn.ops.recompute import keep_states

pytestmark = pytest.mark.gpu

NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dh0")
# gradients of gates are sums that nearly cancel where few tokens are left of a document
BOUNDS = dict.fromkeys(NAMES, 8e-3) | {"dg": 2e-2, "dbeta": 1.2e-2}
GATES = ("mixed", "slow", "zero", "strong", "initial", "closing")


def draw_case(seed):
    rng = random.Random(seed)
    T = rng.choice([rng.randint(64, 200), rng.randint(201, 2500), rng.randint(2501, 9000)])
    case = {
        "heads": rng.choice([(2, 4), (2, 8), (1, 6), (16, 32), (16, 64)]),
        "T": T,
        "B": rng.choice([1, 1, 1, 3]) if T < 2500 else 1,
        "gates": rng.choice(GATES),
        "beta": rng.choice(["uniform", "ends", "two", "tiny"]),
        "initial": rng.random() < 0.6,
        "final": rng.random() < 0.6,
        "keep": rng.random() < 0.25,
        "scale": rng.choice([None, 1.0, 0.01]),
        "documents": None,
        "ranks": 1,
    }
    case["normalize"] = case["heads"] != (1, 6) and rng.random() < 0.5
    if case["B"] == 1:
        if rng.random() < 0.6:
            cuts = {rng.randint(1, T - 1) for _ in range(rng.choice([1, 4, 20, 60]))}
            case["documents"] = sorted({0, T, *cuts})
        case["ranks"] = rng.choice([1, 1, 2, 3, 7])
        cuts = [0, *sorted(rng.sample(range(1, T), case["ranks"] - 1)), T]
        case["sizes"] = [b - a for a, b in itertools.pairwise(cuts)]
        case["exchange"] = rng.choice(["ring", "all_to_all", "all_gather", "serial"])
    return case


def draw_inputs(case, seed):
    gen = torch.Generator("cuda").manual_seed(seed)
    (Hk, Hv), B, T = case["heads"], case["B"], case["T"]

    def normal(*shape):
        return torch.randn(*shape, generator=gen, device="cuda")

    def uniform(*shape):
        return torch.rand(*shape, generator=gen, device="cuda")

    q, k = normal(B, T, Hk, 128), normal(B, T, Hk, 128)
    if case["normalize"]:
        q, k = (x * 10 ** (3 * uniform(B, T, Hk, 1) - 1.5) for x in (q, k))
    else:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = {
        "mixed": lambda: -uniform(B, T, Hv) * 10 ** (6 * uniform(Hv) - 5),
        "slow": lambda: -uniform(B, T, Hv) * 1e-4,
        "zero": lambda: torch.zeros(B, T, Hv, device="cuda"),
        "strong": lambda: -5 * uniform(B, T, Hv),
        "initial": lambda: -16 * uniform(Hv) * F.softplus(0.5 * normal(B, T, Hv) - 4),
        "closing": lambda: torch.where(uniform(B, T, Hv) < 0.02, -80.0, -1e-3) * uniform(B, T, Hv),
    }[case["gates"]]()
    beta = uniform(B, T, Hv)
    beta = {
        "uniform": beta,
        "ends": (beta > 0.5).float(),
        "two": 2 * beta,
        "tiny": torch.where(uniform(B, T, Hv) < 0.3, beta * 1e-6, beta),
    }[case["beta"]]
    N = B if case["documents"] is None else len(case["documents"]) - 1
    low = [x.bfloat16() for x in (q, k, normal(B, T, Hv, 128))]
    inputs = [*low, g, beta, *([normal(N, Hv, 128, 128)] if case["initial"] else [])]
    return inputs, normal(B, T, Hv, 128).bfloat16(), normal(N, Hv, 128, 128)


def run(case, inputs, do, dfinal, engine, context=None, rank=0):
    """o, final and gradients of a rank's part, None where there is none."""
    shard = (lambda x: x) if context is None else (lambda x: context.shard(x).contiguous())
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    keep = case["keep"] and engine == "tilelang"
    with keep_states() if keep else contextlib.nullcontext():
        o, final = chunk_gated_delta_rule(
            *map(shard, leaves[:5]), scale=case["scale"], engine=engine, cp_context=context,
            initial_state=leaves[5] if case["initial"] else None, output_final_state=case["final"],
            use_qk_l2norm_in_kernel=case["normalize"],
            cu_seqlens=case["documents"] if context is None else None,
        )  # fmt: skip
    outputs, gradients = [o], [shard(do).to(o.dtype)]
    if case["final"]:
        outputs, gradients = [o, final], [*gradients, dfinal.to(final.dtype) * (rank == 0)]
    found = torch.autograd.grad(outputs, leaves, gradients)
    final = final.detach() if case["final"] else None
    return [o.detach(), final, *found, *([] if case["initial"] else [None])]


def run_over_ranks(case, inputs, do, dfinal):
    def step(group):
        context = build_cp_context(
            group, seq_len=case["T"], cu_seqlens=case["documents"], shard_sizes=case["sizes"],
            exchange=case["exchange"],
        )  # fmt: skip
        o, final, *gradients = run(case, inputs, do, dfinal, "tilelang", context, group.rank)
        gradients = [x if x is None else x.float() for x in gradients]
        for x in gradients:
            if x is not None:
                group.all_reduce(x)
        return [context.gather(o), final, *gradients]

    return run_virtual_ranks(case["ranks"], step, device="cuda")[-1]


def fill_new_memory_with_nan():
    for size in (2**28, 2**25, 2**22, 2**19, 2**16):
        for _ in range(3):
            torch.full((size,), torch.nan, device="cuda")


@pytest.mark.parametrize("seed", range(60))
def test_a_random_case(seed):
    case = draw_case(seed)
    given = draw_inputs(case, seed)
    several = case["ranks"] > 1
    runs = []
    for _ in range(2):
        fill_new_memory_with_nan()
        runs.append(run_over_ranks(case, *given) if several else run(case, *given, "tilelang"))
    wide = [x.double() for x in given[0]], *(x.double() for x in given[1:])
    want = run(case, *wide, "torch")
    for name, got, again, exact in zip(NAMES, *runs, want, strict=True):
        if got is not None:
            error = ((got.double() - exact).norm() / exact.norm()).item()
            assert error < BOUNDS[name], (name, error, case)
            assert torch.equal(got, again), (name, case)
