"""Training scenes as numbers: what is drawn where, and the caption that says so.

A scene is one row of a table of floats, so a pool of half a million scenes is small, is made by plain Python on a few
processes, and is drawn on the GPU by `render.py` as a pure function of the row.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from names import MASS, called, counted, is_plural, with_article

COLOURS = {
    "red": (226, 46, 44),
    "orange": (246, 140, 32),
    "yellow": (252, 210, 44),
    "green": (66, 170, 66),
    "blue": (46, 120, 226),
    "purple": (146, 70, 196),
    "pink": (246, 130, 180),
    "brown": (140, 86, 48),
    "black": (52, 52, 56),
    "gray": (140, 144, 148),
    "white": (240, 240, 244),
}
PASTELS = {
    "red": (246, 170, 164),
    "orange": (255, 206, 150),
    "yellow": (255, 240, 160),
    "green": (178, 226, 170),
    "blue": (164, 206, 250),
    "purple": (212, 184, 244),
    "pink": (255, 204, 224),
    "brown": (204, 172, 140),
    "black": (28, 28, 32),
    "gray": (196, 200, 204),
    "white": (255, 255, 255),
}
COLOUR_NAMES = list(COLOURS)
PLACES = {
    "grass": ("on the grass", "in a meadow", "in a green field"),
    "beach": ("on the beach", "by the sea"),
    "night": ("at night", "under the stars", "in space"),
    "snow": ("in the snow", "in winter"),
    "sunset": ("at sunset",),
    "sky": ("in the sky", "in the clouds"),
    "water": ("in the water", "under water"),
    "city": ("in the city", "in front of a city skyline"),
}
PATTERNS = {
    "stripes": "on a striped background",
    "dots": "on a dotted background",
    "checks": "on a checkered background",
}
GROUNDS = ["plain", *PLACES, *PATTERNS]
STYLES = {"noto": 0.46, "blob": 0.12, "flat": 0.20, "3d": 0.22}
"""Share of each art style; the first is what a caption without a style means."""
RARE = ["sks", "ohwx", "zwx", "qvy", "xjy", "bnha", "olis", "kitto", "vrk", "tjw", "plm", "grox"]
"""Words without a meaning, for adapters to fill: in captions they stand before nouns and change nothing."""

# One row: three things, then the ground.
THINGS = 3
THING = 7  # sprite (-1: none), centre right, centre down, size, degrees, mirrored, colour (0: its own, i + 1)
GROUND = 8  # kind, first colour (3), second colour (3), seed
WIDTH = THINGS * THING + GROUND


class Ground(NamedTuple):
    kind: str = "plain"
    phrase: str = ""
    first: tuple[float, ...] = (255, 255, 255)
    second: tuple[float, ...] = (255, 255, 255)


class Emoji:
    """The prepared data: concepts, their names, and which sprite is which concept in which style."""

    def __init__(self, folder: Path):
        meta = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
        self.concepts: list[dict[str, Any]] = meta["concepts"]
        self.names = called(self.concepts)
        self.sprite = {(style, index): row for row, (style, index) in enumerate(meta["index"])}
        self.index: list[tuple[str, int]] = [(style, index) for style, index in meta["index"]]

    def drawn_in(self, style: str) -> list[int]:
        """Concepts to train on that this style draws."""
        return [i for i, c in enumerate(self.concepts) if (style, i) in self.sprite and not c["held_out"]]


class Writer:
    """Invents scenes, reproducibly from a seed."""

    def __init__(self, emoji: Emoji, seed: int):
        self.emoji, self.rng = emoji, random.Random(seed)
        self._drawn = {style: emoji.drawn_in(style) for style in STYLES}
        self._weights = {
            style: list(accumulate(emoji.concepts[i]["weight"] for i in indices))
            for style, indices in self._drawn.items()
        }

    def scene(self) -> tuple[np.ndarray, str]:
        """A row of the table and its caption."""
        rng = self.rng
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        concept, layout = self._concept(style), self._layout()
        name = self._name(concept)
        if layout is self._group and (name in MASS or is_plural(name)):
            layout = self._single
        things, phrase, bare = layout(style, concept, name)
        ground = self._ground()
        row = np.zeros(WIDTH, np.float32)
        row[: THINGS * THING : THING] = -1
        row[: len(things) * THING] = np.ravel(things)
        row[THINGS * THING :] = (GROUNDS.index(ground.kind), *ground.first, *ground.second, rng.randrange(1 << 16))
        return row, self._caption(style, concept, phrase, bare, ground.phrase)

    # ---- what is drawn ----

    def _concept(self, style: str) -> int:
        weights = self._weights[style]
        return self._drawn[style][bisect(weights, self.rng.random() * weights[-1])]

    def _name(self, concept: int) -> str:
        """The label mostly; an everyday name often, when there is one; at times with its kind ("tulip plant")."""
        called = self.emoji.names[concept]
        if called.aliases and self.rng.random() < 0.45:
            return self.rng.choice(called.aliases)
        kind = self.emoji.concepts[concept]["kind"]
        if " " not in called.label and kind and not is_plural(called.label) and self.rng.random() < 0.04:
            return f"{called.label} {kind}"
        return called.label

    def _coloured(self, name: str, chance: float) -> tuple[str, int]:
        """The name, maybe in another colour, and that colour's number."""
        if self.rng.random() >= chance:
            return name, 0
        colour = self.rng.randrange(len(COLOUR_NAMES))
        base = " ".join(word for word in name.split() if word not in COLOURS) or name
        return f"{COLOUR_NAMES[colour]} {base}", colour + 1

    def _layout(self) -> Callable[[str, int, str], tuple[list[list[float]], str, str]]:
        """Things, their noun phrase, and the phrase without its article where that is a caption too."""
        return self.rng.choices([self._single, self._pair, self._group], [0.80, 0.11, 0.09])[0]

    def _thing(self, style: str, concept: int, right: float, down: float, size: float, colour: int) -> list[float]:
        rng = self.rng
        degrees = rng.gauss(0, 4) if rng.random() < 0.5 else 0.0
        sprite = self.emoji.sprite[style, concept]
        return [sprite, right, down, size, degrees, float(rng.random() < 0.5), colour]

    def _single(self, style: str, concept: int, name: str) -> tuple[list[list[float]], str, str]:
        rng = self.rng
        name, colour = self._coloured(name, 0.18)
        size, draw = rng.uniform(0.80, 0.95), rng.random()
        if draw < 0.06:
            size, name = rng.uniform(0.32, 0.5), f"{rng.choice(['small', 'tiny', 'little'])} {name}"
        elif draw < 0.10:
            size, name = rng.uniform(0.97, 1.1), f"{rng.choice(['big', 'large', 'huge'])} {name}"
        elif draw < 0.22:
            size = rng.uniform(0.55, 0.8)
        free = (1 - min(size, 0.97)) * 0.4
        right, down = (0.5 + rng.uniform(-free, free) for _ in range(2))
        return [self._thing(style, concept, right, down, size, colour)], with_article(name), name

    def _pair(self, style: str, concept: int, name: str) -> tuple[list[list[float]], str, str]:
        rng, other = self.rng, self._concept(style)
        first, colour = self._coloured(name, 0.2)
        second, other_colour = self._coloured(self._name(other), 0.2)
        places, relation = [(0.27, 0.5), (0.73, 0.5)], rng.choice(["and", "and", "next to", "with"])
        if rng.random() < 0.3:
            places, relation = [(0.5, 0.27), (0.5, 0.73)], "above"
        if rng.random() < 0.5:
            places = places[::-1]
            relation = "below" if relation == "above" else relation
        things = [
            self._thing(style, which, right + rng.uniform(-0.02, 0.02), down + rng.uniform(-0.02, 0.02), size, tint)
            for (right, down), which, tint in zip(places, (concept, other), (colour, other_colour), strict=True)
            for size in [rng.uniform(0.42, 0.5)]
        ]
        return things, f"{with_article(first)} {relation} {with_article(second)}", ""

    def _group(self, style: str, concept: int, name: str) -> tuple[list[list[float]], str, str]:
        rng = self.rng
        number, places = rng.choice(
            [("two", [(0.27, 0.5), (0.73, 0.5)]), ("three", [(0.5, 0.28), (0.27, 0.72), (0.73, 0.72)])]
        )
        name, colour = self._coloured(name, 0.2)
        things = [self._thing(style, concept, *place, rng.uniform(0.42, 0.48), colour) for place in places]
        return things, counted(number, name), ""

    def _ground(self) -> Ground:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.56:
            return Ground(phrase="on a white background" if rng.random() < 0.15 else "")
        if draw < 0.76:
            name = rng.choice(COLOUR_NAMES)
            colour = PASTELS[name] if rng.random() < 0.6 or name == "white" else COLOURS[name]
            shade = tuple(min(255, max(0, value + rng.gauss(0, 4))) for value in colour)
            return Ground("plain", f"on {with_article(name)} background", shade)
        if draw < 0.92:
            place = rng.choice(list(PLACES))
            return Ground(place, rng.choice(PLACES[place]))
        pattern = rng.choice(list(PATTERNS))
        return Ground(pattern, PATTERNS[pattern], PASTELS[rng.choice(COLOUR_NAMES)], PASTELS[rng.choice(COLOUR_NAMES)])

    # ---- what is said ----

    def _caption(self, style: str, concept: int, phrase: str, bare: str, ground: str) -> str:
        rng = self.rng
        if rng.random() < 0.1:
            return ""  # classifier-free guidance needs a model of no caption (Ho and Salimans 2022, arXiv:2207.12598)
        if rng.random() < 0.06:
            phrase = re.sub(r"^an? (\S+)", lambda m: f"a {rng.choice(RARE)} {m[1]}", phrase)
        draw = rng.random()
        if draw < 0.20:
            phrase = f"a photo of {phrase}"
        elif draw < 0.30:
            phrase = f"{rng.choice(['an emoji', 'a drawing', 'a picture', 'an icon'])} of {phrase}"
        elif draw < 0.40 and bare:
            phrase = bare
        elif draw < 0.45 and bare:
            phrase = f"{bare} emoji"
        tags = self.emoji.concepts[concept]["tags"]
        if bare and tags and rng.random() < 0.15:
            phrase = ", ".join([phrase, *rng.sample(tags, min(len(tags), rng.randint(1, 2)))])
        if ground:
            phrase += rng.choice([" ", ", "]) + ground
        if style != next(iter(STYLES)) or rng.random() < 0.2:
            phrase += f", {style} style"
        return phrase


def scenes(emoji: Emoji, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` rows of the table (float32, (count, WIDTH)) and their captions."""
    writer = Writer(emoji, seed)
    rows, captions = zip(*(writer.scene() for _ in range(count)), strict=True)
    return np.stack(rows), list(captions)


def one(sprite: int, size: float = 0.88, *, mirrored: bool = False) -> np.ndarray:
    """The row of one sprite in the middle of a white ground."""
    row = np.zeros(WIDTH, np.float32)
    row[: THINGS * THING : THING] = -1
    row[:THING] = sprite, 0.5, 0.5, size, 0.0, mirrored, 0
    row[THINGS * THING :] = (0, *(255,) * 6, 0)
    return row
