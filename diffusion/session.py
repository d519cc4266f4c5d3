"""A DreamBooth run's own part of the training loop: samples, and what its adapters are written as."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..core.atomic import atomic, atomic_folder
from ..core.runs.directory import RunDirectory
from ..core.runs.events import Event, Notice
from ..core.runs.requests import Requests
from ..core.runs.session import Session
from ..core.runs.settings import plain, to_yaml
from .adapters import trained
from .config import DreamBoothConfig
from .dialects.diffusers_file import FILE_NAME
from .dialects.peft_dir import write_peft_dir
from .events import Plan, Sample
from .grid import contact_sheet
from .pipeline import save_adapter
from .prepare import Prepared
from .sample import generate_each


class DreamBoothSession(Session):
    """One call of a DreamBooth run."""

    def __init__(self, config: DreamBoothConfig, directory: RunDirectory, prepared: Prepared, requests: Requests):
        super().__init__(directory, prepared.trainer, requests)
        self.dreambooth, self.prepared = config, prepared

    def plan(self, **known: Any) -> Plan:
        task = self.prepared.task
        sizes = {group.name: len(group.latents) for group in task.sets}
        return Plan(
            model=self.dreambooth.model,
            family=self.prepared.family.name,
            prediction_type=task.noise_schedule.config["prediction_type"],
            resolution=self.prepared.resolution,
            instance_images=sizes["instance"],
            class_images=sizes.get("class", 0),
            **known,
        )

    def look_every(self) -> int:
        return self.dreambooth.sample_every

    def look(self, step: int) -> Iterator[Event]:
        config = self.dreambooth
        wanted = [(p, s) for p in config.sample_prompts or (config.instance_prompt,) for s in config.sample_seeds]
        if not wanted:
            return
        with self.prepared.whole_pipeline() as pipe:
            images = list(
                generate_each(
                    pipe,
                    wanted,
                    steps=config.sample_steps,
                    guidance_scale=config.guidance_scale,
                    size=self.prepared.resolution,
                    batch_size=config.sample_batch_size,
                )
            )
        folder = self.directory.samples / f"step-{step:06d}"
        with atomic_folder(folder) as temporary:
            for index, ((prompt, seed), image) in enumerate(zip(wanted, images, strict=True)):
                about = PngInfo()
                about.add_text("caption", f"{prompt} #{seed}")
                image.save(temporary / f"{index:02d}-seed-{seed}.png", pnginfo=about)
        sheet = write_sheet(self.directory.samples)
        yield Sample(step, sheet, tuple(sorted(folder.glob("*.png"))))

    def write_adapters(self, folder: Path, step: int) -> None:
        write_peft_dir(folder, trained(self.trainer.models), self._metadata(step))

    def adapter_folder(self, folder: Path, component: str) -> Path:
        return folder / component

    def finish(self, step: int) -> Iterator[Event]:
        if not save_adapter(self.directory.root, trained(self.trainer.models), self._metadata(step)):
            yield Notice(f"no {FILE_NAME}: diffusers' file format holds LoRA and DoRA only, without biases")

    def _metadata(self, step: int) -> dict[str, str]:
        """What an adapter should tell of itself. Local folders are nobody's business."""
        recipe = {key: value for key, value in plain(self.dreambooth).items() if not key.endswith("_dir")}
        return {
            "base_model": self.dreambooth.model,
            "trigger": self.dreambooth.instance_prompt,
            "steps": str(step),
            "recipe": to_yaml(recipe),
        }


def write_sheet(samples: Path) -> Path:
    """All samples so far as one picture, a row a step; read from the folder, so that a resumed run shows its past."""
    rows = []
    for folder in sorted(samples.glob("step-*")):
        cells = []
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as image:
                image.load()
                cells.append((str(image.info.get("caption", "")), image.copy()))
        rows.append((f"step {int(folder.name.removeprefix('step-'))}", cells))
    sheet = samples / "sheet.png"
    with atomic(sheet) as path:
        contact_sheet(rows).save(path, "PNG")
    return sheet
