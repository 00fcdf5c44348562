"""Learning rate as a pure function of the step, so that resuming needs no scheduler state.

    warmup   lr (t + 1) / w                                 t < w
    cosine   lr (m + (1 - m) (1 + cos(pi u)) / 2)           u = (t - w) / (n - w)
    wsd      lr, then lr (m + (1 - m) (1 - u))              u over the last d n steps: warmup, stable, decay

t: step from 0, n: steps, w: warmup_steps, m: min_lr_ratio, d: decay_fraction.
"""

import math

from cp_gdn.train.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``; after the last step it stays at its floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        start, length = config.warmup_steps, steps - config.warmup_steps
        u = min(1.0, (step - start) / max(1, length))
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * u)))
    length = max(1, round(config.decay_fraction * steps))
    u = min(1.0, max(0.0, (step - (steps - length)) / length))
    return config.lr * (floor + (1 - floor) * (1 - u))
