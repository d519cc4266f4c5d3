"""`veneer blend`: several adapters into one, with a picture of what each does alone and what they do together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..core.runs.settings import ConfigError, to_yaml
from ..core.weighted import Weighted, parse_weighted
from .generate import DrawOptions

if TYPE_CHECKING:
    from ..core import Report
    from .adapters import Adapters
    from .grid import Row

BLEND = "blend"
"""Name of the new adapter on the pipeline."""


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How adapters become one. docs/combinations.md tells the kinds and what they are good for."""

    combination_type: Literal[
        "cat", "svd", "linear", "slerp",
        "ties", "dare_linear", "dare_ties", "magnitude_prune",
        "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd", "della", "breadcrumbs",
    ] = "cat"  # fmt: skip
    """"cat" is the exact weighted sum, its rank the sum of the ranks; "svd" the nearest sum of a lower rank; "slerp"
    goes from one adapter to another along an arc. The others prune first, so that adapters interfere less: what ends in
    "svd", "della" and "breadcrumbs" work on the weights' changes and take any adapters; "ties", "dare_linear",
    "dare_ties", "magnitude_prune" and "linear" work on factors and need LoRAs of equal rank."""
    svd_rank: int | None = None
    """Rank of the blend, for kinds that cut to one. Not given, the largest rank of the inputs."""
    max_error: float | None = None
    """Instead of a rank, or below it: the largest relative error of a layer, such as 0.05, by which each finds its own
    rank."""
    svd_clamp: float | None = None
    """Quantile at which the entries of the factors are clamped, such as 0.99; above 0.5."""
    svd_driver: Literal["gesvd", "gesvdj", "gesvda"] | None = None
    """cuSOLVER's routine for full decompositions, rather than faster iterations."""
    density: float | None = None
    """Share of each adapter that the pruning kinds keep, above 0 to 1."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """How "ties", "dare_ties" and "della" settle a sign: by the sum of the values, or by their number."""
    epsilon: float = 0.1
    """How much the chance of "della" to keep an entry differs between a row's largest and smallest."""
    gamma: float = 0.01
    """Share of the largest entries, outliers, that "breadcrumbs" removes."""
    seed: int = 0
    """Seed of what "dare" and "della" keep."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the core's `combine`: the options that the kind reads.

        Raises:
            ConfigError: an option that the kind does not read, or lacks one that it needs.
        """
        from ..core import combination_types

        kind = combination_types()[self.combination_type]
        asked = {f.name: (getattr(self, f.name), f.default) for f in fields(CombineOptions)}
        del asked["combination_type"]
        foreign = [name for name, (value, default) in asked.items() if value != default and name not in kind.options]
        if foreign:
            reads = ", ".join(kind.options) or "no options"
            raise ConfigError(f"{self.combination_type!r} has no {', '.join(foreign)}: it reads {reads}")
        read = {name: value for name, (value, _) in asked.items() if name in kind.options and value is not None}
        try:
            kind.check_options(read)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return {"combination_type": self.combination_type, **read}


@dataclass(frozen=True, kw_only=True)
class BlendConfig(CombineOptions, DrawOptions):
    """Make one adapter of several, and a sheet that shows the inputs, the blend and the bare model side by side."""

    adapters: tuple[str, ...]
    """Two or more adapter folders or files, each PATH or PATH=WEIGHT; 1 is as trained."""
    block_weights: tuple[str, ...] = ()
    """Weights of single blocks, each NAME:BLOCK=WEIGHT, such as `ink:unet.up_blocks=0.5`: NAME is the last part of an
    adapter's path, BLOCK a part of a layer's path with its component. They multiply the adapter's own weight."""
    out: Path = Path("blend")
    """Folder for the new adapter, its preview `sheet.png` and this config."""
    prompts: tuple[str, ...] = ()
    """Columns of the preview. Not given, what the adapters were trained to answer to, one by one and together."""


def blend(config: BlendConfig) -> None:
    """Combine, save and preview."""
    from ..core.files import write_text
    from .grid import contact_sheet
    from .pipeline import save_adapter

    config.arguments()  # what is wrong with them is known before anything is loaded
    inputs = parse_weighted(config.adapters)
    if len(inputs) < 2:
        raise ValueError(f"a blend needs two adapters or more, not {len(inputs)}: give PATH or PATH=WEIGHT for each")
    blocks = parse_blocks(config.block_weights, [adapter.name for adapter in inputs])
    pipe = config.load_pipeline()
    blended = combine(pipe, inputs, config, blocks)
    save_adapter(config.out, blended.adapters, recipe(inputs, config, config.model, blocks))
    write_text(config.out / "config.yaml", to_yaml(config))
    print(f"the blend is in {config.out}")
    for component, report in blended.reports.items():
        print(f"{component}: {told(report, config.combination_type)}")
    prompts = config.prompts or triggers(inputs)
    if not prompts:
        print("no preview: the adapters do not say what they answer to; give --prompts to draw one")
        return
    sheet = config.out / "sheet.png"
    contact_sheet(preview(pipe, inputs, config, prompts)).save(sheet)
    print(f"its preview is {sheet}")


class Blended(NamedTuple):
    """A blend, and how near it came, by component."""

    adapters: Adapters
    reports: dict[str, Report]


def told(report: Report, kind: str) -> str:
    """ "ranks 2 to 16, 12.3% from the exact 'svd'" """
    low, high = min(report.ranks.values()), max(report.ranks.values())
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{ranks}, {report.error:.1%} from the exact {kind!r}" if report.error > 0 else ranks


def combine(
    pipe: Any,
    inputs: Sequence[Weighted],
    options: CombineOptions,
    blocks: Mapping[str, Mapping[str, float]] | None = None,
) -> Blended:
    """Load `inputs` onto `pipe` and combine them there, component by component, into a new adapter named `BLEND`.

    A component that only some of the inputs adapt is combined from those. `blocks` are weights by adapter and block,
    which multiply the adapters' own (see `veneer.core.weights`; paths start with the component).
    """
    from .pipeline import load_adapter

    for adapter in inputs:
        load_adapter(pipe, adapter.path, adapter.name)
    return combine_loaded(pipe, inputs, options, blocks)


def combine_loaded(
    pipe: Any,
    inputs: Sequence[Weighted],
    options: CombineOptions,
    blocks: Mapping[str, Mapping[str, float]] | None = None,
) -> Blended:
    """`combine` for adapters that are on `pipe` already, under the names of `inputs`."""
    from .pipeline import adapted_models, weights_by_component

    within = weights_by_component(pipe, {adapter.name: (blocks or {}).get(adapter.name, 1.0) for adapter in inputs})
    blended = Blended({}, {})
    for component, model in adapted_models(pipe).items():
        here = [adapter for adapter in inputs if adapter.name in model.configs]
        weights = [{p: w * adapter.weight for p, w in within[component][adapter.name].items()} for adapter in here]
        report = model.combine([adapter.name for adapter in here], weights, BLEND, **options.arguments())
        tensors = {key: value.cpu() for key, value in model.tensors(BLEND).items()}
        blended.adapters[component] = model.configs[BLEND], tensors
        blended.reports[component] = report
    return blended


def parse_blocks(texts: Iterable[str], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`["ink:unet.up_blocks=0.5"]` -> {"ink": {"unet.up_blocks": 0.5}}.

    Raises:
        ConfigError: another form, or an adapter that is not among `names`.
    """
    found: dict[str, dict[str, float]] = {}
    for text in texts:
        name, colon, rest = text.partition(":")
        block, equals, number = rest.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not (colon and equals and block):
            raise ConfigError(f"block_weights has {text!r}; expected NAME:BLOCK=WEIGHT, as in ink:unet.up_blocks=0.5")
        if name not in names:
            raise ConfigError(f"block_weights has {text!r}, but {name!r} is none of the adapters {', '.join(names)}")
        found.setdefault(name, {})[block] = weight
    return found


def triggers(inputs: Sequence[Weighted]) -> tuple[str, ...]:
    """The prompts that the adapters were trained to answer to, as their files tell, and all of them in one."""
    from .pipeline import adapter_metadata

    found = [trigger for adapter in inputs if (trigger := adapter_metadata(adapter.path).get("trigger"))]
    return tuple(dict.fromkeys([*found, ", ".join(found)] if found else []))


def recipe(
    inputs: Sequence[Weighted],
    options: CombineOptions,
    model: str,
    blocks: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, str]:
    """How the blend was made, for the files' headers. Names of the inputs only: local folders are nobody's business."""
    made = {"blend": {name: weight for name, _, weight in inputs}, **options.arguments()}
    if blocks:
        made["blocks"] = blocks
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
