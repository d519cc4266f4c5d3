"""`veneer inspect`: what an adapter file or folder holds, whether it fits a model, and which programs read it.

Only headers and alphas are read, so that size does not matter, and no model library is needed for it. What the keys
mean is the readers' own plan of them (`dialects/plan.py`): what is shown here is what loading would do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from ..core.errors import AdapterFileError, one_line
from ..core.files import WEIGHTS_NAME
from ..core.runs.settings import plain
from .base import BaseModel
from .dialects.architectures import Table
from .dialects.canonical import CONFIGS, Entry, Header, Plan
from .dialects.methods import FORMS, POISON
from .dialects.names import Names, families, family_names
from .dialects.peft_plan import component_folders, peft_header, plan_peft
from .dialects.plan import plan
from .families import EMBEDDED
from .verdicts import WHOLE, Verdict, is_tucker, verdicts

SHOWN = 8
"""Keys without a place that the table lists; JSON has them all."""


@dataclass(frozen=True)
class InspectConfig:
    """Say what an adapter file or folder holds, whether it fits a model, and which programs read it.

    Fails (exit code 1) if a file is damaged, or if some of its keys have no place in the model.

    In a shell:
      veneer inspect ink.safetensors
      veneer inspect ink.safetensors --base embedded
      veneer inspect runs/robot --base models/stable-diffusion-v1-5 --json
    """

    path: Positional[Path]
    """A .safetensors file of any dialect, a PEFT directory, or a folder of such files."""
    base: str | None = None
    """The model to hold the file against: a diffusers pipeline's folder, or "embedded". Not given, the family that the
    file's names and shapes fit best."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Part:
    """What a file adapts of one component, by one method."""

    component: str
    method: str
    ranks: list[int]
    scales: list[float]
    """What the product of the factors is multiplied by: alpha / rank, or as the dialect has it."""
    layers: int
    coverage: float | None
    """Percent of the component's layers with a weight of two axes or more; None for a model that is not known."""
    parameters: int


@dataclass(frozen=True)
class Report:
    """What one adapter holds."""

    path: str
    dialect: str
    family: str
    size: int
    """Bytes."""
    parts: list[Part]
    warnings: list[str]
    unmatched: dict[str, str]
    """Key without a place -> why, with the nearest names."""
    verdicts: list[Verdict]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        """Why Veneer would not load it, in one line."""
        ours = self.verdicts[0]
        if ours.reads == WHOLE:
            return None
        if not self.unmatched:
            return f"{self.path}: {ours.why}"
        key, why = next(iter(self.unmatched.items()))
        more = f" (and {len(self.unmatched) - 1} more keys)" if len(self.unmatched) > 1 else ""
        fits = f"does not fit {self.family}" if self.family else f"fits none of {', '.join(families())}"
        return f"{self.path} {fits}: {key}: {why}{more}"


def inspect(config: InspectConfig) -> None:
    """Print what `config.path` holds.

    Raises:
        ValueError: files that cannot be read, or do not fit; what the others hold has been printed.
    """
    names = None if config.base is None else BaseModel(config.base).names
    reports, problems = [], []
    for path in adapters_at(config.path):
        try:
            reports.append(inspect_adapter(path, names))
        except ValueError as error:
            problems.append(str(error))
    if config.json:
        print(json.dumps(plain(reports), indent=2))
    elif reports:
        print("\n\n".join(map(_table, reports)))
    problems += [report.problem for report in reports if report.problem]
    if problems:
        raise ValueError(problems[0] + (f"; and {len(problems) - 1} files more" if len(problems) > 1 else ""))


def adapters_at(path: Path) -> list[Path]:
    """The adapters of a folder: itself if it is a PEFT directory, and its files; of a file, itself.

    Raises:
        AdapterFileError: there is none.
    """
    if not path.is_dir():
        return [path]
    folders = [path] if component_folders(path) else []
    # an adapter's own files before whatever lies deeper, such as a run's checkpoints
    found = folders + sorted(path.glob("*.safetensors")) or sorted(path.rglob("*.safetensors"))
    if not found:
        raise AdapterFileError(f"{path} holds no .safetensors file")
    return found


def inspect_adapter(path: str | Path, names: Names | None = None) -> Report:
    """What one file or PEFT directory holds.

    Arguments:
        names: the modules of the model to hold it against; None takes the stored family that fits best.

    Raises:
        ValueError: it is damaged, or no adapter of a known dialect.
    """
    path = Path(path)
    header, meant, fitted = look_into(path, names)
    return Report(
        str(path),
        meant.dialect.title,
        meant.family if meant.entries or names else "",
        sum(file.stat().st_size for file in _weights(path)),
        list(_parts(meant, header, fitted.tables)),
        [*meant.notes, *_warnings(meant, header)],
        dict(meant.unmatched),
        verdicts(meant),
        {key: _maybe_json(value) for key, value in header.metadata.items() if key != "format"},
    )


def _weights(path: Path) -> list[Path]:
    """The files with an adapter's tensors."""
    return [folder / WEIGHTS_NAME for folder in component_folders(path).values()] if path.is_dir() else [path]


class Found(NamedTuple):
    """An adapter, and what it means to the model that it fits best."""

    header: Header
    plan: Plan
    names: Names


def look_into(path: Path, names: Names | None = None) -> Found:
    """What an adapter's file or directory means.

    Arguments:
        names: the modules of its model; None takes the stored family that fits best, or the pipeline in the box.

    Raises:
        AdapterFileError: it is damaged, or in no known dialect.
    """
    header, look_up = (peft_header(path), plan_peft) if path.is_dir() else (Header.of_file(path), plan)
    try:
        found = look_up(header, names)
    except ValueError as error:
        raise AdapterFileError(f"{path} is {error}") from None
    if names is not None:
        return Found(header, found, names)
    names = family_names(found.family)
    if found.unmatched:
        boxed = BaseModel(EMBEDDED).names
        other = look_up(header, boxed)
        if len(other.unmatched) < len(found.unmatched):
            return Found(header, other, boxed)
    return Found(header, found, names)


_LABELS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "ia3": "IA3"}


def _label(entry: Entry, header: Header) -> str:
    """The method's name for people."""
    if entry.method == "oft":
        return "BOFT" if any(len(header.shapes[key]) == 4 for key in entry.keys.values()) else "OFT"
    name = _LABELS.get(entry.method, entry.method)
    if entry.magnitude:
        name = "DoRA" if name == "LoRA" else f"{name} + DoRA"
    return f"{name}, Tucker" if is_tucker(entry) else name


def _parts(meant: Plan, header: Header, tables: Mapping[str, Table]) -> Iterator[Part]:
    def place(entry: Entry) -> tuple[str, str]:
        return entry.component, _label(entry, header)

    for (component, method), group in groupby(sorted(meant.entries, key=place), key=place):
        entries = list(group)
        keys = {key for entry in entries for key in entry.keys.values()}  # of fused layers, once
        yield Part(
            component,
            method,
            sorted({entry.rank for entry in entries if entry.rank is not None}),
            sorted({entry.scale for entry in entries}),
            len({entry.path for entry in entries}),
            _coverage(len({entry.path for entry in entries}), tables.get(component, {})),
            sum(prod(header.shapes[key]) for key in keys),
        )


def _coverage(layers: int, table: Table) -> float | None:
    adaptable = sum(len(shape) > 1 for shape in table.values())
    return round(100 * layers / adaptable, 1) if adaptable else None


def _warnings(meant: Plan, header: Header) -> Iterator[str]:
    """What is odd about a file, but no error."""
    odd = {
        "ranks larger than what their layers can have": [
            e for e in meant.entries if e.rank and e.rank > _full_rank(e, header)
        ],
        "no alpha, which every program reads as scale 1": [
            e for e in meant.entries if meant.dialect.name == "kohya" and e.rank and e.alpha is None
        ],
        f"an alpha of {POISON:.0f} or infinity beside two full factors, which means nothing and is ignored": [
            e for e in meant.entries if e.rank is None and e.alpha is not None and abs(e.alpha) >= POISON
        ],
        "DoRA's magnitudes by input channel, as LyCORIS before 3.2 had them; PEFT and diffusers cannot hold these": [
            e for e in meant.entries if e.magnitude == "dora_in"
        ],
    }
    for what, layers in odd.items():
        if layers:
            first = f"{layers[0].component}.{layers[0].path}"
            yield f"{what}: {len(layers)} of {len(meant.entries)} layers, the first {first}"


def _full_rank(entry: Entry, header: Header) -> int:
    """The rank beyond which a larger one adds nothing but parameters."""
    shapes = {factor: header.shapes[key] for factor, key in entry.keys.items()}
    return min(size for size in FORMS[entry.method].size(shapes) if size is not None)


def _maybe_json(text: str) -> Any:
    """What a JSON text holds, if it is one that can be written again: not NaN, not 1e999."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


# ---------------------------------------------------------------- for people


def _table(report: Report) -> str:
    model = f" for {report.family}" if report.family else ""
    lines = [f"{report.path}: {report.dialect}{model}, {report.size / 1e6:.2f} MB"]
    if report.parts:
        head = ("component", "method", "rank", "scale", "layers", "of all", "parameters")
        lines += _aligned([head, *map(_row, report.parts)])
        lines.append("")
    lines += _aligned([("read by", "", ""), *((v.program, v.reads, v.why) for v in report.verdicts)])
    lines += [f"  warning: {text}" for text in report.warnings]
    lines += [f"  no place: {_short(key)}: {_short(why)}" for key, why in list(report.unmatched.items())[:SHOWN]]
    if len(report.unmatched) > SHOWN:
        lines.append(f"  no place: {len(report.unmatched) - SHOWN} keys more; --json lists them all")
    lines += [f"  {_short(key)}: {_short(value)}" for key, value in sorted(report.metadata.items()) if key != CONFIGS]
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(part: Part) -> tuple[str, ...]:
    scales, ranks = _several(part.scales), _several(part.ranks)
    layers = str(part.layers)
    coverage = "-" if part.coverage is None else f"{part.coverage:g}%"
    return part.component, part.method, ranks, scales, layers, coverage, f"{part.parameters:,}"


def _several(values: Iterable[float]) -> str:
    """A few numbers one by one, many as a range."""
    numbers = [f"{value:g}" for value in values]
    return " ".join(numbers) or "-" if len(numbers) <= 4 else f"{numbers[0]} .. {numbers[-1]} ({len(numbers)})"


def _short(value: Any, width: int = 160) -> str:
    text = one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= width else f"{text[: width - 1]}…"
