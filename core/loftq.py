"""LoftQ (Li et al. 2023, arXiv:2310.08659) for a base that is quantized already, one weight at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterFileError
from .handle import handle_of
from .init.loftq import fit
from .quantized import Linear4bit
from .tuners.lora import LoRA


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Give a LoRA on 4-bit layers the factors that best make up for what quantizing lost.

    One step of LoftQ: the quantized weights stay. The weights before quantizing are read one by one, so memory is
    needed for one of them. Scales other than 1 are allowed for, which PEFT does not.

    Arguments:
        model_path: the model's safetensors file, or the directory of one or of its shards; not given, where the model
            was loaded from.
        callback: called as `callback(peft_model, path)` after each layer; a layer for which it returns False gets its
            former factors back. With a loss on some data it keeps only what helps.

    Raises:
        ValueError: no such adapter, or no LoRA of it on a 4-bit layer; nothing has changed then.
        AdapterFileError: there is no such file, or it lacks a weight; layers before that one have changed.
    """
    handle = handle_of(peft_model)
    chosen = {
        path: adapter
        for path, adapter in handle.adapters(adapter_name).items()
        if isinstance(adapter, LoRA) and isinstance(adapter.site, Linear4bit)
    }
    if not chosen:
        raise ValueError(f"adapter {adapter_name!r} has no LoRA on a 4-bit layer of bitsandbytes")
    read = _reader(handle.model, model_path)
    for path, lora in chosen.items():
        full = read(f"{path}.weight").to(lora.site.device, torch.float32)
        b, a = fit((full - lora.site.read()[0]) / lora.scaling, lora.r)
        held = lora.lora_B.weight, lora.lora_A.weight
        before = [factor.clone() for factor in held]
        _copy(held, (b, a))
        if callback is not None and not callback(peft_model, path):
            _copy(held, before)


def _copy(held: Any, values: Any) -> None:
    for factor, value in zip(held, values, strict=True):
        factor.copy_(value)


def _reader(model: nn.Module, source: str | Path | None) -> Callable[[str], Tensor]:
    """A function that reads one weight of the saved model at a time."""
    if source is None:
        source = getattr(model, "name_or_path", None) or None
    if source is None:
        raise ValueError("model_path is needed: the model does not say where it was loaded from")
    files = _files(Path(source))
    prefix = getattr(model, "base_model_prefix", "") or "-"

    def read(name: str) -> Tensor:
        from safetensors import safe_open

        alike = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))  # saved with a head, loaded without
        found = next((n for n in alike if n in files), None)
        if found is None:
            raise AdapterFileError(f"{source} has no weight {name}: is it the model that was quantized?")
        with safe_open(files[found], framework="pt") as file:
            return file.get_tensor(found)

    return read


def _files(source: Path) -> dict[str, Path]:
    """Which file holds each tensor of a saved model."""
    from safetensors import safe_open

    if not source.exists():  # a hub id, of which transformers has kept the files
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(str(source), local_files_only=True))
    index = source / "model.safetensors.index.json"
    if index.is_file():
        return {name: source / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    path = source / "model.safetensors" if source.is_dir() else source
    if not path.is_file() or path.suffix != ".safetensors":
        raise AdapterFileError(f"{source} holds no model.safetensors, which is read one weight at a time")
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)
