"""Learning rate schedules: the share of the peak rate at every step, counted from 0. Names as in transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import RunConfig

_POLYNOMIAL_END = 1e-7
"""Rate that `polynomial` ends at."""


def schedule(config: RunConfig, optimizer: Optimizer) -> LambdaLR:
    """The schedule of a run over all its steps."""
    return LambdaLR(optimizer, _share(config, optimizer.defaults["lr"]))


def _share(config: RunConfig, peak: float) -> Callable[[int], float]:
    warmup, steps = config.lr_warmup_steps, config.max_train_steps

    def rising(step: int) -> float:
        return step / max(1, warmup)

    def gone(step: int) -> float:
        """How much of the time after the warm-up has gone by, 0 to 1 and beyond."""
        return (step - warmup) / max(1, steps - warmup)

    def polynomial(step: int) -> float:
        left = max(0.0, 1 - gone(step)) ** config.lr_power
        return ((peak - _POLYNOMIAL_END) * left + _POLYNOMIAL_END) / peak

    falling: dict[str, Callable[[int], float]] = {
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, 1 - gone(step)),
        "cosine": lambda step: max(0.0, (1 + math.cos(math.pi * gone(step))) / 2),
        "cosine_with_restarts": lambda step: (
            0.0 if gone(step) >= 1 else (1 + math.cos(math.pi * (config.lr_num_cycles * gone(step) % 1))) / 2
        ),
        "polynomial": polynomial,
    }
    if config.lr_scheduler == "constant":  # without warm-up, as its name says
        return lambda step: 1.0
    after = falling[config.lr_scheduler]
    return lambda step: rising(step) if step < warmup else after(step)
