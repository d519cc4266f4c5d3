"""Data sets: pictures with captions, to train on.

A data set is a folder that `veneer dreambooth` could train on as it is: `0001.png`, its caption in `0001.txt`, what is
known about it in `0001.json`, a small copy in `small/`, what was removed in `removed/`. The files are the only record,
so that two tabs that add at once lose nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ...core.files import write_text
from ...diffusion.families import EMBEDDED_PATH
from ...diffusion.images import caption_of
from .. import safety
from ..errors import NotFound, StudioError
from ..workspace import Workspace, new_id, read_json, write_json
from . import trash

MAX_PICTURES = 500
"""In one data set: more than any subject or style needs."""
THUMBNAIL = 256
"""Longer side of the small copies, in pixels."""


@dataclass(frozen=True)
class Picture:
    """One picture of a data set."""

    id: str
    """`0001`: its number in the data set."""
    path: Path
    thumbnail: Path
    caption: str
    """Empty for none: then the trigger words are learnt alone."""
    name: str
    """As its file was called."""
    width: int
    height: int
    sharpness: float
    """Strength of its sharpest edges, 0 to 1020; a blurred photo has less than 16."""
    colours: str
    """What it looks like from afar: 8 x 8 pixels in hex."""


@dataclass(frozen=True)
class Dataset:
    """A user's pictures of one subject or style."""

    id: str
    name: str
    created: float
    """Seconds since 1970."""
    folder: Path
    pictures: tuple[Picture, ...]
    goal: str = ""
    """"subject" or "style" where it is known, as of the samples."""
    trigger: str = ""
    """The words that the captions call it by, where they are known."""


@dataclass(frozen=True)
class FileReport:
    """What became of one file."""

    name: str
    message: str
    """In plain words; goes on from the name: "added", "is a GIF; save it as PNG or JPEG"."""
    picture: str | None = None
    """The picture that it became or belongs to; None if it was refused."""


# ---------------------------------------------------------------- the sets


def create(ws: Workspace, user: str, name: str, goal: str = "", trigger: str = "") -> Dataset:
    """A new, empty data set."""
    safety.check_room(ws, user)
    dataset = new_id()
    about = {"name": safety.display_name(name), "created": time.time(), "goal": goal, "trigger": trigger}
    write_json(ws.dataset(user, dataset) / "dataset.json", about)
    return get(ws, user, dataset)


def list_datasets(ws: Workspace, user: str) -> list[Dataset]:
    """A user's data sets, the newest first."""
    folder = ws.datasets(user)
    found = [_read(path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((dataset for dataset in found if dataset), key=lambda dataset: -dataset.created)


def get(ws: Workspace, user: str, dataset: object) -> Dataset:
    """One data set with its pictures.

    Raises:
        NotFound: the user has none of this id.
    """
    found = _read(ws.dataset(user, dataset))
    if found is None:
        raise NotFound("You have no such data set. Choose one from the list, or make a new one.")
    return found


def rename(ws: Workspace, user: str, dataset: object, name: str) -> None:
    path = get(ws, user, dataset).folder / "dataset.json"
    write_json(path, read_json(path) | {"name": safety.display_name(name)})


def delete(ws: Workspace, user: str, dataset: object) -> None:
    """To the trash; `restore` brings it back."""
    trash.throw_away(ws, user, "datasets", dataset)


def restore(ws: Workspace, user: str, dataset: object) -> Dataset:
    trash.put_back(ws, user, "datasets", dataset)
    return get(ws, user, dataset)


def snapshot(dataset: Dataset, folder: Path) -> None:
    """The pictures and captions as they are now, in a folder of their own, without copying a byte where links work.

    A run keeps one: what is added or reworded later must not change what a resumed run learns from.
    """
    folder.mkdir(parents=True)
    for picture in dataset.pictures:
        for path in (picture.path, picture.path.with_suffix(".txt")):
            if path.exists():
                try:
                    os.link(path, folder / path.name)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(path, folder / path.name)


def _read(folder: Path) -> Dataset | None:
    about = read_json(folder / "dataset.json")
    if about is None:
        return None
    pictures = tuple(_picture(path) for path in sorted(folder.glob("[0-9]*.png")))
    return Dataset(id=folder.name, folder=folder, pictures=pictures, **about)


def _picture(path: Path) -> Picture:
    thumbnail = path.parent / "small" / f"{path.stem}.jpg"
    return Picture(path.stem, path, thumbnail, caption_of(path, ""), **read_json(path.with_suffix(".json")))


# ---------------------------------------------------------------- the pictures


def add_files(ws: Workspace, user: str, dataset: object, paths: Iterable[str | Path]) -> list[FileReport]:
    """Add pictures, captions (`dog.txt` for `dog.jpg`) and zip archives of both. What cannot be used is told, file by
    file, and the rest is kept."""
    folder = get(ws, user, dataset).folder
    files = [Path(path) for path in paths]
    if len(files) > safety.MAX_FILES:
        raise StudioError(f"{len(files)} files at once are too many: choose up to {safety.MAX_FILES}.")
    safety.check_room(ws, user, sum(path.stat().st_size for path in files))
    ws.temporary.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ws.temporary) as unpacked:
        reports: list[FileReport] = []
        found = list(_with_archives(files, Path(unpacked), reports))
        captions = {_stem(name): _read_caption(path) for name, path in found if _is_caption(name)}
        for name, path in found:
            if not _is_caption(name):
                reports.append(_add(folder, name, path, captions.pop(_stem(name), "")))
        return reports + [_late_caption(folder, stem, text) for stem, text in captions.items()]


def set_caption(ws: Workspace, user: str, dataset: object, picture: str, caption: str) -> None:
    """What a picture shows, in words; an empty caption removes it."""
    path = _find(ws, user, dataset, picture).path.with_suffix(".txt")
    _write_caption(path, caption)


def remove_image(ws: Workspace, user: str, dataset: object, picture: str) -> None:
    """Take a picture out; `restore_image` brings it back, with its caption."""
    path = _find(ws, user, dataset, picture).path
    _move_picture(path.parent, path.parent / "removed", path.stem)


def restore_image(ws: Workspace, user: str, dataset: object, picture: str) -> None:
    folder = get(ws, user, dataset).folder
    removed = [path.stem for path in (folder / "removed").glob("*.png")]
    if picture not in removed:
        raise NotFound("This picture is not among the removed ones.")
    _move_picture(folder / "removed", folder, picture)


def _find(ws: Workspace, user: str, dataset: object, picture: object) -> Picture:
    for found in get(ws, user, dataset).pictures:
        if found.id == picture:
            return found
    raise NotFound("This picture is not in the data set any more.")


def _move_picture(source: Path, target: Path, stem: str) -> None:
    """The picture goes last on its way in and first on its way out: without it, the others do not count."""
    target.mkdir(exist_ok=True)
    endings = (".json", ".txt", ".png") if source.name == "removed" else (".png", ".txt", ".json")
    for ending in endings:
        if (path := source / f"{stem}{ending}").exists():
            os.replace(path, target / path.name)


def _with_archives(files: list[Path], into: Path, reports: list[FileReport]) -> Iterator[tuple[str, Path]]:
    for number, path in enumerate(files):
        if not safety.is_archive(path):
            yield path.name, path
            continue
        try:
            yield from safety.unpack(path, into / str(number))
        except StudioError as error:
            reports.append(FileReport(safety.one_line(path.name), str(error)))


def _is_caption(name: str) -> bool:
    return name.lower().endswith((".txt", ".caption"))


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_caption(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(8 * safety.MAX_CAPTION).decode("utf-8-sig", "replace")


def _write_caption(path: Path, caption: object) -> None:
    if not isinstance(caption, str):
        raise StudioError("A caption must be text.")
    text = safety.one_line(caption)
    if len(text) > safety.MAX_CAPTION:
        raise StudioError(f"The caption has {len(text)} characters; keep to {safety.MAX_CAPTION}.")
    if text:
        write_text(path, text + "\n")
    else:
        path.unlink(missing_ok=True)


def _add(folder: Path, name: str, path: Path, caption: str) -> FileReport:
    shown = safety.one_line(PurePosixPath(name).name)[:120] or "a file without a name"
    try:
        image = safety.read_picture(path)
        number = _reserve(folder)
    except StudioError as error:
        return FileReport(shown, str(error))
    target = folder / f"{number}.png"
    thumbnail = image.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    safety.write_picture(folder / "small" / f"{number}.jpg", thumbnail)
    write_json(target.with_suffix(".json"), _about(image, shown))
    _write_caption(target.with_suffix(".txt"), caption[: safety.MAX_CAPTION])
    safety.write_picture(target, image)
    return FileReport(shown, "added" if not caption else "added with its caption", number)


def _reserve(folder: Path) -> str:
    """The next free number, taken by creating its file, which only one of several can."""
    taken = [path.stem for path in (*folder.glob("[0-9]*.json"), *folder.glob("removed/[0-9]*.json"))]
    if len(taken) >= 2 * MAX_PICTURES or len(list(folder.glob("[0-9]*.png"))) >= MAX_PICTURES:
        raise StudioError(f"is left out: a data set holds at most {MAX_PICTURES} pictures")
    for number in count(max(map(int, taken), default=0) + 1):
        try:
            (folder / f"{number:04}.json").open("x").close()
        except FileExistsError:
            continue
        return f"{number:04}"
    raise AssertionError


def _late_caption(folder: Path, stem: str, text: str) -> FileReport:
    """A caption whose picture came earlier."""
    name = PurePosixPath(stem).name
    for path in sorted(folder.glob("[0-9]*.png")):
        if PurePosixPath(read_json(path.with_suffix(".json"))["name"]).stem == name:
            _write_caption(path.with_suffix(".txt"), text[: safety.MAX_CAPTION])
            return FileReport(f"{name}.txt", "is now the caption of its picture", path.stem)
    return FileReport(f"{name}.txt", "is left out: there is no picture of the same name")


# ---------------------------------------------------------------- the doctor


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its owner may want to change before training."""

    kind: str
    """"few", "small", "blurry", "duplicate" or "caption"."""
    message: str
    picture: str | None = None
    """None for the whole set."""


def doctor(dataset: Dataset, resolution: int = 512) -> list[Finding]:
    """What may spoil a training on this data set.

    Arguments:
        resolution: side of the base model's training squares in pixels.
    """
    pictures = dataset.pictures
    found = []
    if len(pictures) < 3:
        found.append(Finding("few", f"{len(pictures)} pictures are few: 3 to 30 teach more than how these look"))
    for picture in pictures:
        found += _judge(picture, resolution)
    for first, second in _duplicates(pictures):
        found.append(Finding("duplicate", f"looks just like {first.name}: one of them is enough", second.id))
    return found


def _judge(picture: Picture, resolution: int) -> Iterator[Finding]:
    if min(picture.width, picture.height) < resolution // 2:
        size = f"{picture.width} x {picture.height} pixels"
        yield Finding("small", f"is left out in training: {size}, for a model of {resolution}", picture.id)
    elif min(picture.width, picture.height) < resolution:
        yield Finding("small", f"is enlarged to {resolution} pixels, which blurs it", picture.id)
    if picture.sharpness < 16:
        yield Finding("blurry", "looks blurred, which is learnt along", picture.id)
    if not picture.caption:
        yield Finding("caption", "has no caption: name its background, or it is learnt along", picture.id)


def _duplicates(pictures: Iterable[Picture], nearest: float = 4.0) -> Iterator[tuple[Picture, Picture]]:
    """Pairs that differ, seen from afar, by less than `nearest` of 255 on average; re-encoding makes about 1, another
    picture of the same thing 10 and more."""
    coarse = [(p, np.frombuffer(bytes.fromhex(p.colours), np.uint8).astype(np.int16)) for p in pictures]
    seen: set[str] = set()
    for (first, a), (second, b) in combinations(coarse, 2):
        if second.id not in seen and np.abs(a - b).mean() < nearest:
            seen.add(second.id)
            yield first, second


def _about(image: Image.Image, name: str) -> dict[str, Any]:
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.uint8)
    return {
        "name": name,
        "width": image.width,
        "height": image.height,
        "sharpness": round(_sharpness(image), 1),
        "colours": colours.tobytes().hex(),
    }


def _sharpness(image: Image.Image, side: int = 512) -> float:
    """The 99th percentile of the Laplacian of the brightness, of a picture at the size of a screen."""
    small = image.convert("L")
    small.thumbnail((2 * side, 2 * side))
    grey = np.asarray(small, np.float32)
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    edges = 4 * centre - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return float(np.percentile(np.abs(edges), 99))


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """Pictures that ship with the package, to begin with."""

    key: str
    title: str
    goal: str
    trigger: str
    folder: Path


_MATERIAL = EMBEDDED_PATH.parent
SAMPLES = (
    Sample("robot", "A robot face", "subject", "sks face", _MATERIAL / "subjects" / "robot"),
    Sample("teddy", "A teddy bear", "subject", "sks bear", _MATERIAL / "subjects" / "teddy"),
    Sample("ink", "An ink drawing style", "style", "zwx style", _MATERIAL / "styles" / "ink"),
)


def copy_sample(ws: Workspace, user: str, key: str) -> Dataset:
    """A data set of the user's own with the pictures and captions of a sample.

    Raises:
        NotFound: there is no such sample.
    """
    sample = next((sample for sample in SAMPLES if sample.key == key), None)
    if sample is None:
        raise NotFound(f"There is no such sample; choose one of {', '.join(sample.key for sample in SAMPLES)}.")
    dataset = create(ws, user, sample.title, sample.goal, sample.trigger)
    add_files(ws, user, dataset.id, sorted(sample.folder.iterdir()))
    return get(ws, user, dataset.id)
