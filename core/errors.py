"""What can go wrong, as types.

    PeftError
    ├── NoMatchingPeftModuleError (also a ValueError)   an adapter that would adapt nothing
    ├── NotMergeableError (also a TypeError)                 a change that no weight can express
    ├── MergedError (also a RuntimeError)               a change of activity while weights are merged
    └── AdapterFileError (also a ValueError)            a file that is no adapter, is damaged, or is not safe to read

The first two names are those of the ecosystem; warnings of this package are `PeftWarning`s. `DataError` (a
ValueError) is about the data that a training run learns from.
"""


class PeftError(Exception):
    """Base class of this package's own errors."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The targets of a config match no module of the model."""


class NotMergeableError(PeftError, TypeError):
    """The adapter is not equal to a change of its layer's weights."""


class MergedError(PeftError, RuntimeError):
    """What is active cannot change while adapters are merged into the base weights."""


class AdapterFileError(PeftError, ValueError):
    """A file or folder that cannot be read as an adapter: missing, damaged, of another kind, or a pickle."""


class DataError(ValueError):
    """The user's data cannot be trained on; the message says which and why."""


class PeftWarning(UserWarning):
    """Something that works, but probably not as the caller meant."""


def one_line(text: str) -> str:
    """A text for a terminal's line: files must not move its cursor or worse by what they call their tensors."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
