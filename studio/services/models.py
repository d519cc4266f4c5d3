"""Base models: the one in the box, and those that somebody with access to the machine's disk has added.

They are judged by their files' names and headers, without torch, and stay where they are. A repository of the hub that
is not in this machine's cache, and a checkpoint in one file, are fetched by a job first.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ...core.header import read_header
from ...diffusion.base import BaseModel
from ...diffusion.families import EMBEDDED, EMBEDDED_PATH, FAMILIES
from ..errors import NotFound, PermissionDenied, StudioError
from ..jobs import store
from ..workspace import ME, Workspace, locked, read_json, write_json


@dataclass(frozen=True)
class Model:
    """A pipeline that can be trained and drawn with."""

    name: str
    """How people and jobs call it."""
    source: str
    """What `load_pipeline` takes: "embedded", a folder, or a hub id."""
    kind: str
    """"built in", "folder" or "hub"."""


BOXED = Model(EMBEDDED, EMBEDDED, "built in")


def list_models(ws: Workspace) -> list[Model]:
    """All models, the one in the box first."""
    return [BOXED, *(Model(**values) for values in read_json(ws.models) or [])]


def source_of(ws: Workspace, name: object) -> str:
    """What to load for the model of this name.

    Raises:
        NotFound: none is called so.
    """
    for model in list_models(ws):
        if model.name == name:
            return model.source
    raise NotFound(f"There is no model {str(name)[:80]!r} here. Choose one from the list, or add it under System.")


def resolution(source: str) -> int:
    """Side in pixels of the squares that a model was trained at: its latents' side times what its autoencoder shrinks
    by. 512 where the files do not tell."""
    folder = EMBEDDED_PATH if source == EMBEDDED else folder_of(source)
    unet, vae = (read_json(folder / part / "config.json") or {} for part in ("unet", "vae"))
    latents, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    return latents * 2 ** (len(blocks) - 1) if isinstance(latents, int) and blocks else 512


def folder_of(source: str) -> Path:
    """Where the files of a model's source lie: the folder itself, or the hub's cache."""
    return Path(source) if Path(source).is_dir() else _cached(source)


def begin(ws: Workspace, user: str, source: str, name: str = "") -> str:
    """Add a model: a diffusers pipeline's folder, a checkpoint in one file, or a hub id such as owner/name. What is at
    hand is added at once, and the answer is empty; otherwise it is the id of the job that fetches it.

    Raises:
        StudioError: it is not there, damaged, of a kind that cannot be trained, or its name is taken.
        PermissionDenied: somebody who logged in over the network names paths of this machine.
    """
    _only_at_home(user)
    source = source.strip()
    path = Path(source).expanduser()
    if path.is_file():
        _check_file(path)
        arguments = {"what": "file", "source": str(path.absolute()), "name": _unused(ws, name or path.stem)}
    elif path.is_dir() or _in_cache(source):
        add(ws, user, source, name)
        return ""
    else:
        arguments = {"what": "hub", "source": source, "name": _unused(ws, name or path.name)}
    return store.submit(ws, user, "fetch", arguments)


def add(ws: Workspace, user: str, source: str, name: str = "") -> Model:
    """Add a model that is at hand: a folder, or a hub id whose files are in this machine's cache. Raises as `begin`."""
    _only_at_home(user)
    path = Path(source).expanduser()
    folder, kind = (path, "folder") if path.is_dir() else (_cached(source), "hub")
    _check(folder)
    model = Model(_unused(ws, name or path.name), str(path.absolute()) if kind == "folder" else source, kind)
    with locked(ws.models.with_suffix(".lock")):
        known = list_models(ws)
        _unused(ws, model.name)
        write_json(ws.models, [asdict(other) for other in [*known[1:], model]])
    return model


def remove(ws: Workspace, user: str, name: str) -> None:
    """Take a model off the list; its files stay. Not for those who logged in."""
    _only_at_home(user)
    if name == EMBEDDED:
        raise StudioError("The built-in model cannot be removed.")
    source_of(ws, name)
    with locked(ws.models.with_suffix(".lock")):
        write_json(ws.models, [asdict(model) for model in list_models(ws)[1:] if model.name != name])


def _unused(ws: Workspace, text: str) -> str:
    """A name that no model has yet."""
    name = " ".join(text.split())
    if not name or len(name) > 60 or not name.isprintable():
        raise StudioError("A model's name has 1 to 60 letters. Type one.")
    if any(name == other.name for other in list_models(ws)):
        raise StudioError(f"There is a model {name!r} already. Give this one another name.")
    return name


def _only_at_home(user: str) -> None:
    if user != ME:
        raise PermissionDenied(
            "With several people, whoever runs the studio keeps the list of base models. Ask them to start it once "
            "without --users and to change the list there."
        )


def _check_file(path: Path) -> None:
    """Refuse what is no Stable Diffusion checkpoint, from its header."""
    if path.suffix != ".safetensors":
        raise StudioError(
            f"{path.name} is no .safetensors file: other checkpoints can run code when loaded. Look for its "
            "safetensors version."
        )
    try:
        keys = read_header(path).tensors
    except ValueError as error:
        raise StudioError(str(error)) from error
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise StudioError(
            f"{path.name} is no Stable Diffusion checkpoint: nothing in it is called model.diffusion_model. "
            "Adapters are imported under Library."
        )


def _in_cache(source: str) -> bool:
    """Whether a hub repository lies on this machine."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise StudioError(
            f"{source[:200]!r} is neither a folder or file on this machine nor a hub id such as owner/name."
        )
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "model_index.json"), str)


def _cached(source: str) -> Path:
    """The folder of a hub repository in this machine's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "model_index.json") if _in_cache(source) else None
    if not isinstance(found, str):
        raise StudioError(f"{source} is not on this machine. Add it under System, which downloads it.")
    return Path(found).parent


def _check(folder: Path) -> None:
    """Refuse what training would refuse, only sooner."""
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise StudioError(f"{folder} is not a diffusers pipeline: it holds no model_index.json.")
    if index.get("_class_name") not in FAMILIES:
        kind, known = index.get("_class_name"), ", ".join(FAMILIES)
        raise StudioError(f"{folder.name} is a {kind}, which cannot be trained yet; what can: {known}.")
    try:
        BaseModel(str(folder))  # every header, to the byte
    except ValueError as error:
        raise StudioError(str(error)) from error
