"""Which program reads a file whole, in part, or not at all, and why. No tensors and no other program needed.

What the programs do is a table of rules, each one fact: where it holds for a layer, what comes of it, and in which
words. The facts are of diffusers 0.42, peft 0.21, kohya's sd-scripts 0.9, ComfyUI 0.3 and A1111's webui 1.10; the tests
hold those of the first two to the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .dialects.canonical import Entry, Plan

WHOLE, PART, NO = "whole", "in part", "no"


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file."""

    program: str
    reads: str
    """"whole", "in part" or "no"."""
    why: str = ""
    """What is lost, or why nothing is read; what else the program needs, where it reads the file whole."""


def is_tucker(layer: Entry) -> bool:
    """Whether the kernel of a convolution is itself factored."""
    return not layer.keys.keys().isdisjoint(("lora_mid.weight", "hada_t1", "lokr_t2"))


class File:
    """What rules ask about a whole file."""

    def __init__(self, plan: Plan):
        self.dialect, self.family = plan.dialect.name, plan.family
        self.alphas: dict[str, set[float]] = {}
        """Distinct alphas of each component."""
        self.paths: dict[str, list[str]] = {}
        for layer in plan.entries:
            self.alphas.setdefault(layer.component, set()).add(round(layer.scale * (layer.rank or 1), 6))
            self.paths.setdefault(layer.component, []).append(layer.path)


class Case(NamedTuple):
    """What a rule asks about: one layer, and its file."""

    layer: Entry
    file: File

    @property
    def dialect(self) -> str:
        return self.file.dialect

    @property
    def plain(self) -> bool:
        """Whether it is LoRA and nothing more."""
        return self.layer.method == "lora" and not self.tucker and not self.layer.magnitude

    @property
    def tucker(self) -> bool:
        return is_tucker(self.layer)

    @property
    def is_attention(self) -> bool:
        """Whether it is one of a UNet's attention layers, or any of a text encoder."""
        return self.layer.component != "unet" or ".to_" in self.layer.path

    @property
    def mixed_alphas(self) -> bool:
        """Whether the layers of its component differ in alpha."""
        return len(self.file.alphas[self.layer.component]) > 1


class Effect(Enum):
    """What comes of a fact."""

    REFUSES = 1
    """One such layer, and nothing of the file is read."""
    DROPS = 2
    """The layer is left out."""
    CHANGES = 3
    """The layer is read as something else than it is."""
    NEEDS = 4
    """The layer is read, with something more."""


class Rule(NamedTuple):
    """One fact about a program."""

    holds: Callable[[Case], bool]
    effect: Effect
    why: str


def verdicts(plan: Plan) -> list[Verdict]:
    """The verdict of every program on a file; ours first."""
    file = File(plan)
    cases = [Case(layer, file) for layer in plan.entries]
    return [_ours(plan), *(_judge(program, rules, cases) for program, rules in PROGRAMS.items())]


def _ours(plan: Plan) -> Verdict:
    if not plan.entries:
        return Verdict("Veneer", NO, "no key has a place in the model")
    if plan.unmatched:
        return Verdict("Veneer", PART, f"keys without a place: {len(plan.unmatched)}; refused unless strict=False")
    return Verdict("Veneer", WHOLE)


def _judge(program: str, rules: tuple[Rule, ...], cases: list[Case]) -> Verdict:
    if not cases:
        return Verdict(program, NO, "no key is known")
    hits = [(rule, [i for i, case in enumerate(cases) if rule.holds(case)]) for rule in rules]
    hits = [(rule, layers) for rule, layers in hits if layers]
    dropped = {i for rule, layers in hits if rule.effect is Effect.DROPS for i in layers}
    refused = [rule.why for rule, _ in hits if rule.effect is Effect.REFUSES]
    if refused:
        return Verdict(program, NO, refused[0])
    reads = WHOLE if all(rule.effect is Effect.NEEDS for rule, _ in hits) else PART
    whys = [f"{rule.why} ({len(layers)} of {len(cases)} layers)" for rule, layers in hits]
    return Verdict(program, NO if len(dropped) == len(cases) else reads, "; ".join(whys))


def _is(*dialects: str) -> Callable[[Case], bool]:
    return lambda case: case.dialect in dialects


def _is_not(*dialects: str) -> Callable[[Case], bool]:
    return lambda case: case.dialect not in dialects


REFUSES, DROPS, CHANGES, NEEDS = Effect

PROGRAMS: dict[str, tuple[Rule, ...]] = {
    "diffusers": (
        Rule(_is("peft"), REFUSES, "it reads files of its own, not PEFT's directories"),
        Rule(_is("comfy"), REFUSES, "it does not know ComfyUI's names"),
        Rule(lambda c: c.layer.method != "lora", REFUSES, "it reads LoRA only"),
        Rule(lambda c: c.tucker, REFUSES, "it does not read Tucker kernels (lora_mid)"),
        Rule(lambda c: c.dialect == "kohya" and _lacks_out_proj(c), REFUSES,
             "its converter stops at text encoders that adapt q, k and v without out_proj"),
        Rule(lambda c: c.dialect == "kohya" and bool(c.layer.magnitude), CHANGES,
             "DoRA's magnitudes are dropped, and plain LoRA is applied"),
        Rule(lambda c: c.dialect == "kohya" and c.file.family != "flux" and c.mixed_alphas and c.is_attention, CHANGES,
             "alphas that differ by layer are lost on attention and text encoders"),
    ),
    "PEFT": (
        Rule(_is_not("peft"), REFUSES, "it reads directories of its own only"),
        Rule(lambda c: c.layer.method not in ("lora", "loha", "lokr", "ia3", "oft"), REFUSES, "it has no such method"),
        Rule(lambda c: bool(c.layer.magnitude) and c.layer.method != "lora", CHANGES, "it knows DoRA over LoRA only"),
    ),
    "sd-scripts": (
        Rule(_is_not("kohya"), REFUSES, "it reads kohya's names only"),
        Rule(lambda c: c.file.family == "sdxl" and _key(c).startswith(_DIFFUSERS_UNET), DROPS,
             "it names SDXL's UNet as LDM does (input_blocks, ...), not as diffusers does"),
        Rule(lambda c: not c.plain, NEEDS, "with the LyCORIS plug-in"),
    ),
    "ComfyUI": (
        Rule(_is("peft"), REFUSES, "it reads single files, not PEFT's directories"),
        Rule(_is("xlabs"), REFUSES, "it does not know XLabs' names"),
        Rule(lambda c: c.layer.method == "ia3", DROPS, "it has no IA3"),
        Rule(lambda c: c.dialect == "diffusers" and c.layer.component == "unet" and ".to_" in c.layer.path, DROPS,
             "it does not find the UNet's attention under diffusers' names"),
        Rule(lambda c: c.dialect == "diffusers" and c.layer.scale != 1, CHANGES,
             "scales other than 1 stand in the header, which it ignores"),
        Rule(lambda c: c.dialect == "diffusers" and bool(c.layer.magnitude), CHANGES,
             "DoRA's magnitudes are ignored under PEFT's name"),
    ),
    "A1111": (
        Rule(_is_not("kohya"), REFUSES, "it reads kohya's names only"),
        Rule(lambda c: c.file.family == "flux", REFUSES, "it does not run Flux"),
    ),
}  # fmt: skip


_DIFFUSERS_UNET = tuple(f"lora_unet_{name}" for name in ("down_blocks", "mid_block", "up_blocks"))


def _key(case: Case) -> str:
    """One of the layer's keys in the file."""
    return next(iter(case.layer.keys.values()))


def _lacks_out_proj(case: Case) -> bool:
    paths = case.file.paths[case.layer.component]
    return any(p.endswith("q_proj") for p in paths) and not any(p.endswith("out_proj") for p in paths)
