"""What an adapter file or folder holds. Only headers and alphas are read, so that size does not matter.

A *dialect* is a way to lay an adapter out on disk:

    PEFT directory    adapter_config.json beside adapter_model.safetensors; a folder for each component
    diffusers file    keys such as unet.….to_q.lora_A.weight; the configs as JSON in the file's metadata
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from .dialects.names import COMPONENTS
from .settings import plain

# The tensors of each method, by the last words of their keys; the pattern's group is the module path.
METHODS = {
    "LoRA": re.compile(r"(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?:weight|bias))?$"),
    "LoHa": re.compile(r"(.+)\.hada_(?:w[12]_[ab]|t[12])$"),
    "LoKr": re.compile(r"(.+)\.lokr_(?:w[12](?:_[ab])?|t2)$"),
    "IA3": re.compile(r"(.+)\.ia3_l(?:\.weight)?$"),
    "OFT": re.compile(r"(.+)\.oft_R(?:\.weight)?$"),
}
# Which dimension of which tensor is the rank.
RANK_AXIS = {"lora_A.weight": 0, "lora_embedding_A": 0, "hada_w1_b": 0, "lokr_w2_b": 0, "lokr_w1_b": 0}


@dataclass(frozen=True)
class InspectConfig:
    """Say what an adapter file or folder holds."""

    path: Positional[Path]
    """A .safetensors file, or a folder that holds an adapter."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Part:
    """One component's adapter."""

    component: str
    method: str
    ranks: list[int]
    scales: list[float]
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA: a factor of the product. Empty where the file is silent."""
    modules: int
    """Adapted layers."""
    parameters: int


@dataclass(frozen=True)
class Report:
    """What one file holds."""

    file: str
    dialect: str
    size: int
    """Bytes."""
    parts: list[Part]
    metadata: dict[str, Any] = field(default_factory=dict)
    first_keys: list[str] = field(default_factory=list)
    """Where the dialect is unknown: the first tensors' names, for a person to recognise."""


def inspect(config: InspectConfig) -> None:
    """Print what `config.path` holds."""
    reports = inspect_path(config.path)
    print(json.dumps(plain(reports), indent=2) if config.json else "\n\n".join(_table(report) for report in reports))


def inspect_path(path: Path) -> list[Report]:
    """A report for every adapter file of `path`, a file or a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        files = [path]
    else:  # an adapter's own files before whatever lies deeper, such as a run's checkpoints
        own = [*path.glob("*.safetensors"), *path.glob("*/adapter_model.safetensors")]
        files = sorted(own or path.rglob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no .safetensors file")
    return [_inspect_file(file) for file in files]


def _inspect_file(file: Path) -> Report:
    shapes, header = _read_header(file)
    metadata = {key: _maybe_json(value) for key, value in header.items() if key != "format"}
    config_file = file.parent / "adapter_config.json"
    if file.name == "adapter_model.safetensors" and config_file.is_file():
        shapes = {key.removeprefix("base_model.model."): shape for key, shape in shapes.items()}
        component = file.parent.name if file.parent.name in COMPONENTS else "model"
        parts = list(_parts(component, shapes, json.loads(config_file.read_text(encoding="utf-8"))))
        dialect = "PEFT directory"
    else:
        parts = [part for component in COMPONENTS for part in _component_parts(component, shapes, metadata)]
        dialect = "diffusers file"
    if parts:
        return Report(str(file), dialect, file.stat().st_size, parts, metadata)
    return Report(str(file), "unknown dialect", file.stat().st_size, [], metadata, sorted(shapes)[:8])


def _component_parts(component: str, shapes: dict[str, list[int]], metadata: dict[str, Any]) -> Iterator[Part]:
    """One component's share of a diffusers file: keys and config both carry its name as prefix."""
    prefix = f"{component}."
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    config = metadata.get("lora_adapter_metadata", {})
    yield from _parts(component, own, {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)})


def _parts(component: str, shapes: dict[str, list[int]], config: dict[str, Any]) -> Iterator[Part]:
    for method, pattern in METHODS.items():
        matches = {key: match[1] for key in shapes if (match := pattern.match(key))}
        if not matches:
            continue
        ranks = _ranks(matches, shapes)
        is_dora = method == "LoRA" and any("lora_magnitude_vector" in key for key in matches)
        yield Part(
            component,
            "DoRA" if is_dora else method,
            sorted(set(ranks.values())),
            sorted({scale for module, rank in ranks.items() if (scale := _scale(module, rank, config)) is not None}),
            len(set(matches.values())),
            sum(_count(shapes[key]) for key in matches),
        )


def _ranks(matches: dict[str, str], shapes: dict[str, list[int]]) -> dict[str, int]:
    """The rank of every module whose tensors show one; a LoKr of two full factors has none."""
    return {
        module: shapes[key][axis]
        for key, module in matches.items()
        for tensor, axis in RANK_AXIS.items()
        if key == f"{module}.{tensor}"
    }


def _scale(module: str, rank: int, config: dict[str, Any]) -> float | None:
    alpha = config.get("lora_alpha", config.get("alpha"))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if alpha is None:
        return None
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _read_header(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes by key, and the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            shapes = {key: list(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            return shapes, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _maybe_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _table(report: Report) -> str:
    lines = [f"{report.file}: {report.dialect}, {report.size / 1e6:.2f} MB"]
    if report.parts:
        rows = [("component", "method", "rank", "scale", "modules", "parameters"), *map(_row, report.parts)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [f"  first key: {key}" for key in report.first_keys]
    lines += [
        f"  {key}: {_short(value)}" for key, value in sorted(report.metadata.items()) if key != "lora_adapter_metadata"
    ]
    return "\n".join(lines)


def _row(part: Part) -> tuple[str, ...]:
    scales = " ".join(f"{scale:g}" for scale in part.scales)
    ranks = " ".join(map(str, part.ranks))
    return part.component, part.method, ranks or "-", scales or "-", str(part.modules), f"{part.parameters:,}"


def _short(value: Any, width: int = 160) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"
