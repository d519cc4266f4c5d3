"""Who may log in: a JSON file of names and scrypt hashes, which `veneer studio --add-user` writes."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path

from .errors import StudioError
from .workspace import ME, Workspace, locked, read_json, write_json

MIN_PASSWORD = 8
"""Characters. Length is what makes guessing slow; the login throttles as well."""
_COST = {"n": 2**14, "r": 8, "p": 1}  # about 50 ms and 16 MB a try


class Users:
    """The file, read anew whenever it changed, so that a removed user is out at once."""

    def __init__(self, path: Path):
        self.path = path
        self._read: dict[str, str] = {}
        self._stamp: tuple[int, int] | None = None
        if not self.records():
            raise StudioError(f"{path} names no user yet: add one with --users {path} --add-user NAME.")

    def records(self) -> dict[str, str]:
        """Name -> salted hash."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return {}
        if (found.st_mtime_ns, found.st_size) != self._stamp:
            self._read = read_users(self.path)
            self._stamp = found.st_mtime_ns, found.st_size
        return self._read

    def check(self, name: str, password: str) -> bool:
        """Whether the password is the user's. A wrong name takes as long as a wrong password."""
        record = self.records().get(name)
        matches = verify(password, record or _NOBODY)
        return matches and record is not None


def read_users(path: Path) -> dict[str, str]:
    try:
        found = read_json(path) or {}
    except ValueError as error:
        raise StudioError(f"{path} is damaged ({error}); restore it, or remove it and add the users again.") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise StudioError(f"{path} does not hold users; remove it and add them with --add-user NAME.")
    return found


def add_user(path: Path, name: str, password: str) -> None:
    """Add a user, or give a new password, which logs the user out everywhere."""
    Workspace(Path()).user(name)  # a name that can be a folder's
    if name == ME:
        raise StudioError(f"{ME!r} is who uses the studio without a login. Choose another name.")
    if len(password) < MIN_PASSWORD:
        raise StudioError(f"The password has {len(password)} characters; use at least {MIN_PASSWORD}.")
    with locked(path.with_name(path.name + ".lock")):
        write_json(path, read_users(path) | {name: hashed(password)})
        path.chmod(0o600)


def hashed(password: str) -> str:
    """`salt$hash`, both base64."""
    salt = secrets.token_bytes(16)
    return f"{_text(salt)}${_text(_scrypt(password, salt))}"


def verify(password: str, record: str) -> bool:
    salt, _, expected = record.partition("$")
    return hmac.compare_digest(_text(_scrypt(password, base64.b64decode(salt))), expected)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_COST)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


_NOBODY = f"{_text(bytes(16))}${_text(bytes(64))}"
