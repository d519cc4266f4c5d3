"""Step 7: how well pipelines draw what they know, in one table.

    python evaluate.py --data data --pipelines ../../diffusion/embedded/pipeline pipeline --out evaluation

For every pipeline: the VAE's error on concepts that were held out of training; whether "a <name>" draws that concept,
judged by the nearest of all Noto icons, for seen and for held-out names; and the time of a picture. The folder gets a
sheet of the drawn concepts and one of everyday prompts for each pipeline.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from names import cleaned
from PIL import Image
from render import PIXELS, load_sprites, render
from scenes import Emoji, one
from torch import Tensor

SHIFTS = (-4, -2, 0, 2, 4)
"""Pixels by which a drawn thing may be off its place."""
PROMPTS = """a red apple|a smiling cat face|a dog face|a blue apple|a green cat face|a red rose on the grass
|a rocket at night|a red car|two strawberries|a cat next to an apple|a pizza on a blue background|a house in the snow
|a purple elephant|a photo of a dog on the beach|a lion face, 3d style|a lion face, flat style|a lion face, blob style
|a slice of pizza, 3d style|a photo of a horse in a green field|a fox|a pink car in the city|a woman firefighter
|cherries|a cup of coffee on a yellow background|three ducks in the water|a tiny ship|a bee above a sunflower
|a sad face, flat style|a bunny in the snow|a tree at sunset""".replace("\n", "").split("|")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure pipelines."""

    data: Path
    """Folder that `prepare.py` wrote."""
    pipelines: tuple[Path, ...]
    """Folders of the pipelines, compared in this order."""
    out: Path
    """Folder for the sheets."""
    concepts: int = 72
    """How many seen concepts are drawn."""
    prompts: tuple[str, ...] = tuple(PROMPTS)
    """Everyday prompts of the sheet, two pictures each."""
    threads: int = 2
    """CPU threads. On a machine with other work, 1 is faster."""


@dataclass(frozen=True)
class Figures:
    """What is measured of one pipeline."""

    psnr: float
    """dB on held-out concepts, mean latents."""
    l1: float
    seen: tuple[int, int, int]
    """Nearest is right, right is among the nearest five, of how many."""
    held_out: tuple[int, int, int]
    seconds: float
    """A picture by DPM++ in 20 steps with guidance, the median of nine."""
    megabytes: float


class Icons:
    """All Noto icons on white, as references."""

    def __init__(self, folder: Path):
        emoji = Emoji(folder)
        known = [i for i in range(len(emoji.concepts)) if ("noto", i) in emoji.sprite]
        self.concepts = [emoji.concepts[i] for i in known]
        self.sprites = load_sprites(folder, [emoji.sprite["noto", i] for i in known])
        sides = [[one(k, mirrored=mirrored) for k in range(len(known))] for mirrored in (False, True)]
        self.features = torch.cat([_features(self._drawn(side)) for side in sides])

    def _drawn(self, rows: Any) -> Tensor:
        return render(torch.stack([torch.from_numpy(row) for row in rows]), self.sprites)

    def images(self, indices: list[int]) -> Tensor:
        return self._drawn([one(k) for k in indices])

    def rank(self, image: Tensor, index: int) -> int:
        """How many icons are nearer to the image than icon `index` is, at the best shift of each."""
        distances = torch.full((len(self.concepts),), torch.inf)
        for right in SHIFTS:
            for down in SHIFTS:
                shifted = _features(image.roll((down, right), (2, 3)))
                both = torch.cdist(shifted, self.features).view(2, -1)
                distances = torch.minimum(distances, both.amin(0))
        return int((distances < distances[index]).sum())

    def held_out(self) -> list[int]:
        return [k for k, concept in enumerate(self.concepts) if concept["held_out"]]

    def seen(self) -> list[int]:
        return [k for k, c in enumerate(self.concepts) if not c["held_out"] and c["weight"] == 1]


def _features(images: Tensor) -> Tensor:
    """Colours on a 16 x 16 grid, relative to white."""
    return (F.avg_pool2d(images, PIXELS // 16) - 1).flatten(1)


def article(words: str) -> str:
    """The plain rule, so that pipelines are asked alike whatever their captions were."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def load(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def vae_error(pipe: StableDiffusionPipeline, icons: Icons) -> tuple[float, float]:
    true = icons.images(icons.held_out())
    drawn = pipe.vae.decode(pipe.vae.encode(true * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    error = drawn.clamp(0, 1) - true
    return (-10 * error.square().mean((1, 2, 3)).log10()).mean().item(), error.abs().mean().item()


def recognised(
    pipe: StableDiffusionPipeline, icons: Icons, chosen: list[int]
) -> tuple[tuple[int, int, int], list[Tensor]]:
    """How many of the concepts come out right, and pairs of icon and picture."""
    ranks, pairs = [], []
    for index in chosen:
        image = pipe(
            article(cleaned(icons.concepts[index]["label"])),
            num_inference_steps=16,
            guidance_scale=4.0,
            output_type="pt",
            generator=torch.Generator().manual_seed(index),
        ).images
        ranks.append(icons.rank(image, index))
        pairs += [icons.images([index])[0], image[0]]
    return (sum(r == 0 for r in ranks), sum(r < 5 for r in ranks), len(ranks)), pairs


def everyday(pipe: StableDiffusionPipeline, prompts: tuple[str, ...]) -> Iterator[Tensor]:
    """Two pictures of every everyday prompt, as the command line draws by default."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for number, prompt in enumerate(prompts):
        seeds = [torch.Generator().manual_seed(2 * number + i) for i in range(2)]
        images = pipe([prompt] * 2, num_inference_steps=20, guidance_scale=3.0, output_type="pt", generator=seeds)
        yield from images.images


def seconds_a_picture(pipe: StableDiffusionPipeline) -> float:
    times = []
    for seed in range(9):
        began = time.perf_counter()
        pipe("a red apple", num_inference_steps=20, guidance_scale=3.0, generator=torch.Generator().manual_seed(seed))
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def sheet(images: list[Tensor], columns: int, scale: int = 1) -> Image.Image:
    """Pictures in rows, with two white pixels between them."""
    cell = PIXELS + 2
    canvas = torch.ones(3, -(-len(images) // columns) * cell, columns * cell)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        canvas[:, row * cell : row * cell + PIXELS, column * cell : column * cell + PIXELS] = image
    picture = Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def measure(folder: Path, icons: Icons, options: Options, name: str) -> Figures:
    pipe = load(folder)
    seen = random.Random(5).sample(icons.seen(), options.concepts)
    psnr, l1 = vae_error(pipe, icons)
    right, pairs = recognised(pipe, icons, seen)
    unknown, unknown_pairs = recognised(pipe, icons, icons.held_out()[:24])
    sheet(pairs, columns=24).save(options.out / f"{name}-seen.png", optimize=True)
    sheet(unknown_pairs, columns=24).save(options.out / f"{name}-held-out.png", optimize=True)
    sheet(list(everyday(pipe, options.prompts)), columns=12).save(options.out / f"{name}-prompts.png", optimize=True)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    return Figures(psnr, l1, right, unknown, seconds_a_picture(pipe), size)


def table(figures: dict[str, Figures]) -> str:
    """Markdown, a column for each pipeline."""
    rows = {
        "VAE on held-out concepts, PSNR": lambda f: f"{f.psnr:.1f} dB",
        "VAE on held-out concepts, L1": lambda f: f"{f.l1:.4f}",
        "seen names drawn right (nearest icon)": lambda f: f"{f.seen[0]} of {f.seen[2]}",
        "seen names among the nearest five": lambda f: f"{f.seen[1]} of {f.seen[2]}",
        "held-out names drawn right": lambda f: f"{f.held_out[0]} of {f.held_out[2]}",
        "a picture, 20 steps": lambda f: f"{f.seconds:.2f} s",
        "weights": lambda f: f"{f.megabytes:.1f} MB",
    }
    lines = ["| | " + " | ".join(figures) + " |", "| --- |" + " --- |" * len(figures)]
    return "\n".join(
        lines + [f"| {what} | " + " | ".join(map(shown, figures.values())) + " |" for what, shown in rows.items()]
    )


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    icons = Icons(options.data)
    names = [f"{number}-{folder.name}" for number, folder in enumerate(options.pipelines, 1)]
    figures = {n: measure(f, icons, options, n) for n, f in zip(names, options.pipelines, strict=True)}
    report = table(figures)
    (options.out / "table.md").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
