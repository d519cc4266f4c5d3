"""`veneer convert`: an adapter of any dialect, rewritten for another program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..core.runs.settings import ConfigError
from .base import BaseModel
from .dialects.methods import is_full_lokr
from .dialects.peft_plan import component_folders
from .inspect import adapters_at, look_into

if TYPE_CHECKING:
    from torch import Tensor

    from .dialects.canonical import Canonical, Layer
    from .dialects.names import Names
    from .to_lora import Truncated


@dataclass(frozen=True)
class ConvertConfig:
    """Rewrite an adapter of any dialect for another program, with the same effect.

    What the other program cannot express is refused, with the way out. The result is written whole or not at all.

    In a shell:
      veneer convert ink.safetensors ink-for-comfy.safetensors --to comfy
      veneer convert runs/robot robot.safetensors --to kohya --dtype float16
      veneer convert lokr.safetensors lora.safetensors --to diffusers --method lora --rank 32
      veneer convert dora.safetensors lora.safetensors --to kohya --method lora --max-error 0.05 --base models/sd15
    """

    source: Positional[Path]
    """A .safetensors file of any dialect, or a PEFT directory."""
    out: Positional[Path]
    """The file to write, ending in .safetensors; for peft a folder."""
    to: Literal["peft", "diffusers", "kohya", "comfy"]
    """Whose dialect to write: peft for PEFT and Veneer; diffusers for `load_lora_weights`; kohya for sd-scripts,
    LyCORIS, A1111's webui and most others; comfy for ComfyUI, which reads kohya's too."""
    method: Literal["lora"] | None = None
    """Turn every layer into the nearest LoRA, for programs that know no other method. Needs rank or max_error."""
    rank: int | None = None
    """Largest rank of the LoRA."""
    max_error: float | None = None
    """Relative error that each layer of the LoRA may have: the lowest rank that keeps to it is taken. 0.05 is 5
    percent."""
    base: str | None = None
    """The model that the adapter is for: a diffusers pipeline's folder, or "embedded". Not given, the family that the
    file's names and shapes fit best. Turning DoRA, GLoRA, OFT or IA3 into LoRA needs it."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """What numbers are stored in. Not given, as they are in the source; what is computed anew, in float32."""
    strict: bool = True
    """Refuse a source with keys that have no place in the model, or layers that no LoRA can express. --no-strict leaves
    them out, and says so."""
    overwrite: bool = False
    """Replace what is at `out` already."""

    def __post_init__(self) -> None:
        limits = [name for name in ("rank", "max_error") if getattr(self, name) is not None]
        if limits and self.method is None:
            raise ConfigError(f"{limits[0]} belongs to --method lora, which is not given")
        if self.method == "lora" and not limits:
            raise ConfigError("--method lora needs --rank N or --max-error E: how much of each layer to keep")


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    out: Path
    source: str
    """The dialect that was read."""
    to: str
    family: str
    """The model that it is for."""
    layers: int
    notes: tuple[str, ...]
    """What somebody who relies on it should know, a sentence each."""
    error: float | None = None
    """Relative error of turning it into a LoRA, in the Frobenius norm over all layers; None where nothing was."""


def convert(config: ConvertConfig) -> None:
    """Convert, and say what was done."""
    done = convert_adapter(config)
    print(f"{done.out}: {done.layers} layers for {done.family}, from {done.source} to {done.to}")
    for note in done.notes:
        print(f"  {note}")


def convert_adapter(config: ConvertConfig) -> Conversion:
    """Read, change and write an adapter.

    Raises:
        ValueError: the source is damaged, or not for the model; the target cannot express it, or is there already.
    """
    from .dialects.reading import read
    from .dialects.writing import write

    out = Path(config.out)
    check_target(out, config.to, config.overwrite)
    base = None if config.base is None else BaseModel(config.base)
    source = _the_one_at(Path(config.source))
    found = look_into(source, base and base.names)
    adapter = read(source, found.names, config.strict)
    notes, error = [*found.plan.notes, *_left_out(adapter.unmatched, "keys")], None
    if config.method == "lora":
        adapter, error = _as_lora(adapter, found.names, base, config, notes)
    layers = len(adapter.layers())
    if not layers:
        raise ValueError(f"{source}: nothing is left to write")
    if config.to == "peft":
        _check_no_mixture(out, adapter.components)
    write(out, _cast(adapter, config.dtype), config.to, found.names)
    notes += _scales(adapter, config.to)
    return Conversion(out, found.plan.dialect.title, config.to, found.names.family, layers, tuple(notes), error)


def _as_lora(
    adapter: Canonical, names: Names, base: BaseModel | None, config: ConvertConfig, notes: list[str]
) -> tuple[Canonical, float]:
    """The adapter as a LoRA, and its relative error; what is to be said of it joins `notes`."""
    from ..core.lowrank import Truncation
    from .to_lora import to_lora

    made = to_lora(adapter, names, Truncation(config.rank, config.max_error), base and base.weights, config.strict)
    notes += _how_near(made)
    notes += _left_out({".".join(place): why for place, why in made.left_out.items()}, "layers")
    return made.adapter, made.error


def _the_one_at(path: Path) -> Path:
    """The adapter at `path`: of a run's folder its PEFT directory, of another folder its only file.

    Raises:
        ConfigError: there are several.
    """
    found = adapters_at(path)
    if len(found) > 1 and found[0] != path:
        raise ConfigError(f"{path} holds {len(found)} adapters: name one, such as {found[0]}")
    return found[0]


def check_target(out: Path, to: str, overwrite: bool) -> None:
    """Refuse a path that cannot or should not be written, before any work is done.

    Raises:
        ConfigError: its ending does not fit the dialect, or something is there that would be lost or mixed up.
    """
    if to == "peft" and out.suffix == ".safetensors":
        raise ConfigError(f"{out}: PEFT's adapters are folders; give one, such as {out.with_suffix('')}")
    if to != "peft" and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: a {to} adapter is a file ending in .safetensors, such as {out}.safetensors")
    if to == "peft":
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    else:
        taken = out.exists() or out.is_symlink()
    if taken and not overwrite:
        raise ConfigError(f"{out} is there already: choose another name, or replace it with --overwrite")
    if taken and out.is_dir() != (to == "peft"):
        raise ConfigError(f"{out} is a {'folder' if out.is_dir() else 'file'}, which --overwrite does not replace")


def _check_no_mixture(out: Path, components: Iterable[str]) -> None:
    """A PEFT directory is all of its folders: one that stays from another adapter would be loaded along."""
    old = [name for name in component_folders(out) if name not in set(components)] if out.is_dir() else []
    if old:
        raise ConfigError(
            f"{out} holds an adapter of {', '.join(old)} that the new one would be mixed with: choose another folder"
        )


def _left_out(reasons: Mapping[str, str], what: str) -> Iterator[str]:
    if reasons:
        name, why = next(iter(reasons.items()))
        yield f"left out: {len(reasons)} {what}, the first {name}: {why}"


def _how_near(made: Truncated) -> Iterator[str]:
    place, worst = max(made.errors.items(), key=lambda item: item[1], default=(("", ""), 0.0))
    ranks = sorted({len(layer.factors["lora_A.weight"]) for layer in made.adapter.layers().values()})
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(map(str, ranks))
    name = ".".join(place)
    yield f"as LoRA of rank {shown}, with a relative error of {made.error:.2%} in all, at most {worst:.2%} in {name}"


_SCALES = {
    "peft": "stand in adapter_config.json as alphas",
    "diffusers": "are multiplied into lora_B, since not every reader heeds the header",
    "kohya": "stand beside each layer as its alpha",
    "comfy": "stand beside each layer as its alpha",
}
"""Dialect -> where its writer puts scales other than 1."""


def _scales(adapter: Canonical, to: str) -> Iterator[str]:
    scales = sorted({layer.scale for layer in adapter.layers().values()} - {1.0})
    if scales:
        shown = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        full = to in ("kohya", "comfy") and any(map(_is_full, adapter.layers().values()))
        but = ", or in the left factor of a LoKr with two full ones, where alphas mean nothing" if full else ""
        yield f"scales other than 1 ({shown}) {_SCALES[to]}{but}"


def _is_full(layer: Layer) -> bool:
    return is_full_lokr({name: tuple(tensor.shape) for name, tensor in layer.factors.items()})


def _cast(adapter: Canonical, dtype: str | None) -> Canonical:
    """The factors in another dtype.

    Raises:
        ValueError: a number is too large for it.
    """
    if dtype is None:
        return adapter
    import torch

    def cast(name: str, tensor: Tensor) -> Tensor:
        stored = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        if not stored.isfinite().all():
            raise ValueError(f"{name} has numbers too large for {dtype}: use bfloat16 or float32")
        return stored

    components = {
        component: {
            path: replace(layer, factors={key: cast(f"{path}.{key}", t) for key, t in layer.factors.items()})
            for path, layer in layers.items()
        }
        for component, layers in adapter.components.items()
    }
    return replace(adapter, components=components)
