"""A non-finite loss or gradient stops every rank before the optimizer step and says step, rank, quantity, parameter."""

import pytest
import torch

from cp_gdn.train.engine import build_engine
from cp_gdn.train.guard import GradientGuard, NonFiniteError
from cp_gdn.train.step import TrainStep
from cp_gdn.train.topology import open_topology
from tests.distributed import run_ranks
from tests.train.helpers import random_pack, tiny_config, tiny_model


class PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("inf"))


def held(p):
    """What this rank holds of a parameter; under ZeRO-3 its part."""
    return getattr(p, "ds_tensor", p).detach()


def poisoned(rank, size, folder, what, stage):
    """Message of the error, and whether the parameters are still those before the poisoned step."""
    config = tiny_config(folder, folder, stage=stage)
    with open_topology(2) as topology:
        model = tiny_model()
        active = False

        def poison(module, args, output):
            if not active or rank != 1:
                return None
            return output * float("nan") if what == "loss" else PoisonGradient.apply(output)

        model.model.layers[1].mlp.register_forward_hook(poison)
        engine = build_engine(model, config)
        runner = TrainStep(engine, topology, "ring")
        runner.run([random_pack(0, 160)], step=1, lr=1e-3, stop=False)
        before = [held(p).clone() for p in model.parameters()]
        active = True
        try:
            runner.run([random_pack(1, 160)], step=2, lr=1e-3, stop=False)
        except NonFiniteError as error:
            now = [held(p) for p in model.parameters()]
            same = all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
            return str(error), same
    return None, None


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bad_gradient_stops_all_ranks_before_the_step(stage, tmp_path):
    (message, same), other = run_ranks(2, poisoned, tmp_path, "gradient", stage)
    assert other == (message, same)
    assert same
    assert message.startswith("step 2: not finite on ")
    assert "rank 1: the gradient of model.embed_tokens.weight and of " in message
    assert "the loss" not in message.split(". The optimizer")[0]


def test_bad_loss_names_the_micro_batch(tmp_path):
    (message, same), other = run_ranks(2, poisoned, tmp_path, "loss", 1)
    assert other == (message, same)
    assert same
    assert "rank 1: the loss of micro batch 1 (nan)" in message


def test_guard_names_the_first_bad_parameter_and_forgets_at_reset():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    guard = GradientGuard(model, torch.device("cpu"))
    model(torch.ones(1, 2)).sum().backward()
    assert guard.bad() == 0
    assert guard.describe() is None
    (model[1](torch.ones(1, 2)) * float("inf")).sum().backward()
    assert guard.bad() == 1
    assert guard.describe() == "the gradient of 1.weight and of 1 more parameters"
    guard.reset()
    assert guard.bad() == 0
