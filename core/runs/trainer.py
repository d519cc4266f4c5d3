"""One optimizer step, as a function of the step's number and of nothing else that is random."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..adapted import AdaptedModel
from ..steps import after_step, load_training_state, penalty, training_state
from .config import RunConfig
from .events import Step
from .place import Place
from .random_state import derived_seed
from .schedule import schedule

ADAPTER = "default"
"""Name of the adapter in training."""

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By `mixed_precision`: of frozen weights and activations. Adapters, losses and optimizer stay float32."""

_MOST_OVERFLOWS = 16
"""fp16 steps skipped in a row, each halving the loss scale, before it is called divergence: 65536 -> 1."""


class TrainingError(RuntimeError):
    """The run cannot go on; what it has learnt until the last checkpoint is kept."""


class Task(Protocol):
    """What a front end brings: something to minimise, batch by batch."""

    def losses(self, batch_number: int) -> dict[str, Tensor]:
        """Of batch `batch_number` of the run: scalars, of which `loss` is minimised and the others are its parts.

        All draws follow from the number, so that a resumed run sees what an undisturbed one would.
        """
        ...

    def data(self) -> dict[str, list[Any]]:
        """What it learns from, by set: kept in checkpoints, where a resumed run tells whether it sees the same."""
        ...


class Trainer:
    """Adapters, optimizer and schedule, with one public verb: `step`.

    Neither model is wrapped for several processes: the gradients of the adapters, a few megabytes, are averaged in one
    go after the backward pass. That is the same arithmetic, works with any mix of trained components and with
    checkpointing, and costs one collective.
    """

    def __init__(
        self,
        config: RunConfig,
        models: dict[str, AdaptedModel],
        learning_rates: dict[str, float],
        task: Task,
        place: Place,
    ):
        self.config, self.models, self.task, self.place = config, models, task, place
        self.device = place.device
        self.parameters = {name: model.parameters_of(ADAPTER) for name, model in models.items()}
        groups = [{"params": self.parameters[name], "lr": rate} for name, rate in learning_rates.items()]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=max(learning_rates.values()),  # the polynomial schedule measures against this one
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=self.device.type in ("cpu", "cuda"),  # hundreds of small tensors: one kernel instead of thousands
        )
        self.lr_scheduler = schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        self.overflows = 0
        self.checked = False
        self.recent: deque[float] = deque(maxlen=20)

    # ---------------------------------------------------------------- a step

    def step(self, number: int) -> Step:
        """Step `number`, counted from 1. Raises `TrainingError` rather than go on with broken numbers."""
        started = time.perf_counter()
        rates = {n: float(rate) for n, rate in zip(self.parameters, self.lr_scheduler.get_last_lr(), strict=True)}
        losses = self._backward(number)
        self._average_gradients()
        self.scaler.unscale_(self.optimizer)
        norms = {name: get_total_norm(_gradients(group)).to(self.device) for name, group in self.parameters.items()}
        values = torch.stack([*losses.values(), *norms.values()]).tolist()  # the one wait for the device in a step
        shown = dict(zip([*losses, *norms], values, strict=True))
        self._judge(number, {name: shown[name] for name in losses}, {name: shown[name] for name in norms})
        self._update(number, norms)
        seconds = time.perf_counter() - started
        self.recent.append(seconds)
        return Step(
            step=number,
            loss=shown["loss"],
            losses={name: shown[name] for name in losses if name != "loss"},
            learning_rates=rates,
            gradient_norms={name: shown[name] for name in norms},
            seconds=seconds,
            eta=(self.config.max_train_steps - number) * sum(self.recent) / len(self.recent),
        )

    def _backward(self, number: int) -> dict[str, Tensor]:
        """Accumulate gradients over the step's batches; mean losses of this process, each a scalar."""
        accumulate = self.config.gradient_accumulation_steps
        totals: dict[str, Tensor] = {}
        for turn in range(accumulate):
            batch_number = ((number - 1) * accumulate + turn) * self.place.processes + self.place.process
            with _dropout_seeded(derived_seed(self.config.seed, "dropout", batch_number), self.device):
                losses = self.task.losses(batch_number)
                extra = self._penalty()
                if extra is not None:
                    losses |= {"loss": losses["loss"] + extra, "penalty": extra}
                self.scaler.scale(losses["loss"] / accumulate).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulate
        return totals

    def _penalty(self) -> Tensor | None:
        """What the methods themselves add to the loss, where one does."""
        terms = [term for model in self.models.values() if isinstance(term := penalty(model), Tensor)]
        return torch.stack([term.to(self.device) for term in terms]).sum() if terms else None

    def _average_gradients(self) -> None:
        if self.place.processes == 1:
            return
        trained = [p for group in self.parameters.values() for p in group if p.grad is not None]
        flat = self.place.mean(torch.cat([gradient.flatten() for gradient in _gradients(trained)]))
        for parameter, mean in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            parameter.grad = mean.view_as(parameter)

    def _update(self, number: int, norms: dict[str, Tensor]) -> None:
        everything = [p for group in self.parameters.values() for p in group]
        if self.config.max_grad_norm:
            total = torch.stack(list(norms.values())).norm()
            clip_grads_with_norm_(everything, self.config.max_grad_norm, total)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.overflows:  # in fp16: gradients that have overflowed tell nothing
            for model in self.models.values():
                after_step(model, number)
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()

    # ---------------------------------------------------------------- no silent failure

    def _judge(self, number: int, losses: dict[str, float], norms: dict[str, float]) -> None:
        """Broken losses and gradients end the run before they reach the adapter.

        A component's gradient as a whole is judged, not each tensor's: at the first step LoRA's A has none by
        construction, since B is zero.
        """
        for name, value in losses.items():
            if not math.isfinite(value):
                raise TrainingError(f"the {name} of step {number} is {value}; {_ADVICE}")
        broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if broken and self.scaler.is_enabled():  # an overflow in fp16: the scaler skips this step and scales down
            self.overflows += 1
            if self.overflows > _MOST_OVERFLOWS:
                raise TrainingError(f"gradients of {', '.join(broken)} overflow in fp16 at step {number}; {_ADVICE}")
            return
        self.overflows = 0
        if broken:
            raise TrainingError(f"gradients of {', '.join(broken)} are not finite at step {number}; {_ADVICE}")
        if not self.checked:
            idle = [name for name, norm in norms.items() if norm == 0]
            if idle:
                raise TrainingError(
                    f"no gradient reaches the adapter of {', '.join(idle)}: it would stay untrained. "
                    "Its targets do not take part in the loss; choose others, or method none"
                )
            self.checked = True

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside adapters and step number."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "methods": {name: training_state(model) for name, model in self.models.items()},
            "data": self.task.data(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from `state`; returns the sets whose data are others than they were then."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for name, found in state.get("methods", {}).items():  # checkpoints of version 0.1 have none
            load_training_state(self.models[name], found)
        return [name for name, now in self.task.data().items() if state["data"].get(name) != now]


_ADVICE = "lower the learning rates, or use mixed_precision bf16 or no, in a new output_dir"


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


@contextmanager
def _dropout_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout, in adapters and models, draws from the global generators: seeded inside, restored outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
