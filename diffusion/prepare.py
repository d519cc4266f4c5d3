"""Everything before the first step: load, read, draw class images, encode, attach. Ends with a `Trainer` on its device.

Nothing is on the device longer than it is needed: the autoencoder leaves when the latents are known, a frozen text
encoder when the prompts are, and the denoiser comes only after both.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import AdaptedModel
from ..core.runs.events import Event, Notice, Progress
from ..core.runs.place import Place
from ..core.runs.recompute import recompute_activations
from ..core.runs.settings import ConfigError
from ..core.runs.trainer import WEIGHT_DTYPES, Trainer
from .adapters import attach
from .cache import Latents, Prompts, encode_latents
from .class_images import class_folder, class_recipe, draw_class_images, missing_class_images
from .config import DreamBoothConfig
from .data import Example, ImageFolder, scan
from .denoising import Denoising, TrainingSet
from .families import Family, family_of, load_pipeline, native_resolution, noise_schedule


@dataclass(frozen=True)
class Prepared:
    """A run ready to train."""

    pipe: Any
    family: Family
    resolution: int
    task: Denoising
    trainer: Trainer

    @contextmanager
    def whole_pipeline(self) -> Iterator[Any]:
        """The pipeline with all its parts on the device, for drawing; afterwards only what training needs."""
        device = self.trainer.device
        idle = [n for n in _parts(self.family) if getattr(self.pipe, n).device.type != device.type]  # cuda is cuda:0
        move(self.pipe, idle, device)
        try:
            yield self.pipe
        finally:
            move(self.pipe, idle, torch.device("cpu"))


def prepare(config: DreamBoothConfig, place: Place) -> Generator[Event, None, Prepared]:
    """Yields what the user should see meanwhile; returns the `Prepared` run."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    pipe = load_pipeline(config.model, config.revision)
    family = family_of(pipe)
    resolution = config.resolution or native_resolution(pipe)
    for name in family.components:  # not the autoencoder: in fp16 it overflows to black, in bf16 it bands
        torch.nn.Module.to(getattr(pipe, name), WEIGHT_DTYPES[config.mixed_precision])  # diffusers' own `to` warns

    smallest = config.min_image_size or resolution // 2
    folder = scan(Path(config.instance_data_dir), config.instance_prompt, smallest)
    yield from _skipped(folder)
    examples: dict[str, Sequence[Example]] = {"instance": folder.examples}
    if config.class_prompt is not None:
        examples["class"] = yield from _class_examples(config, pipe, family, resolution, place)

    sets = []
    for name, images in examples.items():
        latents = yield from _encode(config, pipe, name, images, resolution, place.device)
        prompts, files = tuple(image.prompt for image in images), tuple(image.path.name for image in images)
        sets.append(TrainingSet(name, latents, prompts, files))

    adapted = attach(pipe, family, config.adapters(), config.model, config.seed, config.max_train_steps)
    conditions = Prompts(pipe.tokenizer, lambda tokens: family.encode_text(pipe, tokens), place.device)
    yield from _encode_prompts(conditions, pipe, family, adapted, sets)
    needed = adapted.keys() | {family.denoiser}
    move(pipe, needed, place.device)
    _ready_to_train(pipe, needed, config.gradient_checkpointing)
    rates = {
        name: options.learning_rate or family.components[name].learning_rate
        for name, options in config.adapters().items()
    }
    task = Denoising(config, getattr(pipe, family.denoiser), noise_schedule(pipe), sets, conditions, place.device)
    return Prepared(pipe, family, resolution, task, Trainer(config, adapted, rates, task, place))


def move(pipe: Any, names: Iterable[str], device: torch.device) -> None:
    """Move parts one by one: the pipeline's own `to` moves all of them, and warns about half precision on the CPU."""
    for name in names:
        getattr(pipe, name).to(device)


def _parts(family: Family) -> tuple[str, ...]:
    return (*family.components, "vae")


def _skipped(folder: ImageFolder) -> Iterator[Event]:
    yield from (Notice(f"skipped {line}") for line in folder.skipped)


def _class_examples(
    config: DreamBoothConfig, pipe: Any, family: Family, resolution: int, place: Place
) -> Generator[Event, None, Sequence[Example]]:
    assert config.class_prompt is not None
    scale = family.guidance_scale if config.guidance_scale is None else config.guidance_scale
    recipe = class_recipe(config, resolution, scale)
    folder = class_folder(config, recipe)
    missing = missing_class_images(folder, recipe, config.num_class_images)
    missing = [index for index in missing if index % place.processes == place.process]
    if missing:
        move(pipe, _parts(family), place.device)
        yield from draw_class_images(pipe, folder, recipe, missing, config.sample_batch_size)
        move(pipe, _parts(family), torch.device("cpu"))
    place.wait()
    found = scan(folder, config.class_prompt, smallest=resolution // 2)
    yield from _skipped(found)
    return found.examples[: config.num_class_images]


def _encode(
    config: DreamBoothConfig, pipe: Any, name: str, images: Sequence[Example], resolution: int, device: torch.device
) -> Generator[Event, None, Latents]:
    """Latents of a set; only the subject's images are varied, the class varies by itself."""
    varied = name == "instance"
    croppable = any(image.size[0] != image.size[1] for image in images)
    random_crop, flip = config.random_crop and varied and croppable, config.flip and varied
    encoding = encode_latents(
        pipe.vae,
        images,
        resolution,
        device,
        views=config.views if random_crop else 2 if flip else 1,
        random_crop=random_crop,
        flip=flip,
        seed=config.seed,
    )
    for done in encoding:
        if isinstance(done, Latents):
            return done
        yield Progress(f"{name} latents", done, len(images))
    raise ConfigError(f"there are no {name} images")


def _encode_prompts(
    prompts: Prompts, pipe: Any, family: Family, adapted: dict[str, AdaptedModel], sets: list[TrainingSet]
) -> Iterator[Event]:
    longest = pipe.tokenizer.model_max_length
    for prompt in prompts.add(prompt for group in sets for prompt in group.prompts):
        yield Notice(f"the model reads only {longest} tokens: the end of this prompt is not seen: {prompt!r}")
    if not any(name in adapted for name in family.text_encoders):
        move(pipe, family.text_encoders, prompts.device)
        prompts.freeze()
        move(pipe, family.text_encoders, torch.device("cpu"))


def _ready_to_train(pipe: Any, names: Iterable[str], checkpointing: bool) -> None:
    for name in names:
        model = getattr(pipe, name)
        model.train()  # for the adapters' dropout; transformers recomputes activations in this mode only
        if checkpointing:
            recompute_activations(model)
