"""One base model, adapters of several methods, one batch: every row names the adapter that answers it.

python answer_mixed.py --model DIR --output adapters      # train a LoRA, an IA3 and a soft prompt, then answer
python answer_mixed.py --model DIR --adapters pirate=adapters/pirate polite=adapters/polite
python answer_mixed.py --tiny                             # a tiny model with random weights: shows that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from veneer import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model

BASE = "__base__"
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
    "the sky": "blue", "blood": "red", "a carrot": "orange", "milk": "white",
}  # fmt: skip
HELD_OUT = ("a frog", "a ripe banana")


class Task(NamedTuple):
    """A way of answering, the method that learns it, and the learning rate that suits the method."""

    answer: str
    config: PeftConfig
    rate: float


TASKS = {
    "pirate": Task(
        "Arr, {thing} be {colour}, matey!",
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        2e-3,
    ),
    "polite": Task(
        "With pleasure: {thing} is {colour}.",
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        5e-2,
    ),
    "brief": Task("{colour}.", PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), 5e-2),
}


def load(directory: str) -> tuple[Any, Any]:
    """Model and tokenizer of a directory, the hub, or a directory with a GGUF file."""
    files = sorted(Path(directory).glob("*.gguf")) if Path(directory).is_dir() else []
    where = {"gguf_file": files[0].name} if files else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **where)
    return model, AutoTokenizer.from_pretrained(directory, **where)


def tiny() -> tuple[Any, Any]:
    """A Llama of a few thousand weights that reads and writes bytes."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(shape), PreTrainedTokenizerFast(tokenizer_object=letters, **special)


def question(tokenizer: Any, thing: str) -> list[int]:
    text = f"What colour is {thing}?"
    if tokenizer.chat_template is None:
        return tokenizer(f"{text}\n")["input_ids"]
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Rows of one length, filled on the left, so that answers begin together."""
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + row for row in rows])


def examples(tokenizer: Any, answer: str) -> dict[str, torch.Tensor]:
    """Questions with their answers; only the answers are learnt."""
    asked = [question(tokenizer, thing) for thing in COLOURS]
    texts = [answer.format(thing=thing, colour=colour) for thing, colour in COLOURS.items()]
    told = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    rows = [[*a, *t] for a, t in zip(asked, told, strict=True)]
    return {
        "input_ids": padded(rows, tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([[-100] * len(a) + t for a, t in zip(asked, told, strict=True)], -100),
    }


def train(model: PeftModel, name: str, batch: dict[str, torch.Tensor], steps: int, rate: float) -> None:
    """Steps of AdamW on four examples each, in an order that a seed fixes; the other adapters rest."""
    model.set_adapter(name)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    order, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        rows = torch.randperm(len(batch["labels"]), generator=order)[:4]
        loss = model(**{key: value[rows] for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name:8} {TASKS[name].config.peft_type:14} loss {losses[0]:.2f} -> {losses[-1]:.2f}", flush=True)


def trained(base: Any, tokenizer: Any, steps: int) -> PeftModel:
    """The base with one adapter for every task."""
    torch.manual_seed(0)
    (first, task), *rest = TASKS.items()
    model = get_peft_model(base, task.config, adapter_name=first)
    for name, task in rest:
        model.add_adapter(name, task.config)
    for name, task in TASKS.items():
        train(model, name, examples(tokenizer, task.answer), steps, task.rate)
    return model


def loaded(base: Any, adapters: dict[str, str]) -> PeftModel:
    """The base with the adapters of some directories or hub ids."""
    (first, directory), *rest = adapters.items()
    model = PeftModel.from_pretrained(base, directory, adapter_name=first)
    for name, directory in rest:
        model.load_adapter(directory, name)
    return model


class Batch:
    """Questions, each asked of the base and of every adapter, as tokens."""

    def __init__(self, model: PeftModel, tokenizer: Any, new_tokens: int):
        self.model, self.tokenizer = model, tokenizer
        self.rows = [(thing, name) for thing in HELD_OUT for name in (BASE, *model.peft_config)]
        self.options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def _answer(self, rows: list[tuple[str, str]], **names: Any) -> list[str]:
        asked = [question(self.tokenizer, thing) for thing, _ in rows]
        ids, mask = padded(asked, self.tokenizer.pad_token_id), padded([[1] * len(a) for a in asked], 0)
        with torch.no_grad():
            out = self.model.generate(input_ids=ids, attention_mask=mask, **names, **self.options)
        return self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    def mixed(self) -> list[str]:
        """One call: row i is answered by the adapter that `adapter_names[i]` names."""
        return self._answer(self.rows, adapter_names=[name for _, name in self.rows])

    def separate(self) -> list[str]:
        """One call for the base and one for each adapter, alone."""
        found = {}
        for name in dict.fromkeys(name for _, name in self.rows):
            mine = [row for row in self.rows if row[1] == name]
            if name != BASE:
                self.model.set_adapter(name)
            with self.model.disable_adapter() if name == BASE else nullcontext():
                found |= dict(zip(mine, self._answer(mine), strict=True))
        return [found[row] for row in self.rows]


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least time of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def named(text: str) -> tuple[str, str]:
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, directory


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="directory (also of a GGUF file) or hub id of a causal language model")
    which.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--adapters", nargs="+", type=named, metavar="NAME=DIR", help="adapters that exist already")
    source.add_argument("--output", type=Path, help="keep the adapters that are trained here")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps for each adapter that is trained")
    parser.add_argument("--new-tokens", type=int, default=16, help="the longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls, of which the fastest counts")
    options = parser.parse_args(arguments)

    base, tokenizer = tiny() if options.tiny else load(options.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = loaded(base, dict(options.adapters)) if options.adapters else trained(base, tokenizer, options.steps)
    if options.output:
        model.save_pretrained(options.output)
    model.eval()

    batch = Batch(model, tokenizer, options.new_tokens)
    mixed, alone = batch.mixed(), batch.separate()
    for (thing, name), text in zip(batch.rows, mixed, strict=True):
        print(f"{thing:14} {name:8} {text.strip()!r}")
    same = sum(a == b for a, b in zip(mixed, alone, strict=True))
    print(f"{same} of {len(mixed)} answers equal those of the adapter alone")
    times = {"one mixed call": seconds(batch.mixed, options.repeats)}
    times[f"{len(model.peft_config) + 1} separate calls"] = seconds(batch.separate, options.repeats)
    print(", ".join(f"{what}: {time:.2f} s" for what, time in times.items()))
    return {"rows": batch.rows, "mixed": mixed, "alone": alone}


if __name__ == "__main__":
    main()
