"""What a safetensors file says about itself, checked before a tensor is read or memory taken for it.

A file is 8 bytes of header length (little-endian), a JSON object, and the tensors' bytes:

    {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}

`read_header` accepts a file only if these three agree to the byte. It needs neither torch nor the safetensors library,
so that looking into a file costs as little as it should. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import AdapterFileError

MAX_HEADER = 32 * 2**20
"""Bytes of JSON: some 200,000 tensors. Refused beyond, since its parsed form takes ten times as much memory."""
MAX_DIMENSIONS = 8
"""Axes of a tensor; adapters have at most five."""
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one number, for the dtypes that an adapter can be kept in."""

PICKLED = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
"""Endings of files that are, or may be, pickles: refused by name, before they are opened."""
_WHY_NOT_PICKLES = (
    "which could run any code when loaded, so it is not read; convert it to safetensors with the program that wrote it"
)
_FOREIGN = {
    b"PK\x03\x04": f"is a zip archive, as torch.save writes its pickles, {_WHY_NOT_PICKLES}",
    b"GGUF": "is a GGUF file, which holds a model, not an adapter",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository",
    b"<": "is a web page or XML, not a file of tensors: was the download refused or redirected?",
    b"{": "is a JSON file, not a file of tensors",
    b"\x1f\x8b": "is a gzip archive: unpack it first",
    b"\x89PNG": "is a picture",
    b"\xff\xd8\xff": "is a picture",
}
"""How files begin that are often met under the name of an adapter, and what to say of them."""
_PICKLE_PROTOCOLS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


class TensorInfo(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """As the format names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int
    """Its bytes, counted from the start of the tensors' part."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file that has been checked."""

    path: Path
    size: int
    """Bytes of the whole file."""
    start: int
    """Where the tensors' part begins."""
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @cached_property
    def scalars(self) -> dict[str, float]:
        """The values of all tensors of one number, such as alphas; 8-bit floats, which none is kept in, left out."""
        found = {}
        with self.path.open("rb") as file:
            for name, info in self.tensors.items():
                if info.numel == 1 and info.dtype in _FORMATS:
                    file.seek(self.start + info.begin)
                    found[name] = _number(file.read(info.end - info.begin), info.dtype)
        return found


_FORMATS = {
    "BOOL": "?", "U8": "B", "I8": "b", "I16": "h", "U16": "H", "F16": "e", "BF16": "f", "I32": "i", "U32": "I",
    "F32": "f", "I64": "q", "U64": "Q", "F64": "d",
}  # fmt: skip


def _number(data: bytes, dtype: str) -> float:
    if dtype == "BF16":
        data = b"\0\0" + data  # it is the upper half of a float32
    return float(struct.unpack(f"<{_FORMATS[dtype]}", data)[0])


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, every statement in it held against the file's size.

    Raises:
        AdapterFileError: there is no such file, it is a pickle or something else, or it is damaged.
    """
    path = Path(path)
    check_file(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(64), size)
        file.seek(8)
        data = file.read(length)
    try:
        return _parse(path, size, data)
    except _HeaderError as damage:
        raise damaged(path, str(damage)) from None


def damaged(path: Path, how: str) -> AdapterFileError:
    """The error for a file that ends too early or contradicts itself."""
    return AdapterFileError(f"{path} is not a whole safetensors file: {how}")


def check_file(path: Path) -> None:
    """Refuse what cannot be a file of tensors, without opening it: pickles by their name, folders, devices, links to
    nothing."""
    if path.suffix.lower() in PICKLED:
        raise AdapterFileError(f"{path} is a pickle, {_WHY_NOT_PICKLES}")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise AdapterFileError(f"{path} {'is a link to nothing' if path.is_symlink() else 'does not exist'}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise AdapterFileError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        raise AdapterFileError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'a device'}, not a file of tensors")
    if not os.access(path, os.R_OK):
        raise AdapterFileError(f"{path} cannot be read: permission denied")


def _header_length(path: Path, start: bytes, size: int) -> int:
    """The length that the first bytes state, if a header can be there; what the file is instead, if not."""
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and length <= min(size - 8, MAX_HEADER):
        return length
    for magic, kind in _FOREIGN.items():
        if start.lstrip().startswith(magic):
            raise AdapterFileError(f"{path} {kind}")
    if start.startswith(_PICKLE_PROTOCOLS):  # a length such as 640 begins so too: only where no header follows
        raise AdapterFileError(f"{path} is a pickle, {_WHY_NOT_PICKLES}")
    if size < 10:
        raise damaged(path, "it is empty" if size == 0 else f"it has {size} bytes, too few for a header")
    if start[8:9] != b"{":
        raise damaged(path, "no header follows its first 8 bytes")
    if length > size - 8:
        raise damaged(path, f"it has {size} bytes, and its header alone should take {length}: cut short, or no header")
    raise damaged(path, f"a header of {length} bytes is more than the {MAX_HEADER} that are accepted")


class _HeaderError(ValueError):
    """What is wrong with a header."""


def _parse(path: Path, size: int, data: bytes) -> Header:
    entries = _json_object(data)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("its __metadata__ is not an object of strings")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    start = 8 + len(data)
    _check_extents(tensors, size - start)
    return Header(path, size, start, tensors, metadata)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        entries = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _HeaderError:
        raise
    except RecursionError:
        raise _HeaderError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise _HeaderError("its header is not UTF-8") from None
    except ValueError as error:  # not JSON, or numbers of thousands of digits
        raise _HeaderError(f"its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise _HeaderError("its header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _HeaderError(f"its header names {twice!r} twice")
    try:
        "".join(entries).encode()
    except UnicodeEncodeError:
        raise _HeaderError("its header has names with half characters (lone surrogates)") from None
    return entries


def _no_constant(name: str) -> NoReturn:
    raise _HeaderError(f"its header holds {name}, which is not JSON")


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _HeaderError(f"{name!r} has dtype {_short(dtype)}; known are {', '.join(DTYPES)}")
    if not _sizes(shape):
        raise _HeaderError(f"{name!r} has shape {_short(shape)}, expected a list of whole numbers from 0")
    if len(shape) > MAX_DIMENSIONS:
        raise _HeaderError(f"{name!r} has {len(shape)} dimensions; no adapter has more than {MAX_DIMENSIONS}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _HeaderError(f"{name!r} has data_offsets {_short(offsets)}, expected [begin, end]")
    begin, end = offsets
    expected = prod(shape) * DTYPES[dtype]
    if end - begin != expected:
        raise _HeaderError(
            f"{name!r} as {dtype} {_short(shape)} takes {_short(expected)} bytes, has {_short(end - begin)}"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _sizes(values: Any) -> bool:
    """Whether these are whole numbers from 0 that some machine could count."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_extents(tensors: dict[str, TensorInfo], available: int) -> None:
    """The tensors follow one another without overlap or gap, and end where the file does."""
    last, position = None, 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < position:
            raise _HeaderError(f"{name!r} overlaps {last!r}")
        if info.begin > position:
            raise _HeaderError(f"{info.begin - position} bytes before {name!r} belong to no tensor")
        last, position = name, info.end
    if position > available:
        raise _HeaderError(f"cut short: its tensors take {position} bytes, and {available} are there")
    if position < available:
        raise _HeaderError(f"{available - position} bytes after its last tensor belong to no tensor")


def _short(value: Any, width: int = 60) -> str:
    text = repr(value) if not isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 1]}…"
