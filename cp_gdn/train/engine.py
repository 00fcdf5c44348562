"""The model under DeepSpeed: ZeRO stages 0 to 3 by one rule of gradients, bf16 over fp32 parameters.

Gradient. The loss is a mean over all valid tokens of all ranks, of which rank r holds the sum L_r:

    loss = sum_r L_r / n,      n = valid tokens of all ranks and of the whole accumulation window

DeepSpeed is told of no sequence parallelism (no mpu, no mesh): then every stage averages gradients
over all W ranks, and backpropagating `W L_r / n` gives exactly the gradient of the loss. Declared
otherwise, stages 0 to 2 and stage 3 differ by a factor of W, or leave the sequence ranks unreduced.

bf16. Parameters, gradients and optimizer state stay fp32 and the forward runs under torch.autocast:
matrix products in bf16 from bf16 copies of the weights; A_log, dt_bias, norms and the sums in fp32.
DeepSpeed's own bf16 switch casts every parameter, A_log and dt_bias included, and takes another
optimizer class in each stage.
"""

import contextlib
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from cp_gdn.context import CPContext
from cp_gdn.train.config import TrainConfig
from cp_gdn.train.optimizer import build_optimizer


class LossModule(nn.Module):
    """What DeepSpeed drives: (input_ids, labels, context) -> (loss_sum, num_valid), under autocast for bf16."""

    def __init__(self, model: nn.Module, precision: str, *, cache_weights: bool):
        super().__init__()
        self.model = model
        self._bf16 = precision == "bf16"
        self._cache_weights = cache_weights

    def forward(
        self, input_ids: Tensor, labels: Tensor, context: CPContext
    ) -> tuple[Tensor, Tensor]:
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._bf16:
            autocast = torch.autocast(
                input_ids.device.type, torch.bfloat16, cache_enabled=self._cache_weights
            )
        with autocast:
            out = self.model(input_ids, labels, cp_context=context)
        return out.loss_sum, out.num_valid


def build_engine(model: nn.Module, config: TrainConfig) -> Any:
    """DeepSpeed engine over ``model`` in the default process group, with torch's AdamW.

    Its ``module`` is a :class:`LossModule`. Collective: every rank calls it.
    """
    deepspeed = _import_deepspeed()
    # DeepSpeed would probe for, and on the CPU compile, a C++ operator for inference; nothing here uses one.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    # A copy of the weights that outlives its layer would undo ZeRO-3, which frees them after use.
    module = LossModule(model, config.precision, cache_weights=config.zero_stage < 3)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=build_optimizer(module, config.optim),
        config=deepspeed_config(config),
        dist_init_required=False if deepspeed.comm.is_initialized() else None,
    )
    return engine


def _import_deepspeed() -> Any:
    """The package, quiet about what is meant: the CPU as accelerator, and torch's rename of flat collectives."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings(
        "ignore",
        message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*",
        category=FutureWarning,
    )
    import deepspeed

    return deepspeed


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The recipe's dictionary with the keys that follow from the rest of the configuration."""
    return {
        **config.deepspeed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.optim.clip,  # DeepSpeed's default is 1.0, not off
        "communication_data_type": config.deepspeed.get("communication_data_type", "fp32"),
    }
