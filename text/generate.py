"""`veneer text generate`: prompts and weighted adapters in, answers out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..core.runs.settings import ConfigError
from ..core.weighted import Weighted, parse_weighted
from .config import Quantization


@dataclass(frozen=True, kw_only=True)
class AnswerConfig:
    """Answer prompts with a language model, with any number of adapters at chosen weights."""

    model: str
    """The model: a directory, a hub id, or a .gguf file or a directory that holds one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. Not given, the newest."""
    prompts: tuple[str, ...]
    """What to answer. One prompt is answered as it is written; several in one batch."""
    adapters: tuple[str, ...] = ()
    """Adapter directories, each PATH or PATH=WEIGHT. 1 is as trained, 0 is off; they add up."""
    each: bool = False
    """Answer the first prompt with the first adapter alone, the second with the second, and so on, in one batch: as
    many prompts as adapters. "base" in place of an adapter is the model without any."""
    chat: bool | None = None
    """Put prompts through the model's chat template, as the user's words. Not given, if the model has one."""
    system: str | None = None
    """The system message of the chat. Not given, the template's own."""
    max_new_tokens: int = 128
    """Most tokens of an answer, at least 1."""
    temperature: float = 0.0
    """0 always takes the likeliest token; above, tokens are drawn, the more freely the higher: 0.7 to 1 is usual."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this chance, above 0 to 1; 1 draws from all."""
    top_k: int = 0
    """Draw only from this many of the likeliest tokens; 0 draws from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have been written before become less likely; 1 leaves them as they are."""
    seed: int = 0
    """Of what is drawn: the same seed gives the same answers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights."""
    quantization: Quantization = "none"
    """Keep the model's weights in 4 or 8 bits (bitsandbytes). Not for GGUF files."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to run: the accelerator if there is one, or the CPU all the same."""

    def validate(self) -> None:
        """Raise `ConfigError` with a line for everything that cannot work."""
        found = list(self._problems())
        if found:
            raise ConfigError("\n".join(found))

    def _problems(self) -> Iterator[str]:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            yield "nothing to answer: give at least one prompt, and none that is empty"
        if self.each and len(self.adapters) != len(self.prompts):
            yield f"each needs as many adapters as prompts, not {len(self.adapters)} and {len(self.prompts)}"
        if self.max_new_tokens < 1:
            yield f"max_new_tokens={self.max_new_tokens} must be at least 1"
        if self.temperature < 0:
            yield f"temperature={self.temperature} must not be negative"
        if not 0 < self.top_p <= 1:
            yield f"top_p={self.top_p} must be above 0 and at most 1"
        if self.top_k < 0:
            yield f"top_k={self.top_k} must not be negative"
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            yield "top_p and top_k have an effect only with a temperature above 0"
        if self.repetition_penalty <= 0:
            yield f"repetition_penalty={self.repetition_penalty} must be positive"
        if self.system is not None and self.chat is False:
            yield "a system message belongs to a chat, and chat is off"

    def sampling(self) -> dict[str, Any]:
        """The options of transformers' `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            **({"do_sample": True} | drawn if self.temperature else {"do_sample": False}),
        }


def main(config: AnswerConfig) -> None:
    """Print the answers; a single one as it is written."""
    streamed = len(config.prompts) == 1
    answers = generate_text(config, stream=streamed)
    if not streamed:
        for prompt, text in zip(config.prompts, answers, strict=True):
            print(f"> {prompt}\n{text}\n")


def generate_text(config: AnswerConfig, stream: bool = False) -> list[str]:
    """The answer to each prompt; with `stream`, a single one is printed while it is written."""
    config.validate()
    import torch

    from .answers import answer, prompt_ids
    from .with_adapters import load_with_adapters

    weighted = [item for item in parse_weighted(config.adapters) if item.path != BASE]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model, tokenizer = load_with_adapters(
        config.model,
        weighted,
        config.revision,
        dtype=getattr(torch, config.dtype),
        quantization=config.quantization,
        device="cpu" if config.device == "cpu" or accelerator is None else accelerator,
    )
    model.eval()
    chat = tokenizer.chat_template is not None if config.chat is None else config.chat
    if config.system is not None and not chat:
        raise ConfigError("a system message belongs to a chat, and this model's tokenizer has no chat template")
    options = config.sampling()
    if config.each:
        options["adapter_names"] = _rows(config.adapters)
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(config.seed)
    rows = [prompt_ids(tokenizer, prompt, chat, config.system) for prompt in config.prompts]
    return answer(model, tokenizer, rows, **options)


BASE = "base"
"""Stands for the model without an adapter where prompts have one each."""


def _rows(adapters: tuple[str, ...]) -> list[str]:
    """The adapter of each row, as mixed batches name them."""
    parsed: list[Weighted] = parse_weighted(adapters)
    return ["__base__" if item.path == BASE else item.name for item in parsed]
