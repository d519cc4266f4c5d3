"""Adapters: functions from a layer to a layer, with two faces that must agree.

The law, which the tests hold every method to at every kind of layer:

    a(x, inner) == site.apply(x, *a.fold(*inner.weights()))

`forward` says how the adapted layer runs and `fold` which weights it is equal to, so merging *is* folding, and
stacking, saving and blending need no code per method. A method subclasses one of five bases and writes one function:

    Folded.fold        any change of the weights
    Branch.branch      something added to the output
    Dense.delta        a matrix added to the weight
    Factored.factors   a low-rank matrix added to the weight
    Transform.map      a linear map of the output or input features

Everything trained is a Parameter, everything frozen a buffer, and the names of both are those of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PeftConfig
from .errors import NotMergeableError
from .sites import Site

Scale = float | Tensor
"""A factor: a tensor of no dimensions where it has to change without a compiled graph being made anew."""

Slot = tuple[str, dict[str, Any], str]
"""A saved tensor: its name in the file, the module dict that holds it, its key there."""


class Inner:
    """The layer below an adapter."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The effective W (out, cols) and b (out,)."""
        raise NotImplementedError


AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")


def method(config_class: type[PeftConfig]) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: register an adapter as the method of `config_class`."""

    def bind(cls: AdapterClass) -> AdapterClass:
        config_class.adapter_class = cls
        return cls

    return bind


class Factor(nn.Module):
    """A weight, and sometimes a bias, under the names that PEFT's files give them (`lora_A.weight`)."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight = weight
        if bias is not None:
            self.bias = bias


def kaiming_(weight: Tensor) -> Tensor:
    """What `nn.Linear` starts from: uniform within 1 / sqrt(fan_in)."""
    bound = prod(weight.shape[1:]) ** -0.5
    return weight.uniform_(-bound, bound)


class Adapter(nn.Module):
    """The adapter of one layer.

    Arguments:
        config: options of the whole adapter, shared by its layers.
        site: the layer it belongs to.
        path: dotted path of that layer, for options that differ by layer.
        device, dtype: where and as what its tensors are allocated; `reset` then initialises them.
    """

    config: Any
    """The method's own config class."""
    by_name: ClassVar[bool] = False
    """Whether it changes parameters of its module by their names, whatever they are (`fold_parameters`), rather than
    the weight and bias of a layer."""
    strength: float = 1.0
    """How much of the adapter is applied: 0 is the base layer, 1 the adapter as trained."""
    true_shapes: dict[str, tuple[int, ...]] | None = None
    """What is true of its saved tensors, by slot, where they are padded or stand for none ({}): see `padding.py`."""
    paddable: ClassVar[bool] = False
    """Whether zeros in the place of further ranks leave it as it is."""
    views: tuple[str, ...] = ()
    """Attributes that `AdaptedLayer` shows as dicts by adapter name, as PEFT's layers do."""
    common: nn.Module | None
    """What `shared` made: one module, held by all adapters of one name."""

    def __init__(self, config: PeftConfig, site: Site, path: str, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.config, self.site, self._place = config, site, (device, dtype)
        self._modules["common"] = None

    @property
    def whole(self) -> nn.Module | None:
        """The module that runs in place of the base layer, for an adapter that is a trained copy of it."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """What its tensors are kept in, whatever the base layer's dtype."""
        return self._place[1]

    def new(self, *shape: int) -> nn.Parameter:
        """An uninitialised frozen parameter; trainability is decided elsewhere, in one place."""
        device, dtype = self._place
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    def reset(self) -> None:
        """Initialise the tensors, as the config says."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute what the tensors of a file need beside them, for an adapter that is loaded instead of `reset`."""

    @property
    def replaces_base(self) -> bool:
        """Whether the layer runs with another base weight while the adapter is there, until `release`."""
        return False

    def listen(self, model: nn.Module, state: Any, name: str) -> None:
        """Install what the adapters of this class and name need to know of the model's calls; `release` takes it off.

        Called on one of them, after they were attached. `state` is the model's `State`.
        """

    def release(self) -> None:
        """Put the base layer back as it was, before the adapter is removed."""

    def neutralise(self) -> None:
        """Become the identity, in place."""
        parts = [m for m in self.modules() if isinstance(m, Adapter)]
        configs = [part.config for part in parts]
        for part in parts:
            part.config = part.config.identity()
        self.reset()
        for part, config in zip(parts, configs, strict=True):
            part.config = config

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        """Output of the adapted layer."""
        raise NotImplementedError

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """New effective weight (out, cols) and bias (out,); the arguments stay untouched.

        Raises:
            NotMergeableError: as `check_mergeable`.
        """
        raise NotImplementedError

    def fold_parameters(self, stored: dict[str, Any]) -> dict[str, Tensor]:
        """What `fold` is for adapters `by_name`: the changed ones of a module's parameters, in float32 at least."""
        raise NotImplementedError

    @property
    def by_rows(self) -> bool:
        """Whether `fold_rows` is there: rows of W fold apart from each other, and the bias stays as it is."""
        return False

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        """What `fold` does, in place, to some rows of W: a merge then needs no memory of W's size.

        tile: those rows (rows, cols), in float32 at least.
        """
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise `NotMergeableError`, with the reason, if no weight is equal to this adapter."""
        if type(self).fold is Adapter.fold:
            raise NotMergeableError(f"{type(self).__name__} is not a change of weights, so it cannot be merged")

    def file_key(self, path: str, key: str) -> str:
        """The name in files of one of the `slots` of the adapter at `path`."""
        return f"{path}.{key}"

    def settle(self, names: set[str]) -> None:
        """Take the form that a file with tensors of these names needs, before they are assigned."""

    def slots(self) -> Iterator[Slot]:
        """Every saved tensor of its own, with the place that holds it."""
        return slots_of(self)

    def fit(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of a file in the shape of slot `key`, where an equal one of another shape is acceptable."""
        return tensor

    # ---------------------------------------------------------------- hooks, which few methods need
    # The class methods are called with all adapters of one name, by path. Training loops use `steps.py`.

    @classmethod
    def shared(cls, adapters: Mapping[str, Self]) -> nn.Module | None:
        """Initialised tensors that these adapters have in common; each finds the module as `common`.

        Persistent ones are saved once, without a path.
        """
        return None

    @classmethod
    def penalty(cls, adapters: Mapping[str, Self]) -> Tensor | None:
        """A term of the loss that depends on the adapters alone."""
        return None

    @classmethod
    def after_step(cls, adapters: Mapping[str, Self], step: int) -> None:
        """After optimizer step number `step`, with the gradients still there."""

    def training_state(self) -> dict[str, Tensor]:
        """What an exact resume of its training needs beside the file's tensors."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `training_state` gave, into the parameters that are there: an optimizer may hold them."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        scaling = self.__dict__.get("scaling")
        if isinstance(scaling, Tensor):  # moves along, but stays as precise as it is
            self.__dict__["scaling"] = scaling.to(fn(scaling).device)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module asks every value whether it is a parameter or a module; plain numbers are not, and there are many.
        if type(value) in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


_PLAIN = {int, float, bool, str, tuple}


def slots_of(root: nn.Module) -> Iterator[Slot]:
    """Every persistent tensor below a module, but for what it has in common with others."""
    modules: list[tuple[str, nn.Module]] = [("", root)]
    for prefix, module in modules:
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    yield prefix + key, held, key
        own = ((name, m) for name, m in module._modules.items() if m is not None and name != "common")
        modules.extend((f"{prefix}{name}.", m) for name, m in own)


def by_class(adapters: Mapping[str, Adapter]) -> dict[type[Adapter], dict[str, Adapter]]:
    """The adapters of each class, by path."""
    groups: dict[type[Adapter], dict[str, Adapter]] = {}
    for path, adapter in adapters.items():
        groups.setdefault(type(adapter), {})[path] = adapter
    return groups


def common_slots(adapters: Iterable[Adapter]) -> Iterator[Slot]:
    """The saved tensors that adapters of one name have in common, once."""
    modules = {id(a.common): a.common for a in adapters if a.common is not None}
    for module in modules.values():
        yield from slots_of(module)


def materialise(adapter: Adapter, x: Tensor, inner: Inner) -> Tensor:
    """The law itself: run the layer with the folded weight."""
    weight, bias = inner.weights()
    dtype = x.dtype if x.is_floating_point() else weight.dtype
    weight, bias = adapter.fold(wide(weight), None if bias is None else wide(bias))
    return adapter.site.apply(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def wide(tensor: Tensor) -> Tensor:
    """At least float32: what weights are computed in, so that only the result is rounded."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Folded(Adapter):
    """Base 1: any change of the weights. Write `fold`."""

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        return materialise(self, x, inner)


class Branch(Adapter):
    """Base 2: ``y' = y + scaling * branch(x)``. Write `branch`.

    The base's output dtype is the compute dtype: small factors are cast to it, activations never to float32.
    """

    scaling: Scale = 1.0

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def gain(self) -> Any:
        """What the branch is multiplied by: its scaling times its strength. Setting it sets the strength."""
        return self.scaling * self.strength

    @gain.setter
    def gain(self, value: float) -> None:
        self.strength = float(value / self.scaling)

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        return plus(y, self.branch(cast(x, y.dtype)).to(y.dtype), self.gain)


def plus(y: Tensor, z: Tensor, gain: Scale) -> Tensor:
    """``y + gain z``, in one kernel where the gain is a number."""
    return torch.add(y, z, alpha=gain) if isinstance(gain, (int, float)) else y + gain * z


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; indices of an embedding stay as they are."""
    return x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype)


class Dense(Branch):
    """Base 3: ``W' = W + scaling * delta()``. Write `delta`, (out, cols)."""

    @property
    def moves_bias(self) -> bool:
        """Whether it changes the bias too."""
        return False

    def delta(self) -> Tensor:
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B (out, k) and A (k, cols) with ``delta() = B A``, where an exact k smaller than the matrix exists."""
        return None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return plus(weight, self.delta().to(weight.dtype), self.gain), bias

    def branch(self, x: Tensor) -> Tensor:
        delta = self.delta()
        return self.site.apply(x, delta.to(x.dtype) if x.is_floating_point() else delta)

    def row_norms(self, weight: Tensor) -> Tensor:
        """Norms (out,) of the rows of ``W + gain * delta()``, in float32 at least; for DoRA."""
        return plus(wide(weight), wide(self.delta()), self.gain).norm(dim=1)


class Factored(Dense):
    """Base 4: ``delta() = B A``, run as two thin products. Write `factors`."""

    dropout: float = 0.0
    """Probability of zeroing an entry of x in the branch, while training."""

    def factors(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @property
    def only_factors(self) -> bool:
        """Whether `forward` adds ``gain * B A x`` and does nothing else, so that several may run as one product."""
        return type(self).forward is Factored.forward

    def delta(self) -> Tensor:
        b, a = self.factors()
        return b @ a

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        b, a = self.factors()
        if a.dtype != y.dtype:
            a, b, x = a.to(y.dtype), b.to(y.dtype), cast(x, y.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        h, gain = self.site.reduce(x, a), self.gain
        if isinstance(gain, (int, float)):
            return self.site.accumulate(y, h, b, gain)
        return self.site.accumulate(y, h * gain, b, 1.0)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        b, a = (f.to(weight.dtype) for f in self.factors())
        if isinstance(self.gain, (int, float)):
            return torch.addmm(weight, b, a, alpha=self.gain), bias
        return torch.addmm(weight, b * self.gain, a), bias

    @property
    def by_rows(self) -> bool:
        return type(self).fold is Factored.fold

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        b, a = self.factors()
        tile.addmm_(b[rows].to(tile.dtype), a.to(tile.dtype), alpha=self.gain)

    def row_norms(self, weight: Tensor) -> Tensor:
        # |w + s d|^2 = |w|^2 + 2 s (w . d) + s^2 |d|^2 with d = B A, without building a matrix of W's size.
        b, a = (wide(t) for t in self.factors())
        weight = wide(weight)
        dot = ((weight @ a.T) * b).sum(1)
        square = ((b @ (a @ a.T)) * b).sum(1)
        return (weight.norm(dim=1).square() + 2 * self.gain * dot + self.gain**2 * square).clamp(min=0).sqrt()


class Transform(Adapter):
    """Base 5: a linear map of the output or input features. Write `map`.

    On the output side ``y' = map(y)``, bias included; on the input side ``y' = op(map(x))``, where the x of a
    convolution are the unfolded patches of one group.
    """

    side: str = "output"
    elementwise: ClassVar[bool] = False
    """True if the map never mixes features, so that groups do not matter."""

    def map(self, x: Tensor) -> Tensor:
        """Map the last axis: (..., features) -> (..., features)."""
        raise NotImplementedError

    def pull(self, weight: Tensor) -> Tensor:
        """Rows of ``weight`` (out, cols) as seen through an input-side map: ``W M`` where ``map(x) = M x``."""
        return weight @ self.map(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.check_mergeable()
        if self.side == "output":
            return self.map(weight.T).T, None if bias is None else self.map(bias)
        return self.pull(weight), bias

    @property
    def by_rows(self) -> bool:
        return self.side == "input" and self.site.groups == 1 and type(self).fold is Transform.fold

    def fold_rows(self, tile: Tensor, rows: slice) -> None:
        tile.copy_(self.pull(tile))

    def check_mergeable(self) -> None:
        super().check_mergeable()
        if self.side == "output" and self.site.groups > 1 and not self.elementwise:
            raise NotMergeableError(
                f"{type(self).__name__} mixes output features across the {self.site.groups} groups of a convolution; "
                "no grouped weight is equal to it"
            )

    def forward(self, x: Tensor, inner: Inner) -> Tensor:
        if self.side == "output":
            y = inner(x)
            return self.map(y.movedim(self.site.channel, -1)).movedim(-1, self.site.channel)
        return inner(self.map(x)) if self.site.pointwise else materialise(self, x, inner)
