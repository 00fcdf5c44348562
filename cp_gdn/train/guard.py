"""Non-finite gradients, found where they arise: on this rank, before ranks are summed, in every ZeRO stage.

A hook adds each parameter's gradient norm to one device vector as the backward produces it.
Infinities and NaN survive sums of non-negative numbers, so the vector tells the culprit at the end
of the accumulation window without a host read inside it, and whatever DeepSpeed does with the
gradients afterwards.
"""

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is NaN or infinite; raised on every rank before the optimizer step."""


class GradientGuard:
    """Watches the gradients of all trainable parameters of ``model`` on ``device``."""

    def __init__(self, model: nn.Module, device: torch.device):
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._norms = torch.zeros(len(self._names), device=device)
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.register_hook(lambda grad, i=i: self._see(i, grad))

    def _see(self, i: int, grad: Tensor) -> None:
        self._norms[i].add_(torch.linalg.vector_norm(grad.detach(), dtype=torch.float32))

    def reset(self) -> None:
        self._norms.zero_()

    def bad(self) -> Tensor:
        """1.0 where any gradient since the last reset was not finite, else 0.0; a device scalar."""
        return 1.0 - torch.isfinite(self._norms).all().float()

    def describe(self) -> str | None:
        """The first bad parameter, in the model's order; reads the device. None where all are finite."""
        norms = self._norms.tolist()
        bad = [name for name, norm in zip(self._names, norms, strict=True) if not _finite(norm)]
        if not bad:
            return None
        more = f" and of {len(bad) - 1} more parameters" if len(bad) > 1 else ""
        return f"the gradient of {bad[0]}{more}"


def _finite(value: float) -> bool:
    return value - value == 0.0
