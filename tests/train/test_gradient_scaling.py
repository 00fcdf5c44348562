"""The gradient that reaches the optimizer is that of the mean loss over all valid tokens, in every ZeRO stage.

4 ranks, 2 data-parallel groups of 2 context-parallel ranks, 2 packs an accumulation window, uneven
documents, padding, and one rank without a single valid token. The reference is one process, the
whole packs, no DeepSpeed.
"""

import dataclasses

import deepspeed
import torch

from cp_gdn import build_cp_context
from cp_gdn.train.engine import build_engine
from cp_gdn.train.step import TrainStep
from cp_gdn.train.topology import open_topology
from tests.distributed import run_ranks
from tests.train.helpers import random_pack, tiny_config, tiny_model

SEQ_LEN = 160  # cut at 64 * 2: shards of 128 and 32 tokens
STAGES = (0, 1, 2, 3)


def packs_of(dp_rank):
    """Two packs for each dp rank; in those of dp rank 1 the second shard has no valid token."""
    ignored = slice(120, SEQ_LEN) if dp_rank == 1 else None
    return [
        random_pack(10 * dp_rank + i, SEQ_LEN, padding=17 * i, ignored=ignored) for i in range(2)
    ]


def reference():
    """(mean loss, gradients by name) of one process that sees every pack whole."""
    model = tiny_model()
    total, valid = 0.0, 0
    for pack in packs_of(0) + packs_of(1):
        context = build_cp_context(seq_len=SEQ_LEN, cu_seqlens=pack.cu_seqlens)
        out = model(pack.input_ids[None], pack.labels[None], cp_context=context)
        total, valid = total + out.loss_sum, valid + int(out.num_valid)
    loss = total / valid
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def one_step(stage, tmp, believed_world_size=None):
    """(result of the step, the gradients that the optimizer step finds) of a rank."""
    config = tiny_config(tmp, tmp, stage=stage, gradient_accumulation=2)
    config.optim.clip = 0.0
    with open_topology(2) as topology:
        engine = build_engine(tiny_model(), config)
        if believed_world_size is not None:
            topology = dataclasses.replace(topology, world_size=believed_world_size)
        runner = TrainStep(engine, topology, "ring")
        take_step, found = engine.step, {}

        def look_then_step():
            if engine.is_gradient_accumulation_boundary():
                for name, p in engine.module.model.named_parameters():
                    grad = deepspeed.utils.safe_get_full_grad(p) if stage else p.grad
                    found[name] = grad.clone()
            take_step()

        engine.step = look_then_step
        result = runner.run(packs_of(topology.dp_rank), step=1, lr=1e-3, stop=False)
    return result, found


def all_stages(rank, size, tmp):
    return {stage: one_step(stage, tmp) for stage in STAGES}


def wrong_scale(rank, size, tmp):
    return {stage: one_step(stage, tmp, believed_world_size=1)[1] for stage in (0, 3)}


def errors(found, expected):
    """(of the whole gradient, of the worst parameter), relative."""
    assert found.keys() == expected.keys()
    off = {name: (found[name] - e).norm() for name, e in expected.items()}
    size = {name: e.norm() for name, e in expected.items()}
    whole = torch.stack(list(off.values())).norm() / torch.stack(list(size.values())).norm()
    return whole.item(), max((off[name] / size[name]).item() for name in expected)


def test_gradient_is_exact_in_every_stage(tmp_path):
    loss, expected = reference()
    norm = torch.nn.utils.get_total_norm(list(expected.values())).item()
    for by_stage in run_ranks(4, all_stages, tmp_path):
        for stage, (result, found) in by_stage.items():
            whole, worst = errors(found, expected)
            assert whole < 1e-5, f"ZeRO-{stage}"
            assert worst < 1e-3, f"ZeRO-{stage}"  # sums over slow heads cancel in fp32
            assert abs(result.loss - loss) < 1e-5 * loss, f"ZeRO-{stage}"
            assert abs(result.grad_norm - norm) < 1e-4 * norm, f"ZeRO-{stage}"


def test_the_comparison_sees_a_wrong_scale(tmp_path):
    _, expected = reference()
    for by_stage in run_ranks(4, wrong_scale, tmp_path):
        for stage, found in by_stage.items():
            assert errors(found, expected)[0] > 0.5, f"ZeRO-{stage}"


def test_a_rank_without_valid_tokens_is_among_them():
    context = build_cp_context(seq_len=SEQ_LEN)
    assert context.shard_bounds == (0, SEQ_LEN)
    for pack in packs_of(1):
        assert (pack.labels[128:] == -100).all()
        assert (pack.labels[:128] != -100).any()
