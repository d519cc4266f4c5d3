"""transformers' `Trainer` for models with our adapters.

transformers recognises adapters by the class of another library. Its plain `Trainer` trains ours too, but writes the
whole model at every checkpoint, finds no labels to evaluate with, and loads no adapter back. This subclass mends these
places and no more; with a model without adapters it is the plain one.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_loss, find_labels

from ..core.errors import AdapterFileError
from ..core.model import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from ..core.steps import after_step, load_training_state, training_state

TRAINING_STATE = "adapter_training_state.pt"
"""What methods such as AdaLoRA need beside their tensors to go on exactly."""


class Trainer(transformers.Trainer):
    """As transformers' `Trainer`: checkpoints hold adapters only, and resuming and the best model load them back.

    After each optimizer step the adapters get their turn, as AdaLoRA asks; no callback of your own is needed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model = self._adapted()
        if model is None:
            return
        base: Any = model.get_base_model()
        self._describe(base)
        self.add_callback(_AfterStep(model))

    def _describe(self, base: Any) -> None:
        """Tell the plain trainer about the model inside what it asked the outer one."""
        given = self.args.label_names
        self.label_names = find_labels(type(base)) if given is None else given
        self.can_return_loss = can_return_loss(type(base))
        parameters = inspect.signature(base.forward).parameters.values()
        takes_options = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.model_accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", takes_options)
        causal = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        if hasattr(self, "_loss_shifts_labels"):
            self._loss_shifts_labels = causal and not getattr(base.config, "is_encoder_decoder", False)
        if causal and self.label_smoother is not None:
            self.label_smoother = partial(self.label_smoother, shift_labels=True)  # type: ignore[assignment]

    def _adapted(self, model: nn.Module | None = None) -> PeftModel | None:
        """The adapted model behind whatever wraps it, or None."""
        found: Any = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        return found if isinstance(found, PeftModel) else None

    def _set_signature_columns_if_needed(self) -> None:
        model = self._adapted()
        if self._signature_columns is None and model is not None:
            names = inspect.signature(model.get_base_model().forward).parameters
            self._signature_columns = [*names, *{"label", "label_ids", *self.label_names}]
        super()._set_signature_columns_if_needed()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        model.save_pretrained(folder, state_dict=state_dict)
        state = training_state(model)
        if state:
            torch.save(state, folder / TRAINING_STATE)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapted = self._adapted(model)
        if adapted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_checkpoint(adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapted = self._adapted()
        if adapted is None:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            load_checkpoint(adapted, self.state.best_model_checkpoint)


def load_checkpoint(model: PeftModel, folder: str | Path) -> None:
    """Give the adapters of `model` the tensors and training state of a checkpoint's.

    Raises:
        AdapterFileError: an adapter is missing there or has other tensors.
    """
    folder = Path(folder)
    for name in model.peft_config:
        where = folder if name == "default" else folder / name
        tensors = load_peft_weights(where)
        strange = sorted(tensors.keys() ^ get_peft_model_state_dict(model, adapter_name=name).keys())
        if strange:
            raise AdapterFileError(f"{where} is no checkpoint of adapter {name!r}: {strange[:3]} do not match")
        set_peft_model_state_dict(model, tensors, name)
    if (folder / TRAINING_STATE).is_file():
        load_training_state(model, torch.load(folder / TRAINING_STATE, weights_only=True))


class _AfterStep(transformers.TrainerCallback):
    def __init__(self, model: PeftModel):
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after_step(self.model, state.global_step)
