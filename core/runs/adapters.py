"""The adapter that a run trains: one set of options for all registered methods, and the method's own config of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from ..config import PeftConfig, PeftType, config_classes
from .settings import ConfigError

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[*(kind.value.lower() for kind in PeftType), "none"]
"""Every method that is registered, and "none"."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is trained, and how strongly. Options that the method does not have are an error, not ignored."""

    method: Method = "lora"
    """How the model is changed. LoRA is the most widely readable; the others' own options go into `options`."""
    rank: int = 16
    """Rank of the update, from 1 up, for methods that have one. 4 to 32 is usual: more remembers more detail and
    overfits sooner."""
    alpha: float | None = None
    """Strength of the update is alpha / rank. Not given, it equals the rank: strength 1."""
    learning_rate: float | None = None
    """Peak rate of AdamW, between 0 and 1. Not given, what suits the method and the model."""
    targets: tuple[str, ...] = ()
    """Layers to adapt, as dotted name suffixes such as `q_proj`. Not given, what is usual for the model."""
    dropout: float = 0.0
    """Chance, 0 to 1, that an input feature (LoHa, LoKr: a rank) is left out in training. 0 as in the papers' runs."""
    dora: bool = False
    """Weight-decomposed: learn the magnitude of each output apart from its direction. Slower, often closer."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers, by name suffix or regex; a name that matches nothing is an error."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some layers, likewise."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further fields of the method's own config, such as `decompose_factor 8` (LoKr), `use_rslora True` (LoRA) or
    `token_indices 5,6` (trainable tokens)."""

    def problems(self, name: str) -> Iterator[str]:
        """A line for every value that cannot work; `name` is what the run calls this adapter."""
        if self.rank < 1:
            yield f"{name}.rank={self.rank} must be at least 1"
        if self.alpha is not None and self.alpha <= 0:
            yield f"{name}.alpha={self.alpha} must be positive"
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            yield f"{name}.learning_rate={self.learning_rate} must lie between 0 and 1"
        if not 0 <= self.dropout < 1:
            yield f"{name}.dropout={self.dropout} must be at least 0 and below 1"


_NAMES = {
    "rank": ("r",),
    "alpha": ("lora_alpha", "alpha"),
    "dropout": ("lora_dropout", "vera_dropout", "rank_dropout"),
    "dora": ("use_dora",),
    "rank_pattern": ("rank_pattern",),
    "alpha_pattern": ("alpha_pattern",),
    "targets": ("target_modules",),
}
"""What the methods' configs call these options; the first that is there counts."""
_OTHERWISE = {
    PeftType.OFT: {"r"},  # counts blocks, and stands against their size: both stay in `options`
    PeftType.ADALORA: {"r", "rank_pattern"},  # not read; and written by the training
}
"""Fields that are called like one of these and are something else."""


def peft_config(name: str, options: AdapterOptions, steps: int, **shared: Any) -> PeftConfig:
    """The method's own config for `options`.

    Arguments:
        name: what the run calls this adapter, for messages.
        steps: how many the run has, for methods with a schedule of their own.
        shared: further fields, where the config has them; `options` win.

    Raises:
        ConfigError: an option that the method does not have, or a value that it refuses.
    """
    config_class = method_class(name, options.method)
    known = {field.name for field in fields(config_class) if field.init}
    values = {key: value for key, value in shared.items() if key in known}
    if config_class.peft_type == PeftType.ADALORA:
        # as in the paper, half as many triplets again at the start as are left in the end; its scale is alpha / init_r
        init_r = -(-3 * options.rank // 2)
        values |= {"target_r": options.rank, "init_r": init_r, "lora_alpha": init_r, "total_step": steps}
        options = replace(options, rank=_default("rank"))
    values |= dict(_translated(name, options, config_class, known)) | options.options
    unknown = sorted(values.keys() - known)
    if unknown:
        own = sorted(known - {field.name for field in fields(PeftConfig)})
        raise ConfigError(
            f"{name}: {config_class.__name__} has no option {', '.join(unknown)}; it has {', '.join(own)}"
        )
    for known_field in fields(config_class):
        if isinstance(values.get(known_field.name), str) and str(known_field.type).startswith("list[int]"):
            values[known_field.name] = _numbers(f"{name}.options: {known_field.name}", values[known_field.name])
    try:
        return config_class(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _numbers(what: str, text: str) -> list[int]:
    """Whole numbers as a command line gives them: "3,5,8"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{what} takes whole numbers with commas between them, not {text!r}") from None


def method_class(name: str, method: str) -> type[PeftConfig]:
    """The config class of a method.

    Raises:
        ConfigError: there is no such method.
    """
    classes = {kind.value.lower(): found for kind, found in config_classes().items()}
    if method not in classes:
        raise ConfigError(f"{name}.method={method} is no method; choose one of {', '.join(sorted(classes))}")
    return classes[method]


def _translated(
    name: str, options: AdapterOptions, config_class: type[PeftConfig], known: set[str]
) -> Iterator[tuple[str, Any]]:
    """The options under the names of the method's config. One that is set and has none there is an error."""
    known = known - _OTHERWISE.get(PeftType(config_class.peft_type or ""), set())
    for option, names in _NAMES.items():
        value = getattr(options, option)
        own = next((n for n in names if n in known), None)
        if own is None and value != _default(option):
            raise ConfigError(f"{name}.{option}: {options.method} has no such option; see its own under {name}.options")
        if option == "alpha" and value is None and "r" in known:
            value = options.rank
        if own is not None and not (option in ("alpha", "targets") and not value):  # those are then the method's own
            yield own, list(value) if isinstance(value, tuple) else value


def _default(option: str) -> Any:
    declared = next(f for f in fields(AdapterOptions) if f.name == option)
    return declared.default if declared.default is not MISSING else declared.default_factory()  # type: ignore[misc]
