"""Step 6: the trained parts become a `StableDiffusionPipeline` folder.

python assemble.py --state state --tokenizer tokenizer --out pipeline
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from models import make_scheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Assemble the pipeline."""

    state: Path
    """Folder with the trained `vae`, `unet` and `text_encoder`."""
    tokenizer: Path
    """Folder that `make_tokenizer.py` wrote."""
    out: Path
    """Folder of the pipeline."""


def main(options: Options) -> None:
    half = torch.float16
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(options.state / "vae", dtype=half, low_cpu_mem_usage=False),
        text_encoder=CLIPTextModel.from_pretrained(options.state / "text_encoder", dtype=half),
        tokenizer=CLIPTokenizer.from_pretrained(options.tokenizer),
        unet=UNet2DConditionModel.from_pretrained(options.state / "unet", dtype=half, low_cpu_mem_usage=False),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(options.out)
    _write_text_encoder_for_all_versions(options.out / "text_encoder")
    for part in ("unet", "vae"):
        _forget_origin(options.out / part / "config.json")
    for name in ("vocab.json", "merges.txt"):  # newer libraries write tokenizer.json only, older ones read these
        shutil.copy(options.tokenizer / name, options.out / "tokenizer" / name)
    files = sorted(options.out.rglob("*.safetensors"), key=lambda file: file.stat().st_size)
    print(", ".join(f"{file.parent.name} {file.stat().st_size / 2**20:.1f} MiB" for file in files))


def _write_text_encoder_for_all_versions(folder: Path) -> None:
    """CLIP's keys with the `text_model.` that transformers 5 dropped and still reads; a config that asks for float32.

    Pipelines are loaded in float32 by default, and transformers alone would follow the file's half precision.
    """
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    _rewrite(config, lambda settings: {**settings, "dtype": "float32"})


def _forget_origin(config: Path) -> None:
    """Take out the folder that a part was loaded from."""
    _rewrite(config, lambda settings: {key: value for key, value in settings.items() if key != "_name_or_path"})


def _rewrite(config: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    settings = change(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
