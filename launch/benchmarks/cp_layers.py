"""Whole layers and whole models on one GPU and over a group: forward + backward, bf16 autocast, random weights.

The layer: CPGatedDeltaNet, hidden 2048, 16/32 heads, T tokens on one GPU against T tokens over the group (strong
scaling). The model: three GDN layers with their MLPs (hidden 2048, activation checkpointing), T tokens on one GPU
against P T tokens over the group (weak scaling); then the same with a fourth layer of softmax attention, whose work a
token grows with the sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cp_gdn import CPContext, CPGatedDeltaNet, build_cp_context
from cp_gdn.models.hybrid import HybridConfig, HybridLM

from .cp_timing import time_calls

REPEATS = 4  # of a model's step


def _step(module: nn.Module, call: Callable[[], Tensor]) -> Callable[[], None]:
    parameters = list(module.parameters())

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = call()
        torch.autograd.grad(loss, parameters)

    return step


def measure_layer(T: int, repeats: int, group: dist.ProcessGroup) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = CPGatedDeltaNet(2048, 16, 32).cuda()
    x = torch.randn(1, T, 2048, device="cuda").bfloat16()
    context = build_cp_context(group, seq_len=T)

    def on(x: Tensor, context: CPContext | None) -> Callable[[], None]:
        x = x.requires_grad_()
        return _step(layer, lambda: layer(x, cp_context=context).float().square().sum())

    row: dict[str, Any] = {"what": "layer", "T": T, "Hk": 16, "Hv": 32, "gates": "initial"}
    row["one_gpu"] = {"both": time_calls([on(x.clone(), None)], repeats, group)}
    local = context.shard(x).contiguous()
    row["cp"] = {"both": time_calls([on(local, context)], repeats, group)}
    row["ratio_to_one_gpu"] = row["cp"]["both"]["ms"] / row["one_gpu"]["both"]["ms"]
    return row


def measure_model(layers: int, tokens: int, group: dist.ProcessGroup) -> dict[str, Any]:
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=32000, hidden_size=2048, num_layers=layers, intermediate_size=5632,
        num_attention_heads=16, num_key_value_heads=4, head_dim=128, linear_num_key_heads=16,
        linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    )  # fmt: skip
    model = HybridLM(config).cuda()
    model.set_activation_checkpointing(True)
    size = dist.get_world_size(group)
    ids = torch.randint(32000, (1, size * tokens), device="cuda")

    def on(ids: Tensor, context: CPContext | None) -> Callable[[], None]:
        labels = ids.roll(-1, 1)

        def loss() -> Tensor:
            out = model(ids, labels, cp_context=context)
            assert out.loss_sum is not None
            return out.loss_sum / ids.numel()

        return _step(model, loss)

    what = f"model of {layers} layers" + (", one of softmax attention" if layers > 3 else "")
    row: dict[str, Any] = {"what": what, "T": tokens, "Hk": 16, "Hv": 32, "gates": "initial"}
    row["one_gpu"] = {"both": time_calls([on(ids[:, :tokens], None)], REPEATS, group)}
    row["one_gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    context = build_cp_context(group, seq_len=size * tokens)
    row["cp"] = {"both": time_calls([on(context.shard(ids), context)], REPEATS, group)}
    row["cp_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for name in ("one_gpu", "cp"):
        row[f"{name}_tokens_per_s_per_gpu"] = tokens / row[name]["both"]["ms"] * 1e3
    row["ratio_tokens_per_s_per_gpu"] = (
        row["cp_tokens_per_s_per_gpu"] / row["one_gpu_tokens_per_s_per_gpu"]
    )
    return row
