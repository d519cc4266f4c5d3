"""Where everything lies that the studio keeps: one folder, no database.

    ROOT/users/USER/datasets/ID/    dataset.json, 0001.png, 0001.txt, ...
    ROOT/users/USER/adapters/ID/    card.json, the adapter's files, preview.png
    ROOT/users/USER/trash/KIND/ID/
    ROOT/users/USER/drafts/FORM.json
    ROOT/jobs/ID/                   spec.json, state.json, events.jsonl, log.txt, control/, out/
    ROOT/workers/DEVICE.json        who works there; DEVICE.lock is held while it lives
    ROOT/models/ID/                 base models that were made of single files
    ROOT/models.json, users.json, secret, tmp/

Ids are random and names live in JSON, so that nothing a person types becomes a path.
"""

from __future__ import annotations

import fcntl
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import write_text
from .errors import NotFound, StudioError

ME = "me"
"""The user where nobody has to log in."""
_ID = re.compile(r"[0-9a-f]{16}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_FORM = re.compile(r"[a-z][a-z_]{0,31}")


def new_id() -> str:
    """An id that nobody can guess: 64 random bits, so that a link tells of no other one."""
    return secrets.token_hex(8)


def checked_id(text: object) -> str:
    """`text` if it can be an id; whatever comes from outside passes here before it becomes part of a path.

    Raises:
        NotFound: it cannot be one.
    """
    if isinstance(text, str) and _ID.fullmatch(text):
        return text
    raise NotFound("There is nothing under this address. Choose an entry from the list instead.")


@dataclass(frozen=True)
class Workspace:
    """The folder of one studio; its methods name places and create none of them."""

    root: Path

    def user(self, user: str) -> Path:
        """A user's own folder.

        Raises:
            StudioError: a name that cannot be a user's.
        """
        if not _USER.fullmatch(user):
            raise StudioError(f"{user[:80]!r} cannot be a user's name: letters, digits and _ . @ - only.")
        return self.root / "users" / user

    def datasets(self, user: str) -> Path:
        return self.user(user) / "datasets"

    def dataset(self, user: str, dataset: object) -> Path:
        return self.datasets(user) / checked_id(dataset)

    def adapters(self, user: str) -> Path:
        return self.user(user) / "adapters"

    def adapter(self, user: str, adapter: object) -> Path:
        return self.adapters(user) / checked_id(adapter)

    def trash(self, user: str, kind: str) -> Path:
        """Deleted things of a kind: "datasets" or "adapters"."""
        if kind not in ("datasets", "adapters"):
            raise StudioError(f"There is no trash for {kind!r}.")
        return self.user(user) / "trash" / kind

    def draft(self, user: str, form: str) -> Path:
        if not _FORM.fullmatch(form):
            raise StudioError(f"{form[:80]!r} is no form of this page.")
        return self.user(user) / "drafts" / f"{form}.json"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    def job(self, job: object) -> Path:
        return self.jobs / checked_id(job)

    @property
    def workers(self) -> Path:
        return self.root / "workers"

    @property
    def models(self) -> Path:
        return self.root / "models.json"

    def converted(self, job: object) -> Path:
        """The folder of a base model that a job has made of a single file."""
        return self.root / "models" / checked_id(job)

    @property
    def users(self) -> Path:
        return self.root / "users.json"

    @property
    def secret(self) -> Path:
        return self.root / "secret"

    @property
    def temporary(self) -> Path:
        return self.root / "tmp"


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep everybody else, threads and processes, out of the same lock; it dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
