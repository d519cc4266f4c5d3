"""Adapter directories: `adapter_config.json` beside `adapter_model.safetensors`, as PEFT writes them.

Writing is atomic: a file appears whole under its name, or not at all. Reading is safetensors only; pickles are refused
unread, since loading one runs whatever it contains, and a header is checked (`header.py`) before memory is taken for
what it promises. Importing this file imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import atomic
from .config import PEFT_FILE_VERSION, PeftConfig
from .errors import AdapterFileError
from .fields import misfits
from .header import MAX_HEADER, check_file, damaged, read_header
from .hub import download

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors that share memory are stored apart."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with atomic(path) as temporary:
        save_file(apart, temporary, {"format": "pt"} | (metadata or {}))


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite. Every reader of every dialect gets its tensors here.

    The one exception are alphas (`….alpha`): some programs store an infinite one where it has no meaning, which the
    dialects' scale rules know and this file does not.

    Raises:
        AdapterFileError: it is missing, damaged, a pickle, or holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise damaged(path, str(error)) from error
    broken = _not_finite({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")})
    if broken:
        more = f" and {len(broken) - 3} more tensors" if len(broken) > 3 else ""
        raise AdapterFileError(
            f"{path} holds NaN or infinity in {', '.join(broken[:3])}{more}: its training diverged, or numbers too "
            "large for half precision were saved in it"
        )
    return tensors


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors with NaN or infinity."""
    import torch

    floats = {key: t if t.itemsize > 1 else t.float() for key, t in tensors.items() if t.is_floating_point()}
    if not floats:
        return []
    # a sum is finite only if its terms are: one pass over the file, no copy, and one answer from a device
    finite = torch.stack([t.sum(dtype=torch.float32) for t in floats.values()]).isfinite().tolist()
    suspects = [key for key, sum_is_finite in zip(floats, finite, strict=True) if not sum_is_finite]
    return [key for key in suspects if not floats[key].isfinite().all()]  # finite terms may overflow


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in the header of a safetensors file.

    Raises:
        AdapterFileError: as `read_header`.
    """
    return read_header(path).metadata


def write_config(directory: Path, config: PeftConfig, **changes: Any) -> None:
    """Write `adapter_config.json`, with some values changed. `peft_version` says whose format it is."""
    values = config.to_dict() | changes
    values["peft_version"] = values["peft_version"] or PEFT_FILE_VERSION
    values = {key: value for key, value in values.items() if key not in _OURS or value}
    write_text(directory / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True) + "\n")


_OURS = {"use_dora", "dora_on_input", "left_shape", "exclude_modules", "modules_to_save"}
"""Options that go beyond PEFT for some methods: left out of files that do not use them, so that PEFT sees none."""


def save_adapter(
    directory: str | Path, config: PeftConfig, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write an adapter directory that `peft` reads. Tensors are named by module path, without prefix."""
    directory = Path(directory)
    named = {config.to_file(key): t for key, t in config.filed(tensors).items()}
    write_tensors(directory / WEIGHTS_NAME, named, metadata)
    write_config(directory, config, inference_mode=True)


def load_adapter(source: str | Path, **where: Any) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors (without prefix) of an adapter directory or hub id.

    where: `subfolder`, and for the hub `revision`, `token`, `cache_dir`.

    Raises:
        ValueError: no adapter there, or a damaged one (`AdapterFileError`).
    """
    config = read_config(source, **where)
    return config, read_weights(source, config=config, **where)


def read_config(source: str | Path, cls: type[PeftConfig] = PeftConfig, **where: Any) -> PeftConfig:
    """The config of an adapter directory or hub id.

    Raises:
        AdapterFileError: none is there, it is damaged, or it asks for what this release cannot honour.
    """
    path = find_file(source, CONFIG_NAME, **where)
    values = read_json(path)
    try:
        config = cls.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:  # the latter two for a list where a number belongs
        raise AdapterFileError(f"{path}: {error}") from error
    for misfit in misfits(config):
        raise AdapterFileError(f"{path}: {misfit}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        AdapterFileError: it is missing or holds something else.
    """
    check_file(path)
    if path.stat().st_size > MAX_HEADER:
        raise AdapterFileError(f"{path} is larger than the {MAX_HEADER} bytes that are accepted of a config")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers or nesting beyond reason
        raise AdapterFileError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object")
    return values


def read_weights(
    source: str | Path, device: str | torch.device = "cpu", *, config: PeftConfig | None = None, **where: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter directory or hub id: named by module path for a `config`, else as the file has them."""
    tensors = read_tensors(find_file(source, WEIGHTS_NAME, **where), device)
    return tensors if config is None else {config.from_file(key): tensor for key, tensor in tensors.items()}


def find_file(source: str | Path, name: str, *, subfolder: str | None = None, **hub: Any) -> Path:
    """Path of a file of an adapter: in a local directory, else downloaded from the hub.

    Raises:
        AdapterFileError: it is in neither, with what is there instead.
    """
    directory = Path(source, subfolder or "")
    if (directory / name).is_file():
        return directory / name
    if (directory / PICKLE_NAME).is_file() and name == WEIGHTS_NAME:
        check_file(directory / PICKLE_NAME)
    if Path(source).exists():
        there = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else "no directory"
        raise AdapterFileError(f"Can't find '{name}' at '{directory}'; found {there}")
    return download(str(source), name, subfolder, **hub)
