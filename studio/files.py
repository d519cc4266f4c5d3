"""The studio's own files over HTTP: each only to its owner, pictures to be shown and everything else to be saved."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from .auth import Auth
from .errors import NotFound, StudioError
from .jobs import store
from .services import system
from .workspace import Workspace

SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
SAVED = frozenset({".safetensors", ".json", ".yaml", ".txt", ".zip", ".md"})


def url(kind: str, key: str, path: str, version: object = "") -> str:
    """Where a page finds a file of kind "datasets", "adapters" or "jobs". A new version is asked for anew."""
    return f"/files/{kind}/{key}/{quote(path)}" + (f"?v={version}" if version != "" else "")


def add_routes(app: FastAPI, workspace: Workspace, auth: Auth) -> None:
    @app.get("/files/diagnostics")
    def diagnostics(request: Request) -> Response:
        return _response(system.diagnostics(workspace, auth.owner(request) or ""))

    @app.get("/files/{kind}/{key}/{path:path}")
    def file(request: Request, kind: str, key: str, path: str) -> Response:
        try:
            found = find(workspace, auth.owner(request) or "", kind, key, path)
        except StudioError as error:
            return JSONResponse({"detail": str(error)}, 404 if isinstance(error, NotFound) else 403)
        return _response(found)


def find(workspace: Workspace, user: str, kind: str, key: str, path: str) -> Path:
    """A file of this user.

    Raises:
        PermissionDenied: it is somebody else's.
        NotFound: there is none, or of no kind that is served.
    """
    folder = _folder(workspace, user, kind, key).resolve()
    found = (folder / path).resolve() if "\0" not in path else folder
    served = found.suffix.lower() in SHOWN.keys() | SAVED
    if not served or not found.is_relative_to(folder) or not found.is_file():
        raise NotFound("This file is gone, or never was.")
    return found


def _folder(workspace: Workspace, user: str, kind: str, key: str) -> Path:
    if kind == "datasets":
        return workspace.dataset(user, key)
    if kind == "adapters":
        return workspace.adapter(user, key)
    if kind == "jobs":
        return store.owned(workspace, user, key, position=False).out
    raise NotFound("There is nothing here.")


def _response(path: Path) -> Response:
    kind = SHOWN.get(path.suffix.lower())
    headers = {"Cache-Control": "private, max-age=600" if kind else "private, no-store"}
    if kind:
        return FileResponse(path, media_type=kind, headers=headers)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, headers=headers)
