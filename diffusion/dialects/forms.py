"""A canonical layer as the core runs it: a config for that one layer, and tensors in the shapes of its slots.

Everything here is exact: forms that the core does not have are multiplied out where that costs nothing (a Tucker LoRA
is a LoRA of the same rank, a low-rank left factor of a LoKr a small matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...core import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from ...core.adapter import wide
from ...core.tuners.diag_oft import DiagOFTConfig
from ...core.tuners.full import FullConfig
from ...core.tuners.glora import GLoraConfig
from ...core.tuners.lycoris import tucker
from .canonical import Layer, Shape
from .methods import FORMS, lokr_shapes

Formed = tuple[PeftConfig, dict[str, Tensor]]
"""Config of one layer, and its tensors by slot."""


def formed(layer: Layer, path: str, shape: Shape) -> Formed:
    """The layer for a module whose weight has `shape`, (out, in) or (out, in, *kernel).

    Raises:
        ValueError: the factors do not fit it.
    """
    try:
        return _FORMS[layer.method](layer, path, shape)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: {layer.method} factors do not fit a weight of {list(shape)}: {error}") from error


def _lora(layer: Layer, path: str, shape: Shape) -> Formed:
    out, kernel = shape[0], shape[2:]
    factors = {key: t for key, t in layer.factors.items() if key != "lora_mid.weight"}
    down, rank = factors["lora_A.weight"], factors["lora_A.weight"].shape[0]
    if "lora_mid.weight" in layer.factors:  # A'[p, i, k] = sum_q mid[p, q, k] A[q, i]
        mid = layer.factors["lora_mid.weight"]
        down = torch.einsum("pq...,qi->pi...", wide(mid), wide(down).flatten(1))
    tensors = {
        "lora_A.weight": down.reshape(rank, *shape[1:]),
        "lora_B.weight": factors["lora_B.weight"].reshape(out, rank, *[1] * len(kernel)),
    }
    if "lora_B.bias" in factors:
        tensors["lora_B.bias"] = factors["lora_B.bias"].flatten()
    options = {"r": rank, "lora_alpha": layer.scale * rank, "lora_bias": "lora_B.bias" in factors}
    return LoraConfig(**options, **_dora(factors, tensors, shape)), tensors


def _dora(factors: Mapping[str, Tensor], tensors: dict[str, Tensor], shape: Shape) -> dict[str, Any]:
    """Put the magnitudes into `tensors`, and say so in options."""
    ones = [1] * len(shape[2:])
    if "lora_magnitude_vector" in factors:
        magnitude = factors["lora_magnitude_vector"].flatten()
        tensors["lora_magnitude_vector"] = magnitude.reshape(1, -1, *ones) if ones else magnitude
        return {"use_dora": True}
    if "dora_in" in factors:
        tensors["lora_magnitude_vector"] = factors["dora_in"].reshape(1, -1, *ones)
        return {"use_dora": True, "dora_on_input": True}
    return {}


def _loha(layer: Layer, path: str, shape: Shape) -> Formed:
    factors = dict(layer.factors)
    rank = factors["hada_w1_b"].shape[0]
    is_tucker = "hada_t1" in factors and prod(shape[2:]) > 1
    if "hada_t1" in factors and not is_tucker:  # a core over a 1x1 kernel is a matrix
        for i in "12":
            core = wide(factors.pop(f"hada_t{i}")).flatten(1)
            factors[f"hada_w{i}_b"] = core @ wide(factors[f"hada_w{i}_b"]).flatten(1)
            factors[f"hada_w{i}_a"] = factors[f"hada_w{i}_a"].T
    tensors = {key: factors[key].flatten(1) for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors |= {key: factors[key] for key in ("hada_t1", "hada_t2") if is_tucker}
    options = {"r": rank, "alpha": layer.scale * rank, "use_effective_conv2d": is_tucker}
    return LoHaConfig(**options, **_dora(factors, tensors, shape)), tensors


def _lokr(layer: Layer, path: str, shape: Shape) -> Formed:
    factors, kernel = layer.factors, shape[2:]
    (a, c), (b, _) = lokr_shapes({key: tuple(t.shape) for key, t in factors.items()})
    d = shape[1] // c
    tensors = {"lokr_w1": left_factor(factors).reshape(a, c)}
    rank = FORMS["lokr"].rank({"lokr_w2_b": tuple(factors["lokr_w2_b"].shape)}) if "lokr_w2_b" in factors else None
    low = rank is not None and rank < max(b, d) / 2
    is_tucker = low and "lokr_t2" in factors and prod(kernel) > 1
    if is_tucker:
        tensors |= {key: factors[key] for key in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")}
    elif low and "lokr_t2" not in factors:
        tensors |= {key: factors[key].flatten(1) for key in ("lokr_w2_a", "lokr_w2_b")}
    else:
        tensors["lokr_w2"] = right_factor(factors).reshape(b, d, *kernel)
        rank = max(b, d)  # from here on the core takes the right factor as full
    assert rank is not None
    options = {
        "r": rank,
        "alpha": layer.scale * rank,
        "left_shape": (a, c),
        "use_effective_conv2d": is_tucker,
    }
    return LoKrConfig(**options, **_dora(factors, tensors, shape)), tensors


def left_factor(factors: Mapping[str, Tensor]) -> Tensor:
    """The left factor of a LoKr, (a, c)."""
    if "lokr_w1" in factors:
        return factors["lokr_w1"]
    return wide(factors["lokr_w1_a"]) @ wide(factors["lokr_w1_b"])


def right_factor(factors: Mapping[str, Tensor]) -> Tensor:
    """The right factor of a LoKr, (b, d times kernel) or (b, d, *kernel)."""
    if "lokr_w2" in factors:
        return factors["lokr_w2"]
    if "lokr_t2" in factors:
        return tucker(*(wide(factors[key]) for key in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")))
    return wide(factors["lokr_w2_a"]) @ wide(factors["lokr_w2_b"]).flatten(1)


def _full(layer: Layer, path: str, shape: Shape) -> Formed:
    bias = next((layer.factors[key] for key in ("diff_b", "b_norm") if key in layer.factors), None)
    change = next((layer.factors[key] for key in ("diff", "w_norm") if key in layer.factors), None)
    if change is None:
        assert bias is not None
        change = bias.new_zeros(shape)
    tensors = {"diff": change.reshape(shape)}
    if bias is not None:
        tensors["diff_b"] = bias.flatten()
    return FullConfig(scale=layer.scale, train_bias=bias is not None), tensors


def _glora(layer: Layer, path: str, shape: Shape) -> Formed:
    factors, kernel = layer.factors, shape[2:]
    rank = factors["b2.weight"].shape[0]
    ones, b2 = [1] * len(kernel), factors["b2.weight"]
    if "bm.weight" in factors:
        b2 = torch.einsum("pq...,qi->pi...", wide(factors["bm.weight"]), wide(b2).flatten(1))
    tensors = {
        "a1.weight": factors["a1.weight"].reshape(shape[1], -1, *ones),
        "a2.weight": factors["a2.weight"].reshape(-1, shape[1], *ones),
        "b1.weight": factors["b1.weight"].reshape(shape[0], rank, *ones),
        "b2.weight": b2.reshape(rank, *shape[1:]),
    }
    return GLoraConfig(r=rank, alpha=layer.scale * rank), tensors


def _ia3(layer: Layer, path: str, shape: Shape) -> Formed:
    if "ia3_in" in layer.factors:
        by_channel = (1 + layer.factors["ia3_in"]).reshape(1, shape[1], *[1] * len(shape[2:]))
        return IA3Config(target_modules=".*", feedforward_modules=".*"), {"ia3_l": by_channel}
    rows = 1 + layer.factors["ia3_out"].flatten()
    # PEFT's IA3 scales the bias too, LyCORIS' does not: as a rotation of single rows with a scale it is exact
    return DiagOFTConfig(block_size=1, rescaled=True), {
        "oft_blocks": rows.new_zeros(shape[0], 1, 1),
        "rescale": rows,
    }


def _oft(layer: Layer, path: str, shape: Shape) -> Formed:
    blocks = layer.factors["oft_blocks"]
    tensors = {"oft_blocks": blocks}
    if "rescale" in layer.factors:
        tensors["rescale"] = layer.factors["rescale"].flatten()
    constraint = float(layer.factors["constraint"]) if "constraint" in layer.factors else 0.0
    config = DiagOFTConfig(
        block_size=blocks.shape[-1],
        butterflies=blocks.shape[0] if blocks.ndim == 4 else 0,
        constraint=max(constraint, 0.0),
        rescaled="rescale" in tensors,
    )
    return config, tensors


_FORMS: dict[str, Callable[[Layer, str, Shape], Formed]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "norm": _full,
    "glora": _glora,
    "ia3": _ia3,
    "oft": _oft,
}
