"""Values of the learning-rate schedules at their corners, worked out by hand."""

import pytest

from cp_gdn.train.config import OptimConfig
from cp_gdn.train.schedule import learning_rate


def optim(**changes):
    values = {"lr": 2.0, "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.0, "clip": 0.0}
    return OptimConfig(**(values | changes))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.2), (4, 1.0), (9, 2.0), (10, 2.0), (60, 1.1), (110, 0.2), (500, 0.2)],
)
def test_cosine(step, expected):
    assert learning_rate(step, 110, optim()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2),
        (9, 2.0),
        (10, 2.0),
        (79, 2.0),
        (80, 2.0),
        (90, 1.0),
        (99, 0.1),
        (100, 0.0),
        (200, 0.0),
    ],
)
def test_wsd(step, expected):
    config = optim(schedule="wsd", min_lr_ratio=0.0, decay_fraction=0.2)
    assert learning_rate(step, 100, config) == pytest.approx(expected)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(0, 100, optim(warmup_steps=0)) == 2.0


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'linear' but must be one of cosine, wsd"):
        optim(schedule="linear")
