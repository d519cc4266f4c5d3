"""What comes from outside, looked at before anything is made of it: names, pictures, archives, adapter files, room.

Nothing here believes a name, an ending or a header: sizes are checked before memory is taken, archives are counted
while they are unpacked, and pictures are stored as we encode them ourselves, with nothing in them but pixels.
"""

from __future__ import annotations

import re
import shutil
import stat
import struct
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..core.atomic import atomic
from ..core.errors import AdapterFileError
from ..core.header import Header, read_header
from ..diffusion.images import as_seen
from .errors import StudioError
from .workspace import Workspace

MB = 10**6
MAX_PICTURE = 20 * MB
"""Bytes of one picture file: a 40-megapixel photo as JPEG."""
MAX_PIXELS = 40 * MB
"""Pixels of one picture: four bytes each while it is read."""
STORED_SIDE = 1536
"""Shorter side, in pixels, that a stored picture has at most: models train at 1024 or less, the rest leaves room for
crops."""
MAX_CAPTION = 1000
"""Characters. Text encoders read some 75 words."""
MAX_ADAPTER = 2000 * MB
"""Bytes of one adapter file: the largest in use have about half."""
MAX_FILES = 1000
"""Files in one upload or archive."""
MAX_UNPACKED = 500 * MB
"""Bytes that an archive of pictures may unpack to."""
QUOTA = 20_000 * MB
"""Bytes that one user may keep, the trash included."""
SPARE = 500 * MB
"""Bytes of the disk that are left free, so that jobs can still write their checkpoints."""


# ---------------------------------------------------------------- names


def display_name(text: object, what: str = "name", longest: int = 80) -> str:
    """A name as people type it, on one line, without characters that are invisible or change the direction of text.

    It is only ever shown, never a path: files are named by `slug` or by an id.

    Raises:
        StudioError: nothing of it is left, or it is no text.
    """
    if not isinstance(text, str):
        raise StudioError(f"The {what} must be text. Type one.")
    clean = one_line(text)
    if not clean:
        raise StudioError(f"The {what} is empty. Type one.")
    return clean if len(clean) <= longest else f"{clean[: longest - 1]}…"


def one_line(text: str) -> str:
    """Text on one line, in its composed form (NFC), without control and direction characters."""
    visible = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text[: 16 * MAX_CAPTION])
    return " ".join(unicodedata.normalize("NFC", visible).split())


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


def slug(name: str, fallback: str = "adapter", longest: int = 60) -> str:
    """A file's name, without ending, that every system takes: small letters, digits and dashes."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    clean = "-".join(re.findall(r"[a-z0-9]+", ascii_only.lower()))[:longest].strip("-")
    return f"{fallback}-{clean}" if _RESERVED.fullmatch(clean) else clean or fallback


# ---------------------------------------------------------------- pictures

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MAGIC = {
    b"": "is empty",
    b"GIF8": "is a GIF; save it as PNG or JPEG",
    b"II*\0": "is a TIFF; save it as PNG or JPEG",
    b"MM\0*": "is a TIFF; save it as PNG or JPEG",
    b"%PDF": "is a PDF; save its pictures as PNG or JPEG",
    b"<": "is a drawing or a web page (SVG, HTML), not a picture; save it as PNG",
    b"PK\x03\x04": "is an archive inside an archive; unpack it first",
}
"""How files begin that people take for pictures, and what to say of them."""


def read_picture(path: Path) -> Image.Image:
    """The picture in a file as a person sees it, in RGB and no larger than training needs.

    Size and number of frames are read from the header, before any memory is taken for pixels.

    Raises:
        StudioError: it is no picture, or one that is not taken; the message goes on from the file's name.
    """
    if path.stat().st_size > MAX_PICTURE:
        raise StudioError(f"has more than {MAX_PICTURE // MB} MB; save it smaller, as JPEG")
    try:
        with Image.open(path, formats=_FORMATS) as file:
            _check_shape(file)
            return _shrunk(as_seen(file))
    except StudioError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large() from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise StudioError(_what_it_is(path, error)) from None


def _check_shape(file: Image.Image) -> None:
    if file.width * file.height > MAX_PIXELS:
        raise _too_large()
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # a phone's JPEG with a second picture for depth or brightness behind it
        raise StudioError(f"is an animation of {frames} frames; save the one you mean as PNG")


def _too_large() -> StudioError:
    return StudioError(f"has more than {MAX_PIXELS // MB} megapixels; save it smaller")


def _what_it_is(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(32).lstrip()
    if start[4:8] == b"ftyp":
        return "is a HEIC, AVIF or video file, as telephones store them; export it as JPEG"
    for magic, what in _MAGIC.items():
        if start.startswith(magic) and (magic or not start):
            return what
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not a picture; PNG, JPEG, WebP and BMP are"
    return "is damaged or cut short; save or copy it again"


def _shrunk(image: Image.Image) -> Image.Image:
    scale = STORED_SIDE / min(image.size)
    if scale >= 1:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def write_picture(path: Path, image: Image.Image) -> None:
    """Store pixels and nothing else: no metadata, no profile, no bytes of the file that they came in."""
    bare = image.copy()
    bare.info = {}
    with atomic(path) as temporary:
        # zlib's fastest level: pictures are half as large again, and stored four times as fast
        bare.save(temporary, "JPEG" if path.suffix == ".jpg" else "PNG", compress_level=1, quality=88)


# ---------------------------------------------------------------- archives


def is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix.lower() == ".zip"


def unpack(
    path: Path, into: Path, max_file: int = MAX_PICTURE, max_total: int = MAX_UNPACKED
) -> list[tuple[str, Path]]:
    """The files of a zip archive, as (name in the archive, where it lies), counted while they are unpacked.

    Names become no paths: files in `into` are numbered. Entries that only some systems make, such as `__MACOSX/`, and
    hidden files are left out.

    Raises:
        StudioError: it is damaged, too large, or holds what no honest archive does.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    _check_entry(entry)
                entries = [entry for entry in archive.infolist() if not _is_litter(entry)]
                return list(_unpacked(archive, entries, into, max_file, max_total))
    except StudioError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, zlib.error, struct.error, NotImplementedError, ...
        raise StudioError(f"is no zip archive that can be read ({error}); pack it again") from None


def _check_directory(file: BinaryIO) -> None:
    """Refuse long lists of files before `zipfile` reads them: it takes a kilobyte of memory for each.

    The list's own length counts, not the number of files that the archive claims. Archives for more than 65,535 files
    or 4 GB (zip64) are refused.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - 22 - 65535 - 20))
    tail = file.read()
    at = len(tail) - 22 if tail[-22:].startswith(b"PK\x05\x06") else tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise StudioError("is no whole zip archive; pack it again")
    entries, length = struct.unpack("<10xHI6x", tail[at : at + 22])
    if entries > MAX_FILES or length > MAX_FILES * 400 or b"PK\x06\x07" in tail[max(0, at - 20) : at]:
        raise StudioError(f"holds more than {MAX_FILES} files; pack fewer")
    file.seek(0)


def _is_litter(entry: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(entry.filename).parts
    return entry.is_dir() or "__MACOSX" in parts or (bool(parts) and parts[-1].startswith("."))


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise StudioError(f"holds {one_line(name)[:80]!r}, a name that points outside the archive; pack it again")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise StudioError(f"holds {one_line(name)[:80]!r}, a link instead of a file; pack the file itself")
    if entry.flag_bits & 1:
        raise StudioError("is locked by a password; pack it without one")


def _unpacked(
    archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], into: Path, max_file: int, max_total: int
) -> Iterator[tuple[str, Path]]:
    room = max_total
    for number, entry in enumerate(entries):
        name = one_line(entry.filename)
        target = into / f"{number}{'.safetensors' if name.lower().endswith('.safetensors') else ''}"
        with archive.open(entry) as source, target.open("wb") as file:
            copied = 0
            while block := source.read(2**16):
                copied += len(block)
                if copied > max_file:
                    raise StudioError(f"holds {name[:80]!r}, which has more than {max_file // MB} MB unpacked")
                if copied > room:
                    raise StudioError(f"unpacks to more than {max_total // MB} MB; pack fewer files")
                file.write(block)
        room -= copied
        yield name, target


# ---------------------------------------------------------------- adapter files

_SPECIAL = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}
"""dtype -> how it is stored, and the bits that are all set in NaN and infinity only."""


def check_adapter(path: Path) -> Header:
    """The header of an adapter file whose numbers are all finite; tensors are looked through piece by piece, by numpy.

    Raises:
        StudioError: it is too large.
        AdapterFileError: it is a pickle, damaged, or holds NaN or infinity (alphas aside, as the readers have it).
    """
    if path.stat().st_size > MAX_ADAPTER:
        raise StudioError(f"has more than {MAX_ADAPTER // MB} MB, more than any adapter: is it a whole model?")
    header = read_header(path)
    broken = [name for name in header.tensors if not name.endswith(".alpha") and not _is_finite(header, name)]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise AdapterFileError(f"{path} holds NaN or infinity in {broken[0]}{more}: its training diverged")
    return header


def _is_finite(header: Header, name: str, block: int = 2**20) -> bool:
    info = header.tensors[name]
    if info.dtype not in _SPECIAL or not info.numel:
        return True
    kind, mask = _SPECIAL[info.dtype]
    bits = np.memmap(header.path, kind, "r", header.start + info.begin, (info.numel,))
    special = np.array(mask, bits.dtype)
    return not any(((bits[at : at + block] & special) == special).any() for at in range(0, info.numel, block))


# ---------------------------------------------------------------- room


def check_room(ws: Workspace, user: str, coming: int = 0) -> None:
    """Refuse what no longer fits into a user's quota or onto the disk.

    Raises:
        StudioError: with what to do.
    """
    used = folder_size(ws.user(user))
    if used + coming > QUOTA:
        raise StudioError(f"Your {QUOTA // 10**9} GB are full ({used / 10**9:.1f} GB used). Empty the trash first.")
    ws.root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(ws.root).free < coming + SPARE:
        raise StudioError("The disk is nearly full. Delete what is no longer needed, or ask whoever runs the studio.")


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder that may change meanwhile."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total
