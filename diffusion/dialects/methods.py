r"""What the tensors of each method are called, which of them belong together, and by which scale they act.

The scale rules, $\Delta W = s X$, with alpha as the file has it:

    lora    s = alpha / r, r the rows of down; no alpha means s = 1
    loha    s = alpha / r, r the rows of w1_b
    lokr    s = alpha / r, r the rows of w2_b, else of w1_b; *both factors full: s = 1, whatever alpha says*
    glora   s = alpha / r, r the rows of b2
    oft     alpha is the constraint on the rotation, not a scale
    full, norm, ia3    s = 1

A PEFT config, where there is one, says alpha / r, or alpha / sqrt(r) with `use_rslora`, for LoKr of two full factors
too. Files of other trainers have the root multiplied into alpha. A `scalar` saved apart multiplies the scale.
Sources: LyCORIS 3.3, kohya's sd-scripts, ComfyUI's `comfy/weight_adapter`, PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Any

from ...core.config import lookup
from .canonical import Shape

Shapes = Mapping[str, Shape]
"""Factor, under our name -> its shape."""


@dataclass(frozen=True)
class Form:
    """One method's tensors."""

    sets: tuple[frozenset[str], ...]
    """The sets of factors of which one must be there whole."""
    more: frozenset[str]
    """Factors that may be there too."""
    rank: Callable[[Shapes], int | None]
    size: Callable[[Shapes], tuple[int | None, int | None]]
    """(output rows, input features times kernel) of the layer that the factors fit; None where they do not tell."""


def _sets(*alternatives: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(words.split()) for words in alternatives)


def _rows_of(*factors: str) -> Callable[[Shapes], int | None]:
    """The rows of the first of these factors that is there."""
    return lambda shapes: next((shapes[f][0] for f in factors if f in shapes), None)


def _lora_size(shapes: Shapes) -> tuple[int | None, int | None]:
    kernel = prod(shapes["lora_mid.weight"][2:]) if "lora_mid.weight" in shapes else 1
    return shapes["lora_B.weight"][0], prod(shapes["lora_A.weight"][1:]) * kernel


def _loha_size(shapes: Shapes) -> tuple[int | None, int | None]:
    if "hada_t1" in shapes:  # Tucker factors are (r, out) and (r, in)
        return shapes["hada_w1_a"][1], prod(shapes["hada_w1_b"][1:]) * prod(shapes["hada_t1"][2:])
    return shapes["hada_w1_a"][0], prod(shapes["hada_w1_b"][1:])


def lokr_shapes(shapes: Shapes) -> tuple[Shape, Shape]:
    """(a, c) of the left factor and (b, d times kernel) of the right."""
    left = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], prod(shapes["lokr_w1_b"][1:]))
    if "lokr_w2" in shapes:
        right = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        right = shapes["lokr_w2_a"][1], prod(shapes["lokr_w2_b"][1:]), prod(shapes["lokr_t2"][2:])
    else:
        right = shapes["lokr_w2_a"][0], prod(shapes["lokr_w2_b"][1:])
    return (left[0], prod(left[1:])), (right[0], prod(right[1:]))


def _lokr_size(shapes: Shapes) -> tuple[int | None, int | None]:
    (a, c), (b, d) = lokr_shapes(shapes)
    return a * b, c * d


def _glora_size(shapes: Shapes) -> tuple[int | None, int | None]:
    kernel = prod(shapes["bm.weight"][2:]) if "bm.weight" in shapes else 1
    return shapes["b1.weight"][0], prod(shapes["b2.weight"][1:]) * kernel


def _full_size(shapes: Shapes) -> tuple[int | None, int | None]:
    return (shapes["diff"][0], prod(shapes["diff"][1:])) if "diff" in shapes else (shapes["diff_b"][0], None)


_MAGNITUDES = frozenset({"lora_magnitude_vector", "dora_in"})
_W1 = "lokr_w1", "lokr_w1_a lokr_w1_b"
_W2 = "lokr_w2", "lokr_w2_a lokr_w2_b"

FORMS: dict[str, Form] = {
    "lora": Form(
        _sets("lora_A.weight lora_B.weight"),
        frozenset({"lora_mid.weight", "lora_B.bias"}) | _MAGNITUDES,
        _rows_of("lora_A.weight"),
        _lora_size,
    ),
    "loha": Form(
        _sets("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
        _MAGNITUDES,
        _rows_of("hada_w1_b"),
        _loha_size,
    ),
    "lokr": Form(
        _sets(*(f"{one} {two}" for one in _W1 for two in (*_W2, f"{_W2[1]} lokr_t2"))),
        _MAGNITUDES,
        _rows_of("lokr_w2_b", "lokr_w1_b"),
        _lokr_size,
    ),
    "full": Form(
        _sets("diff", "diff_b"),
        frozenset({"diff_b"}),
        lambda shapes: None,
        _full_size,
    ),
    "norm": Form(
        _sets("w_norm", "b_norm"),
        frozenset({"b_norm"}),
        lambda shapes: None,
        lambda shapes: (prod(next(iter(shapes.values()))), None),
    ),
    "glora": Form(
        _sets("a1.weight a2.weight b1.weight b2.weight"), frozenset({"bm.weight"}), _rows_of("b2.weight"), _glora_size
    ),
    "ia3": Form(
        _sets("ia3_out", "ia3_in"),
        frozenset(),
        lambda shapes: None,
        lambda shapes: (prod(shapes["ia3_out"]), None) if "ia3_out" in shapes else (None, None),
    ),
    "oft": Form(
        _sets("oft_blocks"),
        frozenset({"rescale", "constraint"}),
        lambda shapes: None,
        lambda shapes: (shapes["oft_blocks"][-3] * shapes["oft_blocks"][-1], None),
    ),
}  # fmt: skip

_TUCKER = ("hada_t1", "lokr_t2")
_LOHA = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"


def ranks_of(method: str, shapes: Shapes) -> list[dict[str, int]]:
    """Sizes that must be one and the same rank, by factor and axis; of a LoKr those of the left and the right factor.

    >>> ranks_of("lora", {"lora_A.weight": (4, 8), "lora_B.weight": (16, 5)})
    [{'lora_A.weight[0]': 4, 'lora_B.weight[1]': 5}]
    """
    outer = 0 if any(core in shapes for core in _TUCKER) else 1  # Tucker factors have the rank in front, on both sides
    groups: dict[str, list[tuple[tuple[str, int], ...]]] = {
        "lora": [(("lora_A.weight", 0), ("lora_B.weight", 1), ("lora_mid.weight", 0), ("lora_mid.weight", 1))],
        "loha": [(*((name, 0 if name.endswith("b") else outer) for name in _LOHA),
                  *((core, axis) for core in ("hada_t1", "hada_t2") for axis in (0, 1)))],
        "lokr": [(("lokr_w1_a", 1), ("lokr_w1_b", 0)),
                 (("lokr_w2_a", outer), ("lokr_w2_b", 0), ("lokr_t2", 0), ("lokr_t2", 1))],
        "glora": [(("a1.weight", 1), ("a2.weight", 0)), (("b1.weight", 1), ("b2.weight", 0))],
    }  # fmt: skip
    return [
        {f"{name}[{axis}]": shapes[name][axis] for name, axis in group if name in shapes}
        for group in groups.get(method, ())
    ]


_KOHYA = {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "lora_mid": "lora_mid.weight"}
ENDINGS: dict[str, tuple[str, str]] = {
    **{f"{name}.weight": ("lora", factor) for name, factor in _KOHYA.items()},
    **{f"{name}": ("lora", factor) for name, factor in _KOHYA.items()},
    **{f"{prefix}{end}.weight": ("lora", factor)
       for prefix in ("", "lora.", "lora_linear_layer.")
       for end, factor in (("down", "lora_A.weight"), ("up", "lora_B.weight"))},
    **{f"lora_{x}{end}": ("lora", f"lora_{x}.weight") for x in "AB" for end in (".weight", "", ".default.weight")},
    "lora_B.bias": ("lora", "lora_B.bias"),
    **{f"hada_{name}": ("loha", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": ("lokr", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": ("full", "diff"),
    "diff_b": ("full", "diff_b"),
    "w_norm": ("norm", "w_norm"),
    "b_norm": ("norm", "b_norm"),
    **{f"{name}.weight": ("glora", f"{name}.weight") for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": ("oft", "oft_blocks"),
    "rescale": ("oft", "rescale"),
    "weight": ("ia3", "weight"),
    "on_input": ("ia3", "on_input"),
    "dora_scale": ("", "dora_scale"),
    "lora_magnitude_vector": ("", "lora_magnitude_vector"),
    "lora_magnitude_vector.weight": ("", "lora_magnitude_vector"),
    "lora_magnitude_vector.default.weight": ("", "lora_magnitude_vector"),
    "alpha": ("", "alpha"),
    "scalar": ("", "scalar"),
}  # fmt: skip
"""How a key ends, after the module -> (method, or "" for what several have; factor under our name)."""
_LONGEST = max(ending.count(".") for ending in ENDINGS) + 1

POISON = 9999999999.0
"""What ai-toolkit stores as the alpha of a LoKr with two full factors; infinity once it is saved in half precision."""


def split_key(key: str) -> tuple[str, str, str] | None:
    """(module as the file spells it, method, factor), or None for a key that ends like no adapter's.

    >>> split_key("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")
    ('lora_te_text_model_encoder_layers_0_mlp_fc1', 'lora', 'lora_A.weight')
    """
    words = key.split(".")
    for count in range(min(_LONGEST, len(words) - 1), 0, -1):
        if found := ENDINGS.get(".".join(words[-count:])):
            return ".".join(words[:-count]), *found
    return None


def is_full_lokr(factors: Shapes) -> bool:
    """Whether neither factor of a LoKr is low-rank, so that no rank is there to divide by."""
    return "lokr_w1" in factors and "lokr_w2" in factors


def scale_of(method: str, shapes: Shapes, alpha: float | None) -> float:
    """The scale that `alpha` means in every dialect but PEFT's configs; see the rules above.

    Raises:
        ValueError: alpha is no number to scale by.
    """
    rank = FORMS[method].rank(shapes)
    if alpha is None or rank is None or method == "oft" or (method == "lokr" and is_full_lokr(shapes)):
        return 1.0
    if alpha == 0:  # kohya's and LyCORIS' way to say alpha = rank
        return 1.0
    if not isfinite(alpha) or abs(alpha) >= POISON:
        raise ValueError(f"alpha is {alpha:g} at rank {rank}, which is no scale")
    return alpha / rank


def config_scale(config: Mapping[str, Any], path: str, rank: int | None) -> float | None:
    """The scale that a PEFT config gives the module at `path`, or None if it says nothing.

    `rank` is that of the tensors; PEFT takes the config's own, which differs only for a LoKr of two full factors.
    """
    alpha = config.get("lora_alpha", config.get("alpha"))
    alpha = lookup(config.get("alpha_pattern") or {}, path, alpha)
    rank = rank or lookup(config.get("rank_pattern") or {}, path, config.get("r"))
    if alpha is None or not rank:
        return None
    return float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank)
