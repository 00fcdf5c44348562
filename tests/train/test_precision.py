"""bf16 runs: parameters and optimizer state stay fp32 in every ZeRO stage, A_log and dt_bias among them."""

import deepspeed
import numpy as np
import torch

from cp_gdn.train.engine import build_engine
from cp_gdn.train.step import TrainStep
from cp_gdn.train.topology import open_topology
from tests.distributed import run_ranks
from tests.train.helpers import deepspeed_recipe, random_pack, tiny_config, tiny_model

STAGES = (0, 1, 2, 3)


def train_bf16(stage, folder, precision="bf16", steps=4):
    config = tiny_config(
        folder, folder, stage=stage, precision=precision, deepspeed=deepspeed_recipe(stage)
    )
    with open_topology(None) as topology:
        engine = build_engine(tiny_model(), config)
        matmul_dtypes = set()
        for module in engine.module.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, i, out: matmul_dtypes.add(out.dtype))
        runner = TrainStep(engine, topology, "ring")
        losses = [
            runner.run([random_pack(s, 160)], step=s + 1, lr=1e-3, stop=False).loss
            for s in range(steps)
        ]
        decay = {}
        for name, p in engine.module.model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                full = deepspeed.utils.safe_get_full_fp32_param(p) if stage else p.detach()
                decay[name] = (p.dtype, full.clone())
    return losses, matmul_dtypes, decay


def all_stages(rank, size, folder):
    found = {stage: train_bf16(stage, folder) for stage in STAGES}
    found["fp32"] = train_bf16(0, folder, precision="fp32")
    return found


def test_bf16_computes_in_bf16_and_keeps_the_decay_in_fp32(tmp_path):
    found = run_ranks(2, all_stages, tmp_path)[0]
    exact, dtypes, _ = found.pop("fp32")
    assert dtypes == {torch.float32}
    start = {n: p.detach() for n, p in tiny_model().named_parameters()}
    for stage, (losses, dtypes, decay) in found.items():
        assert dtypes == {torch.bfloat16}, f"ZeRO-{stage}"
        np.testing.assert_allclose(losses, exact, rtol=2e-2, err_msg=f"ZeRO-{stage}")
        assert losses != exact
        assert decay
        for name, (dtype, value) in decay.items():
            assert dtype == torch.float32, f"{name} in ZeRO-{stage}"
            # An update far below what bf16 resolves at -9 (0.06) arrives
            assert not torch.equal(value, start[name])
            assert not torch.equal(value, value.bfloat16().float())
            np.testing.assert_allclose(value, start[name], atol=0.02)
