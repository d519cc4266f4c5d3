"""A fine-tuning run's own part of the training loop: held-out losses, answers, and what its adapter is written as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core import save_adapter
from ..core.atomic import atomic_folder
from ..core.runs.directory import RunDirectory
from ..core.runs.events import Event
from ..core.runs.requests import Requests
from ..core.runs.session import Session
from ..core.runs.settings import plain, to_yaml
from ..core.runs.trainer import ADAPTER, Trainer
from .answers import answer, prompt_ids
from .config import TextConfig
from .events import Answers, Plan
from .task import NextToken
from .tokens import Tokens

COMPONENT = "model"
"""What the one trained component is called in events and checkpoints."""


class TextSession(Session):
    """One call of a fine-tuning run."""

    def __init__(
        self,
        config: TextConfig,
        directory: RunDirectory,
        trainer: Trainer,
        task: NextToken,
        tokenizer: Any,
        kind: str,
        requests: Requests,
    ):
        super().__init__(directory, trainer, requests)
        self.text, self.task, self.tokenizer, self.kind = config, task, tokenizer, kind
        self.model = trainer.models[COMPONENT]

    def plan(self, **known: Any) -> Plan:
        learnt: list[Tokens] = [example for row in self.task.rows for example in row]
        return Plan(
            model=self.text.model,
            method=self.text.adapter.method,
            examples=len(learnt),
            rows=len(self.task.rows),
            tokens=sum(len(example.ids) for example in learnt),
            learnt=sum(sum(example.learnt) for example in learnt),
            held_out=sum(len(row) for row in self.task.held_out),
            **known,
        )

    def look_every(self) -> int:
        return self.text.eval_every

    def look(self, step: int) -> Iterator[Event]:
        if self.task.held_out:
            yield self.task.evaluate(step)
        if self.text.sample_prompts:
            yield self._answers(step)

    def _answers(self, step: int) -> Answers:
        """Greedy answers to the sample prompts, kept as `samples/step-N/answers.jsonl` too."""
        prompts, chat = self.text.sample_prompts, self.kind == "messages"
        rows = [prompt_ids(self.tokenizer, prompt, chat) for prompt in prompts]
        model: Any = self.model.model
        was_training = model.training
        model.eval()
        written = answer(model, self.tokenizer, rows, max_new_tokens=self.text.sample_tokens)
        model.train(was_training)
        with atomic_folder(self.directory.samples / f"step-{step:06d}") as folder:
            lines = [
                json.dumps({"prompt": p, "answer": a}, ensure_ascii=False)
                for p, a in zip(prompts, written, strict=True)
            ]
            (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Answers(step, tuple(zip(prompts, written, strict=True)))

    def write_adapters(self, folder: Path, step: int) -> None:
        recipe = {key: value for key, value in plain(self.text).items() if key not in ("data", "eval_data")}
        about = {"base_model": self.text.model, "steps": str(step), "recipe": to_yaml(recipe)}
        save_adapter(folder, self.model.configs[ADAPTER], self.model.tensors(ADAPTER), about)

    def adapter_folder(self, folder: Path, component: str) -> Path:
        return folder

    def finish(self, step: int) -> Iterator[Event]:
        self.write_adapters(self.directory.root, step)
        yield from ()
