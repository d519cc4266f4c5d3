"""What somebody has typed and not yet used, kept on the server: a reload, another device or an error loses nothing."""

from __future__ import annotations

import json
from typing import Any

from ..errors import StudioError
from ..workspace import Workspace, read_json, write_json

MAX_DRAFT = 200_000
"""Characters of one form as JSON: some hundred prompts."""


def save(ws: Workspace, user: str, form: str, values: dict[str, Any]) -> None:
    """Keep what a form holds, in place of what it held before.

    Raises:
        StudioError: no form's name, or values that are no JSON or more than a form can hold.
    """
    path = ws.draft(user, form)
    try:
        text = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        raise StudioError("This form holds something that cannot be kept. Reload the page.") from None
    if not isinstance(values, dict) or len(text) > MAX_DRAFT:
        raise StudioError("This form holds too much to be kept. Shorten the longest text.")
    write_json(path, values)


def load(ws: Workspace, user: str, form: str) -> dict[str, Any]:
    """What `save` kept; empty if nothing, or nothing readable, is there."""
    try:
        kept = read_json(ws.draft(user, form))
    except json.JSONDecodeError:  # damaged from outside: a form must open all the same
        return {}
    return kept if isinstance(kept, dict) else {}


def forget(ws: Workspace, user: str, form: str) -> None:
    """Remove a draft that has been used."""
    ws.draft(user, form).unlink(missing_ok=True)
