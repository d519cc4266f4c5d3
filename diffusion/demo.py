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
STYLE_WORD = ", zwx style"
DRAW = DrawOptions(seeds=(0,), steps=12, batch_size=6, device="cpu")

SUBJECT_PROMPTS = (
    "a photo of sks bear",
    "a photo of sks bear in the snow",
    "a photo of sks bear at night",
    "a blue sks bear",
    "a photo of a bear",
)
STYLE_PROMPTS = (
    "a pear, zwx style",
    "a tiger face, zwx style",
    "a car, zwx style",
    "a tree, zwx style",
    "a tiger face",
)
BLEND_PROMPTS = (
    "a sks bear, zwx style",
    "a photo of sks bear, zwx style",
    "two sks bears, zwx style",
    "a sks bear",
    "a photo of a bear",
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Teach the embedded pipeline a teddy bear and an ink style, then blend the two. About a minute; no downloads."""

    method: Literal["lora", "loha", "lokr"] = "lora"
    """How the pipeline's weights are changed."""
    out: Path = Path("veneer-demo")
    """Folder for the adapters and the pictures. Run it again to resume."""
    subject_steps: int = 100
    """Training steps of the subject, from 1 up."""
    style_steps: int = 80
    """Training steps of the style, from 1 up."""


def demo(config: DemoConfig) -> None:
    """Tell the story: what the model knew, what it learnt, and what the blend does."""
    from .grid import contact_sheet

    began = time.monotonic()
    subject, style, both = (config.out / name for name in ("teddy", "ink", "ink-teddy"))
    with _chapter("1/4  Drawing what the model knows. It has seen neither this bear nor this style."):
        pipe = DRAW.load_pipeline()
        before = _cells(pipe, SUBJECT_PROMPTS), _cells(pipe, STYLE_PROMPTS)
        _draw_class_images(pipe, config.out / "class_images" / "plain", MATERIAL / "styles" / "ink")
    with _chapter(f'2/4  Learning "sks bear" from 8 pictures, and keeping what a bear is ({config.method}).'):
        _train(subject_run(config, subject))
    with _chapter(f'3/4  Learning "zwx style" from 24 pictures ({config.method}).'):
        _train(style_run(config, style))
    with _chapter("4/4  Blending the two adapters into one, and drawing everything again."):
        after = _blend_and_draw(pipe, subject, style, both)

    config.out.mkdir(parents=True, exist_ok=True)
    story = _story(before, after)
    contact_sheet(story[:3], cell=112).save(config.out / "subject.png")
    contact_sheet(story[3:6], cell=112).save(config.out / "style.png")
    contact_sheet(story[6:], cell=112).save(config.out / "blend.png")
    contact_sheet(story, cell=112).quantize(256).save(config.out / "demo.png", optimize=True)
    print(f"\nDone in {time.monotonic() - began:.0f} s. The whole story in one picture: {config.out / 'demo.png'}")
    print(f"Draw with it:  veneer generate --prompts 'a sks bear, zwx style' --adapters {both}")


def subject_run(config: DemoConfig, out: Path) -> DreamBoothConfig:
    """How the subject is learnt: attention, feed-forward and convolutions; bears drawn before keep their looks."""
    return DreamBoothConfig(
        instance_data_dir=MATERIAL / "subjects" / "teddy",
        instance_prompt="a photo of sks bear",
        class_prompt="a photo of a bear",
        num_class_images=16,
        output_dir=out,
        unet=AdapterOptions(method=config.method, rank=8, learning_rate=2e-3, feed_forward=True, conv=True),
        text_encoder=AdapterOptions(method=config.method, rank=8, learning_rate=3e-3),
        max_train_steps=config.subject_steps,
        **_COMMON,
    )


def style_run(config: DemoConfig, out: Path) -> DreamBoothConfig:
    """How the style is learnt: attention only; plain pictures of the same things keep the style to its word."""
    return DreamBoothConfig(
        instance_data_dir=MATERIAL / "styles" / "ink",
        instance_prompt=f"a picture{STYLE_WORD}",
        class_prompt="a picture",
        class_data_dir=config.out / "class_images" / "plain",
        num_class_images=24,
        output_dir=out,
        unet=AdapterOptions(method=config.method, rank=8, learning_rate=2e-3),
        text_encoder=AdapterOptions(method=config.method, rank=8, learning_rate=2e-3),
        max_train_steps=config.style_steps,
        **_COMMON,
    )


_COMMON: dict[str, Any] = {
    "train_batch_size": 2,
    "sample_seeds": (),  # the story draws its own
    "sample_steps": DRAW.steps,
    "sample_batch_size": DRAW.batch_size,
    "device": "cpu",
}


def _train(config: DreamBoothConfig) -> None:
    from .dreambooth import main

    main(config)


def _draw_class_images(pipe: Any, folder: Path, styled: Path) -> None:
    """What the pipeline draws for the style's captions without the style's word, each with its caption."""
    captions = [
        path.read_text(encoding="utf-8").strip().removesuffix(STYLE_WORD) for path in sorted(styled.glob("*.txt"))
    ]
    if len(list(folder.glob("*.png"))) >= len(captions):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for index, (prompt, _, image) in enumerate(DRAW.draw(pipe, captions)):
        (folder / f"{index:02d}.txt").write_text(prompt, encoding="utf-8")
        image.save(folder / f"{index:02d}.png")


def _blend_and_draw(pipe: Any, subject: Path, style: Path, both: Path) -> list[list[tuple[str, Any]]]:
    """Cells drawn with the subject's adapter, with the style's, and with the blend, which is saved to `both`."""
    from .blend import BLEND, CombineOptions, combine, recipe, save, show_only
    from .weighted import parse_weighted

    inputs, options = parse_weighted((str(subject), str(style))), CombineOptions()
    save(both, combine(pipe, inputs, options), recipe(inputs, options))
    drawn = []
    for name, prompts in zip((inputs[0].name, inputs[1].name, BLEND), _PROMPTS, strict=True):
        show_only(pipe, name)
        drawn.append(_cells(pipe, prompts))
    return drawn


_PROMPTS = SUBJECT_PROMPTS, STYLE_PROMPTS, BLEND_PROMPTS


def _cells(pipe: Any, prompts: Sequence[str]) -> list[tuple[str, Any]]:
    return [(prompt, image) for prompt, _, image in DRAW.draw(pipe, prompts)]


def _story(before: Sequence[list[tuple[str, Any]]], after: Sequence[list[tuple[str, Any]]]) -> list[Row]:
    return [
        ("the subject's pictures (5 of 8)", _material("subjects/teddy")),
        ("before", before[0]),
        ("after learning the subject", after[0]),
        ("the style's pictures (5 of 24)", _material("styles/ink")),
        ("before", before[1]),
        ("after learning the style", after[1]),
        ("both, blended into one adapter", after[2]),
    ]


def _material(name: str, count: int = 5) -> list[tuple[str, Any]]:
    from .data import caption_of, read_image

    files = sorted((MATERIAL / name).glob("*.png"))[:count]
    return [(caption_of(file, ""), read_image(file)) for file in files]


@contextmanager
def _chapter(title: str) -> Iterator[None]:
    print(f"\n{title}", flush=True)
    began = time.monotonic()
    yield
    print(f"     {time.monotonic() - began:.0f} s", flush=True)
