"""One optimizer step: an accumulation window of packs, the guard, the update.

The order matters. The count of valid tokens is summed over ranks first, because every backward
needs it. After the last backward one small vector (loss, anything non-finite, anybody asked to
stop) is summed over the ranks and read by the host: the only read of a step, just before the
optimizer, which waits for the device anyway. What it says all ranks know, so they stop together or
go on together.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cp_gdn import comm
from cp_gdn.train.batch import place
from cp_gdn.train.data import Pack
from cp_gdn.train.guard import GradientGuard, NonFiniteError
from cp_gdn.train.optimizer import set_learning_rate
from cp_gdn.train.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the window's valid tokens of all ranks, in nats; stop: some rank wants the run to end."""

    loss: float
    grad_norm: float
    stop: bool


class TrainStep:
    """Runs steps of a DeepSpeed engine built by :func:`cp_gdn.train.engine.build_engine`."""

    def __init__(self, engine: Any, topology: Topology, exchange: str):
        self._engine, self._topology, self._exchange = engine, topology, exchange
        self._guard = GradientGuard(engine.module.model, topology.device)
        self._zero = engine.zero_optimization()

    def run(self, packs: list[Pack], *, step: int, lr: float, stop: bool) -> StepResult:
        """Step number ``step`` (from 1) over the window ``packs``; ``stop``: this rank wants to end after it.

        Raises NonFiniteError on every rank, before the optimizer step, where a loss or gradient is
        not finite.
        """
        engine, topology = self._engine, self._topology
        batches = [place(pack, topology, self._exchange) for pack in packs]
        valid = comm.all_reduce_sum(
            sum((b.num_valid for b in batches), torch.zeros_like(batches[0].num_valid))
        )
        per_token = 1.0 / valid.clamp(min=1.0)

        self._guard.reset()
        losses = []
        for i, batch in enumerate(batches):
            loss_sum, _ = engine(batch.input_ids, batch.labels, batch.context)
            losses.append(loss_sum.detach() * per_token)
            engine.backward(loss_sum * (per_token * topology.world_size), scale_wrt_gas=False)
            if i + 1 < len(batches):
                engine.step()  # not yet the window's end: counts the micro batch only

        loss = torch.stack(losses).sum().float()
        norm = loss.new_zeros(()) if self._zero else self._stage0_norm()
        broken = torch.maximum(self._guard.bad(), 1.0 - torch.isfinite(loss).float())
        wants_stop = torch.full_like(loss, float(stop))
        status = comm.all_reduce_sum(torch.stack((loss, broken, wants_stop, norm)))
        mean_loss, num_broken, num_stop, norm_sum = status.tolist()
        if num_broken > 0:
            self._fail(step, losses)
        set_learning_rate(engine.optimizer, lr)
        engine.step()
        grad_norm = (
            float(engine.get_global_grad_norm()) if self._zero else norm_sum / topology.world_size
        )
        return StepResult(mean_loss, grad_norm, num_stop > 0)

    def _stage0_norm(self) -> torch.Tensor:
        """Gradients are whole and reduced on every rank in stage 0, where DeepSpeed does not report their norm."""
        grads = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def _fail(self, step: int, losses: list[torch.Tensor]) -> None:
        found = [
            f"the loss of micro batch {i + 1} ({value})"
            for i, value in enumerate(torch.stack(losses).tolist())
            if value - value != 0
        ]
        gradient = self._guard.describe()
        if gradient:
            found.append(gradient)
        by_rank = comm.gather_objects(" and ".join(found))
        places = "; ".join(f"rank {r}: {what}" for r, what in enumerate(by_rank) if what)
        raise NonFiniteError(
            f"step {step}: not finite on {places}. The optimizer step was not taken, the parameters are those after "
            f"step {step - 1}; lower optim.lr, set optim.clip, or look at the data of this step"
        )
