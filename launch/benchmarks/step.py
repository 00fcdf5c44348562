"""Forward and backward together beside their peers: time, and peak memory beyond the inputs."""

from typing import Any

import torch

from cp_gdn.kernels.backward import chunk_gdn_backward
from cp_gdn.kernels.forward import chunk_gdn_forward

from .timing import SCALE, Case, Options, peak, run, time_peers


def ours(x, do, packing):
    def step():
        o, _, saved = chunk_gdn_forward(*x, **packing, keys_normalized=True)
        return o, chunk_gdn_backward(*x, saved, do, keys_normalized=True)

    return step


def flash_qla(x, do, offsets):
    from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

    q, k, v, g, beta = x
    options = {"scale": SCALE, "cu_seqlens": offsets}

    def step():
        sums, A, o, *_, cache = chunk_gated_delta_rule_fwd(
            q, k, v, g, beta, enable_fwd_cp_cache=True, **options
        )
        return o, chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, A, do, dht=None, cp_cache=cache, **options
        )

    return step


def fla(x, do, offsets):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    packed = None if len(offsets) == 2 else offsets.long()  # one tensor: read once on the host
    leaves = [t.detach().requires_grad_() for t in x]

    def step():
        o = chunk_gated_delta_rule(*leaves, scale=SCALE, cu_seqlens=packed)[0]
        return o, torch.autograd.grad(o, leaves, do)

    return step


def measure(case: Case) -> dict[str, Any]:
    row, offsets = case.row(), case.offsets
    peers = {"flash_qla": flash_qla, "fla": fla}
    calls: dict[str, list] = {name: [] for name in ("cp_gdn", *case.options.peers)}
    for seed in range(case.options.sets):
        x = case.draw(seed)
        do = torch.randn_like(x[2])
        calls["cp_gdn"].append(ours(x, do, case.packing))
        for name in case.options.peers:
            calls[name].append(peers[name](x, do, offsets))
    for name, each in calls.items():
        each[0]()
        row[f"{name}_peak_gib"] = peak(each[0])
    time_peers(row, calls, case.options.replays)
    if "flash_qla_ms" in row:
        row["ratio_to_flash_qla"] = row["cp_gdn_ms"] / row["flash_qla_ms"]
    return row


def main(arguments: list[str]) -> None:
    run(arguments, Options(op="step", out="docs/results/step-h200"), measure)
