"""Data sets: what is added, told, undone and found wrong."""

from __future__ import annotations

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from veneer.diffusion.data import scan
from veneer.diffusion.images import read_image
from veneer.studio import safety
from veneer.studio.errors import NotFound, StudioError
from veneer.studio.services import datasets, trash


@pytest.fixture
def discs(ws, photos):
    """A data set of three pictures, one with a caption."""
    made = datasets.create(ws, "ann", "Discs")
    datasets.add_files(ws, "ann", made.id, photos)
    return datasets.get(ws, "ann", made.id)


def test_pictures_and_captions_become_a_folder_that_can_be_trained_on(discs):
    assert [picture.caption for picture in discs.pictures] == ["a photo of sks disc on white", "", ""]
    assert [picture.name for picture in discs.pictures] == ["disc 0.png", "disc 1.png", "disc 2.png"]
    found = scan(discs.folder, "a photo of sks disc", smallest=32)
    assert [example.path for example in found.examples] == [picture.path for picture in discs.pictures]
    assert not found.skipped
    assert all(read_image(picture.thumbnail).size == (64, 64) for picture in discs.pictures)


def test_each_file_gets_its_word_and_the_rest_is_kept(ws, photos, tmp_path):
    bad = {"cut.png": photos[0].read_bytes()[:200], "text.png": b"no picture", "empty.jpg": b"", "page.svg": b"<svg/>"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    made = datasets.create(ws, "ann", "Mixed")
    reports = datasets.add_files(ws, "ann", made.id, [*(tmp_path / name for name in bad), *photos])
    assert {report.name for report in reports if report.picture is None} == set(bad)
    assert all(report.message for report in reports)
    assert len(datasets.get(ws, "ann", made.id).pictures) == 3


def test_an_archive_is_added_like_its_files(ws, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in photos:
            archive.write(path, f"some folder/{path.name}")
        archive.writestr("some folder/inner.zip", b"PK\x03\x04")
    made = datasets.create(ws, "ann", "Zipped")
    reports = datasets.add_files(ws, "ann", made.id, [tmp_path / "all.zip"])
    assert [report.message for report in reports if report.picture is None] == [
        "is an archive inside an archive; unpack it first"
    ]
    assert [p.caption for p in datasets.get(ws, "ann", made.id).pictures] == ["a photo of sks disc on white", "", ""]
    assert not list(ws.temporary.iterdir())


def test_a_hostile_archive_is_one_report(ws, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("../../a.png", b"x")
    made = datasets.create(ws, "ann", "Zipped")
    reports = datasets.add_files(ws, "ann", made.id, [tmp_path / "all.zip", *photos])
    assert reports[0].name == "all.zip"
    assert "outside" in reports[0].message
    assert len(datasets.get(ws, "ann", made.id).pictures) == 3


def test_a_caption_may_come_later(ws, discs, tmp_path):
    (tmp_path / "disc 2.txt").write_text("on gold")
    (tmp_path / "other.txt").write_text("nothing")
    reports = datasets.add_files(ws, "ann", discs.id, [tmp_path / "disc 2.txt", tmp_path / "other.txt"])
    assert [report.picture for report in reports] == ["0003", None]
    assert datasets.get(ws, "ann", discs.id).pictures[2].caption == "on gold"


def test_captions_are_one_line_and_empty_ones_are_none(ws, discs):
    datasets.set_caption(ws, "ann", discs.id, "0002", "  on the \u202e beach\n\0 ")
    assert datasets.get(ws, "ann", discs.id).pictures[1].caption == "on the beach"
    datasets.set_caption(ws, "ann", discs.id, "0002", "")
    assert not (discs.folder / "0002.txt").exists()


@pytest.mark.parametrize("caption", ["x" * 1001, None, ["a"]])
def test_other_captions_are_refused(ws, discs, caption):
    with pytest.raises(StudioError, match="caption"):
        datasets.set_caption(ws, "ann", discs.id, "0001", caption)


def test_removing_and_deleting_can_be_undone(ws, discs):
    datasets.remove_image(ws, "ann", discs.id, "0001")
    assert [picture.id for picture in datasets.get(ws, "ann", discs.id).pictures] == ["0002", "0003"]
    datasets.restore_image(ws, "ann", discs.id, "0001")
    assert datasets.get(ws, "ann", discs.id) == discs
    datasets.delete(ws, "ann", discs.id)
    assert datasets.list_datasets(ws, "ann") == []
    assert trash.thrown_away(ws, "ann", "datasets") == [discs.id]
    assert datasets.restore(ws, "ann", discs.id) == discs


def test_the_trash_is_emptied_for_good(ws, discs):
    datasets.delete(ws, "ann", discs.id)
    assert trash.empty(ws, "ann", "datasets", older_than=60) == 0
    assert trash.empty(ws, "ann", "datasets") == 1
    with pytest.raises(NotFound, match="Reload"):
        datasets.restore(ws, "ann", discs.id)


def test_a_number_is_not_used_twice(ws, discs, photos):
    datasets.remove_image(ws, "ann", discs.id, "0003")
    datasets.add_files(ws, "ann", discs.id, photos[-1:])
    assert [picture.id for picture in datasets.get(ws, "ann", discs.id).pictures] == ["0001", "0002", "0004"]
    datasets.restore_image(ws, "ann", discs.id, "0003")
    assert len(datasets.get(ws, "ann", discs.id).pictures) == 4


def test_tabs_that_add_at_once_lose_nothing(ws, photos):
    made = datasets.create(ws, "ann", "Busy")
    with ThreadPoolExecutor(8) as tabs:
        reports = list(tabs.map(lambda _: datasets.add_files(ws, "ann", made.id, photos), range(8)))
    assert all(report.picture for found in reports for report in found)
    pictures = datasets.get(ws, "ann", made.id).pictures
    assert len({picture.id for picture in pictures}) == 24
    assert sum(bool(picture.caption) for picture in pictures) == 8


def test_names_are_only_shown(ws):
    for name in ("../x", "a/b", "CON", "x" * 300, "<script>alert(1)</script>"):
        made = datasets.create(ws, "ann", name)
        assert made.name[:10] == name[:10]
        assert made.folder.parent == ws.datasets("ann")
    first, second = (datasets.create(ws, "ann", "Same") for _ in range(2))
    assert first.id != second.id
    datasets.rename(ws, "ann", first.id, "Other")
    assert {made.name for made in datasets.list_datasets(ws, "ann")} >= {"Same", "Other"}


@pytest.mark.parametrize("forged", ["../ann", "0" * 15, "G" * 16, None, ["a"], 3, "", "0" * 16, "a\0b"])
def test_forged_and_foreign_ids_are_not_found(ws, discs, forged):
    for identifier in (forged, discs.id):
        with pytest.raises(NotFound):
            datasets.get(ws, "bob", identifier)
        with pytest.raises(NotFound):
            datasets.delete(ws, "bob", identifier)
    with pytest.raises(NotFound):
        datasets.set_caption(ws, "ann", discs.id, forged, "x")
    with pytest.raises(NotFound):
        datasets.restore_image(ws, "ann", discs.id, forged)


def test_a_set_is_not_filled_without_end(ws, photos, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_PICTURES", 2)
    made = datasets.create(ws, "ann", "Full")
    reports = datasets.add_files(ws, "ann", made.id, photos)
    assert "at most 2 pictures" in reports[-1].message
    monkeypatch.setattr(safety, "MAX_FILES", 2)
    with pytest.raises(StudioError, match="too many"):
        datasets.add_files(ws, "ann", made.id, photos)


def test_a_snapshot_stays_as_it_was(ws, discs, tmp_path):
    datasets.snapshot(discs, tmp_path / "kept")
    datasets.set_caption(ws, "ann", discs.id, "0001", "changed")
    datasets.remove_image(ws, "ann", discs.id, "0002")
    kept = scan(tmp_path / "kept", "a disc", smallest=32).examples
    assert [(example.path.name, example.prompt) for example in kept] == [
        ("0001.png", "a photo of sks disc on white"),
        ("0002.png", "a disc"),
        ("0003.png", "a disc"),
    ]


# ---------------------------------------------------------------- the doctor


def findings(found: datasets.Dataset, resolution: int = 64) -> set[tuple[str, str | None]]:
    return {(finding.kind, finding.picture) for finding in datasets.doctor(found, resolution)}


@pytest.mark.parametrize("key", [sample.key for sample in datasets.SAMPLES])
def test_samples_are_copied_and_healthy(ws, key):
    made = datasets.copy_sample(ws, "ann", key)
    assert len(made.pictures) >= 8
    assert all(picture.caption for picture in made.pictures)
    assert made.trigger in made.pictures[0].caption
    assert findings(made) == set()


def test_the_doctor_finds_what_is_planted(ws, tmp_path):
    sharp = read_image(datasets.SAMPLES[0].folder / "02.png").resize((512, 512), Image.Resampling.NEAREST)
    planted = {
        "a.png": sharp,
        "b.jpg": sharp.resize((300, 300)),
        "c.png": sharp.transpose(Image.Transpose.ROTATE_90).filter(ImageFilter.GaussianBlur(9)),
        "d.png": read_image(datasets.SAMPLES[1].folder / "05.png"),
    }
    for name, image in planted.items():
        image.save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("" if name == "d.png" else "told")
    made = datasets.create(ws, "ann", "Ill")
    datasets.add_files(ws, "ann", made.id, sorted(tmp_path.glob("[abcd].*")))
    assert findings(datasets.get(ws, "ann", made.id), 512) == {
        ("duplicate", "0002"),
        ("small", "0002"),
        ("blurry", "0003"),
        ("small", "0004"),
        ("caption", "0004"),
    }


def test_few_pictures_are_told(ws):
    assert findings(datasets.create(ws, "ann", "Empty")) == {("few", None)}


def test_unknown_samples_are_named(ws):
    with pytest.raises(NotFound, match="robot"):
        datasets.copy_sample(ws, "ann", "../robot")


def test_no_path_of_the_server_is_told(ws, photos, tmp_path: Path):
    (tmp_path / "bad.png").write_bytes(photos[0].read_bytes()[:100])
    made = datasets.create(ws, "ann", "Any")
    reports = datasets.add_files(ws, "ann", made.id, [tmp_path / "bad.png"])
    assert str(tmp_path) not in str(reports[0].message)
