r"""DoRA (Liu et al. 2024, arXiv:2402.09353): $W' = m \odot V / \lVert V \rVert$ by rows, with $V = W + \Delta W$.

The direction is moved by any additive adapter (LoRA, LoHa, LoKr, ...), the magnitude m (out,) is trained beside it. As
section 4.3 of the paper suggests, the norm is a constant in the backward pass. Nothing of W's size is built for a
low-rank direction, and the base layer runs once: ``y' = g (y - b + branch(x)) + b`` with ``g = m / |V|``. So dropout
acts on the branch alone, where PEFT applies it to the base product too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import offload
from ..adapter import Adapter, Dense, Inner, Slot, materialise, wide
from ..config import PeftConfig
from ..sites import Embedding, Site


@dataclass
class OptionalDora(PeftConfig):
    """The switch that turns a delta method into its weight-decomposed form."""

    use_dora: bool = False
    """Train magnitude and direction of each row of the weight apart (DoRA)."""
    dora_on_input: bool = False
    """Of each input channel instead of each row, as LyCORIS before 3.2 did; PEFT has no such option."""

    def build(self, site: Site, path: str, device: torch.device, dtype: torch.dtype) -> Adapter:
        adapter = super().build(site, path, device, dtype)
        if not self.use_dora:
            return adapter
        return (InputDoRA if self.dora_on_input else DoRA)(adapter)  # type: ignore[arg-type]


class DoRA(Adapter):
    """A delta adapter with the norms of the rows taken out and trained apart."""

    def __init__(self, direction: Dense):
        super().__init__(direction.config, direction.site, "", *direction._place)
        self.direction = direction
        self.views = (*direction.views, "lora_magnitude_vector")
        self.shape = self._shape()
        self.lora_magnitude_vector = self.new(*self.shape)

    def _shape(self) -> tuple[int, ...]:
        site = self.site
        return (site.out,) if isinstance(site, Embedding) or not site.kernel else (1, site.out, *site.kernel_ones)

    def norms(self, weight: Tensor) -> Tensor:
        """|V| for each magnitude, where V is `weight` (out, cols) with the direction's delta."""
        return self.direction.row_norms(weight)

    @property
    def paddable(self) -> bool:  # type: ignore[override]
        return self.direction.paddable

    @property
    def scaling(self) -> Any:
        """The direction's scale."""
        return self.direction.scaling

    @scaling.setter
    def scaling(self, value: Any) -> None:
        self.direction.scaling = value

    def reset(self) -> None:
        self.direction.reset()
        weight = self.site.read()[0].detach()
        place = offload.compute_device(self.config, weight)
        with torch.no_grad():
            self.direction.to(place)
            norms = self.norms(weight.to(place)).to(weight.device)
            self.direction.to(weight.device)
        self.lora_magnitude_vector.data.copy_(norms.view(self.shape))

    def prepare(self) -> None:
        self.direction.prepare()

    @property
    def replaces_base(self) -> bool:
        return self.direction.replaces_base

    def release(self) -> None:
        self.direction.release()

    def quotient(self, weight: Tensor) -> Tensor:
        """m / |V|, (out,)."""
        with torch.no_grad():
            norms = self.norms(weight)
        return wide(self.lora_magnitude_vector).flatten() / norms

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        weight, bias = inner.weights()
        along = self.site.along_output
        gain = along(self.quotient(weight).to(y.dtype))
        if bias is None:
            return gain * self.direction.forward(x, _Given(y))
        bias = along(bias.to(y.dtype))
        return torch.addcmul(bias, gain, self.direction.forward(x, _Given(y - bias)))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.quotient(weight).to(weight.dtype)
        moved, extra = self.direction.fold(weight, None)
        if extra is not None:
            bias = extra * gain if bias is None else bias + extra * gain
        return gain[:, None] * moved, bias

    @property
    def by_rows(self) -> bool:
        return self.direction.by_rows

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        self.direction.fold_rows(tile, rows)
        m = self.lora_magnitude_vector.flatten()[rows].to(tile.dtype)
        tile.mul_((m / tile.norm(dim=1))[:, None])

    def slots(self) -> Iterator[Slot]:
        """The direction's tensors keep their own names, as in PEFT's files."""
        return ((name.removeprefix("direction."), held, key) for name, held, key in super().slots())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "direction" in self.__dict__.get("_modules", {}):
                return getattr(self._modules["direction"], name)
            raise


class InputDoRA(DoRA):
    r"""By input channels i, each with its whole kernel: $W'_{\cdot i} = m_i V_{\cdot i} / \lVert V_{\cdot i} \rVert$.

    Scaling a channel of V is scaling that channel of x, so the base layer runs once here too.
    """

    @property
    def by_rows(self) -> bool:
        return False  # a channel's norm is over all rows

    def _shape(self) -> tuple[int, ...]:
        return (1, self.site.channels, *self.site.kernel_ones)

    def norms(self, weight: Tensor) -> Tensor:
        moved, _ = self.direction.fold(wide(weight), None)
        norms = self._by_channel(moved).norm(dim=(0, 2))
        return norms.clamp(min=torch.finfo(norms.dtype).tiny)  # a padding token's embedding is zero, and stays so

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        if isinstance(self.site, Embedding):  # its input features are the tokens
            return materialise(self, x, inner)
        gain = self.quotient(inner.weights()[0]).to(x.dtype).repeat(self.site.groups)
        return self.direction.forward(x * self.site.along_output(gain), inner)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gain = self.quotient(weight).to(weight.dtype)
        moved, bias = self.direction.fold(weight, bias)
        return (self._by_channel(moved) * gain[:, None]).view_as(moved), bias

    def _by_channel(self, weight: Tensor) -> Tensor:
        """(out, cols) -> (out, channels, kernel)."""
        return weight.reshape(len(weight), self.site.channels, -1)


class _Given(Inner):
    """A layer whose output is known already."""

    def __init__(self, y: Tensor):
        self.y = y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y
