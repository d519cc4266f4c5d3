"""What the frozen parts of a pipeline compute is computed once: latents of all images, embeddings of all prompts.

Afterwards the autoencoder, and text encoders that are not trained, leave the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.runs.random_state import derived_seed
from .data import Example, image_views
from .images import read_image


@dataclass(frozen=True)
class Latents:
    """Moments of the latent distribution of every view of every image, float32 on the CPU.

    Moments and not draws: DreamBooth draws a new latent at each visit, and so do we.
    """

    mean: Tensor
    """(images, views, channels, height, width), scaled as the denoiser takes them"""
    std: Tensor
    """of the same shape"""

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, images: Tensor, random: torch.Generator) -> Tensor:
        """A random view of each image of `images` (batch,): (batch, channels, height, width)."""
        views = torch.randint(self.mean.shape[1], images.shape, generator=random)
        mean, std = self.mean[images, views], self.std[images, views]
        return mean + std * torch.randn(mean.shape, generator=random)


def encode_latents(
    vae: Any,
    examples: Sequence[Example],
    resolution: int,
    device: torch.device,
    *,
    views: int = 1,
    random_crop: bool = False,
    flip: bool = False,
    seed: int = 0,
) -> Iterator[int | Latents]:
    """Encode every view of every image, in float32 and in batches of about half a megapixel.

    Yields how many images are done, for a progress bar, and at last the `Latents`. The autoencoder is moved to `device`
    and back to the CPU: it is not needed again until samples are drawn.
    """
    at_once = max(1, 2 * 512 * 512 // resolution**2)
    moments: list[tuple[Tensor, Tensor]] = []
    vae.to(device)
    try:
        for done, example in enumerate(examples, 1):
            pixels = image_views(
                read_image(example.path),
                resolution,
                views,
                random_crop=random_crop,
                flip=flip,
                seed=derived_seed(seed, "view", example.path.name),
            )
            moments.append(_moments(vae, pixels, at_once, device))
            yield done
    finally:
        vae.to("cpu")
    mean, std = (torch.stack(parts) for parts in zip(*moments, strict=True))
    yield Latents(mean, std)


@torch.no_grad()
def _moments(vae: Any, pixels: Tensor, at_once: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (views, channels, h, w) for pixels (views, 3, height, width)."""
    parts = [vae.encode(part.to(device, vae.dtype)).latent_dist for part in pixels.split(at_once)]
    scale, shift = vae.config["scaling_factor"], vae.config.get("shift_factor") or 0.0
    mean = torch.cat([part.mean.float().cpu() for part in parts])
    std = torch.cat([part.std.float().cpu() for part in parts])
    return (mean - shift) * scale, std * scale


class Prompts:
    """Conditioning of the denoiser by prompt: from the live text encoder when it is trained, else from a cache.

    **Arguments**: `encode` maps token ids (batch, tokens) to keyword arguments of the denoiser.
    """

    def __init__(self, tokenizer: Any, encode: Callable[[Tensor], dict[str, Tensor]], device: torch.device):
        self.tokenizer, self.encode, self.device = tokenizer, encode, device
        self.tokens: dict[str, Tensor] = {}  # prompt -> (tokens,)
        self.cached: dict[str, dict[str, Tensor]] | None = None

    def add(self, prompts: Iterable[str]) -> list[str]:
        """Tokenise `prompts` to the tokenizer's own length; returns those that were cut."""
        cut = []
        for prompt in dict.fromkeys(prompts):
            longest = self.tokenizer.model_max_length
            if len(self.tokenizer(prompt, verbose=False).input_ids) > longest:
                cut.append(prompt)
            tokens = self.tokenizer(prompt, padding="max_length", max_length=longest, truncation=True).input_ids
            self.tokens[prompt] = torch.tensor(tokens)
        return cut

    @torch.no_grad()
    def freeze(self) -> None:
        """Encode everything now and never again: the text encoder may leave the device."""
        self.cached = {p: self.encode(ids[None].to(self.device)) for p, ids in self.tokens.items()}

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Keyword arguments of the denoiser for a batch of prompts."""
        if self.cached is None:
            return self.encode(torch.stack([self.tokens[p] for p in prompts]).to(self.device))
        rows = [self.cached[p] for p in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
