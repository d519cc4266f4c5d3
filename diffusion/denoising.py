"""What DreamBooth minimises: the error of the denoiser on noisy latents of the subject, and of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.runs.random_state import generator, shuffled
from ..core.runs.trainer import WEIGHT_DTYPES
from .cache import Latents, Prompts
from .config import DreamBoothConfig
from .losses import denoising_loss, signal_to_noise, snr_weights, split_loss, training_target


@dataclass(frozen=True)
class TrainingSet:
    """Latents of some images and the prompt of each."""

    name: str
    latents: Latents
    prompts: tuple[str, ...]
    files: tuple[str, ...]
    """Names of the images; with the prompts, how a resumed run tells that it sees the same set."""


@dataclass(frozen=True)
class Batch:
    """One forward pass: subject first, then its class."""

    latents: Tensor
    """(batch, channels, height, width)"""
    noise: Tensor
    """of the same shape"""
    timesteps: Tensor
    """(batch,) of int64"""
    prompts: list[str]
    instances: int


class Denoising:
    """The task of a `Trainer`."""

    def __init__(
        self,
        config: DreamBoothConfig,
        denoiser: nn.Module,
        noise_schedule: Any,
        sets: list[TrainingSet],
        prompts: Prompts,
        device: torch.device,
    ):
        self.config, self.denoiser, self.sets, self.prompts, self.device = config, denoiser, sets, prompts, device
        self.noise_schedule = noise_schedule
        self.noise_schedule.alphas_cumprod = self.noise_schedule.alphas_cumprod.to(device)

    def draw(self, batch_number: int) -> Batch:
        """Batch `batch_number` of the run: images, latents, noise and timesteps, all on the CPU's generators."""
        size, seed = self.config.train_batch_size, self.config.seed
        random = generator(seed, "batch", batch_number)
        latents, prompts = [], []
        for group in self.sets:
            images = shuffled(seed, group.name, len(group.latents), batch_number * size, size)
            latents.append(group.latents.draw(images, random))
            prompts += [group.prompts[i] for i in images.tolist()]
        clean = torch.cat(latents)
        noise = torch.randn(clean.shape, generator=random)
        steps = self.noise_schedule.config["num_train_timesteps"]
        timesteps = torch.randint(steps, (len(clean),), generator=random)
        return Batch(clean.to(self.device), noise.to(self.device), timesteps.to(self.device), prompts, size)

    def losses(self, batch_number: int) -> dict[str, Tensor]:
        """`loss`, and its unweighted parts `instance` and, with prior preservation, `prior`."""
        batch = self.draw(batch_number)
        schedule, kind = self.noise_schedule, self.noise_schedule.config["prediction_type"]
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        target = training_target(schedule, batch.latents, batch.noise, batch.timesteps)
        noisy = noisy.to(WEIGHT_DTYPES[self.config.mixed_precision])
        prediction = self.denoiser(noisy, batch.timesteps, **self.prompts.condition(batch.prompts)).sample
        weights = None
        if self.config.snr_gamma is not None:
            weights = snr_weights(signal_to_noise(schedule, batch.timesteps), kind, self.config.snr_gamma)
        errors = denoising_loss(prediction, target, weights)
        total, parts = split_loss(errors, batch.instances, self.config.prior_loss_weight)
        return {"loss": total, **parts}

    def data(self) -> dict[str, list[tuple[str, str]]]:
        return {group.name: list(zip(group.files, group.prompts, strict=True)) for group in self.sets}
