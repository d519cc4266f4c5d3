"""Layers that other programs fuse into one: q, k and v as `qkv`, Flux's `linear1`. Their adapters split by rows, and
come together again.

Rows of a product are the product of the left factor's rows, so LoRA, LoHa, GLoRA and full differences split exactly.
A Kronecker product splits where a share holds whole blocks of the right factor; else it is multiplied out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.adapter import wide
from .canonical import Layer, Rows
from .forms import left_factor, right_factor
from .methods import lokr_shapes


def split(layer: Layer, rows: Rows, key: str) -> Layer:
    """The share of a fused layer's adapter that `rows` of its output are.

    Raises:
        ValueError: the method does not split; names `key`.
    """
    if "dora_in" in layer.factors:
        raise ValueError(
            f"{key}: its magnitudes are those of the input channels of the fused layer, which no part of it has alone"
        )
    if layer.method not in _SPLIT:
        raise ValueError(f"{key}: {layer.method} on a fused layer does not split into its parts")
    return _SPLIT[layer.method](layer, rows)


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """Ranges of rows, in order."""
    return torch.cat([tensor[start:end] for start, end in rows])


def _split_by(*factors: str) -> Callable[[Layer, Rows], Layer]:
    """Split by the rows of these factors; the others belong to every part."""

    def split_rows(layer: Layer, rows: Rows) -> Layer:
        return Layer(
            layer.method, {k: take(t, rows) if k in factors else t for k, t in layer.factors.items()}, layer.scale
        )

    return split_rows


def _split_lokr(layer: Layer, rows: Rows) -> Layer:
    factors = layer.factors
    left = left_factor(factors)
    height = lokr_shapes({key: tuple(t.shape) for key, t in factors.items()})[1][0]
    if not any(edge % height for share in rows for edge in share):
        share = {k: t for k, t in factors.items() if k.startswith(("lokr_w2", "lokr_t2"))}
        share["lokr_w1"] = take(left, tuple((start // height, end // height) for start, end in rows))
        if "lora_magnitude_vector" in factors:
            share["lora_magnitude_vector"] = take(factors["lora_magnitude_vector"], rows)
        return Layer("lokr", share, layer.scale)
    if "lora_magnitude_vector" in factors:
        raise ValueError("a LoKr with magnitudes (DoRA) on a fused layer does not split where its blocks do not end")
    row = torch.cat([torch.arange(*share) for share in rows])
    right = right_factor(factors).flatten(1)
    picked = wide(left)[row // height, :, None] * wide(right)[row % height, None, :]  # row i of kron(C, D)
    return Layer("full", {"diff": picked.flatten(1)}, layer.scale)


_SPLIT: Mapping[str, Callable[[Layer, Rows], Layer]] = {
    "lora": _split_by("lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    "loha": _split_by("hada_w1_a", "hada_w2_a", "lora_magnitude_vector"),
    "full": _split_by("diff", "diff_b"),
    "glora": _split_by("b1.weight"),
    "ia3": _split_by("ia3_out"),
    "lokr": _split_lokr,
}


def fuse(parts: Sequence[Layer | None], rows: Sequence[Rows], name: str) -> Layer:
    """One layer's adapter from those of its parts, in the order of their rows; None for a part without one.

    Parts that share their input side, as those of a split do, become the layer that they came from. Others become one
    of the summed rank, block by block.

    Raises:
        ValueError: the method does not fuse, with the way out.
    """
    there = [part for part in parts if part is not None]
    kinds = {(part.method, frozenset(part.factors)) for part in there}
    dora = any("lora_magnitude_vector" in part.factors or "dora_in" in part.factors for part in there)
    if len(kinds) == 1 and (len(there) == len(parts) or not dora):
        (method, _), *_ = kinds
        fused = _FUSE.get(method, lambda *_: None)(list(parts), rows)
        if fused is not None:
            return fused
    methods = ", ".join(sorted({part.method for part in there}))
    raise ValueError(
        f"{name}: in this dialect it is one layer, and {methods} adapters of its parts cannot be one adapter of it: "
        "convert to LoRA first (--method lora --rank N)"
    )


def _heights(rows: Sequence[Rows]) -> list[int]:
    return [sum(end - start for start, end in ranges) for ranges in rows]


def _fuse_lora(parts: list[Layer | None], rows: Sequence[Rows]) -> Layer | None:
    there = [part for part in parts if part is not None]
    if any(key in there[0].factors for key in ("dora_in", "lora_mid.weight")):
        return None
    downs = [wide(part.factors["lora_A.weight"]).flatten(1) for part in there]
    ups = [part.scale * wide(part.factors["lora_B.weight"]).flatten(1) for part in there]
    shared = all(torch.equal(down, downs[0]) for down in downs[1:])
    ranks = [0 if shared else down.shape[0] for down in downs]
    up = ups[0].new_zeros(sum(_heights(rows)), downs[0].shape[0] if shared else sum(ranks))
    column, place = 0, iter(range(len(there)))
    for part, ranges in zip(parts, rows, strict=True):
        if part is None:
            continue
        i = next(place)
        _put(up[:, column : column + ups[i].shape[1]], ups[i], ranges)
        column += ranks[i]
    factors = {"lora_A.weight": downs[0] if shared else torch.cat(downs), "lora_B.weight": up}
    for key in ("lora_magnitude_vector", "lora_B.bias"):
        if key in there[0].factors:
            factors[key] = _stacked(parts, rows, key, scaled=key.endswith("bias"))
    return Layer("lora", factors)


def _put(target: Tensor, values: Tensor, ranges: Rows) -> None:
    """The reverse of `take`."""
    start = 0
    for begin, end in ranges:
        target[begin:end] = values[start : start + end - begin]
        start += end - begin


def _stacked(parts: list[Layer | None], rows: Sequence[Rows], key: str, scaled: bool = True) -> Tensor:
    """A factor of rows, of all parts; zeros where a part has none."""
    like = wide(next(part.factors[key] for part in parts if part is not None))
    whole = like.new_zeros(sum(_heights(rows)), *like.shape[1:])
    for part, ranges in zip(parts, rows, strict=True):
        if part is not None:
            _put(whole, wide(part.factors[key]) * (part.scale if scaled else 1), ranges)
    return whole


def _fuse_full(parts: list[Layer | None], rows: Sequence[Rows]) -> Layer | None:
    first = next(part for part in parts if part is not None)
    return Layer("full", {key: _stacked(parts, rows, key) for key in first.factors})


def _fuse_loha(parts: list[Layer | None], rows: Sequence[Rows]) -> Layer | None:
    there = [part for part in parts if part is not None]
    shared = ("hada_w1_b", "hada_w2_b")
    if "hada_t1" in there[0].factors or "dora_in" in there[0].factors:
        return None
    if not all(torch.equal(part.factors[key], there[0].factors[key]) for part in there[1:] for key in shared):
        return None
    own = {key: _stacked(parts, rows, key, scaled=key == "hada_w1_a") for key in there[0].factors if key not in shared}
    return Layer("loha", own | {key: there[0].factors[key] for key in shared})


_FUSE: Mapping[str, Callable[[list[Layer | None], Sequence[Rows]], Layer | None]] = {
    "lora": _fuse_lora,
    "full": _fuse_full,
    "loha": _fuse_loha,
}
