"""The settings of `veneer text train`: the single source of its flags and its YAML.

No model library is imported here, so that help and mistakes show at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.runs import adapters
from ..core.runs.config import RunConfig, own_fields_first

Quantization = Literal["none", "8bit", "4bit"]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(adapters.AdapterOptions):
    """The adapter of the language model."""

    learning_rate: float | None = None
    """Peak rate of AdamW. Not given: 2e-4; for methods with few parameters, which need larger steps, 5e-3 (IA3, VeRA,
    LN tuning) or 1e-2 (prompt methods)."""
    targets: tuple[str, ...] = ()
    """Layers to adapt, as dotted name suffixes such as `q_proj`; "all-linear" for all but the head. Not given, what is
    usual for the method and the model."""

    def rate(self) -> float:
        """The learning rate, or what is usual for the method."""
        return self.learning_rate or _RATES.get(self.method, 2e-4)


_RATES = {
    **dict.fromkeys(("ia3", "vera", "ln_tuning"), 5e-3),
    **dict.fromkeys(("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "adaption_prompt"), 1e-2),
}


@own_fields_first
@dataclass(frozen=True, kw_only=True)
class TextConfig(RunConfig):
    """Teach a causal language model from examples (supervised fine-tuning of an adapter).

    Running the same output directory again resumes it where it stopped, or says that it is complete.
    """

    data: Path
    """The examples, a JSON object a line, all of one kind: {"text": ...}, {"prompt": ..., "completion": ...}, or a chat
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}."""
    output_dir: Path
    """The run's directory: settings, metrics, samples, checkpoints, and in the end the adapter."""
    model: str
    """The model to adapt: a directory, a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, or a .gguf file, or a
    directory that holds one and no config.json."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Not given, the newest."""
    quantization: Quantization = "none"
    """Keep the frozen weights in 4 or 8 bits (bitsandbytes; 4 bits as QLoRA: nf4, quantized twice): a quarter to an
    eighth of the memory, slower steps. Not for GGUF files, which are unpacked."""
    adapter: AdapterOptions = AdapterOptions()
    """What is trained."""

    completion_only: bool = True
    """Learn to write completions and the assistant's turns only; what they answer is read, not learnt. False: all of
    it."""
    max_length: int = 512
    """Most tokens of an example, at least 2; the end of a longer one is cut off, which is told."""
    packing: bool = False
    """Put several examples into one row of `max_length` tokens instead of padding each. They do not see each other:
    attention is block-diagonal and positions start anew. Faster for short examples; a batch then counts rows."""
    eval_data: Path | None = None
    """Held-out examples, in the same form. Not given, `eval_fraction` of `data`."""
    eval_fraction: float = 0.0
    """Share of the examples, 0 to 0.5, that is held out of training to measure the loss on. They follow from the
    seed."""
    eval_every: int = 50
    """Steps between evaluations and samples; 0 for step 0 and the end only."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts that are answered along with every evaluation, greedily. For chats they are the user's words."""
    sample_tokens: int = 48
    """Most tokens of such an answer, at least 1."""

    max_train_steps: int = 200
    """Optimizer steps, at least 1. Two or three passes over the data are a fair start; a run can be prolonged later."""
    train_batch_size: int = 4
    """Examples (packed: rows) in one forward pass, per process."""

    @classmethod
    def may_change(cls) -> frozenset[str]:
        return super().may_change() | {"eval_every", "sample_prompts", "sample_tokens"}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.adapter.problems("adapter")
        if self.adapter.method == "none":
            yield "nothing to train: adapter.method is none"
        yield from self.below(2, "max_length")
        yield from self.below(1, "sample_tokens")
        yield from self.below(0, "eval_every")
        if not 0 <= self.eval_fraction <= 0.5:
            yield f"eval_fraction={self.eval_fraction} must lie between 0 and 0.5"
        if self.eval_data is not None and self.eval_fraction:
            yield "eval_data and eval_fraction are both given; held-out examples come from one of them"
        for name in ("data", "eval_data"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                yield f"{name}={path} is not a file"
