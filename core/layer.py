"""The wrapped layer: a base layer, its adapters, and what is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .adapter import Adapter, Dense, Inner, wide
from .errors import MergedError
from .kept import Kept
from .mixed import Mixed
from .quantized import Rounding
from .sites import Site, find
from .stack import Base, Stacked, fold, knows_strength
from .state import Names, State

TILE = 2**20
"""Entries of a weight that a merge works on at a time: few enough for a processor's cache, enough for full speed."""


class View(MutableMapping[str, Any]):
    """One attribute of all adapters of a layer, by adapter name: `layer.lora_A["default"].weight` as in PEFT."""

    def __init__(self, adapters: nn.ModuleDict, attribute: str):
        self._adapters, self._attribute = adapters, attribute

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self._adapters[name], self._attribute)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._adapters[name], self._attribute, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"delete the adapter {name!r} with delete_adapter, not one of its tensors")

    def __iter__(self) -> Iterator[str]:
        return (n for n, a in self._adapters.items() if getattr(a, self._attribute, None) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)


class AdaptedLayer(nn.Module):
    """A base layer and its adapters. Which of them run is the model's `State`; unknown attributes are the base's.

    A wrapper rather than a class swap, so that hooks installed on the base instance keep working.
    """

    state: State
    site: Site
    base_layer: nn.Module
    adapters: MutableMapping[str, Adapter]
    merged_adapters: list[str]
    rounding: Rounding | None
    _kept: dict[str, Kept | None]
    path: str
    """Where the model has it, for errors."""
    _stacks: dict[Names | None, Callable[..., Any]]

    def __init__(self, base_layer: nn.Module, state: State, path: str = ""):
        super().__init__()
        self._modules.update(adapters=nn.ModuleDict(), base_layer=base_layer)  # there are thousands of layers
        self.__dict__.update(state=state, path=path, merged_adapters=[], rounding=None, _kept={})
        self.__dict__["training"] = base_layer.training
        self._describe_base()

    def _describe_base(self) -> None:
        site_class = find(type(self.base_layer)) or Site
        self.__dict__.update(site=site_class(self.base_layer), _stacks={})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "base_layer":  # somebody replaces it: quantisation, FSDP, dispatch
            self._describe_base()
            for adapter in self.adapters.values():
                adapter.site = self.site

    # ---------------------------------------------------------------- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.state.plan
        if is_compiling():  # what is remembered in the first call would have the second one compiled anew
            stack = self._make(plan)
        else:
            stack = self._stacks.get(plan)
            if stack is None:
                stack = self._compose(plan)
        if len(args) == 1 and not kwargs:
            return stack(args[0])
        return self._forward_general(plan, stack, args, kwargs)

    def run(self, names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer with these adapters, whatever the model's state."""
        return self._forward_general(names, self._stacks.get(names) or self._compose(names), args, kwargs)

    def _compose(self, plan: Names | None) -> Callable[..., Any]:
        """What runs for these adapters, or for rows, remembered: a call then looks nothing up."""
        stack = self._stacks[plan] = self._make(plan)
        return stack

    def _make(self, plan: Names | None) -> Callable[..., Any]:
        return Mixed(self) if plan is None else self._stack(plan, self.base_layer)

    def _stack(self, names: Names, module: Callable[..., Any]) -> Callable[..., Any]:
        here = [self.adapters[n] for n in names if n in self.adapters]
        whole = next((a.whole for a in reversed(here) if a.whole is not None), None)
        if whole is not None:
            return whole
        if self.merged_adapters or not here:
            return module
        stack: Inner = Base(module, self.site)
        for adapter in here:
            stack = Stacked(adapter, stack)
        return stack

    def _forward_general(
        self, plan: Names | None, stack: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called by keyword, or with arguments meant for the base layer."""
        if plan is None or not isinstance(stack, Stacked):
            return stack(*args, **kwargs)
        if args:
            x, extra = args[0], args[1:]
            return self._stack(plan, lambda x: self.base_layer(x, *extra, **kwargs))(x)
        name = "input" if "input" in kwargs else next(iter(kwargs))
        x = kwargs.pop(name)
        return self._stack(plan, lambda x: self.base_layer(**{name: x}, **kwargs))(x)

    def forget(self) -> None:
        """Drop the remembered stacks, after adapters came, went or merged."""
        self._stacks.clear()

    # ---------------------------------------------------------------- merging

    @torch.no_grad()
    def check_merge(self, names: Names, path: str) -> None:
        """Raise `ValueError` if merging these adapters would make the weights NaN or infinite in their own dtype."""
        new, dtype = self.to_merge(names), self.site.place[1]
        stored, adapters = self._to_fold(new)
        if adapters[0].by_name:
            weight, bias = torch.cat([t.flatten() for t in self._folded_by_name(stored, adapters).values()]), None
        else:
            weight, bias = self._folded(stored, adapters)
        if not all(t is None or t.to(dtype).isfinite().all() for t in (weight, bias)):
            raise ValueError(f"NaNs detected in the merged weights of {path}. The adapter {new[-1]} seems to be broken")

    def _to_fold(self, names: Names) -> tuple[dict[str, Any], list[Adapter]]:
        """The parameters that merging `names` starts from, and what is folded into them.

        Where the originals are known they are the start, so that merging one by one equals merging at once.
        """
        originals = self._originals()
        chain = names if originals is None else (*self.merged_adapters, *names)
        return {**self.site.stored(), **(originals or {})}, [self.adapters[n] for n in chain]

    def _folded(self, stored: dict[str, Any], adapters: list[Adapter]) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.site.to_matrix(stored["weight"]), stored.get("bias")
        weight, bias = wide(weight), None if bias is None else wide(bias)
        for adapter in adapters:
            weight, bias = fold(adapter, weight, bias)
        return weight, bias

    def to_merge(self, names: Names) -> Names:
        """Those of `names` that have a weight to merge here and are not merged yet."""
        here = (n for n in names if n in self.adapters and n not in self.merged_adapters)
        return tuple(n for n in here if self.adapters[n].whole is None)

    @torch.no_grad()
    def merge(self, names: Names, keep: str = "cpu", in_place: bool = False) -> None:
        """Fold adapters into the base weight, rounding once; `keep` says where the original waits (see `Kept`).

        `in_place` writes over parameters that nobody else holds and that are not kept.
        """
        new = self.to_merge(names)
        if not new:
            return
        stored, adapters = self._to_fold(new)
        if adapters[0].by_name:
            for name, tensor in self._folded_by_name(stored, adapters).items():
                self._put(name, tensor.to(stored[name].dtype), keep, in_place)
            self.merged_adapters.extend(new)
            self.forget()
            return
        in_place = in_place and not self.site.coarse and stored["weight"] is self.site.stored()["weight"]
        if in_place and len(new) > 1 and stored["weight"].itemsize >= 4:  # nothing is rounded in between
            for name in new:
                self.merge((name,), keep, in_place)
            return
        if not self.site.coarse and all(a.by_rows and knows_strength(a) for a in adapters):
            self._put("weight", self._folded_by_rows(stored["weight"], adapters, in_place), keep, in_place)
        else:
            old, old_bias = stored["weight"], stored.get("bias")
            weight, bias = self._folded(stored, adapters)
            packed = self.site.pack(weight, old)
            if self.site.coarse:
                self.rounding = Rounding.of(self.site.to_matrix(old), self.site.to_matrix(packed), weight)
            self._put("weight", packed, keep, in_place)
            if bias is not None and (old_bias is None or not torch.equal(bias, wide(old_bias))):
                self._put("bias", bias.to(self.site.place[1] if old_bias is None else old_bias.dtype), keep, in_place)
        self.merged_adapters.extend(new)
        self.forget()

    @staticmethod
    def _folded_by_name(stored: dict[str, Any], adapters: list[Adapter]) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for adapter in adapters:
            changed |= adapter.fold_parameters({**stored, **changed})
        return changed

    def _folded_by_rows(self, old: Tensor, adapters: list[Adapter], in_place: bool) -> Tensor:
        """The stored weight `old` with adapters folded in, over itself or as a new tensor: one tile of rows at a time,
        so that whatever is wide or temporary is small."""
        new = old.data if in_place else torch.empty_like(old.data, memory_format=torch.contiguous_format)
        target = self.site.to_matrix(new)  # a copy if the weight lies in memory as no matrix does (channels_last)
        source = target if in_place else self.site.to_matrix(old.data)
        step = max(1, TILE // source.shape[1])
        for start in range(0, len(source), step):
            rows = slice(start, start + step)
            tile = target[rows] if in_place else target[rows].copy_(source[rows])
            wide_tile = wide(tile)  # the tile itself, unless in half precision
            for adapter in adapters:
                adapter.fold_rows(wide_tile, rows)
            if wide_tile is not tile:
                tile.copy_(wide_tile)
        return self.site.from_matrix(target)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit.

        Raises:
            MergedError: they were merged with `keep_original="none"`.
        """
        self.check_kept()
        for name, original in (self._originals() or {}).items():
            self.site.store(name, original)
        self._kept.clear()
        self.merged_adapters.clear()
        self.rounding = None
        self.forget()

    @property
    def recoverable(self) -> bool:
        """Whether the weights before the merge are known."""
        return not any(kept and kept.original is None for kept in self._kept.values())

    def check_kept(self) -> None:
        """Raise `MergedError` if the weights before the merge are gone."""
        if not self.recoverable:
            raise MergedError(
                "the original weights were not kept: merge with keep_original='cpu' or 'device' to unmerge later"
            )

    def original(self) -> tuple[Tensor, Tensor | None]:
        """W (out, cols) and b (out,) as they are without merged adapters: not to be written to.

        Raises:
            MergedError: they were not kept.
        """
        self.check_kept()
        stored = {**self.site.stored(), **(self._originals() or {})}
        return self.site.to_matrix(stored["weight"]), stored.get("bias")

    def _originals(self) -> dict[str, nn.Parameter | None] | None:
        """The parameters before the first merge ({} without one), or None if they were not kept."""
        if not self.recoverable:
            return None
        stored = self.site.stored()
        return {name: kept and kept.restore(stored[name]) for name, kept in self._kept.items()}

    def _put(self, name: str, tensor: Tensor, keep: str, in_place: bool) -> None:
        old = self.site.stored().get(name)
        if in_place and old is not None:
            self._kept.setdefault(name, Kept(old, "overwritten"))
            if tensor.data_ptr() != old.data_ptr():
                old.data.copy_(tensor)
            return
        if name not in self._kept:
            self._kept[name] = None if old is None else Kept(old, keep)
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        self.site.store(name, tensor)

    def replacement(self, names: Names | None = None) -> nn.Module:
        """The plain module that stands for this layer with these adapters (None: the running ones) merged."""
        here = [self.adapters[n] for n in (self.state.running if names is None else names) if n in self.adapters]
        return next((a.whole for a in reversed(here) if a.whole is not None), self.base_layer)

    # ---------------------------------------------------------------- PEFT's face

    def get_base_layer(self) -> nn.Module:
        """The layer without adapters."""
        return self.base_layer

    @property
    def merged(self) -> bool:
        """Whether any adapter is folded into the base weight now."""
        return bool(self.merged_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters of the model; for a module saved whole, those that have a copy of it."""
        if any(a.whole is not None for a in self.adapters.values()):
            return [n for n in self.state.active if n in self.adapters]
        return list(self.state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the list of several."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, scaled, in the layout of the stored weight."""
        delta = self.adapters[adapter]
        if not isinstance(delta, Dense):
            raise TypeError(f"{type(delta).__name__} adds nothing to the weight: it changes it otherwise")
        return self.site.from_matrix(delta.gain * delta.delta())

    @property
    def disable_adapters(self) -> bool:
        return not self.state.enabled

    def set_scale(self, adapter: str, scale: float) -> None:
        """Run an adapter at `scale` times its trained strength."""
        if adapter in self.adapters:
            self._strengthen([adapter], lambda _: scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        self._strengthen(self.state.active, lambda strength: strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`, or with None every change of strength, for the active adapters."""
        self._strengthen(self.state.active, lambda strength: 1.0 if scale is None else strength / scale)

    def _strengthen(self, names: Iterable[str], change: Callable[[float], float]) -> None:
        here = [n for n in names if n in self.adapters]
        merged = [n for n in here if n in self.merged_adapters]
        if merged:
            raise MergedError(f"adapters {merged} are merged into the base weight: unmerge them to change their scale")
        for name in here:
            self.adapters[name].strength = change(self.adapters[name].strength)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        modules = self.__dict__.get("_modules", {})
        if "base_layer" not in modules:
            raise AttributeError(name)
        if any(name in a.views for a in modules["adapters"].values()):
            return View(modules["adapters"], "gain" if name == "scaling" else name)
        return getattr(self.replacement(), name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stacks": {}}
