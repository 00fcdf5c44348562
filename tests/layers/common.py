"""What the parity tests share: tiny transformers layers, relative errors, gradients summed over ranks."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

HF_LAYERS = {
    "qwen3_5": (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig),
    "qwen3_5_moe": (Qwen3_5MoeGatedDeltaNet, Qwen3_5MoeTextConfig),
    "qwen3_next": (Qwen3NextGatedDeltaNet, Qwen3NextConfig),
}


def relative(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """L2 error relative to the norm of ``theirs``, or of ``scale``."""
    norm = (theirs if scale is None else scale).double().norm()
    return ((ours.double() - theirs.double()).norm() / norm).item()


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of two dictionaries with the same keys, and where it is."""
    assert ours.keys() == theirs.keys()
    return max((relative(ours[name], theirs[name]), name) for name in theirs)


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def total(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum over the ranks."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


@contextmanager
def in_float64():
    """Within, transformers computes in float64 what it would compute in float32."""
    with (
        patch.object(torch, "float32", torch.float64),
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def hf_delta_net(kind: str, *, decay: str, heads=(2, 4), dims=(16, 8), hidden=32) -> nn.Module:
    """A random Gated DeltaNet layer of transformers; decay "random" as initialised, or "slow".

    "slow": the first head has g about -1e-4, the second g == 0, the others as initialised.
    """
    layer_class, config_class = HF_LAYERS[kind]
    config = config_class(
        hidden_size=hidden,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads[0],
        linear_num_value_heads=heads[1],
        linear_key_head_dim=dims[0],
        linear_value_head_dim=dims[1],
    )
    layer = layer_class(config, 0)
    with torch.no_grad():
        layer.norm.weight.normal_(1, 0.2)
        layer.dt_bias.normal_(0, 0.5)
        if decay == "slow":
            layer.A_log[0], layer.A_log[1] = -9.2, -200.0
    return layer
