"""A weighted combination of prompts, which is a prompt again: their tokens are added, or put one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..adapted import AdaptedModel
from ..adapter import wide
from ..combine import Sources
from ..tuners.multitask_prompt_tuning import MultitaskPromptTuning, MultitaskPromptTuningConfig
from ..tuners.prefix_tuning import PrefixTuningConfig
from ..tuners.prompt_tuning import PromptTuningConfig
from ..weights import Weight
from .config import PromptLearningConfig
from .layer import NAME
from .prompt import KEY, Prompt

KINDS = ("linear", "cat")
"""How prompts combine: as the weighted sum of their tokens, or one after the other."""
_SIZES = ("num_transformer_submodules", "token_dim")
_SIZES_OF_CACHE = (*_SIZES, "num_attention_heads", "num_layers")


def has_prompts(handle: AdaptedModel, names: Iterable[str]) -> bool:
    """Whether some of these adapters are prompts."""
    return any(name in handle.configs and handle.configs[name].is_prompt_learning for name in names)


@torch.no_grad()
def add_prompts(
    handle: AdaptedModel, names: Sequence[str], weights: Sequence[Weight], new_name: str, kind: str, **options: Any
) -> None:
    r"""Add a frozen prompt: $P = \sum_i w_i P_i$ ("linear"), or $P = [w_1 P_1; w_2 P_2; ...]$ ("cat").

    At weights of 1, "cat" is the prompts active together in this order. What a network makes is taken as it is made, so
    that p-tuning gives plain tokens and a projected prefix a plain one; with a multitask prompt among them the result
    is one, of full rank. Modules trained whole are combined as `AdaptedModel.combine` does.

    Raises:
        ValueError: another kind, any option, adapters that are not prompts of one sort, or that differ in size; a count
            of weights that is not that of the adapters. Nothing has changed then.
    """
    together = f"to run them together, keep them active together: set_adapter({list(names)})"
    if kind not in KINDS:
        raise ValueError(
            f"combination_type={kind!r} works on changes of weights, and virtual tokens are none: prompts are combined "
            f"by 'linear' or 'cat'; {together}"
        )
    if options:
        raise ValueError(f"{kind!r} of prompts has no option {', '.join(sorted(options))}; it reads none")
    found = Sources(handle, names, weights)
    configs: list[Any] = [handle.configs[name] for name in names]
    _check_alike(dict(zip(names, configs, strict=True)), together)
    prompts: list[Any] = [part.adapter for part in found.parts[NAME]]
    tokens = [part.weight * _made(prompt) for part, prompt in zip(found.parts[NAME], prompts, strict=True)]
    tasks = {len(t) for prompt, t in zip(prompts, tokens, strict=True) if isinstance(prompt, MultitaskPromptTuning)}
    if len(tasks) > 1:
        raise ValueError(f"{list(names)} are prompts for {sorted(tasks)} tasks, which must be as many: {together}")
    lengths = [t.shape[-2] for t in tokens]
    if kind == "cat":
        each = max(tasks, default=1)
        total = torch.cat([t.expand(each, -1, -1, -1) for t in tokens], dim=-2)
    elif len(set(lengths)) > 1:
        raise ValueError(
            f"{list(names)} have {lengths} virtual tokens, and a sum needs equal numbers: use combination_type='cat', "
            f"which puts them one after the other; {together}"
        )
    else:
        total = torch.stack(torch.broadcast_tensors(*tokens)).sum(0)
    config, tensors = _packed(configs[0], total, of_tasks=bool(tasks))
    config.modules_to_save = list(found.copies) or None
    handle.load(new_name, config, tensors | found.averages())


def _check_alike(configs: dict[str, Any], together: str) -> None:
    """All are tokens of the input, or all keys and values, and of the same sizes."""
    sorts = {name: _sort(config) for name, config in configs.items()}
    if len(set(sorts.values())) > 1:
        raise ValueError(
            f"{', '.join(f'{name!r} is {sort}' for name, sort in sorts.items())}: virtual tokens can only be combined "
            f"with their own kind; {together}"
        )
    first = next(iter(configs.values()))
    for size in _SIZES_OF_CACHE if first.of_cache else _SIZES:
        found = {name: getattr(config, size) for name, config in configs.items()}
        if len(set(found.values())) > 1:
            raise ValueError(f"prompts that are combined need the same {size}, and have {found}: {together}")


def _sort(config: Any) -> str:
    if not config.is_prompt_learning:
        return f"{config.peft_type}, a change of layers"
    return "keys and values before the text's" if config.of_cache else "tokens before the text's"


def _made(prompt: Prompt) -> Tensor:
    """The tokens (tasks, submodules, count, width) as they run, without dropout."""
    tasks = None
    if isinstance(prompt, MultitaskPromptTuning):
        tasks = torch.arange(len(prompt.prefix_task_cols), device=prompt.site.device)
    training = prompt.training
    tokens = wide(prompt.eval().tokens(tasks))
    prompt.train(training)
    return tokens.reshape(1 if tasks is None else len(tasks), -1, prompt.count, prompt.width)


def _packed(
    first: PromptLearningConfig, tokens: Tensor, of_tasks: bool
) -> tuple[PromptLearningConfig, dict[str, Tensor]]:
    """Config and tensors of a prompt with these tokens, on the model of `first`."""
    own = {"peft_type", "num_virtual_tokens"}
    common = {f.name: getattr(first, f.name) for f in fields(PromptLearningConfig) if f.init and f.name not in own}
    common["num_virtual_tokens"] = tokens.shape[-2]
    rows = tokens.flatten(1, 2)  # (tasks, total, width)
    if not of_tasks:
        plain = PrefixTuningConfig if first.of_cache else PromptTuningConfig
        return plain(**common), {KEY: rows[0]}
    total = rows.shape[1]  # P_k = 1 * (I v_k^T)
    factors = {"prefix_task_cols": torch.eye(total).expand(len(rows), -1, -1), "prefix_task_rows": rows}
    config = MultitaskPromptTuningConfig(**common, num_ranks=total, num_tasks=len(rows))
    return config, {KEY: torch.ones_like(rows[0]), **factors}
