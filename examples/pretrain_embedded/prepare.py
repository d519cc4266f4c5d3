"""Step 1: the art packages become `sprites.npz` (RGBA, 96 pixels, lossless) and `concepts.json`.

    NODE_PATH=packages/renderer/node_modules python prepare.py --packages packages --out data

README.md says how to fetch the packages.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

PIXELS = 96
RASTER = Path(__file__).parents[1] / "embedded_material" / "raster.cjs"

SETS = {  # style -> package
    "noto": "iconify-json-noto-1.2.9",
    "blob": "iconify-json-noto-v1-1.2.5",
    "flat": "iconify-json-fluent-emoji-flat-1.2.6",
    "3d": "lobehub-fluent-emoji-3d-1.1.0",
}
LABELS, CATEGORIES = "emojibase-data-17.0.0", "emoji-datasource-google-16.0.0"

HELD_OUT = set(
    """black cat|pouting cat|poodle|service dog|polar bear|hedgehog|sloth|zebra|flamingo|parrot|peacock|T-Rex|blowfish
    |lobster|raccoon|llama|baby chick|tiger|mammoth|dodo|robot|jack-o-lantern|teddy bear|nesting dolls|teapot|backpack
    |cowboy hat face|ogre|alien monster|racing car|motor scooter|sailboat|castle|cactus|pretzel|bento box|violin
    |roller skate|piñata|lollipop|cupcake|pineapple""".replace("\n    ", "").split("|")
)
"""Never shown in training, in any style: what adapters are to learn, and what generalisation is measured on."""

SKIPPED_CATEGORIES = {"Flags", "Component"}
SKIPPED = {
    *("alphanum", "keycap", "arrow", "av-symbol", "math", "punctuation", "time", "gender", "currency"),
    *("transport-sign", "other-symbol", "family", "warning"),
}
KINDS = {  # start of the subcategory -> a word for the kind
    "animal": "animal",
    "plant": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food": "food",
    "drink": "drink",
    "face": "face",
    "cat-face": "cat",
    "transport": "vehicle",
    "place": "place",
    "clothing": "clothes",
    "musical-instrument": "musical instrument",
    "sport": "sport",
    "person": "person",
    "tool": "tool",
    "hand": "hand",
}
RARER = {"People & Body": 0.4, "Symbols": 0.4}
"""Weight of categories that have many near-copies."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw the training art and list its concepts."""

    packages: Path
    """Folder with the unpacked packages."""
    out: Path
    """Folder for `sprites.npz` and `concepts.json`."""


def code(text: str) -> str:
    """A code point sequence as one key, without the variation selector that packages disagree about."""
    return text.upper().replace("-FE0F", "")


def read_concepts(packages: Path) -> list[dict[str, Any]]:
    """Every emoji that is a picture of something, with its label, tags and kind."""
    known = {code(entry["hexcode"]): entry for entry in _json(packages / LABELS / "en" / "data.json")}
    concepts = []
    for entry in _json(packages / CATEGORIES / "emoji.json"):
        found = known.get(code(entry["unified"]))
        if found is None or entry["category"] in SKIPPED_CATEGORIES or entry["subcategory"] in SKIPPED:
            continue
        label, sub = found["label"], entry["subcategory"]
        if "key:" in label or label.lower().startswith("flag"):
            continue
        concepts.append(
            {
                "code": code(entry["unified"]),
                "label": label,
                "tags": [tag for tag in found.get("tags", []) if re.fullmatch(r"[a-z][a-z '\-]{1,14}", tag)][:12],
                "short": [name.replace("_", " ") for name in entry["short_names"][:2]],
                "sub": sub,
                "kind": next((kind for start, kind in KINDS.items() if sub.startswith(start)), ""),
                "weight": RARER.get(entry["category"], 1.0),
                "held_out": label in HELD_OUT,
            }
        )
    missing = HELD_OUT - {concept["label"] for concept in concepts}
    if missing:
        raise ValueError(f"held-out concepts that the packages do not have: {sorted(missing)}")
    return concepts


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def draw_icons(package: Path, concepts: list[dict[str, Any]], folder: Path) -> Iterator[tuple[int, Image.Image]]:
    """Images of an iconify package, by concept."""
    icons = _json(package / "icons.json")
    names = _icon_names(package, set(icons["icons"]) | set(icons.get("aliases", {})), concepts)
    wanted = list(names)
    while wanted:  # the renderer aborts on a few icons: go on after the one that it died of
        subprocess.run(["node", str(RASTER), str(package), str(folder), str(PIXELS), *wanted], capture_output=True)
        done = {name for name in wanted if (folder / f"{name}.png").exists()}
        wanted = [name for name in wanted if name not in done][1:]
    for name, index in names.items():
        if (folder / f"{name}.png").exists():
            yield index, Image.open(folder / f"{name}.png")


def _icon_names(package: Path, available: set[str], concepts: list[dict[str, Any]]) -> dict[str, int]:
    """Icon name -> concept: by code point where the package has a table of those, else by label."""
    table = {code(key): name for key, name in _json(package / "chars.json").items()}
    names: dict[str, int] = {}
    for index, concept in enumerate(concepts):
        label = concept["label"]
        spellings = [label, f"{label} face", label.replace(" face", "")]
        guesses = [table.get(concept["code"])] if table else [_slug(spelling) for spelling in spellings]
        name = next((guess for guess in guesses if guess in available), None)
        if name is not None:
            names.setdefault(name, index)
    return names


def _slug(label: str) -> str:
    return re.sub(
        r"[^a-z0-9]+", "-", label.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "").replace("ñ", "n")
    ).strip("-")


def read_images(folder: Path, concepts: list[dict[str, Any]]) -> Iterator[tuple[int, Image.Image]]:
    """Images of a package that holds one file per code point."""
    files = {code(path.stem): path for path in folder.iterdir()}
    for index, concept in enumerate(concepts):
        if concept["code"] in files:
            yield index, Image.open(files[concept["code"]])


def fitted(image: Image.Image) -> Image.Image:
    """RGBA, square, PIXELS wide."""
    image = image.convert("RGBA")
    if image.width == image.height:
        return image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    image.thumbnail((PIXELS, PIXELS))
    square = Image.new("RGBA", (PIXELS, PIXELS))
    square.paste(image, ((PIXELS - image.width) // 2, (PIXELS - image.height) // 2))
    return square


def read_art(options: Options, concepts: list[dict[str, Any]], style: str) -> dict[int, Image.Image]:
    """All images of one style. What the renderer cannot draw of Noto comes from another package's 64-pixel PNGs."""
    package = options.packages / SETS[style]
    if not (package / "icons.json").exists():
        return dict(read_images(package / "assets", concepts))
    folder = options.out / "png" / style
    folder.mkdir(parents=True, exist_ok=True)
    drawn = dict(draw_icons(package, concepts, folder))
    if style == "noto":
        drawn = dict(read_images(options.packages / CATEGORIES / "img" / "google" / "64", concepts)) | drawn
    return drawn


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(options.packages)
    blobs, index = [], []
    for style in SETS:
        for concept, image in sorted(read_art(options, concepts, style).items()):
            sprite = fitted(image)
            if np.asarray(sprite)[..., 3].mean() < 4:
                continue  # nothing to see
            encoded = io.BytesIO()
            sprite.save(encoded, "WEBP", lossless=True, quality=60)
            blobs.append(np.frombuffer(encoded.getvalue(), np.uint8))
            index.append((style, concept))
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(options.out / "sprites.npz", data=np.concatenate(blobs), offsets=offsets)
    (options.out / "concepts.json").write_text(json.dumps({"concepts": concepts, "index": index}), encoding="utf-8")
    print(f"{len(concepts)} concepts, {dict(Counter(style for style, _ in index))}, {offsets[-1] / 1e6:.1f} MB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
