"""`veneer demo`: the whole story on the embedded pipeline, with nothing downloaded.

A subject and a style are learnt from bundled pictures, each by an adapter of its own, and then blended into one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import AdapterOptions, DreamBoothConfig
from .generate import DrawOptions

if TYPE_CHECKING:
    from .grid import Row

MATERIAL = Path(__file__).parent / "embedded"
DRAW = DrawOptions(seeds=(0,), steps=12, batch_size=6, device="cpu")

SUBJECT_PROMPTS = (
    "a photo of sks face",
    "a photo of sks face in the snow",
    "a photo of sks face at night",
    "a blue sks face",
    "a photo of a face",
)
STYLE_PROMPTS = (
    "a tiger face, zwx style",
    "a pear, zwx style",
    "a castle, zwx style",
    "a car, zwx style",
    "a tiger face",
)
BLEND_PROMPTS = (
    "a photo of sks face, zwx style",
    "a photo of sks face on the grass, zwx style",
    "a photo of sks face in the snow, zwx style",
    "a photo of sks face",
    "a photo of a face",
)
BLEND_WEIGHTS = 1.0, 1.1  # a little more of the style, which the subject's own colours resist

# What the pipeline draws for these is learnt along with the pictures, so that other words keep their meaning.
SUBJECT_CLASS = tuple(
    f"a photo of a face{place}"
    for place in (
        *("", " on the grass", " on the beach", " at night", " in the snow", " in the city"),
        *(" on a blue background", " on a yellow background"),
    )
)
STYLE_CLASS = (
    *("a red apple", "a photo of a face", "a lion", "a house on the grass", "a tulip", "a guitar", "a cat face"),
    *("a banana", "a photo of a bear on a blue background", "a car in the city", "a bird at night", "a hamburger"),
)

# Learning rates of (UNet, text encoder). The text encoder's are higher because the rare words start without a meaning.
SUBJECT_RATES = {"lora": (3e-3, 6e-3), "loha": (1e-2, 1.6e-2), "lokr": (8e-3, 1.6e-2)}
STYLE_RATES = {"lora": (3e-3, 1e-2), "loha": (1e-2, 2e-2), "lokr": (1e-2, 2e-2)}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Teach the embedded pipeline a robot and an ink style, then blend the two. A minute or two; no downloads."""

    method: Literal["lora", "loha", "lokr"] = "lora"
    """How the pipeline's weights are changed."""
    out: Path = Path("veneer-demo")
    """Folder for the adapters and the pictures. Run it again to resume."""
    subject_steps: int = 120
    """Training steps of the subject, from 1 up."""
    style_steps: int = 110
    """Training steps of the style, from 1 up."""


def demo(config: DemoConfig) -> None:
    """Tell the story: what the model knew, what it learnt, and what the blend does."""
    from .dreambooth import main as train

    began = time.monotonic()
    subject, style, both = (config.out / name for name in ("robot", "ink", "ink-robot"))
    with _chapter("1/4  Drawing what the model knows. It has seen neither this robot nor this style."):
        pipe = DRAW.load_pipeline()
        before = _cells(pipe, SUBJECT_PROMPTS), _cells(pipe, STYLE_PROMPTS)
        _draw_class_images(pipe, _class_folder(config, "robot"), SUBJECT_CLASS)
        _draw_class_images(pipe, _class_folder(config, "ink"), STYLE_CLASS)
    with _chapter(
        f'2/4  Learning what "sks face" is from 8 pictures, by {config.method}. Other faces are to stay faces.'
    ):
        train(subject_run(config, subject))
    with _chapter(f'3/4  Learning what "zwx style" is from 24 pictures, by {config.method}.'):
        train(style_run(config, style))
    with _chapter("4/4  Blending the two adapters into one, and drawing everything again."):
        after = _blend_and_draw(config, pipe, subject, style, both)
    _write_sheets(config.out, _story(before, after))
    print(f"\nDone in {time.monotonic() - began:.0f} s. The whole story in one picture: {config.out / 'demo.png'}")
    print(f'Go on with:  veneer generate --prompts "a photo of sks face, zwx style" --adapters {both} --out pictures')


def subject_run(config: DemoConfig, out: Path) -> DreamBoothConfig:
    """How the subject is learnt: with the convolutions too, for its shape."""
    unet_rate, text_rate = SUBJECT_RATES[config.method]
    return DreamBoothConfig(
        instance_data_dir=MATERIAL / "subjects" / "robot",
        instance_prompt="a photo of sks face",
        class_prompt="a photo of a face",
        class_data_dir=_class_folder(config, "robot"),
        num_class_images=len(SUBJECT_CLASS),
        output_dir=out,
        unet=AdapterOptions(method=config.method, rank=8, learning_rate=unet_rate, feed_forward=True, conv=True),
        text_encoder=AdapterOptions(method=config.method, rank=8, learning_rate=text_rate),
        max_train_steps=config.subject_steps,
        **_COMMON,
    )


def style_run(config: DemoConfig, out: Path) -> DreamBoothConfig:
    """How the style is learnt: without the convolutions; the plain pictures keep it to its word."""
    unet_rate, text_rate = STYLE_RATES[config.method]
    return DreamBoothConfig(
        instance_data_dir=MATERIAL / "styles" / "ink",
        instance_prompt="a picture, zwx style",
        class_prompt="a picture",
        class_data_dir=_class_folder(config, "ink"),
        num_class_images=len(STYLE_CLASS),
        output_dir=out,
        unet=AdapterOptions(method=config.method, rank=8, learning_rate=unet_rate, feed_forward=True),
        text_encoder=AdapterOptions(method=config.method, rank=8, learning_rate=text_rate),
        max_train_steps=config.style_steps,
        **_COMMON,
    )


_COMMON: dict[str, Any] = {
    "train_batch_size": 2,
    "prior_loss_weight": 0.5,  # keeps the class all the same, and leaves more of the few steps to what is new
    "lr_scheduler": "cosine",  # few steps at high rates: what is learnt last must be fine
    "lr_warmup_steps": 5,
    "adam_beta2": 0.99,
    "sample_seeds": (),  # the story draws its own
    "device": "cpu",
}


def _class_folder(config: DemoConfig, name: str) -> Path:
    return config.out / "class_images" / name


def _draw_class_images(pipe: Any, folder: Path, prompts: Sequence[str]) -> None:
    """A picture for each prompt, and the prompt beside it as its caption, unless an earlier run has drawn them."""
    if len(list(folder.glob("*.png"))) == len(prompts):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for index, (prompt, _, image) in enumerate(DRAW.draw(pipe, prompts)):
        (folder / f"{index:02d}.txt").write_text(prompt, encoding="utf-8")
        image.save(folder / f"{index:02d}.png")


def _blend_and_draw(
    config: DemoConfig, pipe: Any, subject: Path, style: Path, both: Path
) -> list[list[tuple[str, Any]]]:
    """Cells drawn with the subject's adapter, with the style's, and with the blend, which is saved to `both`.

    The exact sum of LoRAs is a LoRA of 16 columns. LoHas and LoKrs have high rank, and LoKr's singular values fall
    slowly: at 32 columns the robot is lost, at 96 it is there.
    """
    from ..core.weighted import parse_weighted
    from .blend import BLEND, CombineOptions, combine, recipe, show_only
    from .pipeline import save_adapter

    inputs = parse_weighted(f"{path}={weight}" for path, weight in zip((subject, style), BLEND_WEIGHTS, strict=True))
    options = CombineOptions() if config.method == "lora" else CombineOptions(combination_type="svd", svd_rank=96)
    save_adapter(both, combine(pipe, inputs, options).adapters, recipe(inputs, options, DRAW.model))
    drawn = []
    names = inputs[0].name, inputs[1].name, BLEND
    for name, prompts in zip(names, (SUBJECT_PROMPTS, STYLE_PROMPTS, BLEND_PROMPTS), strict=True):
        show_only(pipe, name)
        drawn.append(_cells(pipe, prompts))
    return drawn


def _cells(pipe: Any, prompts: Sequence[str]) -> list[tuple[str, Any]]:
    return [(prompt, image) for prompt, _, image in DRAW.draw(pipe, prompts)]


def _story(before: Sequence[list[tuple[str, Any]]], after: Sequence[list[tuple[str, Any]]]) -> list[Row]:
    return [
        ("the subject's pictures (5 of 8)", _material("subjects/robot")),
        ("before", before[0]),
        ("after learning the subject", after[0]),
        ("the style's pictures (5 of 24)", _material("styles/ink")),
        ("before", before[1]),
        ("after learning the style", after[1]),
        ("both, blended into one adapter", after[2]),
    ]


def _material(name: str, count: int = 5) -> list[tuple[str, Any]]:
    from .images import caption_of, read_image

    files = sorted((MATERIAL / name).glob("*.png"))[:count]
    return [(caption_of(file, ""), read_image(file)) for file in files]


def _write_sheets(folder: Path, story: list[Row]) -> None:
    from .grid import contact_sheet

    for name, rows in (("subject", story[:3]), ("style", story[3:6]), ("blend", story[6:])):
        contact_sheet(rows, cell=112).save(folder / f"{name}.png")
    contact_sheet(story, cell=112).quantize(256).save(folder / "demo.png", optimize=True)


@contextmanager
def _chapter(title: str) -> Iterator[None]:
    print(f"\n{title}", flush=True)
    began = time.monotonic()
    yield
    print(f"     {time.monotonic() - began:.0f} s", flush=True)
