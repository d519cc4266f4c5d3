r"""Any adapter as a LoRA: $B A \approx \Delta W$, the best of its rank (Eckart and Young 1936), with the error stated.

One layer at a time, from the factors where the method has exact ones, else from the difference that it makes to the
layer's weight. Methods whose difference depends on that weight (DoRA, GLoRA, OFT, IA3) need the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor, nn

from ..core import Adapter, Dense
from ..core.adapter import wide
from ..core.sites import find
from .dialects.canonical import Canonical, Layer, Shape
from .dialects.forms import formed
from .dialects.names import Names

Place = tuple[str, str]
"""Component and module path."""
Base = Callable[[str, str], tuple[Tensor, Tensor | None]]
"""(component, path) -> weight and bias of the base model; `base.BaseModel.weights` is one."""


@dataclass(frozen=True)
class Limits:
    """How far a matrix may be cut: a largest rank, a tolerated error, or both."""

    rank: int | None = None
    tolerance: float | None = None
    """Relative error in the Frobenius norm: the lowest rank that keeps to it is taken. 0.1 is 10 percent."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} is no rank: give 1 or more")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} is no relative error: give 0 or more, below 1")

    def rank_of(self, missed: Tensor) -> int:
        """The rank to keep, of a matrix that misses the norm `missed[r]` at rank r."""
        rank = len(missed)
        if self.tolerance is not None:
            rank = int((missed > self.tolerance * missed[0]).sum())
        return max(1, min(rank, self.rank or rank))


@dataclass(frozen=True)
class Truncated:
    """A LoRA, and how far it is from what it stands for."""

    adapter: Canonical
    errors: Mapping[Place, float]
    """Relative error of each layer, in the Frobenius norm."""
    error: float
    """The same over all layers."""
    left_out: Mapping[Place, str]
    """Layers that no LoRA can stand for -> why."""


@torch.no_grad()
def to_lora(
    adapter: Canonical, names: Names, limits: Limits, base: Base | None = None, strict: bool = True
) -> Truncated:
    """The nearest LoRA within `limits`, layer by layer.

    Layers that are LoRA of no higher rank already stay as they are.

    Arguments:
        names: the modules of the model.
        base: its weights, for methods that need them.
        strict: False leaves out what no LoRA can express, such as changes of norms, rather than refuse.

    Raises:
        ValueError: with `strict` such a layer, or one that needs `base`, which is not given.
    """
    layers: dict[str, dict[str, Layer]] = {}
    errors: dict[Place, float] = {}
    left_out: dict[Place, str] = {}
    squares = missed = 0.0
    for place, layer in adapter.layers().items():
        component, path = place
        try:
            found, error, norm = _layer(layer, place, names.tables[component][path], limits, base)
        except _NoLoraError as reason:
            if strict:
                raise ValueError(f"{component}.{path}: {reason}; --no-strict leaves such layers out") from None
            left_out[place] = str(reason)
            continue
        layers.setdefault(component, {})[path] = found
        errors[place] = error / norm if norm else 0.0
        squares, missed = squares + norm**2, missed + error**2
    return Truncated(replace(adapter, components=layers), errors, sqrt(missed / squares) if squares else 0.0, left_out)


class _NoLoraError(ValueError):
    """Why a layer cannot be written as a LoRA."""


def _layer(layer: Layer, place: Place, shape: Shape, limits: Limits, base: Base | None) -> tuple[Layer, float, float]:
    """The LoRA of one layer, the norm of what it misses, and of what it stands for."""
    if len(shape) < 2:
        raise _NoLoraError("a norm has no matrix that a LoRA could change")
    if layer.method == "full" and "diff" not in layer.factors:
        raise _NoLoraError("it changes the bias alone, for which there is no LoRA")
    own = built(layer, place[1], shape)
    factors = own.factors() if isinstance(own, Dense) else None
    if isinstance(own, Dense) and factors is not None:
        b, a = factors[0].flatten(1) * own.gain, factors[1].flatten(1)
        if layer.method == "lora" and "lora_mid.weight" not in layer.factors and len(a) <= (limits.rank or len(a)):
            return layer, 0.0, ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
        bias = _bias(layer)
    elif isinstance(own, Dense):
        b, a, bias = own.delta() * own.gain, None, _bias(layer)
    else:
        (b, bias), a = _difference(own, place, base), None
    b, a, error, norm = truncated(b, a, limits)
    made = {
        "lora_A.weight": a.reshape(len(a), *shape[1:]),
        "lora_B.weight": b.reshape(len(b), -1, *[1] * len(shape[2:])),
    }
    return Layer("lora", made if bias is None else {**made, "lora_B.bias": bias}), error, norm


def built(layer: Layer, path: str, shape: Shape) -> Adapter:
    """The core's adapter for a layer whose weight has `shape`; the weight itself is not needed."""
    ones = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if len(shape) == 2:
        module: nn.Module = nn.Linear(shape[1], shape[0], device="meta")
    else:
        module = ones[len(shape) - 3](shape[1], shape[0], shape[2:], device="meta")  # type: ignore[arg-type]
    site = find(type(module))
    assert site is not None
    config, tensors = formed(layer, path, shape)
    own = config.build(site(module), path, torch.device("cpu"), torch.float32)
    for name, held, key in own.slots():
        held[key] = nn.Parameter(wide(tensors[name]), requires_grad=False)
    return own


def _bias(layer: Layer) -> Tensor | None:
    """What a layer adds to the bias, (out,)."""
    return next((layer.scale * layer.factors[key] for key in ("lora_B.bias", "diff_b") if key in layer.factors), None)


def _difference(own: Adapter, place: Place, base: Base | None) -> tuple[Tensor, Tensor | None]:
    """What an adapter changes of its layer's weight, (out, cols), and of its bias, if anything."""
    if base is None:
        kind = type(own).__name__
        raise ValueError(f"{'.'.join(place)}: what {kind} changes depends on the base model's weights: give --base")
    weight, bias = (None if t is None else wide(t) for t in base(*place))
    assert weight is not None
    weight = own.site.to_matrix(weight)
    changed, changed_bias = own.fold(weight, bias)
    if bias is None or changed_bias is None or torch.equal(bias, changed_bias):
        return changed - weight, None
    return changed - weight, changed_bias - bias


def truncated(b: Tensor, a: Tensor | None, limits: Limits) -> tuple[Tensor, Tensor, float, float]:
    """The best B (out, r) and A (r, cols) for ``b a``, or for the matrix b; the norm of what is missed, and of all."""
    core = b
    if a is not None:
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        core = r_b @ r_a.T
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    if a is not None:
        u, vh = q_b @ u, vh @ q_a.T
    missed = s.double().square().flip(0).cumsum(0).flip(0).sqrt()  # at rank 0, 1, ...
    r = limits.rank_of(missed)
    return u[:, :r] * s[:r], vh[:r], missed[r].item() if r < len(s) else 0.0, missed[0].item()
