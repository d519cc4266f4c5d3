"""The settings of the studio's web server: its flags and nothing else, so that `--help` imports no web framework."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from .errors import StudioError


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """Train, blend and compare adapters in the browser."""

    data: Path = Path("veneer-studio")
    """Folder for everything the studio keeps: pictures, runs, adapters. Made if missing; back it up as it is."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own needs --users."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    users: Path | None = None
    """File of the people who may log in; --add-user makes it. Not given, there is one user and no login."""
    add_user: str | None = None
    """Add this user to the file, or change the password, which is asked for or read from standard input; then stop."""

    def check(self) -> None:
        """Raise `StudioError` for what would be unsafe or cannot work."""
        if self.add_user is not None and self.users is None:
            raise StudioError("--add-user needs the file to add to: give --users FILE.")
        if not is_loopback(self.host) and self.users is None:
            raise StudioError(
                f"--host {self.host} can be reached from other machines, so people have to log in: "
                "make a user with --users users.json --add-user NAME, then start with --users users.json."
            )
        if not 0 <= self.port < 65536:
            raise StudioError(f"--port {self.port} must lie between 0 and 65535.")


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
