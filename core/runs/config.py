"""The settings that every training run has: amounts, optimizer, schedule, checkpoints.

No model library is imported here, so that help and mistakes show at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from .settings import ConfigError

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
C = TypeVar("C", bound=type)


def own_fields_first(cls: C) -> C:
    """Class decorator: a config's own fields come before those of every run, in help, YAML and forms."""
    known: dict[str, Any] = cls.__dataclass_fields__
    own = [name for name in vars(cls).get("__annotations__", {}) if name in known]
    cls.__dataclass_fields__ = {name: known[name] for name in dict.fromkeys([*own, *known])}
    return cls


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run needs beside its data and its model. Front ends subclass it; a rerun resumes."""

    output_dir: Path
    """The run's directory: settings, metrics, checkpoints, and in the end the adapter."""
    max_train_steps: int = 400
    """Optimizer steps, at least 1. A run can be prolonged later."""
    train_batch_size: int = 1
    """Examples in one forward pass, per process."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step: a larger batch without more memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 40% slower, a third to a half less memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format of the frozen weights and of activations; adapters stay float32. bf16 halves the memory on recent
    hardware, fp16 on older."""
    lr_scheduler: Schedule = "constant"
    """How the learning rates change over the run. Constant lets a run be prolonged without changing its past."""
    lr_warmup_steps: int = 0
    """Steps over which the rates rise from 0."""
    lr_num_cycles: int = 1
    """Restarts of `cosine_with_restarts`."""
    lr_power: float = 1.0
    """Exponent of `polynomial`."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients, 0 to 1."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients, 0 to 1."""
    adam_weight_decay: float = 1e-2
    """Decay of the adapter's weights towards 0 (no change), relative to the learning rate."""
    adam_epsilon: float = 1e-8
    """Keeps AdamW from dividing by zero."""
    max_grad_norm: float = 1.0
    """All gradients together are scaled down to this length; 0 switches it off."""
    seed: int = 0
    """Decides everything random: the adapter, the order of the data, every draw. A step's draws depend only on the seed
    and the step's number, which is why a resumed run equals an undisturbed one."""
    allow_tf32: bool = False
    """Faster, slightly less exact float32 products on NVIDIA GPUs since Ampere."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train: the accelerator that this process was launched for, or the CPU all the same."""
    checkpointing_steps: int = 100
    """Steps between checkpoints, at least 1."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept, the newest; at least 1."""

    @classmethod
    def may_change(cls) -> frozenset[str]:
        """Fields that a rerun of the same directory may change: they alter nothing that is learnt already."""
        return frozenset({"output_dir", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "device"})

    def validate(self) -> None:
        """Raise `ConfigError` with a line for everything that cannot work."""
        found = list(self.problems())
        if found:
            raise ConfigError("\n".join(found))

    def problems(self) -> Iterator[str]:
        """A line for everything that cannot work; subclasses add theirs."""
        yield from self.below(1, *_AT_LEAST_ONE)
        yield from self.below(0, "lr_warmup_steps", "max_grad_norm", "seed")

    def below(self, least: int, *names: str) -> Iterator[str]:
        """A line for each of these fields that is below its least value."""
        must = "must not be negative" if least == 0 else f"must be at least {least}"
        yield from (f"{name}={getattr(self, name)} {must}" for name in names if getattr(self, name) < least)


_AT_LEAST_ONE = (
    *("max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
    *("checkpointing_steps", "checkpoints_total_limit"),
)


def differing_fields(
    before: dict[str, Any], now: dict[str, Any], may_change: frozenset[str], prefix: str = ""
) -> list[str]:
    """`name: before -> now` for all fields that a rerun must not change; nested configs by dotted name."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differing_fields(old, new, may_change, f"{prefix}{name}.")
        elif old != new and prefix + name not in may_change:
            lines.append(f"{prefix}{name}: {old!r} -> {new!r}")
    return lines
