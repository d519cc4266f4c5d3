"""PEFT directories: one folder a component (`unet/`, `text_encoder/`), each as `peft` reads and writes it."""

from __future__ import annotations

from pathlib import Path

from ...core import files
from ..adapters import Adapters
from .names import COMPONENTS


def is_peft_dir(path: Path) -> bool:
    return any((path / name / "adapter_config.json").is_file() for name in COMPONENTS)


def write_peft_dir(path: Path, adapters: Adapters, metadata: dict[str, str] | None = None) -> None:
    """Write each component's folder, atomically one by one. `metadata` goes into the safetensors headers."""
    for name, (config, tensors) in adapters.items():
        files.save_adapter(path / name, config, tensors, metadata)


def read_peft_dir(path: Path) -> Adapters:
    """All components that `path` holds."""
    found = [name for name in COMPONENTS if (path / name / "adapter_config.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no PEFT adapter in any of the folders {', '.join(COMPONENTS)}")
    return {name: files.load_adapter(path / name) for name in found}
