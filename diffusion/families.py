"""What differs between model families, as data: one small spec each, no script each.

A new family is a `Family` with its adaptable components, their usual targets, how its text becomes the denoiser's
inputs, and a line in `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

EMBEDDED = "embedded"
"""Names the small, really trained pipeline that ships with the package."""
EMBEDDED_PATH = Path(__file__).parent / "embedded" / "pipeline"


@dataclass(frozen=True)
class Component:
    """An adaptable part of a pipeline. The names are dotted suffixes, as in `target_modules`."""

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...] = ()
    convolution: tuple[str, ...] = ()
    learning_rate: float = 1e-4
    """Default for AdamW and LoRA at batch sizes 1 to 4."""


@dataclass(frozen=True)
class Family:
    """All that training and sampling need to know about a kind of pipeline."""

    name: str
    components: Mapping[str, Component]
    """By attribute of the pipeline, the denoiser first; the rest are text encoders."""
    encode_text: Callable[[Any, Tensor], dict[str, Tensor]]
    """(pipeline, token ids (batch, tokens)) -> keyword arguments of the denoiser, each with the batch first."""
    guidance_scale: float
    """Classifier-free guidance at which the family draws well."""

    @property
    def denoiser(self) -> str:
        return next(iter(self.components))

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(self.components)[1:]


def _clip_hidden_states(pipe: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Last hidden states of one CLIP text encoder: (batch, tokens, width)."""
    return {"encoder_hidden_states": pipe.text_encoder(tokens)[0]}


_UNET = Component(
    attention=("to_q", "to_k", "to_v", "to_out.0"),
    feed_forward=("ff.net.0.proj", "ff.net.2"),
    convolution=(
        *("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
        *("downsamplers.0.conv", "upsamplers.0.conv"),
    ),
)
_CLIP = Component(
    attention=("q_proj", "k_proj", "v_proj", "out_proj"),
    feed_forward=("fc1", "fc2"),
    learning_rate=5e-5,  # text encoders forget other words at the denoiser's rate
)

SD1 = Family("sd1", {"unet": _UNET, "text_encoder": _CLIP}, _clip_hidden_states, guidance_scale=7.5)
SD2 = replace(SD1, name="sd2")
TINY = Family(
    "tiny_sd",
    {"unet": replace(_UNET, learning_rate=1e-3), "text_encoder": replace(_CLIP, learning_rate=1e-3)},
    _clip_hidden_states,
    guidance_scale=3.0,
)
"""The embedded pipeline: Stable Diffusion's architecture at a hundredth of the size, so it learns at higher rates."""

FAMILIES: dict[str, Callable[[Any], Family]] = {
    "StableDiffusionPipeline": lambda pipe: _stable_diffusion(pipe.unet.config.cross_attention_dim),
}
"""Pipeline class -> how to tell its family."""


def _stable_diffusion(width: int) -> Family:
    """The text encoder's width tells CLIP ViT-L (768) from OpenCLIP ViT-H (1024) and the small one."""
    return {768: SD1, 1024: SD2}.get(width, TINY)


def family_of(pipe: DiffusionPipeline) -> Family:
    tell = FAMILIES.get(type(pipe).__name__)
    if tell is None:
        raise ValueError(f"{type(pipe).__name__} cannot be trained yet; supported: {', '.join(FAMILIES)}")
    return tell(pipe)


def native_resolution(pipe: Any) -> int:
    """Side in pixels of the squares that the pipeline was trained on."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


def noise_schedule(pipe: Any) -> Any:
    """A `DDPMScheduler` over the noise levels and with the prediction type that the pipeline was trained with."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(pipe.scheduler.config)


def load_pipeline(model: str, revision: str | None = None) -> Any:
    """The pipeline at `model`: a local directory, a hub id, or "embedded". On the CPU, weights in float32.

    Safety checkers are left out: they are of no use in training and cost 1.2 GB.
    """
    source = EMBEDDED_PATH if model == EMBEDDED else Path(model).expanduser()
    if source.is_dir():
        if not (source / "model_index.json").is_file():
            raise ValueError(f"{source} is not a diffusers pipeline: it holds no model_index.json")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ValueError(f"model={model!r} is neither a directory, nor a hub id such as owner/name, nor {EMBEDDED!r}")
    from torch import nn

    with _quiet_loading():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(
            str(source) if source.is_dir() else model,
            revision=revision,
            safety_checker=None,
            requires_safety_checker=False,
        )
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.float().eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """The libraries' loading bars are gone in a blink and would tear the run's own bar; that torchvision is missing is
    no news to somebody who does without it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
