"""PEFT's names for what an `AdaptedModel` does, on `PeftModel` and on its `base_model` alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedModel
from .combine import find_combination
from .config import PeftConfig
from .errors import PeftWarning
from .prompts.blend import add_prompts, has_prompts
from .steps import after_step, penalty
from .vectors import add_vectors, are_vectors
from .weights import Weight


class AdapterMethods:
    """Switching, merging and combining adapters; `handle` is the model that has them."""

    handle: AdaptedModel

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of every adapter, by name."""
        return self.handle.configs

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in the order in which they run."""
        return list(self.handle.state.active)

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter or several, in this order. Frozen ones stay frozen; `inference_mode` freezes them."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.handle.activate(*names)
        if inference_mode:
            self.handle.set_trainable(names, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, the next one becomes active."""
        self.handle.delete(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say which adapters may be trained; they are while they are active."""
        self.handle.set_trainable(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model inside; the state before is restored afterwards."""
        with self.handle.disabled():
            yield

    def disable_adapter_layers(self) -> None:
        self.handle.enable(False)

    def enable_adapter_layers(self) -> None:
        self.handle.enable(True)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: Sequence[Weight],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **options: Any,
    ) -> None:
        """Add an adapter that is a weighted combination of others, by any of `combination_types()`.

        Without a `combination_type`, IA3 adapters become an IA3 adapter, whose vectors are the weighted sum of theirs,
        prompts a prompt, by "linear", and others a LoRA by "svd". Prompts also take "cat", which puts their tokens one
        after the other.

        options: those beyond PEFT's, `max_error` or `seed` for example. `svd_full_matrices` changes no result, and is
        not needed. A name that exists already is left as it is, as in PEFT. `AdaptedModel.combine` does the same and
        returns how near the result came.
        """
        if adapter_name in self.peft_config:
            return
        given = {
            "svd_rank": svd_rank,
            "svd_clamp": svd_clamp,
            "svd_driver": svd_driver,
            "density": density,
            "majority_sign_method": None if majority_sign_method == "total" else majority_sign_method,
        }
        options |= {key: value for key, value in given.items() if value is not None}
        if has_prompts(self.handle, adapters):
            add_prompts(self.handle, adapters, weights, adapter_name, combination_type or "linear", **options)
            return
        if combination_type is None and not options and are_vectors(self.handle, adapters):
            add_vectors(self.handle, adapters, weights, adapter_name)
            return
        combination_type = combination_type or "svd"
        unread = sorted(options.keys() & given.keys() - find_combination(combination_type).options.keys())
        if unread:
            warnings.warn(f"{combination_type!r} does not read {', '.join(unread)}", PeftWarning, stacklevel=2)
        read = {key: value for key, value in options.items() if key not in unread}
        self.handle.combine(adapters, weights, adapter_name, combination_type, **read)

    def update_and_allocate(self, global_step: int) -> None:
        """After an optimizer step, before the gradients are cleared: let AdaLoRA move its budget."""
        after_step(self.handle, global_step)

    # ---------------------------------------------------------------- merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        keep_original: str = "cpu",
        weights: Mapping[str, Weight] | None = None,
    ) -> None:
        """Fold adapters (None: the active ones) into the base weights; `unmerge_adapter` undoes it bit for bit.

        `keep_original` and `weights` are those of `AdaptedModel.merge`.
        """
        names = [*(weights or self.active_adapters)] if adapter_names is None else adapter_names
        merged = [n for n in names if n in self.handle.state.merged]
        if merged:
            warnings.warn(f"Already merged: {', '.join(merged)}. Nothing to do for them.", PeftWarning, stacklevel=2)
        self.handle.merge(names, safe_merge, keep_original, weights=weights)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        if not self.handle.state.merged:
            warnings.warn("Already unmerged. Nothing to do.", PeftWarning, stacklevel=2)
        self.handle.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        weights: Mapping[str, Weight] | None = None,
    ) -> nn.Module:
        """The base model with adapters (None: the active ones) folded in, in place, and no trace of them left."""
        return self.handle.merge_and_detach(adapter_names, safe_merge, progressbar, weights)

    def unload(self) -> nn.Module:
        """The base model with its original modules, and no trace of adapters left."""
        return self.handle.detach()


class BaseTuner(AdapterMethods, AdaptedModel):
    """The `base_model` of a `PeftModel`: adapters of any method, and PEFT's names for their verbs."""

    @property
    def handle(self) -> AdaptedModel:  # type: ignore[override]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with the adapters' `penalty` added to the loss that it returns, as in PEFT."""
        outputs = super().forward(*args, **kwargs)
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and self.state.trainable:
            outputs.loss = loss + penalty(self)
        return outputs
