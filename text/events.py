"""What a fine-tuning run tells beyond any other: its data, and answers along the way."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.runs import events
from ..core.runs.events import Event


@dataclass(frozen=True, kw_only=True)
class Plan(events.Plan):
    """Sent once, before the first step: what is going to be trained, on what, from where to where."""

    method: str
    examples: int
    rows: int
    """Rows that they fill: fewer than examples when packed."""
    tokens: int
    """Tokens in all, and of these `learnt`."""
    learnt: int
    held_out: int
    """Examples that are held out."""

    def about(self) -> str:
        packed = f" in {self.rows} rows" if self.rows != self.examples else ""
        held = f", {self.held_out} held out" if self.held_out else ""
        return f"{self.method}; {self.examples} examples{packed}{held}, {self.learnt} of {self.tokens} tokens learnt"


@dataclass(frozen=True)
class Answers(Event):
    """The sample prompts were answered after `step` steps."""

    step: int
    answers: tuple[tuple[str, str], ...]
    """Prompt and answer."""

    def line(self) -> str:
        return "\n".join(f"  {prompt!r} -> {answer!r}" for prompt, answer in self.answers)
