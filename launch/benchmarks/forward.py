"""The forward beside its peers. flash_qla: its training and its inference forward; the faster counts."""

from typing import Any

from cp_gdn.kernels.forward import chunk_gdn_forward

from .timing import SCALE, TERABYTES, TFLOPS, Case, Options, run, time_peers


def flash_qla(inputs, cu, train: bool):
    from flash_qla import chunk_gated_delta_rule_fwd

    return [
        lambda x=x: chunk_gated_delta_rule_fwd(*x, scale=SCALE, cu_seqlens=cu, is_train=train)
        for x in inputs
    ]


def fla(inputs, cu):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    offsets = None if cu is None else cu.long()  # one tensor: FLA reads it once on the host
    return [lambda x=x: chunk_gated_delta_rule(*x, scale=SCALE, cu_seqlens=offsets) for x in inputs]


def measure(case: Case) -> dict[str, Any]:
    options, row, offsets = case.options, case.row(), case.offsets
    inputs = [case.draw(seed) for seed in range(options.sets)]
    packed = None if case.documents == 1 else offsets
    calls = {
        "cp_gdn": [
            lambda x=x: chunk_gdn_forward(*x, cu_seqlens=packed, keys_normalized=True)
            for x in inputs
        ]
    }
    if "flash_qla" in options.peers:
        calls["flash_qla_train"] = flash_qla(inputs, offsets, True)
        calls["flash_qla_inference"] = flash_qla(inputs, offsets, False)
    if "fla" in options.peers:
        calls["fla"] = fla(inputs, packed)
    time_peers(row, calls, options.replays)
    if "flash_qla" in options.peers:
        from flash_qla import chunk_gated_delta_rule_fwd

        ours = chunk_gdn_forward(*inputs[0], cu_seqlens=packed, keys_normalized=True)[0].float()
        theirs = chunk_gated_delta_rule_fwd(*inputs[0], scale=SCALE, cu_seqlens=offsets)[2].float()
        row["difference_from_flash_qla"] = ((ours - theirs).norm() / theirs.norm()).item()
        peers = [row[f"{name}_ms"] for name in calls if f"{name}_ms" in row and "qla" in name]
        if peers:
            row["ratio_to_flash_qla"] = row["cp_gdn_ms"] / min(peers)
    flops = case.tokens * case.shape[2] * (8 + 2 / case.ratio) * 2**20 / 64
    volume = case.tokens * case.shape[2] * (520 + 512 / case.ratio)
    row["tensor_share"] = flops / row["cp_gdn_ms"] / 1e9 / TFLOPS
    row["bandwidth_share"] = volume / row["cp_gdn_ms"] / 1e9 / TERABYTES
    row["us_per_chunk"] = row["cp_gdn_ms"] * 1e3 / (case.tokens / 64)
    return row


def main(arguments: list[str]) -> None:
    run(arguments, Options(op="forward", out="docs/results/forward-h200"), measure)
