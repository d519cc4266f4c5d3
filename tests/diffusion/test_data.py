"""Images and captions: found, read, judged, cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from veneer.core.errors import DataError
from veneer.diffusion.data import image_views, scan
from veneer.diffusion.images import caption_of, find_files, read_image


def test_natural_order_and_what_is_not_an_image(tmp_path: Path):
    for name in ("10.png", "2.png", "a1.png", "A10.png", "a2.png", ".hidden.png", "2.txt", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    assert [path.name for path in find_files(tmp_path)] == ["2.png", "10.png", "a1.png", "a2.png", "A10.png"]


def test_caption_beside_the_image_wins(tmp_path: Path):
    (tmp_path / "1.txt").write_text("\ufeff a disc\n on the grass \n", encoding="utf-8")
    (tmp_path / "2.txt").write_text("  \n")
    captions = [caption_of(tmp_path / f"{i}.png", "a photo of sks disc") for i in (1, 2, 3)]
    assert captions == ["a disc on the grass", "a photo of sks disc", "a photo of sks disc"]


def test_exif_orientation_is_applied(tmp_path: Path):
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "PA":
        picture.quantize(4).save(tmp_path / "x.png")
    else:
        picture.convert(mode).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png")
    assert read.mode == "RGB"
    assert read.getpixel((5, 5)) == (255, 255, 255)
    assert read.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / f"x.{suffix}")
    read = read_image(tmp_path / f"x.{suffix}")
    assert read.mode == "RGB"
    assert min(read.getpixel((4, 4))) > 250


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path: Path):
    Image.fromarray(np.array([[0, 32768], [65535, 256]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert [read_image(tmp_path / "x.png").getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        0,
        127,
        255,
        0,
    ]


def test_bad_images_are_named_and_skipped(images: Path):
    whole = (images / "0.png").read_bytes()
    (images / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (images / "unreadable.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 20)).save(images / "small.png")
    found = scan(images, "a disc", smallest=32)
    assert [example.path.name for example in found.examples] == ["0.png", "1.png", "2.png", "3.png"]
    assert [line.partition(":")[0] for line in found.skipped] == ["small.png", "truncated.png", "unreadable.jpg"]
    assert "40x20" in found.skipped[0]


def test_too_few_good_images_end_the_run(images: Path):
    for index in range(4):
        (images / f"bad{index}.png").write_bytes(b"no image")
    assert len(scan(images, "a disc", 32).examples) == 4
    (images / "bad4.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"only 4 of 9 images .* bad0.png: cannot be read"):
        scan(images, "a disc", 32)


def test_empty_and_missing_folders(tmp_path: Path):
    with pytest.raises(DataError, match="holds no images"):
        scan(tmp_path, "a disc", 32)
    with pytest.raises(DataError, match="not a folder"):
        scan(tmp_path / "nowhere", "a disc", 32)


def test_shorter_side_then_centre():
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste((255, 255, 255), (100, 0, 200, 100))
    view = image_views(picture, 32)
    assert view.shape == (1, 3, 32, 32)
    assert view[:, :, :, 2:-2].min() > 0.99
    assert view.max() <= 1


def test_random_crops_are_reproducible_and_every_second_is_mirrored():
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    first = image_views(picture, 32, 6, random_crop=True, seed=3)
    assert torch.equal(first, image_views(picture, 32, 6, random_crop=True, seed=3))
    assert len({tuple(view.flatten().tolist()) for view in first}) == 6
    plain, mirrored = image_views(picture, 32, 2, flip=True)
    assert torch.equal(mirrored, plain.flip(-1))
