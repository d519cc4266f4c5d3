"""Drawing images with a pipeline: prompts x seeds, in batches, each image independent of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SAMPLERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
}
"""Short names; "pipeline" stands for the scheduler that the pipeline came with."""


def generate(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[list[Image.Image]]:
    """Images by prompt and seed: `images[i][j]` shows `prompts[i]` from `seeds[j]`. Options: `generate_each`'s."""
    flat = list(generate_each(pipe, [(prompt, seed) for prompt in prompts for seed in seeds], **options))
    return [flat[row * len(seeds) : (row + 1) * len(seeds)] for row in range(len(prompts))]


def generate_each(
    pipe: Any,
    wanted: Sequence[tuple[str, int]],
    *,
    steps: int = 20,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    size: int | tuple[int, int] | None = None,
    sampler: str = "dpm++",
    batch_size: int = 4,
) -> Iterator[Image.Image]:
    """One image for each (prompt, seed), as soon as its batch is done.

    **Arguments**:
    - `guidance_scale`: the family's unless given; 1 and below draws without guidance.
    - `size`: side, or (width, height), in pixels; the pipeline's own unless given.
    - `sampler`: a key of `SAMPLERS`, built from the pipeline's scheduler config and so with its prediction type, or
      "pipeline". Two steps of "dpm++" do the work of five of "ddim".

    Noise is drawn on the CPU with a generator per image: an image depends neither on its batch nor on the device's
    random numbers, and the global random state is left alone.
    """
    from .families import family_of

    scale = family_of(pipe).guidance_scale if guidance_scale is None else guidance_scale
    width, height = (size, size) if isinstance(size, int) else size or (None, None)
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        with torch.no_grad(), _ready(pipe, sampler):
            latents = pipe(
                [prompt for prompt, _ in batch],
                negative_prompt=[negative_prompt] * len(batch),
                num_inference_steps=steps,
                guidance_scale=scale,
                width=width,
                height=height,
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                output_type="latent",
            ).images
            images = [decode(pipe, latent) for latent in latents]
        yield from images


def decode(pipe: Any, latent: Tensor) -> Image.Image:
    """The picture of one latent (channels, height, width). One at a time: at 512 pixels the decoder's activations weigh
    more than a checkpointed training step; in the autoencoder's own dtype, which may differ from the denoiser's."""
    vae = pipe.vae
    shift = vae.config.get("shift_factor") or 0.0
    latent = latent.to(vae.dtype) / vae.config["scaling_factor"] + shift
    pixels = vae.decode(latent[None], return_dict=False)[0][0]  # (3, height, width) in -1 .. 1
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


@contextmanager
def _ready(pipe: Any, sampler: str) -> Iterator[None]:
    """The pipeline in evaluation mode with the asked sampler; afterwards as it was."""
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    before = pipe.scheduler, [m.training for m in models]
    pipe.scheduler = make_sampler(pipe, sampler)
    for model in models:
        model.eval()
    try:
        yield
    finally:
        pipe.scheduler = before[0]
        for model, training in zip(models, before[1], strict=True):
            model.train(training)


def make_sampler(pipe: Any, name: str) -> Any:
    """A fresh scheduler over the noise schedule and prediction type that `pipe` was trained with."""
    import diffusers

    if name != "pipeline" and name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; known: pipeline, {', '.join(SAMPLERS)}")
    scheduler = type(pipe.scheduler) if name == "pipeline" else getattr(diffusers, SAMPLERS[name])
    return scheduler.from_config(pipe.scheduler.config)
