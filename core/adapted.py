"""A model with adapters: attaching, switching, merging, saving and taking off again.

`AdaptedModel` works on the model in place and keeps nothing that cannot be found again in the model's tree, so two
handles of one model agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import islice
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapter import Adapter, by_class, common_slots
from .assign import LoadResult, assign
from .attach import build_adapters, install, no_collection
from .combine import Report, Sources, blend, find_combination
from .config import PeftConfig
from .errors import MergedError, PeftWarning
from .layer import AdaptedLayer
from .padding import pad, trim
from .quantized import Rounding, warn_of_rounding
from .replicate import replicated, restore_depth
from .rows import Rows, cast
from .state import State
from .targets import walk
from .ties import kept_tied, note_untied, shared_parameters
from .train import Trainability, TrainedBias, parameter_dicts, trained_biases
from .tuners.lora import LoraConfig
from .weights import Weight, resolve


class AdaptedModel(nn.Module):
    """The adapters of `model`, which stays the very object that was passed in: its layers are wrapped in place."""

    model: nn.Module

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.layers = {p: m.module for p, m in walk(model).items() if isinstance(m.module, AdaptedLayer)}
        self.state: State = next((layer.state for layer in self.layers.values()), None) or State()
        self.training = model.training
        self.rounding: dict[str, Rounding] = {}
        """What the last merge into quantized weights lost, by path."""
        self.trainability = Trainability(self.state)
        for name in self.state.configs:
            self._track(name)

    @property
    def configs(self) -> dict[str, PeftConfig]:
        """The config of every adapter, by name."""
        return self.state.configs

    # ---------------------------------------------------------------- attaching

    def add(
        self,
        name: str,
        config: PeftConfig,
        *,
        trainable: bool | None = None,
        autocast_adapter_dtype: bool = True,
        strict: bool = False,
        initialise: bool = True,
    ) -> None:
        """Attach a new adapter. The first one becomes active and freezes the base model; later ones wait.

        Arguments:
            trainable: whether it may be trained; None asks `config.inference_mode`.
            autocast_adapter_dtype: keep the adapter in float32 over a half-precision base, which training needs.
            strict: make pattern keys that match nothing an error rather than a warning.
            initialise: False leaves the tensors on the meta device, for a caller that assigns them.

        Raises:
            ValueError: the name is taken or unusable, or the config does not fit the model. Nothing has changed then.
        """
        self._check_new(name, config)
        if any(config is other for other in self.configs.values()):
            config = deepcopy(config)  # training may write to it
        with no_collection(), replicated(self.model, config, self.state):
            built = build_adapters(
                self.model,
                config,
                walk(self.model),
                self.state,
                autocast=autocast_adapter_dtype,
                initialise=initialise,
                strict=strict,
            )
            if not self.state.configs:
                self.model.requires_grad_(False)
            for place, layer, adapter in built:
                install(place, layer)
                layer.adapters[name] = adapter if layer.training else adapter.eval()
                self.layers[place.path] = layer
        with self.trainability.change():
            self.configs[name] = config
            if not config.inference_mode if trainable is None else trainable:
                self.state.trainable.add(name)
            if not self.state.active and not self.state.merged:
                self.state.choose((name,), self.state.enabled)
        self.forget_stacks()
        for group in by_class(self.adapters(name)).values():
            next(iter(group.values())).listen(self.model, self.state, name)
        kind = getattr(config, "bias", "none")
        if kind != "none":
            self.state.biases[name] = trained_biases(self.model, self.layers, kind)
        self._track(name)

    def _check_new(self, name: str, config: PeftConfig) -> None:
        if not name or "." in name or not isinstance(name, str):
            raise ValueError(f"{name!r} cannot name an adapter: a name is a non-empty string without dots")
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(f"{name!r} cannot name an adapter: it is a word that torch.nn.ModuleDict keeps for itself")
        if name in self.configs:
            raise ValueError(f"Adapter with name {name} already exists; delete it first or choose another name")
        others = [n for n, c in self.configs.items() if getattr(c, "bias", "none") != "none"]
        if others and getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"only one adapter of a model may train its biases, and {others[0]!r} does: use bias='none'"
            )

    def _track(self, name: str) -> None:
        held = parameter_dicts(self.layers.values(), name)
        self.trainability.track(name, held + [{"bias": b.parameter} for b in self._biases(name).values()])

    def _biases(self, name: str) -> dict[str, TrainedBias]:
        return self.state.biases.get(name, {})

    def delete(self, name: str) -> None:
        """Remove an adapter and its tensors; if it was the only active one, the next becomes active.

        Raises:
            ValueError: no such adapter.
            MergedError: it is merged into the weights; nothing has changed.
        """
        self._known(name)
        if name in self.state.merged:
            raise MergedError(f"adapter {name!r} is merged into the base weights: unmerge it before deleting it")
        if self.state.rows is not None and name in self.state.rows.adapters:
            raise ValueError(f"adapter {name!r} runs rows of the mixed batch that is on: delete it afterwards")
        with self.trainability.change():
            if name in self.state.active:
                left = tuple(n for n in self.state.active if n != name)
                rest = (n for n in self.configs if n != name)
                self.state.choose(left or tuple(islice(rest, 1)), self.state.enabled)
            self.state.forget(name)
        for bias in self.state.biases.pop(name, {}).values():
            bias.restore()
        for layer in self.layers.values():
            if name in layer.adapters:
                layer.adapters[name].release()
                del layer.adapters[name]
        self.forget_stacks()
        self.trainability.held.pop(name, None)
        if not self.configs and self.state.replication:
            self._unwrap(lambda layer: layer.base_layer)
            restore_depth(self.state)

    def detach(self) -> nn.Module:
        """Put the original module objects back and return the model, free of any trace of adapters.

        Raises:
            MergedError: as `unmerge`; nothing has changed then.
        """
        self.unmerge()
        for adapter in (a for layer in self.layers.values() for a in layer.adapters.values()):
            adapter.release()
        self._unwrap(lambda layer: layer.base_layer)
        restore_depth(self.state)
        for bias in (b for found in self.state.biases.values() for b in found.values()):
            bias.restore()
        return self._forget_adapters()

    def merge_and_detach(
        self,
        names: Iterable[str] | None = None,
        safe_merge: bool = False,
        progressbar: bool = False,
        weights: Mapping[str, Weight] | None = None,
    ) -> nn.Module:
        """Fold adapters into the weights for good, in place, and return the plain model.

        The arguments are those of `merge`; disabled or not, what is named is merged, and what was merged before stays.

        Raises:
            ValueError, MergedError, NotMergeableError: as `merge`; nothing has changed then.
        """
        self._merge(names, weights, safe_merge, "none", progressbar)
        self._unwrap(lambda layer: layer.replacement(self.state.merged))
        note_untied(self.model)
        return self._forget_adapters()

    def _forget_adapters(self) -> nn.Module:
        self.state = State()
        self.trainability = Trainability(self.state)
        return self.model

    def _unwrap(self, plain: Callable[[AdaptedLayer], nn.Module | None]) -> None:
        """Put plain modules in the place of the layers for which there is one."""
        for place in walk(self.model).values():
            module = plain(place.module) if isinstance(place.module, AdaptedLayer) else None
            if module is not None:
                install(place, module)
                del self.layers[place.path]

    # ---------------------------------------------------------------- switching

    def activate(self, *names: str) -> None:
        """Run exactly these adapters, in this order (none: the base model). Says nothing about gradients.

        Raises:
            ValueError: an unknown adapter, or two that both replace the same module.
            MergedError: adapters are merged.
        """
        for name in names:
            self._known(name)
        if len(names) > 1:
            self._check_together(names)
        with self.trainability.change():
            self.state.choose(tuple(names), self.state.enabled)

    def _check_together(self, names: Iterable[str]) -> None:
        for path, layer in self.layers.items():
            copies = [n for n in names if n in layer.adapters and layer.adapters[n].whole is not None]
            if len(copies) > 1:
                raise ValueError(f"Only one active adapter may replace {path}, which is in modules_to_save of {copies}")

    def enable(self, flag: bool = True) -> None:
        """Run the active adapters, or with False the bare base model, without forgetting which are active."""
        if not flag and self.state.enabled and self.state.biases:
            message = f"the biases that {list(self.state.biases)} trained are the base model's own, disabled or not"
            warnings.warn(message, PeftWarning, stacklevel=3)
        with self.trainability.change():
            self.state.choose(self.state.active, flag)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare base model inside; nests, and restores the state it found."""
        before = self.state.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(before)

    @contextmanager
    def rows(self, names: Sequence[str], *, each: int = 1, tiled: int = 1) -> Iterator[None]:
        """Run a mixed batch inside: row i through adapter `names[i]`, or the base model where that is "__base__".

        Adapters that are disabled stay so. Those that may be trained are, each by its own rows.

        Arguments:
            each: layers may also see every row so many times in place (beams).
            tiled: layers may also see the whole batch so many times over (classifier-free guidance).

        Raises:
            ValueError: an unknown adapter; when the model is called, a batch of another number of rows.
            MergedError: adapters are merged.
        """
        rows = Rows(names, each, tiled)
        for name in rows.adapters:
            self._known(name)
        learning = self.state.learning
        with cast(self.model, self.state, rows):
            self.trainability.catch_up(learning)
            yield

    def set_trainable(self, names: str | Iterable[str], flag: bool = True) -> None:
        """Say which adapters may be trained; they are while they are active."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            self._known(name)
        with self.trainability.change():
            (self.state.trainable.update if flag else self.state.trainable.difference_update)(names)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter, whole modules and trained biases included."""
        return list(self.trainability.parameters(self._known(name)))

    def adapters(self, name: str) -> dict[str, Adapter]:
        """The adapter of every layer that has one of this name, by path."""
        self._known(name)
        return {path: layer.adapters[name] for path, layer in self.layers.items() if name in layer.adapters}

    def set_weight(self, name: str, weight: Weight) -> None:
        """Apply an adapter at a multiple of its trained strength: 0 is the base model, 1 the adapter as trained.

        weight: one for all layers, or by block: `{"up_blocks": 0.8, "down_blocks": 0.3}` (see `weights.resolve`).

        Raises:
            ValueError: no such adapter, a weight that is no number, a pattern that matches none of its layers.
            MergedError: it is merged, where no weight reaches it.
        """
        adapters = self.adapters(name)
        if name in self.state.merged:
            raise MergedError(f"adapter {name!r} is merged into the base weights: unmerge it to change its weight")
        for path, strength in resolve(weight, adapters).items():
            adapters[path].strength = strength

    @staticmethod
    def _set_strengths(strengths: Iterable[tuple[Adapter, float]]) -> None:
        for adapter, strength in strengths:
            adapter.strength = strength

    # ---------------------------------------------------------------- tensors

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's tensors under the names of its file, without prefix: `path.lora_A.weight`."""
        held = {key: tensor.detach() for key, tensor in self.held_tensors(name).items()}
        return trim(self.adapters(name), held)

    def held_tensors(self, name: str) -> dict[str, Tensor]:
        """As `tensors`, but the very parameters and buffers that the model holds."""
        adapters = self.adapters(name)
        found: dict[str, Tensor] = {
            adapter.file_key(path, key): held[k]
            for path, adapter in adapters.items()
            for key, held, k in adapter.slots()
        }
        found |= {key: held[k] for key, held, k in common_slots(adapters.values())}
        return found | {key: bias.parameter for key, bias in self._biases(name).items()}

    def load(
        self,
        name: str,
        config: PeftConfig,
        tensors: dict[str, Tensor],
        *,
        trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        strict: bool = True,
        missing_ok: bool = False,
    ) -> LoadResult:
        """Attach an adapter whose tensors are known: they are assigned, nothing is initialised first.

        Raises:
            ValueError: tensors of a wrong shape; with `strict`, unexpected ones, and missing ones unless `missing_ok`.
                Nothing has changed then.
        """
        thawed = [] if self.configs else [p for p in self.model.parameters() if p.requires_grad]
        with no_collection():
            self.add(name, config, trainable=trainable, autocast_adapter_dtype=autocast_adapter_dtype, initialise=False)
            try:
                return self.assign(name, tensors, strict=strict, missing_ok=missing_ok)
            except Exception:
                self.delete(name)
                self._unwrap(lambda layer: None if layer.adapters else layer.base_layer)
                for parameter in thawed:
                    parameter.requires_grad = True
                raise

    def assign(
        self, name: str, tensors: dict[str, Tensor], *, strict: bool = True, missing_ok: bool = False
    ) -> LoadResult:
        """Overwrite an adapter's tensors, on the devices and in the dtypes that it has. All of them, or none.

        Raises:
            ValueError: as `load`.
        """
        adapters, tensors = pad(self.adapters(name), tensors)
        found = adapters, self._biases(name)
        result = assign(name, tensors, *found, self.model, strict=strict, missing_ok=missing_ok)
        self.trainability.refresh(name)
        return result

    # ---------------------------------------------------------------- merging

    def merge(
        self,
        names: Iterable[str] | None = None,
        safe_merge: bool = False,
        keep_original: str = "cpu",
        progressbar: bool = False,
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        """Fold adapters into the base weights, in float32 with one rounding. Until `unmerge`, exactly they run.

        Arguments:
            names: which; None takes those in `weights`, or the active ones.
            safe_merge: refuse weights that would become NaN or infinite.
            keep_original: where the original weights wait for an exact unmerge: "cpu", "device", or "none". With
                "none" the weights are overwritten where they lie, with temporaries of one layer.
            weights: by adapter, how much of it is merged, as `set_weight` takes it, and sets it; it holds after
                `unmerge` too.

        Raises:
            ValueError: an unknown adapter or pattern, adapters are disabled, two replace the same module, or
                `safe_merge` found broken weights.
            MergedError: one in `weights` is merged already.
            NotMergeableError: a method that is no change of weights.
            All layers are as they were then.
        """
        if not self.state.enabled:
            raise ValueError("adapters are disabled: enable them before merging, or the merged model would run them")
        self._merge(names, weights, safe_merge, keep_original, progressbar)

    def check_merge(
        self,
        names: Iterable[str] | None = None,
        safe_merge: bool = False,
        progressbar: bool = False,
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        """Raise what `merge` would raise for these arguments; nothing changes."""
        with ExitStack() as undo:
            self._check_merge(names, weights or {}, safe_merge, progressbar, undo)

    def _check_merge(
        self,
        names: Iterable[str] | None,
        weights: Mapping[str, Weight],
        safe_merge: bool,
        progressbar: bool,
        undo: ExitStack,
    ) -> tuple[str, ...]:
        """Set the weights, until `undo`, and find out what there is to merge then."""
        names = (weights or self.state.active) if names is None else names
        names = [names] if isinstance(names, str) else list(names)
        foreign = sorted(weights.keys() - set(names))
        if foreign:
            raise ValueError(f"weights has {foreign}, which are not among the adapters to merge: {names}")
        new = tuple(dict.fromkeys(self._known(n) for n in names if n not in self.state.merged))
        undo.callback(self._set_strengths, [(a, a.strength) for n in weights for a in self.adapters(n).values()])
        for name, weight in weights.items():
            self.set_weight(name, weight)
        self._check_together((*self.state.merged, *new))
        here = {path: layer for path, layer in self.layers.items() if layer.to_merge(new)}
        for layer in here.values():
            for name in layer.to_merge(new):
                layer.adapters[name].check_mergeable()
        if safe_merge:
            for path, layer in tqdm(here.items(), "checking", disable=not progressbar, unit="layer"):
                layer.check_merge(new, path)
        return new

    def _merge(
        self,
        names: Iterable[str] | None,
        weights: Mapping[str, Weight] | None,
        safe_merge: bool,
        keep_original: str,
        progressbar: bool,
    ) -> None:
        if keep_original not in ("cpu", "device", "none"):
            raise ValueError(f"keep_original={keep_original!r} is unknown; expected 'cpu', 'device' or 'none'")
        with ExitStack() as undo:
            new = self._check_merge(names, weights or {}, safe_merge, progressbar, undo)
            undo.callback(self._undo_partial_merge)
            shared = shared_parameters(self.model) if keep_original == "none" else set()
            here = {path: layer for path, layer in self.layers.items() if layer.to_merge(new)}
            with kept_tied(layer.site.module for layer in here.values()):
                for layer in tqdm(here.values(), "merging", disable=not progressbar, unit="layer"):
                    alone = shared.isdisjoint(map(id, layer.site.module._parameters.values()))
                    layer.merge(new, keep_original, in_place=keep_original == "none" and alone)
            undo.pop_all()
        self.rounding |= warn_of_rounding({path: layer.rounding for path, layer in here.items()})
        with self.trainability.change():
            self.state.merge((*self.state.merged, *new))

    def _undo_partial_merge(self) -> None:
        """After memory ran out or the user interrupted: layers that kept their originals go back to what the state
        says. Others stay merged, and the same merge, called again, does the rest."""
        for layer in self.layers.values():
            if layer.recoverable and not set(layer.merged_adapters) <= set(self.state.merged):
                layer.unmerge()
                layer.merge(self.state.merged)

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit; what was active before is so again.

        Raises:
            MergedError: they were merged with `keep_original="none"`; nothing has changed then.
        """
        for layer in self.layers.values():
            layer.check_kept()
        for layer in self.layers.values():
            layer.unmerge()
        self.rounding = {}
        with self.trainability.change():
            self.state.merge(())

    # ---------------------------------------------------------------- combining

    def combine(
        self,
        names: Sequence[str],
        weights: Sequence[Weight],
        new_name: str,
        combination_type: str = "svd",
        *,
        progressbar: bool = False,
        **options: Any,
    ) -> Report:
        """Add an adapter `new_name`, a frozen LoRA of scale 1, that is a weighted combination of others.

        Adapters may be of any methods that are a change of weights, at any ranks; layers that only some target combine
        those. Modules trained whole become the base's plus the weighted sum of what training changed in them.

        Arguments:
            weights: one for each adapter: a number, or numbers by block (see `weights.resolve`). 1 is as trained, and
                negative ones subtract.
            combination_type: a name in `combination_types()`.
            options: what that kind reads (`combination_types()[kind].options`).

        Returns:
            How near the result is to what the kind defines, by layer and in all.

        Raises:
            ValueError: unknown adapters, kinds or options, or adapters that this kind cannot combine; nothing has
                changed.
        """
        for name in names:
            self._known(name)
        self._check_new(new_name, LoraConfig())
        made = blend(self, names, weights, combination_type, progressbar=progressbar, **options)
        half = all(tensor.itemsize == 2 for tensor in made.tensors.values())
        self.load(new_name, made.config, made.tensors, autocast_adapter_dtype=not half)
        return made.report

    def reason_against(self, names: Sequence[str], combination_type: str) -> str | None:
        """Why these adapters cannot be combined so, in one sentence, or None if they can.

        Raises:
            ValueError: unknown adapters or an unknown kind.
        """
        names = [self._known(name) for name in names]
        kind = find_combination(combination_type)
        try:
            found = Sources(self, names, [1.0] * len(names))
        except ValueError as error:
            return str(error)
        return kind.reason_against(found.parts, len(names))

    # ---------------------------------------------------------------- small things

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def _known(self, name: str) -> str:
        if name not in self.configs:
            raise ValueError(f"Adapter {name} not found; this model has {list(self.configs)}")
        return name

    def forget_stacks(self) -> None:
        """Have all layers compose anew what runs."""
        for layer in self.layers.values():
            layer.forget()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
