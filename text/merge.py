"""`veneer text merge`: adapters folded into their model, which loads without this package afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.runs.settings import ConfigError


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Fold adapters into a language model and write it as a plain model of transformers, tokenizer included."""

    model: str
    """The model that they were trained on: a directory, a hub id, or a .gguf file or a directory that holds one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Not given, the newest."""
    adapters: tuple[str, ...]
    """Adapter directories, each PATH or PATH=WEIGHT. 1 is as trained; several add up."""
    out: Path
    """Directory to write. One that is there already is not overwritten."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the written weights; the sum itself is computed in float32 and rounded once."""


def main(config: MergeConfig) -> None:
    merge_adapters(config)
    print(f"a plain transformers model is in {config.out}: AutoModelForCausalLM.from_pretrained({str(config.out)!r})")


def merge_adapters(config: MergeConfig) -> None:
    """Write the merged model.

    Raises:
        ConfigError: nothing to merge, or something is at `out` already.
        NotMergeableError: an adapter that is no change of weights, such as a prompt method; nothing is written.
    """
    if not config.adapters:
        raise ConfigError("nothing to merge: give at least one adapter")
    out = Path(config.out)
    if out.exists():
        raise ConfigError(f"{out} is there already: choose another directory")
    import torch

    from ..core.atomic import atomic_folder
    from ..core.weighted import parse_weighted
    from .with_adapters import load_with_adapters

    adapted, tokenizer = load_with_adapters(
        config.model, parse_weighted(config.adapters), config.revision, dtype=torch.float32
    )
    plain = adapted.merge_and_unload(safe_merge=True)
    plain.to(getattr(torch, config.dtype))
    with atomic_folder(out) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
