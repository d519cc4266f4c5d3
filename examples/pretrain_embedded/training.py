"""What both trainings share: the pool of scenes, the clock, the optimizers, and a state on disk to resume from."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from render import load_sprites, render
from scenes import STYLES, Emoji, scenes
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BEGAN = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Options of everything that draws scenes."""

    data: Path
    """Folder that `prepare.py` wrote."""
    state: Path
    """Folder to resume from and to write to."""
    pool: int = 400_000
    """Scenes; every call invents new ones."""
    workers: int = max(1, (os.cpu_count() or 1) - 1)
    """Processes that invent scenes."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of both trainings."""

    state: Path
    """Folder to resume from and to write to."""
    minutes: float
    """Training time in all; the learning rate falls along it, so that it is always used whole."""
    deadline: float = math.inf
    """Seconds after which this call must have finished the training. Where fewer are left for it than `minutes` says
    once everything is compiled, the training is that much shorter, and its learning rate falls sooner."""
    stop: float = math.inf
    """Seconds after which this call saves and ends; the next call goes on."""
    save_every: float = 120
    """Seconds between two saves."""
    warmup: int = 100
    """Steps in which the learning rate rises."""
    compile: bool = True
    """Compile the models. Without, steps are slower and start at once."""


def log(*words: object) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s]", *words, flush=True)


def mixed_precision() -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE, torch.bfloat16)


def prepare_torch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


# ---- the pool --------------------------------------------------------------------------------------------------------


def _invent(task: tuple[Path, int, int]) -> tuple[np.ndarray, list[str]]:
    folder, count, seed = task
    return scenes(Emoji(folder), count, seed)


def pool_of(options: Pool, seed: int) -> tuple[np.ndarray, list[str]]:
    """Rows and captions of the pool, invented by several processes and kept on disk. Call it before CUDA starts."""
    file = options.state / f"pool-{seed}-{options.pool}.npz"
    if not file.exists():
        share = -(-options.pool // options.workers)
        tasks = [(options.data, share, seed * 1000 + worker) for worker in range(options.workers)]
        with multiprocessing.get_context("fork").Pool(options.workers) as pool:
            parts = pool.map(_invent, tasks)
        captions = "\n".join(caption for _, some in parts for caption in some)
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new.npz")
        np.savez(new, rows=np.concatenate([rows for rows, _ in parts]), captions=np.array(captions))
        os.replace(new, file)
    stored = np.load(file)
    log(f"{len(stored['rows'])} scenes invented")
    return stored["rows"], str(stored["captions"]).split("\n")


def drawn(options: Pool, rows: np.ndarray, batch: int = 2048) -> Iterator[Tensor]:
    """The pool drawn, batch by batch: uint8 (batch, 3, 64, 64), on the device."""
    emoji = Emoji(options.data)
    sprites = load_sprites(options.data, [row for row, (style, _) in enumerate(emoji.index) if style in STYLES])
    sprites = sprites.to(DEVICE)
    table = torch.from_numpy(rows).to(DEVICE)
    for part in table.split(batch):
        yield render(part, sprites).mul_(255).round_().byte()


def model_input(images: Tensor) -> Tensor:
    """uint8 images as the VAE takes them: -1 to 1, channels last."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


# ---- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """How much of the training time is spent, over all calls."""

    def __init__(self, options: Training, spent: float):
        self._start = time.monotonic()
        left = options.deadline - (self._start - BEGAN)
        self._total, self._spent, self._stop = min(options.minutes * 60, spent + left), spent, options.stop

    @property
    def spent(self) -> float:
        return self._spent + time.monotonic() - self._start

    @property
    def finished(self) -> bool:
        return self.spent >= self._total

    def __iter__(self) -> Iterator[float]:
        """The share of the time that is spent, until all of it is, or this call's part."""
        while not self.finished and time.monotonic() - BEGAN < self._stop:
            yield self.spent / self._total


def falling(share: float, step: int, warmup: int) -> float:
    """Factor of the learning rate: up in `warmup` steps, then a cosine down to a fiftieth."""
    return min(1, (step + 1) / warmup) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1, share))))


# ---- optimizing ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, for weights of two axes and more (Jordan 2024, kellerjordan.github.io/posts/muon).

    Every update is scaled to an RMS of 0.2, as AdamW's are, so that both take the same rates (Liu et al. 2025,
    arXiv:2502.16982). Weights of one shape are orthogonalised together, since on small ones launching is what costs.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(groups, {"momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                grads = [p.grad for p in params]
                held = [self._momentum(p) for p in params]
                torch._foreach_lerp_(held, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, held, group["momentum"])
                updates = orthogonal(torch.stack(ahead).flatten(2)).view(-1, *shape).float()
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, list((updates * (group["lr"] * scale)).unbind()))

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest (semi-)orthogonal matrices, (n, rows, cols), by Newton-Schulz with Jordan's coefficients."""
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Optimizer:
    """Muon for matrices and kernels, AdamW for the rest; clipping; an exponential moving average of the weights.

    Learning rates are tensors, so that a captured step reads their present values.
    """

    def __init__(self, modules: list[tuple[nn.Module, float]], average: float, weight_decay: float = 0.01):
        self.params = [p for module, _ in modules for p in module.parameters()]
        self.average, self.means = average, [p.detach().clone() for p in self.params]
        self.rates: list[tuple[Tensor, float]] = []
        matrices, others = [], []
        for module, rate in modules:
            tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
            is_matrix = [p.ndim > 1 and id(p) not in tables for p in module.parameters()]
            for groups, wanted in ((matrices, True), (others, False)):
                chosen = [p for p, matrix in zip(module.parameters(), is_matrix, strict=True) if matrix == wanted]
                self.rates.append((torch.zeros((), device=DEVICE), rate))
                groups.append({"params": chosen, "lr": self.rates[-1][0]})
        cuda = DEVICE == "cuda"
        self.parts = [
            Muon(matrices, weight_decay=weight_decay),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=weight_decay, fused=cuda, capturable=cuda),
        ]

    def descend(self, loss: Tensor) -> None:
        """One step down `loss`."""
        for p in self.params:
            p.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            part.step()

    def set_rates(self, factor: float) -> None:
        for tensor, top in self.rates:
            tensor.fill_(top * factor)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Let the average follow the weights."""
        torch._foreach_lerp_(self.means, self.params, 1 - min(self.average, (1 + step) / (10 + step)))

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts], "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rates = [group["lr"] for part in self.parts for group in part.param_groups]
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        for group in [group for part in self.parts for group in part.param_groups]:
            group["lr"] = rates.pop(0)
        self.means = [mean.to(DEVICE) for mean in state["means"]]

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged weights into the models. Save the state first: the live weights are gone after it."""
        for p, mean in zip(self.params, self.means, strict=True):
            p.copy_(mean)

    @torch.no_grad()
    def save_average(self, models: dict[str, nn.Module], out: Path | None) -> None:
        """Write the models with the averaged weights, in half precision, to folders of `out`."""
        if out is None:
            return
        mean_of = {id(p): mean for p, mean in zip(self.params, self.means, strict=True)}
        for name, model in models.items():
            averaged = copy.deepcopy(model)
            for p, mine in zip(averaged.parameters(), model.parameters(), strict=True):
                p.copy_(mean_of[id(mine)])
            averaged.half().save_pretrained(out / name)


# ---- the loop --------------------------------------------------------------------------------------------------------


def captured(function: Callable[[], Tensor], warmup: int = 3) -> Callable[[], Tensor]:
    """A step as one CUDA graph: on small models launching hundreds of kernels costs more than running them.

    `function` is run `warmup` times first. What it returns is overwritten by every call.
    """
    if DEVICE != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def train(
    options: Training,
    file: Path,
    models: dict[str, nn.Module],
    optimizer: Optimizer,
    loss: Callable[[], Tensor],
    out: Path | None = None,
) -> None:
    """Go down `loss()`, which draws its own batch, from where `file` says until the time is over; save there.

    With every save the averaged models go to folders of `out`, if it is given: an interrupted training has a result.
    """
    state = load(file)
    step, spent = 0, 0.0
    if state is not None:
        for name, model in models.items():
            model.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]

    def one_step() -> Tensor:
        value = loss()
        optimizer.descend(value)
        return value.detach()

    optimizer.set_rates(falling(spent / options.minutes / 60, step, options.warmup))
    run = captured(one_step)
    log("first steps done")
    clock, total, saved, count = Clock(options, spent), torch.zeros((), device=DEVICE), time.monotonic(), 0
    for share in clock:
        optimizer.set_rates(falling(share, step, options.warmup))
        total += run()
        optimizer.follow(step)
        step, count = step + 1, count + 1
        if step % 25 == 0 and total.isnan():  # also keeps the queue of steps short, so that the clock is right
            raise FloatingPointError(f"the loss is not a number at step {step}")
        if step % 1000 == 0:
            log(f"step {step}, {share:.1%} of the time, mean loss {total.item() / count:.4f}")
            total, count = torch.zeros_like(total), 0
        if time.monotonic() - saved > options.save_every:
            _save(file, models, optimizer, step, clock.spent)
            optimizer.save_average(models, out)
            saved = time.monotonic()
    _save(file, models, optimizer, step, clock.spent)
    optimizer.save_average(models, out)
    optimizer.use_average()
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if DEVICE == "cuda" else ""
    log(f"{step} steps in {clock.spent:.0f} s{peak}; the last mean loss {total.item() / max(1, count):.4f}")


def _save(file: Path, models: dict[str, nn.Module], optimizer: Optimizer, step: int, spent: float) -> None:
    """Whole or not at all."""
    state = {name: model.state_dict() for name, model in models.items()}
    torch.save({**state, "optimizer": optimizer.state_dict(), "step": step, "spent": spent}, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, map_location=DEVICE, weights_only=True) if path.exists() else None
