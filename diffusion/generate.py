"""`veneer generate`: prompts and weighted adapters in, pictures and a contact sheet out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.runs.settings import to_yaml
from ..core.weighted import parse_weighted

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How pictures are drawn: which pipeline, and how it samples."""

    model: str = "embedded"
    """The pipeline: a local directory, a hub id such as CompVis/stable-diffusion-v1-4, or "embedded" for the small one
    that ships with this package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Not given, the newest."""
    seeds: tuple[int, ...] = (0, 1)
    """One picture a prompt and seed. The same seed gives the same picture, whatever else is drawn."""
    steps: int = 20
    """Denoising steps; 12 to 30 with "dpm++"."""
    guidance_scale: float | None = None
    """How closely pictures follow their prompt. Not given, the family's: 7.5, or 3 for the embedded pipeline."""
    negative_prompt: str = ""
    """What to keep away from."""
    sampler: Literal["dpm++", "ddim", "euler", "unipc", "pndm", "pipeline"] = "dpm++"
    """The solver; "pipeline" is the one that the pipeline came with."""
    batch_size: int = 4
    """Pictures drawn at once. Changes memory and speed, not the pictures."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to draw: the accelerator if there is one, or the CPU all the same."""

    def load_pipeline(self) -> Any:
        import torch

        from .families import load_pipeline

        on_cpu = self.device == "cpu" or not torch.accelerator.is_available()
        return load_pipeline(self.model, self.revision).to("cpu" if on_cpu else torch.accelerator.current_accelerator())

    def draw(self, pipe: Any, prompts: Sequence[str]) -> list[tuple[str, int, Image]]:
        """(prompt, seed, picture) for each prompt and seed, prompts outermost."""
        from tqdm import tqdm

        from .sample import generate_each

        wanted = [(prompt, seed) for prompt in prompts for seed in self.seeds]
        images = generate_each(
            pipe,
            wanted,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            sampler=self.sampler,
            batch_size=self.batch_size,
        )
        images = tqdm(images, "drawing", len(wanted), leave=False, disable=None)  # None: off where no one looks on
        return [(prompt, seed, image) for (prompt, seed), image in zip(wanted, images, strict=True)]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DrawOptions):
    """Draw prompts, with any number of adapters at chosen weights."""

    prompts: tuple[str, ...]
    """What to draw."""
    adapters: tuple[str, ...] = ()
    """Adapter folders or files, each PATH or PATH=WEIGHT. 1 is as trained, 0 is off; they add up."""
    out: Path = Path("pictures")
    """Folder for a PNG a picture, the contact sheet `sheet.png` and this config."""


def generate(config: GenerateConfig) -> None:
    """Draw and write everything that `config` asks for."""
    from .grid import contact_sheet
    from .pipeline import load_adapter

    if not config.prompts or not config.seeds:
        raise ValueError("nothing to draw: give at least one prompt and one seed")
    pipe = config.load_pipeline()
    for adapter in parse_weighted(config.adapters):
        load_adapter(pipe, adapter.path, adapter.name, adapter.weight)
    drawn = config.draw(pipe, config.prompts)

    config.out.mkdir(parents=True, exist_ok=True)
    for index, (prompt, seed, image) in enumerate(drawn):
        image.save(config.out / f"{index:03d}-{_slug(prompt)}-{seed}.png")
    rows = [(prompt, [(f"seed {seed}", image) for p, seed, image in drawn if p == prompt]) for prompt in config.prompts]
    contact_sheet(rows).save(config.out / "sheet.png")
    (config.out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    print(f"{len(drawn)} pictures and their sheet are in {config.out}")


def _slug(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48]
