"""`veneer blend`: several adapters into one, with a picture of what each does alone and what they do together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import ConfigError
from .generate import DrawOptions
from .settings import to_yaml
from .weighted import Weighted, parse_weighted

if TYPE_CHECKING:
    from .adapters import Adapters
    from .grid import Row

BLEND = "blend"
"""Name of the new adapter on the pipeline."""


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How adapters become one."""

    combination_type: Literal["cat", "linear", "svd", "ties"] = "cat"
    """"cat" is the exact weighted sum, its rank the sum of the ranks; "svd" the nearest sum of a lower rank; "linear"
    averages the factors one by one, for adapters of equal rank; "ties" keeps large changes and settles their signs."""
    svd_rank: int | None = None
    """Rank of an "svd" blend. Not given, the largest rank of the inputs."""
    density: float | None = None
    """Share of each adapter that "ties" keeps, above 0 to 1: its largest values."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How "ties" settles a sign: by the sum of the values, or by their number."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the core's `combine`.

        Raises:
            ConfigError: an option that the combination does not have, or lacks one that it needs.
        """
        asked = {name: getattr(self, name) for name in OPTION_OF}
        given = {name: value for name, value in asked.items() if value != getattr(CombineOptions, name)}
        foreign = [name for name in given if OPTION_OF[name] != self.combination_type]
        if foreign:
            belongs = ", ".join(f"{name} is an option of {OPTION_OF[name]!r}" for name in foreign)
            raise ConfigError(f"{belongs}, not of {self.combination_type!r}")
        if self.combination_type == "ties" and self.density is None:
            raise ConfigError("'ties' needs density: the share of each adapter to keep, above 0 to 1")
        return {"combination_type": self.combination_type, **given}


OPTION_OF = {"svd_rank": "svd", "density": "ties", "majority_sign_method": "ties"}
"""Which combination each further option belongs to."""


@dataclass(frozen=True, kw_only=True)
class BlendConfig(CombineOptions, DrawOptions):
    """Make one adapter of several, and a sheet that shows the inputs, the blend and the bare model side by side."""

    adapters: tuple[str, ...]
    """Two or more adapter folders or files, each PATH or PATH=WEIGHT; 1 is as trained."""
    out: Path = Path("blend")
    """Folder for the new adapter, its preview `sheet.png` and this config."""
    prompts: tuple[str, ...] = ()
    """Columns of the preview. Not given, what the adapters were trained to answer to, one by one and together."""


def blend(config: BlendConfig) -> None:
    """Combine, save and preview."""
    from ..core.files import write_text
    from .grid import contact_sheet
    from .pipeline import save_adapter

    inputs = parse_weighted(config.adapters)
    if len(inputs) < 2:
        raise ValueError(f"a blend needs two adapters or more, not {len(inputs)}: give PATH or PATH=WEIGHT for each")
    pipe = config.load_pipeline()
    blended = combine(pipe, inputs, config)
    save_adapter(config.out, blended, recipe(inputs, config, config.model))
    write_text(config.out / "config.yaml", to_yaml(config))
    print(f"the blend is in {config.out}")
    prompts = config.prompts or triggers(inputs)
    if not prompts:
        print("no preview: the adapters do not say what they answer to; give --prompts to draw one")
        return
    sheet = config.out / "sheet.png"
    contact_sheet(preview(pipe, inputs, config, prompts)).save(sheet)
    print(f"its preview is {sheet}")


def combine(pipe: Any, inputs: Sequence[Weighted], options: CombineOptions) -> Adapters:
    """Load `inputs` onto `pipe` and combine them there, component by component, into a new adapter named `BLEND`.

    A component that only some of the inputs adapt is combined from those.
    """
    from .pipeline import adapted_models, load_adapter

    for adapter in inputs:
        load_adapter(pipe, adapter.path, adapter.name)
    blended = {}
    for component, model in adapted_models(pipe).items():
        here = [adapter for adapter in inputs if adapter.name in model.configs]
        weights = [adapter.weight for adapter in here]
        model.combine([adapter.name for adapter in here], weights, BLEND, **options.arguments())
        blended[component] = model.configs[BLEND], {key: value.cpu() for key, value in model.tensors(BLEND).items()}
    return blended


def triggers(inputs: Sequence[Weighted]) -> tuple[str, ...]:
    """The prompts that the adapters were trained to answer to, as their files tell, and all of them in one."""
    from .pipeline import adapter_metadata

    found = [trigger for adapter in inputs if (trigger := adapter_metadata(adapter.path).get("trigger"))]
    return tuple(dict.fromkeys([*found, ", ".join(found)] if found else []))


def recipe(inputs: Sequence[Weighted], options: CombineOptions, model: str) -> dict[str, str]:
    """How the blend was made, for the files' headers. Names of the inputs only: local folders are nobody's business."""
    made = {"blend": {name: weight for name, _, weight in inputs}, **options.arguments()}
    together = ", ".join(triggers(inputs)[:-1])
    return {"base_model": model, "recipe": to_yaml(made)} | ({"trigger": together} if together else {})


def preview(pipe: Any, inputs: Sequence[Weighted], draw: DrawOptions, prompts: Sequence[str]) -> list[Row]:
    """Rows of the sheet: the bare model, each input at its weight, the blend; columns are prompts and seeds."""
    shown = [(None, 1.0, "no adapter"), *((name, weight, f"{name} at {weight:g}") for name, _, weight in inputs)]
    rows = []
    for name, weight, label in [*shown, (BLEND, 1.0, "blend")]:
        show_only(pipe, name, weight)
        rows.append((label, [(prompt, image) for prompt, _, image in draw.draw(pipe, prompts)]))
    return rows


def show_only(pipe: Any, name: str | None, weight: float = 1.0) -> None:
    """Of all loaded adapters run this one alone, or none."""
    from .pipeline import adapted_models, set_weights

    for model in adapted_models(pipe).values():
        model.activate(*[name] if name in model.configs else [])
    if name is not None:
        set_weights(pipe, {name: weight})
