"""One adapter as every dialect sees it: component -> module path -> method, factors, resolved scale.

A *dialect* is a way to lay an adapter out on disk. Reading goes in two steps, so that a file can be judged by its
header alone, without torch:

    header   names, shapes and single numbers of a file                        -> `Header`
    plan     which module, method, rank and scale each key means               -> `Plan`, of `Entry`s
    read     the tensors themselves, under our names                           -> `Canonical`, of `Layer`s

Writing is the way back. Nothing after a reader guesses at alphas: ``W' = W + scale * X(factors)`` with the scale as
one float for each module.

Names in a canonical adapter are diffusers' module paths, CLIP's with the `text_model.` that transformers 5 took away
(`names.clip_path` fits them to a live model). Factors have the names that they have in the core and in PEFT's files:

    lora   lora_A.weight (r, in, *k), lora_B.weight (out, r), lora_mid.weight (r, r, *k) for a Tucker kernel,
           lora_B.bias (out,): a change of the bias, scaled as the product is
    loha   hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b; hada_t1, hada_t2 for Tucker kernels
    lokr   lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, lokr_w2_b; lokr_t2 for a Tucker kernel
    full   diff (out, in, *k), diff_b (out,)
    norm   w_norm, b_norm (features,): changes of a norm's weight and bias
    glora  a1.weight, a2.weight, b1.weight, b2.weight, bm.weight: ``X = W a1 a2 + b1 b2``
    ia3    ia3_out or ia3_in: factors of the rows or of the input channels, biases untouched
    oft    oft_blocks (n, b, b), or (m, n, b, b) for a butterfly; rescale (out,), constraint ()

and beside lora, loha and lokr one of two magnitudes: `lora_magnitude_vector` for the norms of the output rows (DoRA),
`dora_in` for those of the input channels (LyCORIS before 3.2). Tensors keep the shapes of their file: the 1x1 axes of
a convolution may be there or not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .registry import Dialect

Shape = tuple[int, ...]
Rows = tuple[tuple[int, int], ...]
"""Ranges of output rows, in order."""

CONFIGS = "lora_adapter_metadata"
"""Under which name diffusers keeps the configs in a file's metadata."""
METHODS = ("lora", "loha", "lokr", "full", "norm", "glora", "ia3", "oft")


@dataclass(frozen=True)
class Header:
    """What a file tells before its tensors are read."""

    shapes: Mapping[str, Shape]
    """Shape of every tensor, by key."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Values of the tensors of one element: alphas and their like."""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """PEFT's config of each component, where the file has one (`lora_adapter_metadata`)."""

    @classmethod
    def of_file(cls, path: str | Path) -> Header:
        """The header of a safetensors file.

        Raises:
            AdapterFileError: it is none, or damaged.
        """
        from ...core.header import read_header

        file = read_header(path)
        shapes = {key: info.shape for key, info in file.tensors.items()}
        return cls(shapes, file.metadata, file.scalars, _configs(file.metadata))


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """diffusers' flat `{"unet.r": 4, ...}` by component; of no use where it is no such object."""
    try:
        flat = json.loads(metadata.get(CONFIGS, "{}"))
    except ValueError:
        flat = {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        component, _, name = key.partition(".")
        configs.setdefault(component, {})[name] = value
    return configs


@dataclass(frozen=True)
class Entry:
    """One module's adapter, as the header tells it."""

    component: str
    path: str
    method: str
    keys: Mapping[str, str]
    """Factor, under our name -> its key in the file."""
    scale: float
    rank: int | None = None
    """None where the method has none, such as a LoKr of two full factors."""
    rows: Rows | None = None
    """This module's share of the output rows, where the file's module is several fused into one."""
    magnitude: str | None = None
    """`lora_magnitude_vector` or `dora_in` for a DoRA."""
    alpha: float | None = None
    """As the file has it; the scale is what it means."""


@dataclass(frozen=True)
class Plan:
    """What a file means, key by key."""

    dialect: Dialect
    entries: tuple[Entry, ...]
    unmatched: Mapping[str, str] = field(default_factory=dict)
    """Key without a place -> why, with the nearest names."""
    notes: tuple[str, ...] = ()
    """What a user should know: settings that are read in one of several possible ways."""
    family: str = ""
    """Whose modules the keys were looked up among."""


@dataclass(frozen=True)
class Layer:
    """The adapter of one module: ``delta = scale * X(factors)``."""

    method: str
    factors: Mapping[str, Tensor]
    scale: float = 1.0


@dataclass(frozen=True)
class Canonical:
    """An adapter, whatever file it came from."""

    components: Mapping[str, Mapping[str, Layer]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file said of itself: `base_model`, `trigger`, ..."""
    unmatched: Mapping[str, str] = field(default_factory=dict)
    """As in `Plan`; empty unless it was read with `strict=False`."""
    notes: tuple[str, ...] = ()

    def layers(self) -> dict[tuple[str, str], Layer]:
        """All layers by (component, path)."""
        return {(name, path): layer for name, part in self.components.items() for path, layer in part.items()}
