"""What the studio says when something cannot be done: in plain words, with a next step, fit to be shown as it is.

StudioError (a ValueError)
├── PermissionDenied    the thing belongs to somebody else
└── NotFound            there is no such thing, or no longer
"""


class StudioError(ValueError):
    """Something that cannot be done as asked. Its message is for the person at the browser."""


class PermissionDenied(StudioError):  # noqa: N818  (what it says, where a web page shows it)
    """The thing belongs to somebody else."""


class NotFound(StudioError):  # noqa: N818
    """There is no such thing, or no longer."""
