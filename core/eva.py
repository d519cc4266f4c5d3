"""EVA's pass over data: components of every layer's inputs, a redistribution of the ranks, and new factors.

Method and options are in `init/eva.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import ExitStack
from copy import copy
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapted import AdaptedModel
from .config import PREFIX, PeftConfig
from .init.eva import Components, EvaConfig
from .layer import AdaptedLayer
from .sites import find
from .status import handle_of
from .targets import condense, select, walk
from .tuners.lora import LoraConfig

Prepare = Callable[[Any, Any, str], Tensor]


def unmasked_tokens(inputs: Any, config: LoraConfig) -> Tensor:
    """Which tokens of a batch of text count, as indices (n, 2): those attended to and, with a label mask, learned."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs are a {type(inputs).__name__}, not a mapping: pass prepare_model_inputs_fn for them")
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    eva = config.eva_config
    assert isinstance(eva, EvaConfig)
    if eva.use_label_mask and "labels" in inputs:
        mask = mask & (inputs["labels"] != eva.label_mask_value)
    return mask.nonzero()


def chosen_rows(layer_input: Any, model_input: Any, name: str) -> Tensor:
    """The rows (n, features) of a layer's input that `unmasked_tokens` chose."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x[model_input.T.unbind()]


def all_rows(layer_input: Any, model_input: Any, name: str) -> Tensor:
    """A layer's whole input as rows (n, features)."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x.flatten(0, -2)


def call_with_keywords(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = call_with_keywords,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = unmasked_tokens,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = chosen_rows,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A new A (rank, features) for every linear layer, by path; ranks are redistributed by explained variance.

    The batches are gone through, again and again if need be, until the components that the ranks need have settled.

    Arguments:
        model: one with adapters, or a bare one together with `peft_config`.
        prepare_model_inputs_fn: (batch, config) -> what the next function gets; by default the tokens that count.
        prepare_layer_inputs_fn: (layer input, that, layer path) -> rows (n, features); one for all layers or by path.
            None takes every row.
        gather_distributed_inputs: False where every process shall look at its own data only.

    Raises:
        ValueError: no data, no such layers, or batches with fewer rows than a layer has components.
    """
    with ExitStack() as undo:
        layers, config = _layers(model, peft_config, adapter_name, undo)
        if isinstance(dataloader, Sized) and not len(dataloader):
            raise ValueError("the dataloader is empty: EVA needs at least one batch")
        given = prepare_layer_inputs_fn or all_rows
        unknown = given.keys() - layers.keys() if isinstance(given, Mapping) else set()
        if unknown:
            raise ValueError(f"prepare_layer_inputs_fn names {sorted(unknown)}, which are none of the adapted layers")
        watched = {
            path: _Watched(path, config, given.get(path, all_rows) if isinstance(given, Mapping) else given)
            for path in layers
        }
        gather = gather_distributed_inputs and torch.distributed.is_available() and torch.distributed.is_initialized()
        for path, module in layers.items():
            hook = module.register_forward_pre_hook(watched[path].see)
            undo.callback(hook.remove)
        training = model.training
        undo.callback(model.train, training)
        model.eval()
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

        def run(batch: Any) -> dict[str, Any]:
            batch = _moved(batch, device)
            prepared = prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn else batch
            for one in watched.values():
                one.model_input, one.seen = prepared, None
            forward_fn(model, batch)
            return {path: one.seen for path, one in watched.items()}

        return _components(watched, dataloader, config, run, gather, show_progress_bar)


class _Watched:
    """A layer whose inputs are looked at."""

    def __init__(self, path: str, config: LoraConfig, prepare: Prepare):
        eva = config.eva_config
        assert isinstance(eva, EvaConfig)
        self.path, self.prepare = path, prepare
        self.rank = config.rank_and_alpha(path)[0]
        self.most = round(self.rank * eva.rho)
        self.model_input: Any = None
        self.seen: Tensor | None = None
        self.active = True

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.active:
            self.seen = self.prepare(args, self.model_input, self.path).float()


def _components(
    watched: dict[str, _Watched],
    dataloader: Iterable[Any],
    config: LoraConfig,
    run: Callable[[Any], dict[str, Any]],
    gather: bool,
    progress: bool,
) -> dict[str, Tensor]:
    eva = config.eva_config
    assert isinstance(eva, EvaConfig)
    seen = run(next(iter(dataloader)))
    leader = _same_inputs(seen)
    for path, first in leader.items():
        watched[first].most = max(watched[first].most, watched[path].most)
    for path, first in leader.items():
        watched[path].most = watched[first].most
        watched[path].active = path == first
    firsts = [path for path, first in leader.items() if path == first]
    found = {path: Components(watched[path].most) for path in firsts}
    settled = {path: torch.zeros(watched[path].most, dtype=torch.bool) for path in firsts}
    ranks = {path: one.most for path, one in watched.items()}
    batches = len(dataloader) if isinstance(dataloader, Sized) else None
    bar = tqdm(cycle(dataloader), "EVA", disable=not progress, unit="batch")
    for number, batch in enumerate(bar):
        for path in firsts:
            watched[path].active = not settled[path][: ranks[path]].all()
        waiting = [path for path in firsts if watched[path].active]
        if not waiting:
            break
        bar.set_postfix(layers=f"{len(firsts) - len(waiting)}/{len(firsts)}")
        seen = run(batch)
        for path in waiting:
            rows = _gathered(seen[path]) if gather else seen[path]
            if len(rows) >= found[path].number:
                settled[path] = (found[path].add(rows) >= eva.tau).cpu()
        if all(components.count for components in found.values()):
            ranks = _ranks(watched, found, leader)
        elif batches is not None and number + 1 >= batches:
            short = next(path for path, components in found.items() if not components.count)
            raise ValueError(
                f"no batch has the {found[short].number} rows that {short} needs for as many components: use larger "
                "batches, or lower r or rho"
            )
    bar.close()
    result = {}
    for path, rank in ranks.items():
        components = found[leader[path]]
        vectors = components.vectors[:rank]
        result[path] = vectors / components.values[:rank, None].sqrt() if eva.whiten else vectors
    return result


def _ranks(watched: dict[str, _Watched], found: dict[str, Components], leader: dict[str, str]) -> dict[str, int]:
    """Ranks by layer: the budget goes to the components that explain the largest shares of their layer's variance."""
    ordered = sorted(watched, key=lambda path: path != leader[path])  # leaders first
    shares = {path: found[leader[path]].shares[: watched[path].most] for path in ordered}
    owners = [path for path in ordered for _ in shares[path]]
    best = torch.cat(list(shares.values())).argsort(descending=True)
    won = Counter(owners[i] for i in best[: sum(one.rank for one in watched.values())].tolist())
    ranks = {path: won[path] for path in ordered}
    for path, first in leader.items():  # one that is looked at has at least the rank of those like it
        if ranks[first] < ranks[path]:
            ranks[first], ranks[path] = ranks[path], ranks[first]
    return ranks


def _same_inputs(seen: Mapping[str, Tensor | None]) -> dict[str, str]:
    """For each layer the first one that sees the same input: they share one decomposition."""
    unseen = [path for path, rows in seen.items() if rows is None]
    if unseen:
        raise ValueError(f"{unseen[0]} was not called in a forward pass: leave it out with exclude_modules")
    first: dict[str, str] = {}
    for path, rows in seen.items():
        assert rows is not None
        same = (p for p in dict.fromkeys(first.values()) if _equal(seen[p], rows))
        first[path] = next(same, path)
    return first


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.device == other.device and one.shape == other.shape and torch.equal(one, other)


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _layers(
    model: nn.Module, config: LoraConfig | None, name: str, undo: ExitStack
) -> tuple[dict[str, nn.Module], LoraConfig]:
    """The linear layers in question by path, and the options; adapters are off until `undo`."""
    if config is not None and not any(isinstance(m, AdaptedLayer) for m in model.modules()):
        modules = {place.path: place.module for place in select(model, copy(config), walk(model))}
        layers = {path: m for path, m in modules.items() if (site := find(type(m))) is not None and site.pointwise}
    else:
        handle = handle_of(model)
        found: PeftConfig | None = config or handle.configs.get(name)
        if not isinstance(found, LoraConfig):
            raise ValueError(f"adapter {name!r} is no LoRA of this model, which has {list(handle.configs)}")
        config = found
        undo.enter_context(handle.disabled())
        layers = {p: handle.layers[p].base_layer for p, a in handle.adapters(name).items() if a.site.pointwise}
    if config.eva_config is None or config.init_lora_weights != "eva":
        raise ValueError(f"the config says init_lora_weights={config.init_lora_weights!r}: EVA needs 'eva'")
    if not layers:
        raise ValueError("EVA is for linear layers, and the adapter has none")
    return layers, config


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = call_with_keywords,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = unmasked_tokens,
    prepare_layer_inputs_fn: Prepare | Mapping[str, Prepare] | None = chosen_rows,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a LoRA with `init_lora_weights="eva"` from data: A spans what varies most among each layer's inputs.

    Ranks, and with `adjust_scaling_factors` alphas, become those that the data ask for; layers left without rank lose
    their adapter. Layers that are not linear keep their plain start. The arguments are those of `get_eva_state_dict`,
    whose result may be given instead of a `dataloader`.

    Raises:
        ValueError: neither data nor a result is given, the adapter is merged or no EVA adapter, or as
            `get_eva_state_dict`; nothing has changed then.
    """
    handle = handle_of(model)
    if adapter_name in handle.state.merged:
        raise ValueError(f"adapter {adapter_name!r} is merged into the base weights: unmerge it first")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("give a dataloader, or an eva_state_dict that get_eva_state_dict found")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    _replace(handle, adapter_name, eva_state_dict)


def _replace(handle: AdaptedModel, name: str, found: Mapping[str, Tensor]) -> None:
    """Put an adapter of the found ranks in the place of adapter `name`."""
    config, tensors = handle.configs[name], handle.tensors(name)
    assert isinstance(config, LoraConfig)
    found = {path.removeprefix(PREFIX): a for path, a in found.items()}
    unknown = sorted(found.keys() - handle.adapters(name).keys())
    if unknown:
        raise ValueError(f"eva_state_dict has {unknown[:3]}, where adapter {name!r} has no layers")
    config.target_modules, config.rank_pattern, config.alpha_pattern = _patterns(handle, name, config, found)
    kept = {path for path in handle.adapters(name) if path not in found or len(found[path])}
    tensors = {key: t for key, t in tensors.items() if key.rsplit(".", 2)[0] in kept or key.rpartition(".")[0] in kept}
    for path, a in found.items():
        if len(a):
            b = tensors[f"{path}.lora_B.weight"]
            tensors[f"{path}.lora_A.weight"] = a
            tensors[f"{path}.lora_B.weight"] = b.new_zeros(len(b), len(a))
    active, trainable = handle.state.active, name in handle.state.trainable
    dtype = next(iter(handle.adapters(name).values())).dtype
    handle.delete(name)
    handle.load(name, config, tensors, trainable=trainable, autocast_adapter_dtype=dtype == torch.float32)
    handle.activate(*active)
    handle._unwrap(lambda layer: None if layer.adapters else layer.base_layer)


def _patterns(
    handle: AdaptedModel, name: str, config: LoraConfig, found: Mapping[str, Tensor]
) -> tuple[set[str], dict[str, int], dict[str, float]]:
    """Targets, ranks and alphas that select what was found."""
    eva = config.eva_config
    assert isinstance(eva, EvaConfig)
    targets, ranks, alphas = set(), {}, {}
    for path in handle.adapters(name):
        rank, alpha = config.rank_and_alpha(path)
        new = len(found[path]) if path in found else rank
        if not new:
            continue
        targets.add(path)
        if eva.adjust_scaling_factors and new != rank:
            alpha *= new / rank
        if new != config.r:
            ranks[f"^{re.escape(path)}"] = new
        if alpha != config.lora_alpha:
            alphas[f"^{re.escape(path)}"] = alpha
    return condense(targets, walk(handle.model)), ranks, alphas
