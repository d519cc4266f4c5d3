"""The training loop: step, sample, save, until the end or until asked to stop."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..core.atomic import atomic, atomic_folder
from ..core.files import load_adapter
from .adapters import ADAPTER, trained
from .config import DreamBoothConfig
from .dialects.diffusers_file import FILE_NAME
from .dialects.peft_dir import write_peft_dir
from .events import Checkpoint, Done, Event, Notice, Plan, Sample, Stopped
from .grid import contact_sheet
from .pipeline import save_adapter
from .place import Place
from .prepare import Prepared
from .requests import Requests, taken
from .run_directory import RunDirectory
from .sample import generate_each
from .settings import plain, to_yaml
from .trainer import TrainingError

_STATE = "training.pt"


class Session:
    """One call of a run, from where its directory stands."""

    def __init__(
        self,
        config: DreamBoothConfig,
        directory: RunDirectory,
        prepared: Prepared,
        place: Place,
        requests: Requests,
    ):
        self.config, self.directory, self.place = config, directory, place
        self.prepared, self.trainer, self.adapted = prepared, prepared.trainer, prepared.adapted
        self.requests = requests
        self.started = time.perf_counter()

    def events(self) -> Iterator[Event]:
        done = yield from self._resume()
        if self.place.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.place.device)
        yield self._plan(done)
        if done == 0:
            yield from self._sample(0)
        try:
            for step in range(done + 1, self.config.max_train_steps + 1):
                yield self.trainer.step(step)
                last, stopping = step == self.config.max_train_steps, self._stopping()
                if taken(self.requests.sample) or last or self._sampling(step):
                    yield from self._sample(step)
                if taken(self.requests.save) or last or stopping or step % self.config.checkpointing_steps == 0:
                    yield from self._save(step)
                if stopping and not last:
                    yield Stopped(step, self.directory.root)
                    return
        except TrainingError as error:
            raise TrainingError(f"{error}. {self._kept()}") from None
        yield from self._finish()

    # ---------------------------------------------------------------- resume and stop

    def _resume(self) -> Generator[Event, None, int]:
        """Put adapters, optimizer and schedule back as the newest checkpoint has them; its step, or 0."""
        step = self.directory.newest_step() or 0
        if self.place.main:
            self.directory.rewind(step)
        if step:
            folder = self.directory.checkpoint(step)
            for name, model in self.adapted.items():
                model.assign(ADAPTER, load_adapter(folder / name)[1])
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            for name in self.trainer.load_state_dict(state):
                yield Notice(f"the {name} images or their prompts have changed since step {step}")
        self.place.wait()
        return step

    def _save(self, step: int) -> Iterator[Event]:
        if not self.place.main:
            return
        with self.directory.new_checkpoint(step, self.config.checkpoints_total_limit) as folder:
            write_peft_dir(folder, trained(self.adapted), self._metadata(step))
            torch.save(self.trainer.state_dict(), folder / _STATE)
        yield Checkpoint(step, self.directory.checkpoint(step))

    def _sampling(self, step: int) -> bool:
        return self.config.sample_every > 0 and step % self.config.sample_every == 0

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; all stop after the same step."""
        asked = self.requests.stop.is_set()
        if self.place.processes == 1:
            return asked
        return self.place.mean(torch.tensor(float(asked), device=self.place.device)).item() > 0

    def _kept(self) -> str:
        step = self.directory.newest_step()
        return "No checkpoint was saved yet" if step is None else f"Kept: {self.directory.checkpoint(step)}"

    # ---------------------------------------------------------------- what is told and written

    def _plan(self, done: int) -> Plan:
        sizes = {group.name: len(group.latents) for group in self.trainer.sets}
        return Plan(
            model=self.config.model,
            family=self.prepared.family.name,
            prediction_type=self.trainer.noise_schedule.config["prediction_type"],
            resolution=self.prepared.resolution,
            instance_images=sizes["instance"],
            class_images=sizes.get("class", 0),
            trainable={name: sum(p.numel() for p in group) for name, group in self.trainer.parameters.items()},
            start_step=done,
            max_train_steps=self.config.max_train_steps,
            device=str(self.place.device),
        )

    def _sample(self, step: int) -> Iterator[Event]:
        config = self.config
        wanted = [(p, s) for p in config.sample_prompts or (config.instance_prompt,) for s in config.sample_seeds]
        if not wanted or not self.place.main:
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

    def _finish(self) -> Iterator[Event]:
        step, root = self.config.max_train_steps, self.directory.root
        peak = torch.cuda.max_memory_allocated(self.place.device) if self.place.on_cuda else None
        if self.place.main:
            if not save_adapter(root, trained(self.adapted), self._metadata(step)):
                yield Notice(f"no {FILE_NAME}: diffusers' file format holds LoRA and DoRA only, without biases")
            self.directory.finish(step)
        yield Done(step, root, time.perf_counter() - self.started, peak)

    def _metadata(self, step: int) -> dict[str, str]:
        """What an adapter should tell of itself. Local folders are nobody's business."""
        recipe = {key: value for key, value in plain(self.config).items() if not key.endswith("_dir")}
        return {
            "base_model": self.config.model,
            "trigger": self.config.instance_prompt,
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
