"""Everything before the first step: read, load, tokenise, attach. Ends with a `TextSession`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from ..core import AdaptedModel, PeftConfig, PeftType, TaskType
from ..core.errors import DataError
from ..core.kbit import prepare_model_for_kbit_training
from ..core.runs.adapters import peft_config
from ..core.runs.directory import RunDirectory
from ..core.runs.events import Event, Notice, Progress
from ..core.runs.place import Place
from ..core.runs.random_state import derived_seed, generator
from ..core.runs.recompute import recompute_activations
from ..core.runs.requests import Requests
from ..core.runs.settings import ConfigError
from ..core.runs.trainer import ADAPTER, WEIGHT_DTYPES, Trainer
from .base import load_base
from .batches import Row, pack, single
from .config import TextConfig
from .data import Example, read_examples
from .session import COMPONENT, TextSession
from .task import NextToken
from .tokens import tokenise

_VIRTUAL_TOKENS = 20
"""Of prompt methods, unless `adapter.options` say another number."""
_SHOWN = 5
"""Examples that are cut or left out are named one by one up to this many, then counted."""


def prepare(
    config: TextConfig, directory: RunDirectory, place: Place, requests: Requests
) -> Generator[Event, None, TextSession]:
    """Yields what the user should see meanwhile; returns the session that is ready to train."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    examples, held_out = split(config)  # before the model: what is wrong with the data shows at once
    yield Progress("loading the model", 0, 1)
    model, tokenizer = load_base(
        config.model,
        config.revision,
        dtype=WEIGHT_DTYPES[config.mixed_precision],
        quantization=config.quantization,
        device=place.device,
    )
    yield Progress("loading the model", 1, 1)
    rows = yield from _rows(config, examples, tokenizer)
    held_rows: list[Row] = []
    if held_out:
        held_rows = yield from _rows(config, held_out, tokenizer)
    if config.quantization != "none":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapted = attach(model, config)
    if config.gradient_checkpointing:
        recompute_activations(model)
    model.train()
    task = NextToken(config, model, rows, held_rows, place)
    trainer = Trainer(config, {COMPONENT: adapted}, {COMPONENT: config.adapter.rate()}, task, place)
    return TextSession(config, directory, trainer, task, tokenizer, examples[0].kind, requests)


def _rows(config: TextConfig, examples: list[Example], tokenizer: Any) -> Generator[Event, None, list[Row]]:
    tokens, notes = tokenise(examples, tokenizer, config.max_length, config.completion_only)
    yield from (Notice(note) for note in notes[:_SHOWN])
    if len(notes) > _SHOWN:
        yield Notice(f"{len(notes)} of {len(examples)} examples are too long for max_length={config.max_length}")
    if not tokens:
        raise DataError(f"no example has anything to learn within max_length={config.max_length} tokens")
    return pack(tokens, config.max_length) if config.packing else single(tokens)


def split(config: TextConfig) -> tuple[list[Example], list[Example]]:
    """What is learnt from, and what is held out."""
    examples = read_examples(Path(config.data))
    if config.eval_data is not None:
        return examples, read_examples(Path(config.eval_data))
    count = round(config.eval_fraction * len(examples))
    if config.eval_fraction and count == 0:
        raise ConfigError(
            f"eval_fraction={config.eval_fraction} of {len(examples)} examples is none; hold out more, or set it to 0"
        )
    order = torch.randperm(len(examples), generator=generator(config.seed, "held out")).tolist()
    chosen = set(order[:count])
    learnt = [example for index, example in enumerate(examples) if index not in chosen]
    return learnt, [examples[index] for index in sorted(chosen)]


def attach(model: Any, config: TextConfig) -> AdaptedModel:
    """Freeze the model and give it the adapter to train."""
    options = config.adapter
    method: PeftConfig = peft_config(
        "adapter",
        options,
        config.max_train_steps,
        base_model_name_or_path=config.model,
        revision=config.revision,
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=_VIRTUAL_TOKENS,
    )
    if method.prompts and config.packing:
        raise ConfigError(
            f"packing does not fit {options.method}: its virtual tokens stand once before a row, so the second example "
            "of a row would not see them; set packing to False"
        )
    if method.peft_type == PeftType.MULTITASK_PROMPT_TUNING:
        raise ConfigError(
            "adapter.method=multitask_prompt_tuning needs the task of every row, which these data do not have; use "
            "prompt_tuning, or train it from Python"
        )
    if options.targets == ("all-linear",):
        method.target_modules = "all-linear"
    adapted = AdaptedModel(model)
    with torch.random.fork_rng([]):
        torch.manual_seed(derived_seed(config.seed, "adapter", COMPONENT))
        adapted.add(ADAPTER, method, strict=True)
    if not any(p.requires_grad and p.numel() for p in adapted.parameters_of(ADAPTER)):
        raise ConfigError("the adapter has no trainable parameter; check adapter.options")
    return adapted
