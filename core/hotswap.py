"""Another adapter in the place of one that is there, under its name: tensors are copied over those of the old one.

Nothing a compiled graph depends on changes, so that nothing is compiled anew: not across ranks and scales, once
`prepare_model_for_compiled_hotswap` has padded the adapter and made its scales tensors, and not across layers: where
the new adapter has none, the old one becomes the identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .adapted import AdaptedModel
from .adapter import Adapter, common_slots
from .config import PeftConfig, RankedConfig
from .errors import MergedError, PeftWarning
from .files import load_adapter
from .handle import handle_of
from .padding import META, corner, prepare
from .targets import near


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | dict[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Before compiling: let the adapters of a model be swapped for others of any rank up to `target_rank`, and scale.

    Layers that later adapters may target are those of the adapter that is there now.

    Arguments:
        target_rank: None leaves the ranks as they are.
        config: accepted for PEFT's sake; configs keep the adapters' true ranks here, and padding is not saved.

    Raises:
        ValueError: the model is compiled already, has no adapters, or one of larger rank.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r}")
    handle = handle_of(model)
    compiled = (hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in (model, *model.modules()))
    if check_compiled != "ignore" and any(compiled):
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(message)
        warnings.warn(f"{message}: it will be compiled anew", PeftWarning, stacklevel=2)
    if not handle.configs:
        raise ValueError("No adapter layers found on the model: load or add the first adapter before preparing it")
    for name in handle.configs:
        for path, adapter in handle.adapters(name).items():
            prepare(adapter, adapter.config, path, target_rank)
    handle.forget_stacks()


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **where: Any,
) -> None:
    """Put the adapter of a directory or hub id in the place of `adapter_name`, which keeps its name and activity.

    where: as for `PeftModel.load_adapter`. `torch_device` is not needed: tensors go where the adapter is.

    Raises:
        ValueError: as `hotswap`.
    """
    hotswap(handle_of(model), adapter_name, *load_adapter(model_name_or_path, **where))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As `hotswap_adapter`, with tensors under the names of a file, or of PEFT's models (the adapter's name inside).

    `parameter_prefix` is accepted for PEFT's sake.

    Raises:
        ValueError: as `hotswap`.
    """
    names = (f".{adapter_name}.weight", ".weight"), (f".{adapter_name}.bias", ".bias"), (f".{adapter_name}", "")
    tensors = {}
    for key, tensor in state_dict.items():
        key = config.from_file(key)
        ending = next((pair for pair in names if key.endswith(pair[0])), ("", ""))
        tensors[key.removesuffix(ending[0]) + ending[1]] = tensor
    hotswap(handle_of(model), adapter_name, config, tensors)


def hotswap(handle: AdaptedModel, name: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Put an adapter, its tensors named by module path, in the place of the adapter `name`. All of it, or nothing.

    Raises:
        ValueError: no such adapter; tensors that it has no place for, or of other shapes. A prepared adapter takes
            ranks up to its own.
        MergedError: it is merged.
    """
    old = handle.configs.get(name)
    if old is None:
        raise ValueError(f"Adapter {name} not found; this model has {list(handle.configs)}")
    if name in handle.state.merged:
        raise MergedError(f"adapter {name!r} is merged into the base weights: unmerge it before swapping it")
    if type(old) is not type(config):
        raise ValueError(f"Incompatible PEFT types found: {old.peft_type} and {config.peft_type}")
    if getattr(old, "bias", "none") != "none" or getattr(config, "bias", "none") != "none":
        raise ValueError("adapters that train biases of the base model cannot be swapped: delete one, load the other")
    _Swap(name, old, config, handle.adapters(name), tensors).run()
    config.inference_mode = old.inference_mode
    handle.configs[name] = config


class _Copy(NamedTuple):
    """A tensor of the new adapter, and where it goes."""

    source: Tensor
    target: Tensor
    cleared: bool
    """Whether the rest of the target has to become zero."""


class _Form(NamedTuple):
    """What an adapter of the new config is like at a layer, but for its tensors."""

    configs: list[PeftConfig]
    settings: list[dict[str, Any]]
    """Its plain attributes; these and the configs by adapter, of which DoRA holds another one."""
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, adapter: Adapter, uniform: bool) -> _Form:
        parts = _parts(adapter)
        kinds = (int, float, bool, tuple) if uniform else (int, float, bool, tuple, str)  # a path is a str
        settings = [
            {k: v for k, v in vars(part).items() if type(v) in kinds and k[0] != "_" and k != "training"}
            for part in parts
        ]
        shapes = {key: held[k].shape for key, held, k in adapter.slots()}
        return cls([part.config for part in parts], settings, shapes)


class _Swap:
    """What a swap does, found out before anything changes."""

    def __init__(
        self,
        name: str,
        old: PeftConfig,
        config: PeftConfig,
        adapters: dict[str, Adapter],
        tensors: Mapping[str, Tensor],
    ):
        self.name, self.old, self.config, self.tensors = name, old, config, tensors
        self.uniform = isinstance(config, RankedConfig) and not (config.rank_pattern or config.alpha_pattern)
        self.copies: list[_Copy] = []
        self.forms: list[tuple[Adapter, _Form, dict[str, tuple[int, ...]] | None]] = []
        self.absent: list[Adapter] = []
        self._known_forms: dict[Any, _Form] = {}
        for path, adapter in adapters.items():
            self._plan(path, adapter)
        self._plan_common(adapters.values())
        if len(self.copies) < len(tensors):
            self._refuse_strangers(adapters)

    def _plan(self, path: str, adapter: Adapter) -> None:
        slots = list(adapter.slots())
        found = [self.tensors.get(f"{path}.{key}") for key, _, _ in slots]
        missing = [key for (key, _, _), tensor in zip(slots, found, strict=True) if tensor is None]
        if len(missing) == len(slots):
            self.absent.append(adapter)
            return
        if missing:
            raise ValueError(f"adapter {self.name!r}: the new one has no {', '.join(missing)} for {path}")
        form = self._form(path, adapter)
        before, after = adapter.true_shapes, {}
        for (key, held, k), tensor in zip(slots, found, strict=True):
            target, shape = held[k], form.shapes[key]
            assert tensor is not None
            if tensor.shape != shape:
                tensor = adapter.fit(key, tensor)
            larger = len(shape) != target.ndim or any(n > m for n, m in zip(shape, target.shape, strict=True))
            if tensor.shape != shape or larger or (before is None and shape != target.shape):
                self._refuse(f"{path}.{key}", tensor, shape, target, before is not None)
            after[key] = tuple(shape)
            self.copies.append(_Copy(tensor, target, before is not None and before.get(key) != after[key]))
        self.forms.append((adapter, form, None if before is None else after))

    def _plan_common(self, adapters: Iterable[Adapter]) -> None:
        for key, held, k in common_slots(adapters):
            tensor, target = self.tensors.get(key), held[k]
            if tensor is None or tensor.shape != target.shape:
                given = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ValueError(f"adapter {self.name!r}: {key} {given}, expected {tuple(target.shape)}")
            self.copies.append(_Copy(tensor, target, False))

    def _form(self, path: str, adapter: Adapter) -> _Form:
        """As the new config has it; layers of one kind share it where their paths make no difference."""
        if adapter.whole is not None:
            return _Form([self.config], [{}], {key: held[k].shape for key, held, k in adapter.slots()})
        site, config = adapter.site, self.config
        kind = (type(site), site.out, site.cols, site.kernel, site.groups, adapter.dtype) if self.uniform else path
        form = self._known_forms.get(kind)
        if form is None:
            new = config.build(site, path, META, adapter.dtype)
            form = self._known_forms[kind] = _Form.of(new, self.uniform)
            if [type(p) for p in _parts(new)] != [type(p) for p in _parts(adapter)]:
                kinds = type(adapter).__name__, type(new).__name__
                raise ValueError(f"adapter {self.name!r}: {path} is a {kinds[0]}, and the new one is a {kinds[1]}")
        if form.shapes.keys() != {key for key, _, _ in adapter.slots()}:
            raise ValueError(f"adapter {self.name!r}: the new one has other tensors at {path}: {sorted(form.shapes)}")
        return form

    def _refuse(self, key: str, tensor: Tensor, shape: torch.Size, target: Tensor, prepared: bool) -> NoReturn:
        if tensor.shape != shape:
            raise ValueError(f"adapter {self.name!r}: {key} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if prepared:
            advice = "prepare the model with a larger target_rank"
        else:
            advice = "call prepare_model_for_compiled_hotswap(model, target_rank=...) before, or delete and load it"
        room = tuple(target.shape)
        raise ValueError(f"adapter {self.name!r}: {key} has shape {tuple(shape)}, there is room for {room}: {advice}")

    def _refuse_strangers(self, adapters: dict[str, Adapter]) -> NoReturn:
        known = {f"{path}.{key}" for path, adapter in adapters.items() for key, _, _ in adapter.slots()}
        known.update(key for key, _, _ in common_slots(adapters.values()))
        strange = sorted(self.tensors.keys() - known)
        hint = near([key.rsplit(".lora", 1)[0] for key in strange[:3]], adapters)
        raise ValueError(
            f"adapter {self.name!r}: no place for {strange[:3]} ({len(strange)} unexpected keys in all){hint}. The "
            "adapter that is swapped out has to cover all layers of those that come in"
        )

    @torch.no_grad()
    def run(self) -> None:
        """Change everything, by few operations on many tensors."""
        scales: list[Tensor] = []
        values: list[float] = []
        for adapter, form, shapes in self.forms:
            adapter.true_shapes = shapes
            for part, config, settings in zip(_parts(adapter), form.configs, form.settings, strict=True):
                part.config = config
                for key, value in settings.items():
                    held = vars(part).get(key)
                    if isinstance(held, Tensor):
                        scales.append(held)
                        values.append(value)
                    elif held != value:
                        setattr(part, key, value)
        if scales:
            torch._foreach_zero_(scales)
            torch._foreach_add_(scales, values)
        cleared = [copy.target for copy in self.copies if copy.cleared]
        if cleared:
            torch._foreach_zero_(cleared)
        targets = [t if s.shape == t.shape else corner(t, s.shape) for s, t, _ in self.copies]
        if targets:
            torch._foreach_copy_(targets, _moved([copy.source for copy in self.copies], targets))
        if self.absent:
            devices = {a.site.device for a in self.absent if a.site.device.type == "cuda"}
            with torch.random.fork_rng(devices):
                for adapter in self.absent:
                    adapter.neutralise()
                    adapter.true_shapes = {}
                    for part in _parts(adapter):
                        part.config = self.config if part.config is self.old else part.config


def _parts(adapter: Adapter) -> list[Adapter]:
    """The adapter, and one that it is made of."""
    direction = adapter._modules.get("direction")
    return [adapter, direction] if isinstance(direction, Adapter) else [adapter]


def _moved(sources: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """The sources where the targets are, sent there together rather than one by one."""
    device, dtype = targets[0].device, sources[0].dtype
    if (
        sources[0].device == device
        or any(t.device != device for t in targets)
        or any(s.dtype != dtype for s in sources)
    ):
        return sources
    flat = torch.cat([s.reshape(-1) for s in sources]).to(device)
    return [part.view(s.shape) for part, s in zip(flat.split([s.numel() for s in sources]), sources, strict=True)]
