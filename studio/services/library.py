"""The library: a user's adapters, each with its card.

An adapter is a folder: `card.json` with what people call it, `report.json` with what `veneer inspect` says of it,
`preview.png`, and its files: PEFT's folders (`unet/`, ...) or one file of any dialect. Whatever is brought in is looked
through first: safetensors only, from headers alone, without torch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ...core.atomic import atomic_folder
from ...core.files import CONFIG_NAME, WEIGHTS_NAME
from ...core.header import PICKLED, read_header
from ...core.runs.settings import plain
from ...diffusion.dialects.peft_plan import component_folders
from ...diffusion.families import EMBEDDED_PATH
from ...diffusion.inspect import Report, inspect_adapter
from .. import safety
from ..errors import NotFound, StudioError
from ..shelf import PREVIEW
from ..workspace import Workspace, new_id, read_json, write_json
from . import trash

FILE_NAME = "pytorch_lora_weights.safetensors"
"""Where an adapter of one file lies in its folder, whatever its dialect: its readers go by keys."""
MAX_TAGS = 12
BUNDLED = EMBEDDED_PATH.parent / "adapters"
"""Adapters that every user starts with: NAME.safetensors beside NAME.png."""


@dataclass(frozen=True)
class Adapter:
    """One adapter of the library, as its card shows it."""

    id: str
    name: str
    created: float
    """Seconds since 1970."""
    folder: Path
    base: str = ""
    """The model that it is for: "embedded", a hub id, or a family such as sdxl."""
    method: str = ""
    rank: str = ""
    """One number, or the smallest to the largest; empty for methods without."""
    trigger: str = ""
    """The prompt that it was trained to answer to."""
    recipe: Any = None
    """How it was made, as far as its file tells."""
    source: Any = ""
    """Where it came from: a training, a blend, a file."""
    tags: tuple[str, ...] = ()
    preview: Path | None = None

    @property
    def path(self) -> Path:
        """What to load, inspect or convert."""
        return self.folder if component_folders(self.folder) else self.folder / FILE_NAME


@dataclass(frozen=True)
class ImportReport:
    """What became of one file."""

    name: str
    message: str
    """In plain words; goes on from the name."""
    adapter: str | None = None
    """Its id in the library; None if it was refused."""
    report: dict[str, Any] | None = None
    """As `veneer inspect --json` tells it, without the path."""


# ---------------------------------------------------------------- looking


def list_adapters(
    ws: Workspace, user: str, query: str = "", *, base: str = "", method: str = "", tag: str = ""
) -> list[Adapter]:
    """The user's adapters, the newest first.

    Arguments:
        query: words that must all occur in name, trigger, tags, base or method.
        base, method, tag: only adapters with exactly this one; empty for all.
    """
    _welcome(ws, user)
    cards = [card for folder in ws.adapters(user).iterdir() if (card := _read(folder)) is not None]
    wanted = [card for card in cards if _fits(card, query) and base in ("", card.base) and method in ("", card.method)]
    return sorted((card for card in wanted if not tag or tag in card.tags), key=lambda card: -card.created)


def get(ws: Workspace, user: str, adapter: object) -> Adapter:
    """One adapter.

    Raises:
        NotFound: the user has none of this id.
    """
    found = _read(ws.adapter(user, adapter))
    if found is None:
        raise NotFound("You have no such adapter. Choose one from the library.")
    return found


def report(ws: Workspace, user: str, adapter: object) -> dict[str, Any]:
    """What an adapter holds and which programs read it, as `veneer inspect --json` tells it."""
    found = get(ws, user, adapter)
    kept = read_json(found.folder / "report.json")
    if kept is None:
        kept = _plain_report(inspect_adapter(found.path))
        write_json(found.folder / "report.json", kept)
    return kept


def _read(folder: Path) -> Adapter | None:
    card = None if folder.name.startswith(".") else read_json(folder / "card.json")
    if card is None:
        return None
    preview = folder / PREVIEW
    return Adapter(
        id=folder.name,
        name=card["name"],
        created=card["created"],
        folder=folder,
        tags=tuple(card.get("tags", ())),
        preview=preview if preview.is_file() else None,
        rank=_ranks(card.get("rank")),
        **{key: card.get(key) or "" for key in ("base", "method", "trigger", "recipe", "source")},
    )


def _ranks(rank: object) -> str:
    if isinstance(rank, list):
        return "" if not rank else str(rank[0]) if len(set(rank)) == 1 else f"{min(rank)} to {max(rank)}"
    return "" if rank is None else str(rank)


def _fits(card: Adapter, query: str) -> bool:
    text = " ".join((card.name, card.trigger, *card.tags, card.base, card.method)).lower()
    return all(word in text for word in query.lower().split())


def _welcome(ws: Workspace, user: str) -> None:
    """Put the adapters that ship with the package into a library that is opened for the first time.

    They are like all others from then on: to blend, rename or delete.
    """
    ws.adapters(user).mkdir(parents=True, exist_ok=True)
    try:
        (ws.user(user) / "welcomed").open("x").close()
    except FileExistsError:
        return
    for file in sorted(BUNDLED.glob("*.safetensors")):
        _store(ws.adapter(user, new_id()), file, inspect_adapter(file), file.stem.capitalize(), "ships with Veneer")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---------------------------------------------------------------- changing


def rename(ws: Workspace, user: str, adapter: object, name: str) -> None:
    _change(ws, user, adapter, name=safety.display_name(name))


def set_tags(ws: Workspace, user: str, adapter: object, tags: Iterable[str]) -> None:
    """Replace the tags; they are kept in small letters, each once."""
    clean = list(dict.fromkeys(safety.display_name(tag, "tag", 30).lower() for tag in tags))
    if len(clean) > MAX_TAGS:
        raise StudioError(f"{len(clean)} tags are too many: keep to {MAX_TAGS}.")
    _change(ws, user, adapter, tags=clean)


def set_trigger(ws: Workspace, user: str, adapter: object, trigger: str) -> None:
    """The words that call the adapter's subject or style, for files that do not tell."""
    _change(ws, user, adapter, trigger=safety.one_line(trigger)[: safety.MAX_CAPTION])


def delete(ws: Workspace, user: str, adapter: object) -> None:
    """To the trash; `restore` brings it back."""
    trash.throw_away(ws, user, "adapters", adapter)


def restore(ws: Workspace, user: str, adapter: object) -> Adapter:
    trash.put_back(ws, user, "adapters", adapter)
    return get(ws, user, adapter)


def _change(ws: Workspace, user: str, adapter: object, **values: Any) -> None:
    path = get(ws, user, adapter).folder / "card.json"
    write_json(path, read_json(path) | values)


# ---------------------------------------------------------------- bringing in


def import_files(ws: Workspace, user: str, paths: Iterable[str | Path]) -> list[ImportReport]:
    """Adapters from files: safetensors of any dialect, PEFT's two files together, or zip archives of either.

    Each is inspected, and refused if Veneer could not load it whole; the others are kept.
    """
    files = [Path(path) for path in paths]
    if len(files) > safety.MAX_FILES:
        raise StudioError(f"{len(files)} files at once are too many: choose up to {safety.MAX_FILES}.")
    safety.check_room(ws, user, sum(path.stat().st_size for path in files))
    with tempfile.TemporaryDirectory(dir=_made(ws.temporary)) as folder:
        reports: list[ImportReport] = []
        named: list[tuple[str, Path]] = []
        for number, path in enumerate(files):
            try:
                named += _opened(path, Path(folder) / str(number))
            except StudioError as error:
                reports.append(ImportReport(safety.one_line(path.name), str(error)))
        adapters = _peft_folders(named, Path(folder) / "peft")
        return reports + [_import(ws, user, name, path) for name, path in adapters]


def waiting(ws: Workspace, user: str) -> list[str]:
    """Names of what lies in `import/USER/` of the data folder: the way in for files too large to upload."""
    folder = ws.root / "import" / ws.user(user).name
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink()) if folder.is_dir() else []


def import_waiting(ws: Workspace, user: str, name: str) -> list[ImportReport]:
    """`import_files` for one of `waiting`, a file or a PEFT folder; what was imported is removed there.

    Raises:
        NotFound: there is no such file.
    """
    if name not in waiting(ws, user):
        raise NotFound("This file is not in the import folder any more.")
    path = ws.root / "import" / ws.user(user).name / name
    reports = [_import(ws, user, name, path)] if path.is_dir() else import_files(ws, user, [path])
    if all(report.adapter for report in reports):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return reports


def _opened(path: Path, into: Path) -> list[tuple[str, Path]]:
    """A file, or an archive's files. Pickles go by their name and are never opened, not even as the zip that they
    are."""
    if path.suffix.lower() in PICKLED or not safety.is_archive(path):
        return [(path.name, path)]
    return safety.unpack(path, into, safety.MAX_ADAPTER, safety.MAX_ADAPTER)


def _peft_folders(named: list[tuple[str, Path]], into: Path) -> list[tuple[str, Path]]:
    """PEFT's pairs of config and weights as folders, a folder for each component; other files as they are."""
    weights = {PurePosixPath(name).parent: path for name, path in named if PurePosixPath(name).name == WEIGHTS_NAME}
    configs = {PurePosixPath(name).parent: path for name, path in named if PurePosixPath(name).name == CONFIG_NAME}
    single = [(name, path) for name, path in named if PurePosixPath(name).name not in (WEIGHTS_NAME, CONFIG_NAME)]
    folders: dict[str, Path] = {}
    for place in weights.keys() & configs.keys():
        component = place.name if place.name in _COMPONENTS else _component(weights[place])
        root = place.parent if place.name in _COMPONENTS else place
        home = folders.setdefault(root.name or "adapter", into / str(len(folders)))
        (home / component).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights[place], home / component / WEIGHTS_NAME)
        shutil.copyfile(configs[place], home / component / CONFIG_NAME)
    alone = weights.keys() ^ configs.keys()
    single += [(f"{place}/{CONFIG_NAME if place in configs else WEIGHTS_NAME}", into) for place in alone]
    known = [(name, path) for name, path in single if path.suffix == ".safetensors" or not folders]
    return list(folders.items()) + known


_COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "transformer")


def _component(weights: Path) -> str:
    """Which component PEFT's weights are for, where no folder tells: layers of CLIP are called so in no UNet."""
    try:
        keys = read_header(weights).tensors
    except ValueError:
        return "unet"  # the import tells what is wrong with it
    return "text_encoder" if any("encoder.layers." in key for key in keys) else "unet"


def _import(ws: Workspace, user: str, name: str, path: Path) -> ImportReport:
    shown = safety.one_line(PurePosixPath(name).name)[:120] or "a file without a name"
    if shown in (CONFIG_NAME, WEIGHTS_NAME):
        return ImportReport(shown, f"is half of a PEFT adapter: choose {CONFIG_NAME} and {WEIGHTS_NAME} together")
    try:
        for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
            safety.check_adapter(file)
        found = inspect_adapter(path)
        if found.problem:
            raise StudioError(found.problem)
        identifier = new_id()
        _store(ws.adapter(user, identifier), path, found, PurePosixPath(shown).stem, f"imported from {shown}")
    except ValueError as error:
        return ImportReport(shown, _without(path, str(error)))
    return ImportReport(shown, f"imported: {found.dialect} for {found.family}", identifier, _plain_report(found))


def _store(folder: Path, source: Path, found: Report, name: str, origin: str) -> None:
    with atomic_folder(folder) as made:
        if source.is_dir():
            shutil.copytree(source, made, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, made / FILE_NAME)
        preview = source.with_suffix(".png")
        if preview.is_file():
            shutil.copyfile(preview, made / PREVIEW)
        write_json(made / "report.json", _plain_report(found))
        write_json(made / "card.json", _card(found, name) | {"source": origin})


def _card(found: Report, name: str) -> dict[str, Any]:
    """What an adapter's file tells for its card; kohya's and others' files under modelspec's names."""
    told = found.metadata
    return {
        "name": safety.display_name(str(told.get("modelspec.title") or told.get("ss_output_name") or name)),
        "created": time.time(),
        "base": str(told.get("base_model") or found.family),
        "method": ", ".join(dict.fromkeys(part.method for part in found.parts)),
        "rank": sorted({rank for part in found.parts for rank in part.ranks}),
        "trigger": safety.one_line(str(told.get("trigger") or told.get("modelspec.trigger_phrase") or "")),
        "recipe": told.get("recipe", ""),
        "tags": [],
    }


def _plain_report(found: Report) -> dict[str, Any]:
    """The report without the server's path."""
    told = plain(found)
    del told["path"]
    return told


def _without(path: Path, message: str) -> str:
    """A message that goes on from the file's name, without the path where it lay meanwhile."""
    return message.replace(f"{path}: ", "").replace(f"{path} ", "").replace(str(path), "it")
