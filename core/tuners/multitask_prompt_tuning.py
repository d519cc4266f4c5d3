"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861): a prompt for all tasks, and a low-rank factor of each.

P_k = P * (u_k v_k^T),  P (n, d),  u_k (n, r),  v_k (r, d)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import method
from ..config import PeftType, TaskType
from ..files import read_tensors
from ..prompts.prompt import KEY
from .prompt_tuning import PromptTuning, PromptTuningConfig


class MultitaskPromptTuningInit(StrEnum):
    """What a prompt starts as."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Options of multitask prompt tuning, under PEFT's names."""

    peft_type: PeftType | str | None = PeftType.MULTITASK_PROMPT_TUNING
    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    """"RANDOM" or "TEXT" for training on the source tasks. For a target task, from a prompt trained on those: its
    shared prompt with the mean of its factors ("AVERAGE_SOURCE_TASKS"), with those of one task ("EXACT_SOURCE_TASK"),
    or with fresh ones ("ONLY_SOURCE_SHARED")."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The `adapter_model.safetensors` of that trained prompt."""
    prompt_tuning_init_task: int | None = 0
    """The source task, from 0, whose factors are taken."""
    num_ranks: int | None = 1
    """Rank r of a task's factor: 1 in the paper."""
    num_tasks: int | None = 1
    """Tasks that are trained together."""

    own_keys: ClassVar[tuple[str, ...]] = (*PromptTuningConfig.own_keys, "prefix_task_")

    def _check_init(self) -> None:
        allowed = [i.value for i in MultitaskPromptTuningInit]
        if self.prompt_tuning_init not in allowed:
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} is unknown; expected one of {allowed}")
        self.prompt_tuning_init = MultitaskPromptTuningInit(self.prompt_tuning_init)
        self._check_text()

    def complete_for(self, sizes: dict[str, int | None]) -> None:
        if self.num_transformer_submodules is None and self.task_type == TaskType.SEQ_2_SEQ_LM:
            self.num_transformer_submodules = 2  # as PEFT: before the decoder's text too
        super().complete_for(sizes)


@method(MultitaskPromptTuningConfig)
class MultitaskPromptTuning(PromptTuning):
    def __init__(self, config: MultitaskPromptTuningConfig, *place: Any):
        super().__init__(config, *place)
        self.parts = config.num_transformer_submodules or 1
        tasks, rank = config.num_tasks or 1, config.num_ranks or 1
        if config.prompt_tuning_init in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"):
            tasks = 1  # the target's
        self.prefix_task_cols = self.new(tasks, config.total_virtual_tokens, rank)
        self.prefix_task_rows = self.new(tasks, rank, self.width)

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        for factor in (self.prefix_task_cols, self.prefix_task_rows):
            nn.init.normal_(factor, std=0.02)
        if self.config.prompt_tuning_init in FROM_SOURCE and not self.config.inference_mode:
            self._take_from_source()

    def _take_from_source(self) -> None:
        config = self.config
        kind, path = config.prompt_tuning_init, config.prompt_tuning_init_state_dict_path
        if path is None:
            raise ValueError(f"prompt_tuning_init={kind} needs prompt_tuning_init_state_dict_path, the trained prompt")
        source = read_tensors(Path(path))
        names = {KEY: self.embedding.weight}
        if kind != "ONLY_SOURCE_SHARED":
            names |= {n: getattr(self, n) for n in ("prefix_task_cols", "prefix_task_rows")}
        for name, target in names.items():
            if name not in source:
                raise ValueError(f"{path} has no {name!r}: it is no multitask prompt; it has {sorted(source)[:4]}")
            value = source[name]
            if kind == "AVERAGE_SOURCE_TASKS" and name != KEY:
                value = value.mean(0, keepdim=True)
            elif kind == "EXACT_SOURCE_TASK" and name != KEY:
                task = config.prompt_tuning_init_task
                if not 0 <= task < len(value):
                    raise ValueError(f"prompt_tuning_init_task={task}: {path} has tasks 0 to {len(value) - 1}")
                value = value[task : task + 1]
            if value.shape != target.shape:
                raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
            target.copy_(value)

    def tokens(self, task_ids: Tensor | None) -> Tensor:
        if task_ids is None:
            raise ValueError("task_ids cannot be None: pass the task of every row, from 0, to a multitask prompt")
        factor = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]  # (batch, n, d)
        return self.embedding.weight * factor
