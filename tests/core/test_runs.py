"""The machinery that every training run shares."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler
from veneer.core.runs.config import RunConfig, own_fields_first
from veneer.core.runs.docs import field_docs
from veneer.core.runs.schedule import schedule


@own_fields_first
@dataclass(frozen=True, kw_only=True)
class Own(RunConfig):
    data: Path = Path("x")
    """What it learns from."""
    max_train_steps: int = 7
    """Fewer than
    usual."""


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_schedules_are_those_of_the_ecosystem(name, warmup):
    config = Own(
        output_dir=Path("x"), max_train_steps=12, lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=2, lr_power=2
    )
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3) for _ in range(2))
    expected = get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=12, num_cycles=2, power=2)
    made = schedule(config, ours)
    for step in range(14):
        # theirs has no cycles for a plain cosine: half a wave, whatever is asked
        assert made.get_last_lr() == pytest.approx(expected.get_last_lr(), rel=1e-12), step
        for optimizer, following in ((ours, made), (theirs, expected)):
            optimizer.step()
            following.step()


def test_own_fields_come_first_and_every_field_has_its_sentence():
    names = [field.name for field in fields(Own)]
    assert names[:3] == ["data", "max_train_steps", "output_dir"]
    docs = field_docs(Own)
    assert docs.keys() == set(names)
    assert docs["max_train_steps"] == "Fewer than usual."


def test_problems_name_the_field_and_the_value():
    config = Own(output_dir=Path("x"), max_train_steps=0, seed=-1)
    with pytest.raises(ValueError, match="max_train_steps=0 must be at least 1\nseed=-1 must not be negative"):
        config.validate()
