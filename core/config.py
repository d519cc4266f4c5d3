"""Adapter configs: dataclasses that go to `adapter_config.json` and come back, under PEFT's field names.

A config describes one adapter for one model. `PeftConfig` holds what every method shares; the methods' own configs
live beside their mathematics in `tuners/`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum, StrEnum
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from . import defaults
from .errors import PeftWarning

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .adapter import Adapter
    from .layer import AdaptedLayer
    from .sites import Site
    from .state import State
    from .targets import Place


class PeftType(StrEnum):
    """The methods, by the name that `adapter_config.json` stores. PEFT does not know those of the second group."""

    LORA = "LORA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    IA3 = "IA3"
    OFT = "OFT"
    ADALORA = "ADALORA"
    VERA = "VERA"
    LN_TUNING = "LN_TUNING"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    CPT = "CPT"

    FULL = "FULL"
    GLORA = "GLORA"
    DIAG_OFT = "DIAG_OFT"


class TaskType(StrEnum):
    """What the base model is for; decides which heads are trained along (`HEADS`)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""Freshly initialised heads per task: an adapter that leaves them untrained would be useless."""

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in its files: the path inside its own wrapper."""
SHARED = "base_model."
"""What it puts before a tensor that all layers share."""
PEFT_FILE_VERSION = "0.21.2"
"""The release of `peft` whose file format is written."""


class _Options(type):
    """Makes constructors take every option that PEFT's config has: one that cannot be honoured is refused by name when
    it is set, and dropped when it is empty, as are those that say nothing about the adapter."""

    later: frozenset[str]
    ignored: frozenset[str]
    why_not: dict[str, str]

    def __call__(cls, *args: Any, **options: Any) -> Any:
        refused = sorted(name for name in cls.later if options.get(name))
        if refused:
            reasons = "".join(f"; {name}: {cls.why_not[name]}" for name in refused if name in cls.why_not)
            raise ValueError(f"{cls.__name__}: {', '.join(refused)} cannot be honoured by this release{reasons}")
        own = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unread = (cls.later | cls.ignored) - own
        return super().__call__(*args, **{name: value for name, value in options.items() if name not in unread})


@dataclass
class PeftConfig(metaclass=_Options):
    """Options that every method shares."""

    task_type: TaskType | str | None = None
    """What the base model is for. Only classification and QA tasks change anything: their head is trained along."""
    peft_type: PeftType | str | None = None
    """The method. Each config class sets its own."""
    auto_mapping: dict | None = None
    """Class and library of the base model, when no task says how to load it."""
    peft_version: str | None = None
    """Version that wrote the file; kept as read."""
    base_model_name_or_path: str | None = None
    """Where the base model came from: a directory or a hub id."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    inference_mode: bool = False
    """True freezes the adapter: it runs, but is not trained."""
    target_modules: list[str] | set[str] | str | None = None
    """Which layers get an adapter: dotted suffixes, one regex over whole paths, "all-linear", or None for the default
    of the model type."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Layers left alone although `target_modules` matches them: dotted suffixes or a regex."""
    modules_to_save: list[str] | None = None
    """Modules trained and saved whole beside the adapter, such as a new head."""

    adapter_class: ClassVar[type[Adapter]]
    prompts: ClassVar[bool] = False
    """Whether the method is virtual tokens, rather than a change of layers."""
    norms: ClassVar[bool] = False
    """Whether the method can adapt a norm, whose weight is no matrix but a number for each feature."""
    on_embeddings: ClassVar[bool] = False
    """Whether the default target is the model's input embedding."""
    later: ClassVar[frozenset[str]] = frozenset()
    """Fields of PEFT's config that this release cannot honour: refused when set, dropped when empty."""
    why_not: ClassVar[dict[str, str]] = {}
    """Reasons, by option, where there is more to say than that nobody has built it."""
    ignored: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    """Fields of PEFT's config that say nothing about the adapter."""

    def __post_init__(self) -> None:
        if self.task_type is not None:
            allowed = [t.value for t in TaskType]
            if self.task_type not in allowed:
                raise ValueError(f"task_type={self.task_type!r} is unknown; expected one of {allowed}")
            self.task_type = TaskType(self.task_type)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, Iterable) and not isinstance(value, str):
                setattr(self, name, set(value))

    def complete(self, model_type: str | None) -> None:
        """Fill in what was left to the defaults of a transformers model type.

        Raises:
            ValueError: the type has none.
        """
        if self.target_modules is None:
            targets = defaults.targets_for(self.peft_type, model_type)
            if targets is None:
                raise ValueError(self._no_default("target_modules", model_type))
            self.target_modules = targets

    def _no_default(self, name: str, model_type: str | None) -> str:
        kind = f"models of type {model_type!r}" if model_type else "a model that is not from transformers"
        return f"Please specify `{name}` in `{type(self).__name__}`: there is no default for {kind}"

    def build(self, site: Site, path: str, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The adapter of one layer, its tensors allocated but not initialised.

        Raises:
            ValueError: the layer is a norm, and the method is for matrices.
        """
        if site.elementwise and not self.norms:
            kind = type(site.module).__name__
            raise ValueError(f"{path}: {self.peft_type} cannot adapt a {kind}, whose weight is no matrix")
        return self.adapter_class(self, site, path, device, dtype)

    def layers(self, model: nn.Module, places: Mapping[str, Place], state: State) -> list[tuple[Place, AdaptedLayer]]:
        """Of a method with `prompts`: the layers that get an adapter, which may be new, and their places.

        Raises:
            ValueError: the model is none that can have them.
        """
        raise NotImplementedError

    def filed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, by `path.name`, as its file holds them."""
        return tensors

    @property
    def is_prompt_learning(self) -> bool:
        return self.prompts and not self.is_adaption_prompt

    @property
    def is_adaption_prompt(self) -> bool:
        return self.peft_type == PeftType.ADAPTION_PROMPT

    def identity(self) -> Self:
        """This config with the initialisation that changes nothing at the start."""
        names = (f.name for f in fields(self) if f.name.startswith("init_") and f.name.endswith("_weights"))
        return replace(self, **dict.fromkeys(names, True))

    # ---------------------------------------------------------------- JSON

    def to_file(self, key: str) -> str:
        """The name in PEFT's files of `path.tensor`, or of a tensor that all layers share, which has no path."""
        return (PREFIX if "." in key else SHARED) + key

    def from_file(self, key: str) -> str:
        """What `to_file` undoes."""
        shared = key.removeprefix(SHARED)
        return shared if "." not in shared else key.removeprefix(PREFIX)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, sets as sorted lists."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `adapter_config.json` into `save_directory`, atomically."""
        from .files import write_config

        write_config(Path(save_directory), self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PeftConfig:
        """The config that a JSON object describes, of the class that its `peft_type` names.

        Raises:
            ValueError: an unknown method, or an option that this release cannot honour.
        """
        values = dict(values)
        config_class = cls if "adapter_class" in vars(cls) else config_class_for(values.get("peft_type"))
        known = {f.name for f in fields(config_class) if f.init}
        unknown = sorted(values.keys() - known - config_class.later - config_class.ignored)
        if unknown:
            warnings.warn(
                f"Unexpected keys in the adapter config are ignored: {unknown}. They come from a newer or another "
                f"library; {config_class.__name__} knows {sorted(known)}",
                PeftWarning,
                stacklevel=2,
            )
        values = {k: v for k, v in values.items() if k in known | config_class.later}
        return config_class(**{k: v for k, v in values.items() if k not in config_class.ignored})

    @classmethod
    def from_json_file(cls, path: str | Path) -> dict[str, Any]:
        """The raw values of an `adapter_config.json`."""
        return json.loads(Path(path).read_text())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **source: Any) -> PeftConfig:
        """Read the config of an adapter directory or hub id (`subfolder`, `revision`, `token`, `cache_dir`)."""
        from .files import read_config

        return read_config(pretrained_model_name_or_path, cls=cls, **source)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def compile_pattern(key: str) -> re.Pattern[str]:
    """A `rank_pattern` key: a regex over a whole dotted suffix, so "foo" is not "barfoo", and "^foo" is top-level."""
    return re.compile(rf"(.*\.)?({key})$")


def lookup(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key of `pattern` that matches `path`."""
    for key, value in pattern.items():
        if compile_pattern(key).match(path):
            return value
    return default


@dataclass
class LayeredConfig(PeftConfig):
    """Adds the choice of layers by their index."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the layers to adapt, when `target_modules` is a list of suffixes."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that holds the layers ("layers", "h"); None accepts any numbered path part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        by_index = self.layers_to_transform is not None
        if by_index and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of suffixes; a regex names its layers")
        if self.layers_pattern and not by_index:
            raise ValueError("layers_pattern has an effect only with layers_to_transform; set both or neither")


@dataclass
class RankedConfig(LayeredConfig):
    """Adds ranks: a rank, and patterns that override rank and alpha for some layers."""

    r: int = 8
    """Rank: the inner dimension of the factors."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regex over a whole dotted suffix -> rank, for the layers that differ from `r`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regex over a whole dotted suffix -> alpha."""

    alpha_field: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.r, *self.rank_pattern.values()):
            if rank <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {rank}")
        for alpha in (getattr(self, self.alpha_field), *self.alpha_pattern.values()):
            if not isinstance(alpha, Real):
                raise ValueError(f"`{self.alpha_field}` should be a number but the value passed is {alpha!r}")

    def rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Rank and alpha of the layer at `path`, looked up independently."""
        alpha = getattr(self, self.alpha_field)
        if self.rank_pattern or self.alpha_pattern:
            return lookup(self.rank_pattern, path, self.r), lookup(self.alpha_pattern, path, alpha)
        return self.r, alpha


def config_classes() -> dict[PeftType, type[PeftConfig]]:
    """Every registered method's config class."""
    from . import tuners

    return tuners.registry()


def config_class_for(peft_type: PeftType | str | None) -> type[PeftConfig]:
    """The config class of a method.

    Raises:
        ValueError: no such method here.
    """
    classes = config_classes()
    if peft_type not in classes:
        raise ValueError(f"peft_type={peft_type!r} is no method of this release; known: {[t.value for t in classes]}")
    return classes[PeftType(peft_type)]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config object that a plain dict with a `peft_type` describes."""
    return PeftConfig.from_dict(config_dict)
