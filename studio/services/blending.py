"""Several adapters become one: what is possible, how it looks at many weights, and the result in the library.

What is possible is told from the files' headers, without torch. The core decides again when it blends; tests hold the
two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ...diffusion.families import EMBEDDED
from ...diffusion.inspect import look_into
from ..errors import StudioError
from ..jobs import store
from ..workspace import Workspace, read_json
from . import drawing, models, references

MOST = 4
"""Adapters in one blend."""
LONGEST = 12
"""Rows or columns of a grid: more do not fit on a screen."""


@dataclass(frozen=True)
class Option:
    """A number or word that some kinds read."""

    name: str
    label: str
    help: str
    type: Literal["int", "float", "choice"]
    default: Any
    least: float = 0
    most: float = 1
    choices: tuple[str, ...] = ()


OPTIONS = {
    option.name: option
    for option in (
        Option("svd_rank", "Rank", "Of the blend. Empty: the largest of the adapters.", "int", None, 1, 1024),
        Option("max_error", "Largest error", "Instead of a rank: 0.05 is 5 percent a layer.", "float", None, 0.0001, 1),
        Option("density", "Density", "Share of each adapter that is kept.", "float", 0.5, 0.01, 1),
        Option(
            "majority_sign_method", "Signs", "Settled by the sum of the values, or by their number.", "choice", "total",
            choices=("total", "frequency"),
        ),
        Option("seed", "Seed", "Of what is kept at random.", "int", 0, 0, 2**31),
        Option("epsilon", "Epsilon", "How much likelier large entries stay than small ones.", "float", 0.1, 0, 1),
        Option("gamma", "Gamma", "Share of the very largest entries that is removed.", "float", 0.01, 0, 0.5),
    )
}  # fmt: skip
_RANK, _KEPT, _SIGN = ("svd_rank", "max_error"), ("density",), ("majority_sign_method",)


@dataclass(frozen=True)
class Kind:
    """A way to blend."""

    name: str
    title: str
    help: str
    options: tuple[str, ...] = ()
    on_factors: bool = False
    """Whether it merges LoRA's factors entry by entry, which need equal ranks."""
    adapters: int | None = None
    """How many it takes; None for any number."""
    reason: str = ""
    """Why these adapters cannot be blended so; empty if they can."""


_FACTORS = "Works on the two factors of LoRAs of equal rank."
_PRUNED = (*_KEPT, *_RANK)
KINDS = (
    Kind("cat", "Sum (exact)", "The weighted sum itself; the rank is the sum of the ranks."),
    Kind("svd", "Sum at a rank (svd)", "The nearest to the sum at a chosen rank; takes any adapters.", _RANK),
    Kind("slerp", "Between two (slerp)", "From one to the other along an arc, at full strength.", _RANK, adapters=2),
    Kind("ties_svd", "TIES", "Keeps the largest entries where adapters agree on the sign.", (*_SIGN, *_PRUNED)),
    Kind("dare_linear_svd", "DARE", "Keeps entries at random, made larger instead.", ("seed", *_PRUNED)),
    Kind("dare_ties_svd", "DARE with TIES' signs", "At random, then by agreed signs.", (*_SIGN, "seed", *_PRUNED)),
    Kind("magnitude_prune_svd", "Largest entries", "The sum of each one's largest entries.", _PRUNED),
    Kind("della", "DELLA", "At random, large ones likelier; agreed signs.", ("epsilon", *_SIGN, "seed", *_PRUNED)),
    Kind("breadcrumbs", "Breadcrumbs", "Without the smallest and the very largest.", ("gamma", *_PRUNED)),
    Kind("linear", "Sum of factors (PEFT's linear)", f"With cross terms; Sum is better. {_FACTORS}", (), True),
    Kind("ties", "TIES on factors", _FACTORS, (*_KEPT, *_SIGN), True),
    Kind("dare_linear", "DARE on factors", _FACTORS, (*_KEPT, "seed"), True),
    Kind("dare_ties", "DARE with TIES' signs, on factors", _FACTORS, (*_KEPT, *_SIGN, "seed"), True),
    Kind("magnitude_prune", "Largest entries of factors", _FACTORS, _KEPT, True),
)
_BY_NAME = {kind.name: kind for kind in KINDS}


def kinds(ws: Workspace, user: str, adapters: Sequence[str]) -> list[Kind]:
    """Every way to blend these adapters, with the reason against it where there is one."""
    if not 2 <= len(adapters) <= MOST:
        return [_with_reason(kind, f"choose 2 to {MOST} adapters") for kind in KINDS]
    found = [references.find(ws, user, reference) for reference in adapters]
    against_factors = _against_factors(found)
    return [_with_reason(kind, _reason(kind, len(adapters), against_factors)) for kind in KINDS]


def _with_reason(kind: Kind, reason: str) -> Kind:
    return replace(kind, reason=reason)


def _reason(kind: Kind, count: int, against_factors: str) -> str:
    if kind.adapters not in (None, count):
        return f"takes {kind.adapters} adapters, not {count}"
    return against_factors if kind.on_factors else ""


def _against_factors(adapters: Sequence[references.Named]) -> str:
    """Why factors cannot be merged entry by entry: a method without, or ranks that differ within a layer."""
    layers: dict[tuple[str, str], dict[str, int]] = {}
    for adapter in adapters:
        for entry in look_into(adapter.path).plan.entries:
            if entry.method != "lora" or entry.magnitude:
                method = "DoRA" if entry.magnitude else entry.method.upper()
                return f"needs plain LoRAs, and {adapter.name} is {method}: take svd, or a kind that takes any adapters"
            layers.setdefault((entry.component, entry.path), {})[adapter.name] = entry.rank or 0
    for ranks in layers.values():
        if len(set(ranks.values())) > 1:
            told = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
            return f"needs equal ranks, and they are {told}: take svd, or a kind that takes any adapters"
    return ""


def combination(
    ws: Workspace, user: str, adapters: Sequence[str], kind: object, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of `CombineOptions` for a kind and its options, checked.

    Raises:
        StudioError: these adapters cannot be blended so, or an option that the kind does not read or that cannot be.
    """
    found = next((known for known in kinds(ws, user, adapters) if known.name == kind), None)
    if found is None:
        raise StudioError(f"{str(kind)[:80]!r} is no way to blend. Choose one of {', '.join(_BY_NAME)}.")
    if found.reason:
        raise StudioError(f"{found.title} cannot blend these: it {found.reason}.")
    given = {name: value for name, value in (options or {}).items() if value not in (None, "")}
    foreign = sorted(given.keys() - set(found.options))
    if foreign:
        raise StudioError(
            f"{found.title} reads no {', '.join(foreign)}; it reads {', '.join(found.options) or 'none'}."
        )
    usual = {name: OPTIONS[name].default for name in found.options if OPTIONS[name].default is not None}
    return {"combination_type": found.name} | usual | {name: _checked(OPTIONS[name], v) for name, v in given.items()}


def _checked(option: Option, value: Any) -> Any:
    if option.type == "choice":
        if value in option.choices:
            return value
        raise StudioError(f"{option.label} is one of {', '.join(option.choices)}, not {str(value)[:40]!r}.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not option.least <= value <= option.most or (option.type == "int" and value != int(value)):
        what = "a whole number" if option.type == "int" else "a number"
        raise StudioError(
            f"{option.label} is {what} from {option.least:g} to {option.most:g}, not {str(value)[:40]!r}."
        )
    return int(value) if option.type == "int" else float(value)


# -------------------------------------------------------------------------------- how it looks


@dataclass(frozen=True)
class Axis:
    """What changes along the rows or the columns of a grid."""

    of: str
    """"weight-1" to "weight-4" for the weight of one adapter, "strength" for what multiplies all weights, "seed"."""
    values: tuple[float, ...]

    def apply(self, weights: list[float], seed: int, value: float) -> tuple[list[float], int]:
        """Weights and seed at one place of the axis."""
        if self.of == "seed":
            return weights, int(value)
        if self.of == "strength":
            return [value * weight for weight in weights], seed
        at = int(self.of.removeprefix("weight-")) - 1
        return [*weights[:at], value, *weights[at + 1 :]], seed


def axis(of: object, values: Sequence[Any], adapters: int) -> Axis:
    """An axis, checked.

    Raises:
        StudioError: of what there is none, or values that cannot be.
    """
    known = [*(f"weight-{n}" for n in range(1, adapters + 1)), "strength", "seed"]
    if of not in known:
        raise StudioError(f"{str(of)[:40]!r} cannot change along a grid. Choose one of {', '.join(known)}.")
    if not 1 <= len(values) <= LONGEST:
        raise StudioError(f"A grid has 1 to {LONGEST} rows and columns. Type numbers with commas between.")
    check = drawing.checked_seeds if of == "seed" else lambda numbers: map(references.checked_weight, numbers)
    return Axis(str(of), tuple(check(values)))


def preview_grid(
    ws: Workspace,
    user: str,
    adapters: drawing.Weighted,
    kind: str,
    prompt: str,
    rows: tuple[str, Sequence[Any]],
    columns: tuple[str, Sequence[Any]],
    seed: int = 0,
    model: str = EMBEDDED,
    options: Mapping[str, Any] | None = None,
    **draw: Any,
) -> str:
    """Draw a blend at many weights, with baselines; the job's id.

    Baselines, in row -1, are the bare model and each adapter alone as it is weighted.

    Arguments:
        rows, columns: what changes along them, and its values, as `Axis` has them.
        options: of the kind, as `combination` takes them; draw: of the pictures, as `drawing.draw`.
    """
    pairs = [
        (r, references.checked_weight(w)) for r, w in (adapters.items() if isinstance(adapters, Mapping) else adapters)
    ]
    combined = combination(ws, user, [reference for reference, _ in pairs], kind, options)
    (words,), (number,) = drawing.checked_prompts([prompt]), drawing.checked_seeds([seed])
    down, across = (axis(*asked, adapters=len(pairs)) for asked in (rows, columns))
    if down.of == across.of:
        raise StudioError("Rows and columns change the same. Choose something else for one of them.")
    own = [weight for _, weight in pairs]
    cells = _baselines(own, number)
    for row, first in enumerate(down.values):
        for column, second in enumerate(across.values):
            weights, at = across.apply(*down.apply(own, number, first), second)
            weights = [references.checked_weight(weight) for weight in weights]
            label = ", ".join(f"{weight:g}" for weight in weights) + (f", seed {at}" if at != number else "")
            cells.append(_cell(row, column, weights, at, label))
    for cell in cells:
        cell["prompt"] = words
    arguments = drawing.request(ws, user, cells, pairs, model, draw)
    names = [adapter["name"] for adapter in arguments["adapters"]]
    for cell in arguments["cells"]:
        if cell["row"] < 0 and cell["column"] > 0:
            cell["label"] = f"{names[cell['column'] - 1]} alone"
    axes = {"rows": asdict(down), "columns": asdict(across)}
    return store.submit(ws, user, "grid", arguments | {"combination": combined, "axes": axes})


def _cell(
    row: int, column: int, weights: Sequence[float], seed: int, label: str, combine: bool = True
) -> dict[str, Any]:
    return {"row": row, "column": column, "weights": list(weights), "seed": seed, "label": label, "combine": combine}


def _baselines(own: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """The bare model, and each adapter alone."""
    nothing = [0.0] * len(own)
    alone = [[weight if i == at else 0.0 for i, weight in enumerate(own)] for at in range(len(own))]
    return [
        _cell(-1, column, weights, seed, "no adapter", combine=False)
        for column, weights in enumerate([nothing, *alone])
    ]


# -------------------------------------------------------------------------------- the result


def save_blend(
    ws: Workspace,
    user: str,
    name: str,
    adapters: drawing.Weighted,
    kind: str,
    model: str = EMBEDDED,
    options: Mapping[str, Any] | None = None,
    prompt: str = "",
    seed: int = 0,
) -> str:
    """Blend and put the result into the library; the job's id. `saved` tells the adapter's.

    Arguments:
        prompt: of its preview; empty takes what the adapters were trained to answer to, all in one.
    """
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    combined = combination(ws, user, [reference for reference, _ in pairs], kind, options)
    if not name.strip():
        raise StudioError("The blend needs a name. Type one, then save again.")
    found = [references.find(ws, user, reference) for reference, _ in pairs]
    trigger = ", ".join(dict.fromkeys(adapter.trigger for adapter in found if adapter.trigger))
    (words,) = drawing.checked_prompts([prompt or trigger or "a picture"])
    cells = [{"prompt": words, "seed": drawing.checked_seeds([seed])[0]}]
    arguments = drawing.request(ws, user, cells, pairs, model, {})
    made_of = " + ".join(f"{a.name} at {w:g}" for a, (_, w) in zip(found, pairs, strict=True))
    card = {
        "name": name.strip()[:80],
        "base": model,
        "method": "LoRA",
        "trigger": trigger,
        "source": f"blended here: {made_of}",
        "recipe": {"blend": dict(zip((a.name for a in found), (w for _, w in pairs), strict=True)), **combined},
    }
    return store.submit(ws, user, "blend", arguments | {"combination": combined, "card": card, "base": model})


def saved(ws: Workspace, user: str, job: str) -> str | None:
    """The adapter that a blend has become in the library; None before that."""
    made = read_json(store.owned(ws, user, job, position=False).out / "blend.json")
    return None if made is None else made["adapter"]


def base_of(ws: Workspace, user: str, adapters: Sequence[str]) -> str:
    """The model on the list that these adapters are for, as far as they tell; else the one in the box."""
    sources = {model.source: model.name for model in models.list_models(ws)}
    told = (references.find(ws, user, reference).base for reference in adapters)
    return next((sources[base] for base in told if base in sources), EMBEDDED)
