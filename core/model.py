"""`PeftModel`: the user's handle, with PEFT's names and semantics over `AdaptedModel`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapted import AdaptedModel
from .assign import LoadResult
from .card import write_card
from .config import HEADS, PeftConfig, TaskType
from .embeddings import SaveEmbeddings, embeddings
from .errors import PeftWarning
from .files import load_adapter, read_config, read_weights, save_adapter
from .handle import handle_of
from .hotswap import hotswap as swap
from .hotswap import prepare_model_for_compiled_hotswap
from .hub import push
from .initial import as_plain_lora
from .methods import AdapterMethods, BaseTuner
from .padding import trim
from .prompts.layer import NAME as VIRTUAL_TOKENS
from .prompts.layer import PromptLayer
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status


class PeftModel(AdapterMethods, nn.Module):
    """A base model with one or more adapters.

    The layers of `model` are wrapped in place. `peft_model.base_model.model` is the base model itself; anything this
    class does not define is the base model's (`generate`, `config`, `device`, ...).
    """

    _hf_peft_config_loaded = True
    """What transformers' Trainer asks before it trains a quantized model."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ):
        super().__init__()
        _accept(options)
        self.base_model = BaseTuner(model)
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.training = model.training
        if any(vars(m).get("gradient_checkpointing") for m in model.modules()):  # what transformers' own property asks
            # a frozen embedding would cut re-entrant checkpoints off the graph
            getattr(model, "enable_input_require_grads", lambda: None)()
        self.add_adapter(adapter_name, peft_config)

    @property
    def handle(self) -> AdaptedModel:  # type: ignore[override]
        return self.base_model

    # ---------------------------------------------------------------- loading and saving

    @classmethod
    def of(cls, model: nn.Module, autocast_adapter_dtype: bool = True) -> PeftModel:
        """A handle on the adapters that `model` has already, or is still to be given; it changes nothing."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.base_model = BaseTuner(model)
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self.training = model.training
        return self

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **where: Any,
    ) -> PeftModel:
        """A model with the adapter of a directory or hub id, frozen and in evaluation mode unless `is_trainable`.

        where: `subfolder`, `revision`, `token`, `cache_dir`; `torch_device` for the read. Other options of PEFT that
        tune how it loads are accepted and not needed.
        """
        where = _where(where)
        config = config or read_config(model_id, **where)
        tensors = read_weights(model_id, config=config, **where)
        self = _class_for(config, cls).of(model, autocast_adapter_dtype)
        self._load(adapter_name, config, tensors, is_trainable)
        return self

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool | None = None,
        hotswap: bool = False,
        **where: Any,
    ) -> LoadResult:
        """Load a further adapter beside those that are there. It becomes active only if none was.

        With `hotswap` it takes the place of the adapter of that name, which keeps its activity: see `hotswap.py`.

        Raises:
            ValueError: no such adapter, or one that does not fit; nothing has changed then.
        """
        config, tensors = load_adapter(model_id, **_where(where))
        if hotswap:
            swap(self.handle, adapter_name, config, tensors)
            return LoadResult([], [])
        return self._load(adapter_name, config, tensors, is_trainable, autocast_adapter_dtype)

    def _load(
        self,
        name: str,
        config: PeftConfig,
        tensors: dict[str, Tensor],
        trainable: bool,
        autocast: bool | None = None,
    ) -> LoadResult:
        config.inference_mode = not trainable
        training = [] if trainable else [m for m in self.modules() if m.training]
        if training:
            self.eval()  # before there are adapters, which take after their layers
        try:
            result = self.base_model.load(
                name,
                config,
                tensors,
                trainable=trainable,
                autocast_adapter_dtype=self.autocast_adapter_dtype if autocast is None else autocast,
                missing_ok=True,
            )
        except Exception:
            for module in training:
                module.training = True
            raise
        if result.missing_keys:
            keys = [_with_name(config.to_file(key), name) for key in result.missing_keys]
            warnings.warn(
                f"Found missing adapter keys while loading the checkpoint: {keys}.", PeftWarning, stacklevel=3
            )
        return result

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        root: str = "default",
        save_embedding_layers: SaveEmbeddings = "auto",
        **options: Any,
    ) -> None:
        """Write the adapters as `peft` reads them: `root` into the directory, others into folders of their name.

        A `state_dict` of the whole model, gathered shards for example, is taken for the values where one is given.
        With `path_initial_model_for_weight_conversion`, the directory of a LoRA as it was before training, what is
        written is the plain LoRA of twice the rank that does the same over the original base model. `save_as_lora`
        needs no such directory. `save_embedding_layers` says which embeddings of the base model are saved along: see
        `embeddings.py`.
        """
        _accept(options)
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle; adapters are written as safetensors only")
        if Path(save_directory).is_file():
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        unknown = set(names) - set(self.peft_config)
        if unknown:
            raise ValueError(f"selected_adapters {sorted(unknown)} are not among {list(self.peft_config)}")
        if not is_main_process:
            return
        for name in names:
            directory = Path(save_directory) if name == root else Path(save_directory, name)
            config = self.peft_config[name]
            if config.base_model_name_or_path is None:
                config.base_model_name_or_path = getattr(self.get_base_model(), "name_or_path", None) or None
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers)
            tensors = {config.from_file(key): tensor for key, tensor in tensors.items()}
            if path_initial_model_for_weight_conversion is not None:
                initial = read_weights(path_initial_model_for_weight_conversion, config=config)
                config, tensors = as_plain_lora(config, tensors, initial)
            save_adapter(directory, config, tensors)
        write_card(Path(save_directory), self.peft_config[names[0]])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        selected_adapters: Sequence[str] | None = None,
        root: str = "default",
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, made if it is not there.

        options: those of `hub.push` (`commit_message`, `private`, `token`, `revision`, `create_pr`, `tags`, ...).

        Returns:
            The address of the commit.
        """
        return push(partial(self.save_pretrained, selected_adapters=selected_adapters, root=root), repo_id, **options)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **options: Any) -> None:
        """Add a fresh adapter, of any method; it becomes active only if none was."""
        _accept(options)
        _train_head(peft_config, self.get_base_model())
        self.base_model.add(adapter_name, peft_config, autocast_adapter_dtype=self.autocast_adapter_dtype)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every adapted layer."""
        return get_layer_status(self.base_model)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapters together."""
        return get_model_status(self.base_model)

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Before compiling: let `load_adapter(hotswap=True)` change ranks, up to `target_rank`, and scales."""
        prepare_model_for_compiled_hotswap(self, target_rank=target_rank, check_compiled=check_compiled)

    # ---------------------------------------------------------------- the model

    def forward(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward; `adapter_names` names an adapter, or "__base__", for every row of the batch, and
        `task_ids` the task of every row for a multitask prompt."""
        with ExitStack() as call:
            self._tell_tasks(task_ids, call)
            if adapter_names is not None:
                call.enter_context(self.base_model.rows(adapter_names))
            return self.base_model(*args, **kwargs)

    def _tell_tasks(self, task_ids: Tensor | None, call: ExitStack) -> None:
        if task_ids is not None:
            layer = self.base_model.layers.get(VIRTUAL_TOKENS)
            if not isinstance(layer, PromptLayer):
                raise ValueError("task_ids are read by multitask prompts, and this model has none")
            call.enter_context(layer.tasks(task_ids))

    def generate(
        self,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's own `generate`; `adapter_names` and `task_ids` are those of `forward`, for every prompt."""
        model: Any = self.get_base_model()
        with ExitStack() as call:
            self._tell_tasks(task_ids, call)
            if adapter_names is not None:
                given = args[1] if len(args) > 1 else kwargs.get("generation_config")
                config = given or model.generation_config
                copies = [kwargs.get(k, getattr(config, k)) or 1 for k in ("num_beams", "num_return_sequences")]
                call.enter_context(self.base_model.rows(adapter_names, each=max(copies)))
            return model.generate(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The base model; its targeted layers are wrapped."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how much of the model is trained."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _with_name(key: str, name: str) -> str:
    """A key of a file as PEFT's models call it, with the adapter's name in it."""
    path, _, last = key.rpartition(".")
    return f"{path}.{name}.{last}" if last in ("weight", "bias") else f"{key}.{name}"


_WHERE = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
_UNNEEDED = {
    *("torch_device", "low_cpu_mem_usage", "ephemeral_gpu_offload", "use_safetensors", "offload_folder"),
    *("unwrap_compiled",),
}
"""Options of PEFT that tune how it works and change no result: accepted, and without effect here."""
_AT_REST = {
    "key_mapping": {None},
    "ignore_mismatched_sizes": {False},
}
"""Options of PEFT that could change the result: accepted only with values that ask for nothing."""


def _accept(options: dict[str, Any]) -> None:
    """Raise for an option that would be ignored though it matters, or that nobody knows."""
    refused = sorted(
        k
        for k, v in options.items()
        if k not in _UNNEEDED and not any(v is rest or v == rest for rest in _AT_REST.get(k, ()))
    )
    if refused:
        raise TypeError(f"unexpected or unsupported options: {', '.join(refused)}")


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say where an adapter is, under the names of `files`."""
    _accept({k: v for k, v in options.items() if k not in _WHERE})
    return {k: options[k] for k in _WHERE if options.get(k) is not None}


def _train_head(config: PeftConfig, model: nn.Module) -> None:
    """Classification and QA heads are new: an adapter for such a task trains them whole."""
    heads = HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    **options: Any,
) -> PeftModel:
    """Wrap `model` with a fresh, trainable adapter and freeze everything else.

    `mixed` is accepted for PEFT's sake: adapters of different methods may always share a model here.

    Example:
        >>> from torch import nn
        >>> from veneer import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 32 || all params: 104 || trainable%: 30.7692
    """
    _accept(options)
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    if revision is not None:
        peft_config.revision = revision
    if peft_config.task_type is None and peft_config.auto_mapping is None:
        peft_config.auto_mapping = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return _class_for(peft_config, PeftModel, mixed)(model, peft_config, adapter_name, autocast_adapter_dtype)


def _class_for(config: PeftConfig, asked: type[PeftModel], mixed: bool = False) -> type[PeftModel]:
    """The class that is asked for, or where that is only `PeftModel`, the one of the config's task."""
    from .tasks import TASKS, PeftMixedModel

    if mixed:
        return PeftMixedModel
    return TASKS.get(config.task_type, asked) if asked is PeftModel else asked


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default", **options: Any
) -> nn.Module:
    """Attach a fresh adapter to `model` in place, and return the model itself rather than a `PeftModel`."""
    _accept(options)
    AdaptedModel(model).add(adapter_name, peft_config)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: SaveEmbeddings = "auto",
    **options: Any,
) -> dict[str, Tensor]:
    """The tensors of one adapter under the names of its file.

    With PEFT's prefix for a `PeftModel`, without for a model that was injected into. A `state_dict` of the whole model
    is taken for the values where one is given (gathered shards, for example). `save_embedding_layers`: see
    `embeddings.py`.
    """
    _accept(options)
    handle = handle_of(model)
    name_of = handle.configs[adapter_name].to_file if isinstance(model, PeftModel) else str
    prefix = next(f"{path}." if path else "" for path, module in model.named_modules() if module is handle.model)
    along = embeddings(handle, adapter_name, save_embedding_layers, state_dict, prefix)
    if state_dict is None:
        return {name_of(key): tensor for key, tensor in (handle.tensors(adapter_name) | along).items()}
    live_names = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    held = handle.held_tensors(adapter_name)
    given = {key: state_dict[live_names[id(tensor)]] for key, tensor in held.items()}
    return {name_of(key): tensor for key, tensor in (trim(handle.adapters(adapter_name), given) | along).items()}


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default", **options: Any
) -> LoadResult:
    """Overwrite one adapter's tensors; the given dict stays as it is. Returns missing and unexpected keys."""
    _accept(options)
    handle = handle_of(model)
    tensors = {handle.configs[adapter_name].from_file(k): tensor for k, tensor in peft_model_state_dict.items()}
    return handle.assign(adapter_name, tensors, strict=False)


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Activate adapters of a model that was injected into."""
    handle, names = handle_of(model), [adapter_name] if isinstance(adapter_name, str) else adapter_name
    handle.activate(*names)
    if inference_mode:
        handle.set_trainable(names, False)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], *, each: int = 1, tiled: int = 1) -> Iterator[None]:
    """Run row i of a batch through adapter `adapter_names[i]`, or "__base__", in any model that has adapters.

    The arguments are those of `AdaptedModel.rows`.
    """
    with handle_of(model).rows(adapter_names, each=each, tiled=tiled):
        yield


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter of a model that was injected into."""
    handle_of(model).delete(adapter_name)


def load_peft_weights(model_id: str | Path, device: str | torch.device = "cpu", **where: Any) -> dict[str, Tensor]:
    """The tensors of an adapter directory or hub id, under the names of its file."""
    return read_weights(model_id, device, **_where(where))
