"""Errors of outputs and gradients beside FlashQLA's, on the same inputs: ``python launch/bench.py op=numerics``

Relative L2 against the float64 chunked engine (tests/ops hold that to 1e-10 of the float64 token recurrence), mean over
draws, states and their gradients included. Inputs are rounded to bf16 before anybody sees them, beta uniform in [0, 1],
queries and keys of unit norm. Writes docs/results/numerics-h200.json and .png. Needs one Hopper GPU. Arguments, all
optional:

    kinds=[random,slow,zero,strong,mixed,near,equal]   gates to -0.1, -1e-4, 0, -5, slow and fast heads; keys at
                                                       cosine 0.9; all keys equal with g = -1e-3 and beta = 0.835
    tokens=1024 key_heads=4 value_heads=16 draws=3 peers=[flash_qla] out=docs/results/numerics-h200
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cp_gdn import chunk_gated_delta_rule

from .timing import SCALE, need_gpu, parse, pyplot, results_path, write

NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dh0")
GATES = {"random": 0.1, "slow": 1e-4, "zero": 0.0, "strong": 5.0, "mixed": 1.0, "near": 1e-2}
KINDS = (*GATES, "equal")


@dataclass
class Options:
    op: str = "numerics"
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    tokens: int = 1024
    key_heads: int = 4
    value_heads: int = 16
    draws: int = 3
    peers: list[str] = field(default_factory=lambda: ["flash_qla"])
    out: str = "docs/results/numerics-h200"


def draw(kind: str, options: Options, seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, g, beta, h0; dO; the final state's gradient."""
    gen = torch.Generator("cuda").manual_seed(seed)
    T, Hk, Hv = options.tokens, options.key_heads, options.value_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device="cuda")

    q, k = normal(1, T, Hk, 128), normal(1, T, Hk, 128)
    if kind in ("near", "equal"):
        common = normal(1, 1, Hk, 128)
        k = common + k / 3 if kind == "near" else common.expand_as(k)
    q, k = (F.normalize(x, dim=-1).bfloat16() for x in (q, k))
    v, do = normal(1, T, Hv, 128).bfloat16(), normal(1, T, Hv, 128).bfloat16()
    g = -GATES.get(kind, 0) * torch.rand(1, T, Hv, generator=gen, device="cuda")
    beta = torch.rand(1, T, Hv, generator=gen, device="cuda")
    if kind == "mixed":
        g[..., ::2] *= 1e-4
    if kind == "equal":
        g, beta = torch.full_like(g, -1e-3), torch.full_like(beta, 0.835)
    h0, dfinal = normal(1, Hv, 128, 128), normal(1, Hv, 128, 128)
    if kind == "equal":  # a state of its own would hide what cancels
        h0, dfinal = h0 * 0, dfinal * 0
    return [q, k, v, g, beta, h0], do, dfinal


def ours(inputs: list[Tensor], do: Tensor, dfinal: Tensor, engine: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v, g, beta, h0 = leaves
    o, final = chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=h0, output_final_state=True, engine=engine
    )
    assert final is not None
    return [o.detach(), final.detach(), *torch.autograd.grad([o, final], leaves, [do, dfinal])]


def flash_qla(inputs: list[Tensor], do: Tensor, dfinal: Tensor) -> list[Tensor]:
    from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    *x, h0 = inputs
    sums, A, o, _, final, cache = chunk_gated_delta_rule_fwd(
        *x, scale=SCALE, initial_state=h0, enable_fwd_cp_cache=True
    )
    q, k, v, _, beta = x
    dq, dk, dv, dbeta, dg, dh0 = chunk_gated_delta_rule_bwd(
        q, k, v, sums, beta, A, do, dht=dfinal, initial_state=h0, scale=SCALE, cp_cache=cache
    )
    return [o, final, dq, dk, dv, dg, dbeta, dh0]


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


def measure(kind: str, options: Options) -> dict[str, Any]:
    found: dict[str, list[list[float]]] = {"cp_gdn": [], **{name: [] for name in options.peers}}
    for seed in range(options.draws):
        inputs, do, dfinal = draw(kind, options, seed)
        wide = [x.double() for x in inputs]
        exact = ours(wide, do.double(), dfinal.double(), "torch")
        found["cp_gdn"].append(errors(ours(inputs, do, dfinal, "tilelang"), exact))
        if "flash_qla" in options.peers:
            found["flash_qla"].append(errors(flash_qla(inputs, do, dfinal), exact))
    row: dict[str, Any] = {"kind": kind}
    for name, draws in found.items():
        means = torch.tensor(draws).mean(0).tolist()
        row[name] = dict(zip(NAMES, means, strict=True))
        row[f"{name}_worst"] = dict(zip(NAMES, torch.tensor(draws).amax(0).tolist(), strict=True))
    if "flash_qla" in options.peers:
        row["ratio"] = {n: row["cp_gdn"][n] / row["flash_qla"][n] for n in NAMES}
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure, panels = pyplot().subplots(2, 4, figsize=(12, 5.5), sharey=True, layout="constrained")
    for name, axes in zip(NAMES, panels.flat, strict=True):
        for peer, mark in (("cp_gdn", "o"), ("flash_qla", "x")):
            points = [(row["kind"], row[peer][name]) for row in rows if peer in row]
            if points:
                axes.plot(*zip(*points, strict=True), mark, label=peer)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.tick_params(axis="x", rotation=60)
        axes.grid(alpha=0.3)
    panels[0, 0].legend()
    panels[0, 0].set_ylabel("relative L2 error")
    panels[1, 0].set_ylabel("relative L2 error")
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    options = parse(Options(), arguments)
    for name, given, known in (
        ("kinds", options.kinds, KINDS), ("peers", options.peers, ("flash_qla",))
    ):  # fmt: skip
        if not set(given) <= set(known):
            raise ValueError(f"{name}={given}; there are {', '.join(known)}")
    need_gpu()
    path = results_path(options.out)
    rows: list[dict[str, Any]] = []
    print(f"{'':7s} {'':9s} " + " ".join(f"{n:>8s}" for n in NAMES))
    for kind in tqdm(options.kinds, unit="kind"):
        row = measure(kind, options)
        rows.append(row)
        write(path, options, rows)
        for peer in ("cp_gdn", *options.peers):
            line = " ".join(f"{row[peer][n]:8.1e}" for n in NAMES)
            tqdm.write(f"{kind:7s} {peer:9s} {line}")
    plot(rows, path.with_suffix(".png"))
