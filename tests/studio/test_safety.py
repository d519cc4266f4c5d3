"""What comes from outside: names, pictures, archives. Everything hostile is refused with one clear sentence."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from veneer.studio import safety
from veneer.studio.errors import StudioError
from veneer.studio.workspace import Workspace

# ---------------------------------------------------------------- names

HOSTILE = ("../x", "a/b", "a\0b", "CON", "lpt1", "x" * 300, "\u202egnp.exe", "<script>alert(1)</script>", "  ", "é猫")


@given(st.one_of(st.text(), st.sampled_from(HOSTILE)))
def test_a_slug_is_a_file_name_on_every_system(name):
    slug = safety.slug(name)
    assert slug
    assert len(slug) <= 70
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert slug not in {"con", "prn", "aux", "nul", "lpt1"}


@given(st.text())
def test_a_display_name_is_one_visible_line_or_refused(name):
    try:
        shown = safety.display_name(name)
    except StudioError:
        return
    assert 1 <= len(shown) <= 80
    assert not any(unicodedata.category(c).startswith("C") for c in shown)
    assert safety.display_name(shown) == shown


@pytest.mark.parametrize("name", [None, ["a"], 3, "", " \t\n", "\u202e\u200b"])
def test_no_name_is_refused(name):
    with pytest.raises(StudioError, match="name"):
        safety.display_name(name)


# ---------------------------------------------------------------- pictures


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that states a size, with no more pixels than nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0")) + IEND


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IEND = chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16", "1"])
def test_every_kind_of_png_is_read_as_rgb(mode, tmp_path):
    image = safety.read_picture(saved(tmp_path / "a.png", Image.new(mode, (20, 10))))
    assert (image.mode, image.size) == ("RGB", (20, 10))


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "a.jpg"), ("RGB", "a.webp"), ("RGB", "a.bmp"), ("L", "a.jpg")])
def test_other_formats_are_read_as_rgb(mode, name, tmp_path):
    image = safety.read_picture(saved(tmp_path / name, Image.new(mode, (20, 10))))
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_a_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (40, 20)), exif=exif)
    assert safety.read_picture(path).size == (20, 40)


def test_a_photo_with_a_second_picture_behind_it_is_its_first(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20), "red").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert safety.read_picture(path).size == (40, 20)


def test_sixteen_bits_are_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    read = np.asarray(safety.read_picture(saved(tmp_path / "a.png", Image.fromarray(values))))[..., 0]
    assert np.abs(read.astype(int) - values // 257).max() <= 1


def test_large_pictures_are_stored_smaller(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (6000, 4000)))
    assert min(safety.read_picture(path).size) == safety.STORED_SIDE


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, kind)
    return file.getvalue()


GIF, WHOLE = encoded("GIF"), encoded("PNG")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"just text", "is not a picture"),
        (GIF, "is a GIF"),
        (SVG, "web page"),
        (b"<!doctype html><img src=x onerror=alert(1)>", "web page"),
        (b"\0\0\0\x20ftypheic" + bytes(30), "HEIC"),
        (b"II*\0" + bytes(30), "TIFF"),
        (b"%PDF-1.7", "PDF"),
        (png(13_000, 13_000), "megapixels"),
        (png(30_000, 30_000), "megapixels"),
        (png(8, 8, chunk(b"acTL", struct.pack(">II", 10_000, 0))), "animation of 1000"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))), "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_picture_is_refused_in_words(content, message, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(StudioError, match=message):
        safety.read_picture(path)


def test_an_animated_webp_is_refused(tmp_path):
    path = tmp_path / "a.webp"
    Image.new("RGB", (9, 9)).save(path, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    with pytest.raises(StudioError, match="animation of 2 frames"):
        safety.read_picture(path)


def test_a_file_of_more_bytes_than_a_photo_is_refused_unread(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(safety.MAX_PICTURE + 1)
    with pytest.raises(StudioError, match="20 MB"):
        safety.read_picture(tmp_path / "a.png")


def test_huge_pictures_cost_no_memory(tmp_path):
    """Refused from the header: a process that is given both grows by less than 100 MB."""
    for side in (13_000, 30_000):
        (tmp_path / f"{side}.png").write_bytes(png(side, side))
    code = f"""
import resource, warnings
from pathlib import Path
from veneer.studio import safety
warnings.simplefilter("ignore")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for path in Path({str(tmp_path)!r}).glob("*.png"):
    try:
        safety.read_picture(path)
    except ValueError as error:
        assert "megapixels" in str(error)
    else:
        raise SystemExit(1)
print(peak() - before)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 100_000  # KB


def test_stored_pictures_hold_pixels_and_nothing_else(tmp_path):
    """A polyglot, a comment, EXIF with a place, a colour profile: none of it survives."""
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    source = saved(
        tmp_path / "a.jpg", Image.new("RGB", (16, 16), "red"), exif=exif, icc_profile=b"secret", comment=b"secret"
    )
    source.write_bytes(source.read_bytes() + b"<script>secret</script>")
    target = tmp_path / "b.png"
    safety.write_picture(target, safety.read_picture(source))
    content = target.read_bytes()
    assert b"secret" not in content
    assert content[-12:] == IEND
    kinds, at = [], 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kinds.append(content[at + 4 : at + 8])
        at += 12 + length
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}


# ---------------------------------------------------------------- archives


def zipped(path: Path, entries: dict[str, bytes], **changes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def test_an_honest_archive_is_unpacked_under_numbers(tmp_path):
    path = zipped(
        tmp_path / "a.zip", {"dogs/1.png": b"one", "dogs/1.txt": b"two", "__MACOSX/._1.png": b"", ".DS_Store": b""}
    )
    found = safety.unpack(path, tmp_path / "out")
    assert {name: file.read_bytes() for name, file in found} == {"dogs/1.png": b"one", "dogs/1.txt": b"two"}
    assert all(file.parent == tmp_path / "out" for _, file in found)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "C:/x.png", "..\\x.png", "\\x.png"])
def test_names_that_point_outside_are_refused(name, tmp_path):
    with pytest.raises(StudioError, match="outside the archive"):
        safety.unpack(zipped(tmp_path / "a.zip", {name: b"x"}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.png": b"/etc/passwd"}, external_attr=0o120777 << 16, create_system=3)
    with pytest.raises(StudioError, match="a link"):
        safety.unpack(path, tmp_path / "out")


def test_locked_archives_are_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.png": b"x"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(StudioError, match="password"):
        safety.unpack(path, tmp_path / "out")


def test_a_bomb_is_stopped_by_what_it_unpacks_to(tmp_path):
    """200 MB in 195 KB; also if its headers claim 10 bytes."""
    path = zipped(tmp_path / "a.zip", {"a.png": bytes(200_000_000)})
    assert path.stat().st_size < 200_000
    with pytest.raises(StudioError, match="more than 20 MB unpacked"):
        safety.unpack(path, tmp_path / "out")
    lying = path.read_bytes().replace(struct.pack("<I", 200_000_000), struct.pack("<I", 10))
    path.write_bytes(lying)
    with pytest.raises(StudioError):
        safety.unpack(path, tmp_path / "lies")
    assert sum(file.stat().st_size for file in tmp_path.rglob("out/*")) <= safety.MAX_PICTURE + 2**16
    assert sum(file.stat().st_size for file in tmp_path.rglob("lies/*")) < 2**17


def test_many_files_are_stopped_by_their_sum(tmp_path):
    path = zipped(tmp_path / "a.zip", {f"{number}.png": bytes(1000) for number in range(20)})
    with pytest.raises(StudioError, match="unpacks to more than"):
        safety.unpack(path, tmp_path / "out", max_total=10_000)


def test_a_hundred_thousand_entries_are_refused_before_their_list_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "")
        archive.filelist *= 100_000
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("the list was read"))
    with pytest.raises(StudioError, match="more than 1000 files"):
        safety.unpack(path, tmp_path / "out")
    end = path.read_bytes()[-22:]
    short = path.read_bytes()[:-22] + end[:8] + struct.pack("<HH", 1, 1) + end[12:]  # it claims to have one
    path.write_bytes(short)
    with pytest.raises(StudioError, match="more than 1000 files"):
        safety.unpack(path, tmp_path / "out")


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18)])
def test_damaged_archives_are_refused_or_empty(content, tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with contextlib.suppress(StudioError):
        assert safety.unpack(path, tmp_path / "out") == []


@given(position=st.floats(0, 1), value=st.integers(0, 255))
def test_an_archive_with_a_wrong_byte_never_fails_otherwise(position, value):
    with tempfile.TemporaryDirectory() as folder:
        path = zipped(Path(folder) / "a.zip", {"a.png": b"content" * 50, "b.txt": b"text"})
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] = value
        path.write_bytes(content)
        with contextlib.suppress(StudioError):
            safety.unpack(path, Path(folder) / "out")


# ---------------------------------------------------------------- room


def test_a_full_quota_and_a_full_disk_are_told(tmp_path, monkeypatch):
    ws = Workspace(tmp_path)
    (ws.user("me")).mkdir(parents=True)
    (ws.user("me") / "a").write_bytes(bytes(1000))
    safety.check_room(ws, "me")
    monkeypatch.setattr(safety, "QUOTA", 999)
    with pytest.raises(StudioError, match="Empty the trash"):
        safety.check_room(ws, "me")
    monkeypatch.setattr(safety, "QUOTA", 10**9)
    monkeypatch.setattr(safety, "SPARE", 10**18)
    with pytest.raises(StudioError, match="disk is nearly full"):
        safety.check_room(ws, "me")
