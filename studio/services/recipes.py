"""From a few choices to the settings of a run: goal, method, trigger, preset; and all other settings for who asks.

The result is a `DreamBoothConfig` as plain data, without the folders: what a job keeps, what the command line shows,
and what Duplicate fills the form with again.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ...cli import flags
from ...core.runs.docs import field_docs
from ...core.runs.settings import ConfigError, from_plain, plain
from ...diffusion.config import AdapterOptions, DreamBoothConfig
from ...diffusion.demo import STYLE_RATES, SUBJECT_RATES
from ...diffusion.families import EMBEDDED
from ..errors import StudioError
from .methods import methods

if TYPE_CHECKING:
    from .datasets import Dataset


@dataclass(frozen=True)
class Choice:
    """One of a few, with the sentence that tells it from the others."""

    title: str
    help: str


GOALS = {
    "subject": Choice("A subject", "One thing, person or animal, which can then be drawn anywhere."),
    "style": Choice("A style", "A way of drawing, which can then be given to anything."),
}
_KNOWN = {
    "lora": Choice("LoRA", "Read by every program. The right one unless you know why not."),
    "dora": Choice("DoRA", "LoRA that learns magnitudes apart: slower, often closer."),
    "loha": Choice("LoHa", "More expressive at the same rank; read by fewer programs."),
    "lokr": Choice("LoKr", "The smallest files; read by fewer programs."),
    "diag_oft": Choice("Diag-OFT and BOFT", "Turns each layer's outputs, block by block, as LyCORIS does."),
    "full": Choice("Full difference", "Every weight of the layers: the largest files."),
    "glora": Choice("GLoRA", "Scales and shifts weights and inputs together."),
    "ia3": Choice("IA3", "A number for each output: tiny files, small changes."),
    "oft": Choice("OFT", "Turns each layer's inputs, block by block."),
}
_NOT_HERE = frozenset({"trainable_tokens", "ln_tuning", "vera", "adalora"})
"""Two train what a diffusion pipeline's attention does not have, rows of an embedding and norm layers; the files of the
other two are read by no dialect yet, so that the library could not show them."""


def _offered() -> dict[str, Choice]:
    """Every method that DreamBooth takes, in the order of `_KNOWN`; one of which nothing is said here by its file."""
    taken = set(get_args(get_type_hints(AdapterOptions)["method"])) & methods().keys() - _NOT_HERE
    order = [key for key in _KNOWN if key in taken or key == "dora"]
    return {key: _KNOWN[key] for key in order} | {
        key: Choice(key.replace("_", " ").upper(), methods()[key].about) for key in sorted(taken - _KNOWN.keys())
    }


METHODS = _offered()
_CALLED = {
    "rank": {"r"},
    "alpha": {"lora_alpha", "alpha"},
    "dropout": {"lora_dropout", "vera_dropout", "rank_dropout"},
    "dora": {"use_dora"},
    "rank_pattern": {"rank_pattern"},
    "alpha_pattern": {"alpha_pattern"},
}
"""Options of every method, and what the methods' own configs call them."""


def has(method: str, option: str) -> bool:
    """Whether a method reads one of the options that `AdapterOptions` has for all."""
    counts_blocks = method == "oft" and option == "rank"
    return not counts_blocks and (option not in _CALLED or bool(_CALLED[option] & methods()[method].fields))


@dataclass(frozen=True)
class Preset(Choice):
    """How much time to spend."""

    embedded_steps: int
    steps_an_image: int
    """For models of usual size; 100 is a fair start."""
    rank: int
    class_images: int
    """Pictures of the class drawn for the embedded pipeline, which costs it seconds."""


PRESETS = {
    "fast": Preset("Fast", "To see whether it works at all.", 60, 60, 8, 8),
    "balanced": Preset("Balanced", "A good likeness in reasonable time.", 120, 100, 16, 16),
    "best": Preset("Best", "Twice the time of Balanced, for the last details.", 240, 200, 32, 24),
}
_STEPS = 200, 4000
"""Least and most steps that a preset asks for with models of usual size."""


def build(
    dataset: Dataset,
    goal: str,
    method: str,
    trigger: str,
    preset: str = "balanced",
    advanced: Mapping[str, Any] | None = None,
    model: str = EMBEDDED,
) -> dict[str, Any]:
    """The settings of a run as plain data.

    Arguments:
        trigger: the words that will call it, such as "sks face"; what follows the first word names its class.
        advanced: other settings by the names of `fields_for`, as a form has them; they win over the preset, but for
            those left empty.
        model: a source as `models` names it.

    Raises:
        StudioError: a choice that is none, an empty trigger, or a setting that cannot be; a line for each problem.
    """
    for value, known, what in ((goal, GOALS, "goal"), (method, METHODS, "method"), (preset, PRESETS, "preset")):
        if not isinstance(value, str) or value not in known:
            raise StudioError(f"{value!r} is no {what}. Choose one of {', '.join(known)}.")
    trigger = " ".join(str(trigger).split())
    if not trigger or len(trigger) > 100:
        raise StudioError('Type the words that shall call it, such as "sks face": a rare word, then what it is.')
    values = {"model": model} | _prompts(goal, trigger) | _amounts(PRESETS[preset], len(dataset.pictures), model)
    values |= _adapters(PRESETS[preset], goal, method, model)
    if "class_prompt" in values and model != EMBEDDED and preset != "best":
        del values["class_prompt"]  # a hundred pictures of a large model take longer than the training
    settings = plain(_config(values))
    problems = list(_set(settings, method, advanced or {}))
    if problems:
        raise StudioError("\n".join(problems))
    return _checked(settings)


def _prompts(goal: str, trigger: str) -> dict[str, Any]:
    """What is learnt under which words, and what the samples show."""
    if goal == "style":
        shown = (f"a castle, {trigger}", f"a tiger face, {trigger}", "a castle")
        return {"instance_prompt": f"a picture, {trigger}", "sample_prompts": shown}
    photo, kind = f"a photo of {trigger}", trigger.partition(" ")[2]
    known = {"class_prompt": f"a photo of a {kind}"} if kind else {}
    shown = (photo, f"{photo} in the snow", *known.values())
    return {"instance_prompt": photo, "sample_prompts": shown, **known}


def _amounts(preset: Preset, pictures: int, model: str) -> dict[str, Any]:
    least, most = _STEPS
    small = model == EMBEDDED
    steps = preset.embedded_steps if small else min(max(preset.steps_an_image * pictures, least), most)
    between = max(1, steps // 6)
    amounts = {
        "max_train_steps": steps,
        "sample_seeds": (0,),
        "sample_every": between,
        "checkpointing_steps": between,
        "checkpoints_total_limit": 20,  # any of them may turn out the best
    }
    if not small:
        return amounts
    return amounts | {
        "train_batch_size": 2,
        "prior_loss_weight": 0.5,
        "num_class_images": preset.class_images,
        "sample_steps": 12,
        "lr_warmup_steps": 5,
        "adam_beta2": 0.99,  # a hundred steps are too few for a longer memory
    }


def _adapters(preset: Preset, goal: str, method: str, model: str) -> dict[str, Any]:
    own, dora = ("lora" if method == "dora" else method), method == "dora"
    rank = {"rank": 8 if model == EMBEDDED else preset.rank} if has(own, "rank") else {}
    known = SUBJECT_RATES if goal == "subject" else STYLE_RATES
    rates = known.get(own, (None, None) if rank else (1e-2, 1e-2)) if model == EMBEDDED else (None, None)
    wide = goal == "subject" and own in known and (model == EMBEDDED or preset is PRESETS["best"])
    common: dict[str, Any] = {"method": own, "dora": dora, "options": _own_options(own, model), **rank}
    unet = AdapterOptions(**common, learning_rate=rates[0], feed_forward=wide, conv=wide)
    return {"unet": unet, "text_encoder": AdapterOptions(**common, learning_rate=rates[1])}


def _own_options(method: str, model: str) -> dict[str, Any]:
    """What a method needs that its defaults, made for large language models, do not give."""
    small = {"oft": "oft_block_size", "diag_oft": "block_size"}.get(method)
    return {small: 8} if small and model == EMBEDDED else {}


def _config(values: Mapping[str, Any]) -> DreamBoothConfig:
    return from_plain(DreamBoothConfig, _PLACES | dict(values))


_PLACES: dict[str, Any] = {"instance_data_dir": Path(), "output_dir": Path()}
"""Stand-ins: a job's folders are known only when it runs."""


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the places, if a run could begin with them."""
    try:
        _config(settings | _PLACES).validate()
    except ConfigError as error:
        raise StudioError(str(error)) from error
    return {name: value for name, value in settings.items() if name not in (*_PLACES, "device")}


# -------------------------------------------------------------------------------- every setting


@dataclass(frozen=True)
class Field:
    """A setting as a form shows it."""

    name: str
    """Dotted: `unet.rank`."""
    label: str
    help: str
    type: Literal["int", "float", "bool", "text", "choice", "list"]
    """A list is a text with a line, or a comma, between its entries."""
    default: Any
    """None where the value is found by itself."""
    choices: tuple[str, ...] = ()

    def matches(self, query: str) -> bool:
        """Whether all words of a search are in it."""
        text = f"{self.name} {self.label} {self.help}".lower()
        return all(word in text for word in query.lower().split())


_DECIDED = frozenset(
    {"instance_data_dir", "instance_prompt", "output_dir", "class_data_dir", "device", "model", "revision"}
)
"""Settings that the form's first choices make, or the server."""
_COMPONENTS = {"unet": "UNet", "text_encoder": "Text encoder"}


def fields_for(method: str, query: str = "") -> list[Field]:
    """The settings that mean something for this method and match a search, in the order of the config."""
    if method not in METHODS:
        raise StudioError(f"{method!r} is no method. Choose one of {', '.join(METHODS)}.")
    return [field for field in _all_fields(method) if field.matches(query)]


@cache
def _all_fields(method: str) -> tuple[Field, ...]:
    top = [field for field in _fields_of(DreamBoothConfig, "", "") if field.name not in _DECIDED]
    return (*top, *(field for part, title in _COMPONENTS.items() for field in _adapter_fields(method, part, title)))


def _adapter_fields(method: str, part: str, title: str) -> Iterator[Field]:
    own = "lora" if method == "dora" else method
    for field in _fields_of(AdapterOptions, f"{part}.", f"{title}: "):
        short = field.name.rpartition(".")[2]
        if short == "method":
            help_ = "Whether this part is trained."
            yield Field(field.name, f"{title}: trained by", help_, "choice", own, (own, "none"))
        elif has(own, short) and not (short == "dora" and own == "lora"):  # between LoRA and DoRA the method decides
            yield field
    common = set().union(*_CALLED.values()) - ({"r"} if own == "oft" else set())
    for option in methods()[own].options:
        if option.name not in common:
            label = f"{title}: {_words(option.name)}"
            kind: Any = option.type
            yield Field(f"{part}.options.{option.name}", label, option.help, kind, option.default, option.choices)


def _fields_of(cls: type, prefix: str, title: str) -> Iterator[Field]:
    kinds, docs = get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        form = _form(kinds[field.name])
        if form is None:
            continue
        type_, choices = form
        default = None if field.default is MISSING else plain(field.default)
        label = f"{title}{_words(field.name)}" if title else _words(field.name).capitalize()
        yield Field(prefix + field.name, label, docs[field.name], type_, default, choices)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("lr ", "learning rate ").replace("num ", "number of ")


def _form(kind: Any) -> tuple[Any, tuple[str, ...]] | None:
    """How a form asks for a value of this type; None for what it cannot, such as patterns and parts."""
    if get_origin(kind) is UnionType:
        return _form(next(choice for choice in get_args(kind) if choice is not NoneType))
    if get_origin(kind) is Literal:
        return "choice", get_args(kind)
    if get_origin(kind) is tuple:
        return "list", ()
    simple = {int: "int", float: "float", bool: "bool", str: "text", Path: "text"}
    return (simple[kind], ()) if kind in simple else None


# -------------------------------------------------------------------------------- what a form sends

_MOST = {
    "max_train_steps": 100_000, "resolution": 2048, "num_class_images": 2000, "train_batch_size": 64, "views": 64,
    "sample_steps": 200, "sample_batch_size": 32, "gradient_accumulation_steps": 256, "seed": 2**32,
    "checkpoints_total_limit": 100, "rank": 1024,
}  # fmt: skip
"""More than anybody needs: beyond, one form could keep a shared machine busy for ever."""


def _set(settings: dict[str, Any], method: str, advanced: Mapping[str, Any]) -> Iterator[str]:
    """Put a form's values into the settings; a line for each that cannot be."""
    known = {field.name: field for field in _all_fields(method)}
    for name, value in advanced.items():
        if name not in known:
            yield f"{str(name)[:80]!r} is no setting of {METHODS[method].title}."
            continue
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            typed = parsed(known[name], value)
        except ValueError as error:
            yield f"{known[name].label}: {error}"
            continue
        place: Any = settings
        *outer, last = name.split(".")
        for part in outer:
            place = place[part]
        place[last] = typed


def parsed(field: Field, value: Any) -> Any:
    """What somebody typed, as the setting's own type.

    Raises:
        ValueError: it cannot be that.
    """
    match field.type:
        case "bool":
            if isinstance(value, bool):
                return value
            raise ValueError(f"{value!r} is neither on nor off")
        case "int" | "float":
            return _number(field, value)
        case "list":
            return _entries(field, value)
        case "choice" if value not in field.choices:
            raise ValueError(f"{value!r} is none of {', '.join(field.choices)}")
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError("a text of at most 1000 letters belongs here")
    return value.strip()


def _number(field: Field, value: Any) -> int | float:
    try:
        number = float(value) if not isinstance(value, (bool, list, dict)) else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf") or (field.type == "int" and number != int(number)):
        raise ValueError(f"{value!r} is no {'whole ' if field.type == 'int' else ''}number")
    most = _MOST.get(field.name.rpartition(".")[2])
    if most is not None and number > most:
        raise ValueError(f"{value} is more than {most}")
    return int(number) if field.type == "int" else number


def _entries(field: Field, value: Any) -> list[Any]:
    if isinstance(value, str):  # prompts have commas of their own
        value = (value if field.name == "sample_prompts" else value.replace(",", "\n")).splitlines()
    if not isinstance(value, list) or len(value) > 50:
        raise ValueError("at most 50 entries, one a line, belong here")
    entries = [str(part).strip() for part in value if str(part).strip()]
    if field.name != "sample_seeds":
        return entries
    try:
        return [int(entry) for entry in entries]
    except ValueError:
        raise ValueError("seeds are whole numbers, such as 0, 1, 2") from None


def values(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by the names of fields, to fill a form with."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= values(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def command_line(settings: Mapping[str, Any], dataset: str = "IMAGES", out: str = "RUN") -> str:
    """The same run from a shell: `veneer dreambooth ...`, with what differs from the defaults."""
    usual = plain(_config({"instance_prompt": ""}))
    places = {"instance_data_dir": dataset, "output_dir": out}
    return shlex.join(["veneer", "dreambooth", *flags(DreamBoothConfig, places | _different(settings, usual))])


def _different(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        before = usual.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and before:
            value, before = _different(value, before), {}
        if value != before:
            found[name] = value
    return found
