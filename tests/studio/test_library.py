"""The library: what is taken in, refused, shown and given out."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from veneer.studio.errors import NotFound, PermissionDenied, StudioError
from veneer.studio.jobs import store
from veneer.studio.services import drafts, export, library, trash
from veneer.studio.workspace import read_json, write_json

INK = library.BUNDLED / "ink.safetensors"


@pytest.fixture
def ink(ws):
    return next(card for card in library.list_adapters(ws, "ann") if card.name == "Ink")


def test_a_new_library_holds_what_ships_with_the_package(ws):
    cards = library.list_adapters(ws, "ann")
    assert sorted(card.name for card in cards) == ["Ink", "Robot"]
    assert all(card.preview and card.base == "embedded" and card.trigger and card.recipe for card in cards)
    for card in cards:
        library.delete(ws, "ann", card.id)
    assert library.list_adapters(ws, "ann") == []
    assert library.restore(ws, "ann", cards[0].id) == cards[0]
    assert sorted(trash.thrown_away(ws, "ann", "adapters")) == [cards[1].id]


def test_cards_are_found_by_words_and_filters(ws, ink):
    library.set_tags(ws, "ann", ink.id, ["Style", "style", "drawing"])
    library.rename(ws, "ann", ink.id, "Ink, black on white")
    library.set_trigger(ws, "ann", ink.id, "zwx\nstyle")

    def found(query="", **filters):
        return [card.id for card in library.list_adapters(ws, "ann", query, **filters)]

    assert found("BLACK zwx") == found(tag="drawing") == [ink.id]
    assert found("black nothing") == found(tag="no") == found(base="sdxl") == []
    assert len(found(base="embedded", method="LoRA")) == 2
    assert library.get(ws, "ann", ink.id).tags == ("style", "drawing")
    assert library.get(ws, "ann", ink.id).trigger == "zwx style"


def test_foreign_and_forged_ids_are_not_found(ws, ink):
    library.list_adapters(ws, "bob")
    for identifier in (ink.id, "../ann", None, ["a"]):
        for ask in (library.get, library.report, library.delete, library.restore):
            with pytest.raises(NotFound):
                ask(ws, "bob", identifier)


def test_a_run_directory_and_a_blend_are_shown_as_they_were_shelved(ws, ink):
    """A card that another part of the studio wrote, without what this one would have added."""
    folder = ws.adapter("ann", "0" * 16)
    folder.mkdir()
    (folder / library.FILE_NAME).write_bytes(INK.read_bytes())
    write_json(folder / "card.json", {"name": "Blend", "created": 1.0, "rank": [8, 4], "recipe": {"kind": "svd"}})
    card = library.get(ws, "ann", "0" * 16)
    assert (card.rank, card.recipe, card.preview) == ("4 to 8", {"kind": "svd"}, None)
    assert library.report(ws, "ann", card.id)["family"] == "embedded"
    assert (folder / "report.json").exists()


# ---------------------------------------------------------------- bringing in


def one(ws, *paths: Path) -> library.ImportReport:
    (report,) = library.import_files(ws, "ann", paths)
    return report


def test_an_imported_file_keeps_its_inspection(ws):
    report = one(ws, INK)
    assert report.message == "imported: diffusers for embedded"
    card = library.get(ws, "ann", report.adapter)
    assert (card.name, card.method, card.rank) == ("ink", "LoRA", "8")
    assert card.path.read_bytes() == INK.read_bytes()
    kept = library.report(ws, "ann", card.id)
    assert kept == report.report
    assert str(INK.parent) not in json.dumps(kept)


@pytest.fixture
def peft_files(tmp_path) -> Path:
    """A folder `style` with `unet/`, as PEFT writes it."""
    folder = tmp_path / "style" / "unet"
    folder.mkdir(parents=True)
    path = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A.weight": np.ones((2, 160), np.float32), "lora_B.weight": np.ones((160, 2), np.float32)}
    save_file({f"{path}.{name}": tensor for name, tensor in factors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder.parent


def test_pefts_two_files_come_together(ws, peft_files):
    report = one(ws, *(peft_files / "unet").iterdir())
    assert report.message == "imported: PEFT directory for embedded"
    assert library.get(ws, "ann", report.adapter).path.joinpath("unet", "adapter_config.json").is_file()


@pytest.mark.parametrize("half", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_of_pefts_files_is_told(ws, peft_files, half):
    report = one(ws, peft_files / "unet" / half)
    assert "together" in report.message
    assert report.adapter is None


def test_an_archive_of_folders_and_files(ws, peft_files, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in (peft_files / "unet").iterdir():
            archive.write(path, f"style/unet/{path.name}")
        archive.write(INK, "more/ink.safetensors")
        archive.writestr("style/README.md", "words")
    reports = library.import_files(ws, "ann", [tmp_path / "a.zip"])
    assert sorted(report.name for report in reports) == ["ink.safetensors", "style"]
    assert all(report.adapter for report in reports)


def test_large_files_come_in_through_a_folder(ws, peft_files):
    folder = ws.root / "import" / "ann"
    folder.mkdir(parents=True)
    shutil.copy(INK, folder)
    shutil.copytree(peft_files, folder / "style")
    (folder / "link.safetensors").symlink_to(INK)
    assert library.waiting(ws, "ann") == ["ink.safetensors", "style"]
    assert all(library.import_waiting(ws, "ann", name)[0].adapter for name in library.waiting(ws, "ann"))
    assert library.waiting(ws, "ann") == library.waiting(ws, "bob") == []
    for name in ("link.safetensors", "../bob/x", "style"):
        with pytest.raises(NotFound):
            library.import_waiting(ws, "ann", name)


class Canary:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def tensors(**changes) -> dict[str, np.ndarray]:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    kept = {"lora_A": np.ones((2, 160), np.float32), "lora_B": np.ones((160, 2), np.float32)} | changes
    return {f"{path}.{name}.weight": tensor for name, tensor in kept.items()}


def header(entries: object, body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", None, "pickle"),
        ("a.bin", None, "pickle"),
        ("a.ckpt", None, "pickle"),
        ("a.safetensors", None, "pickle"),
        ("a.safetensors", b"", "empty"),
        ("a.safetensors", struct.pack("<Q", 2 * 2**30) + b"{", "not a whole safetensors file"),
        ("a.safetensors", header({"a": F32, "b": F32}, bytes(8)), "overlaps"),
        ("a.safetensors", header({"a": F32 | {"shape": [10**9, 10**9]}}, bytes(8)), "takes"),
        ("a.safetensors", tensors(lora_A=np.full((2, 160), np.nan, np.float32)), "NaN or infinity"),
        ("a.safetensors", tensors(lora_A=np.full((2, 160), np.inf, np.float16)), "NaN or infinity"),
        ("a.safetensors", tensors(lora_A=np.ones((2, 9), np.float32)), "does not fit|fits none"),
        ("a.safetensors", tensors(lora_B=np.ones((160, 3), np.float32)), "does not fit|fits none"),
        ("a.safetensors", {"some.weight": np.ones(3, np.float32)}, "no adapter of a known dialect"),
        ("photo.png", b"\x89PNG\r\n\x1a\n", "picture"),
        ("<script>.json", b"{}", "JSON"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(ws, tmp_path, name, content, message):
    canary = tmp_path / "canary"
    path = tmp_path / name
    if isinstance(content, dict):
        save_file(content, path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)) if content is None else content)
    report = one(ws, path)
    assert report.adapter is None
    assert message.split("|")[0] in report.message or message.split("|")[-1] in report.message
    assert str(tmp_path) not in report.message
    assert not canary.exists()
    assert not list(ws.temporary.iterdir())
    assert not list(ws.adapters("ann").glob("*"))


def test_a_zip_of_pickles_is_not_believed(ws, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.pt", pickle.dumps(Canary(tmp_path / "canary")))
    report = one(ws, tmp_path / "a.zip")
    assert report.adapter is None
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------- giving out


def test_an_export_is_a_job_with_everything_that_the_command_line_takes(ws, ink):
    job = export.start(ws, "ann", ink.id, "kohya", dtype="float16")
    spec = read_json(ws.job(job) / "spec.json")
    assert spec["arguments"]["file"] == "ink-kohya.safetensors"
    assert spec["arguments"]["options"] == {"to": "kohya", "dtype": "float16", "base": "embedded"}
    assert (ws.root / spec["arguments"]["path"]).is_file()
    with pytest.raises(PermissionDenied):
        export.result(ws, "bob", job)
    with pytest.raises(NotFound):
        export.result(ws, "ann", job)
    assert export.start(ws, "ann", ink.id, "kohya", dtype="float16") == job
    assert store.load(ws, job).kind == "convert"


@pytest.mark.parametrize(
    "asked", [{"to": "pickle"}, {"to": ["kohya"]}, {"to": "kohya", "dtype": "int8"}, {"to": "kohya", "rank": 0}]
)
def test_other_exports_are_refused(ws, ink, asked):
    with pytest.raises(StudioError, match=r"Choose a format|The rank"):
        export.start(ws, "ann", ink.id, **asked)


def test_formats_that_lack_the_method_say_so(ws, ink):
    kept = library.report(ws, "ann", ink.id)
    write_json(ink.folder / "report.json", kept | {"parts": [kept["parts"][0] | {"method": "LoHa"}]})
    reasons = {choice.to: choice.reason for choice in export.choices(ws, "ann", ink.id)}
    assert {to for to, reason in reasons.items() if reason} == {"diffusers"}
    with pytest.raises(StudioError, match="turn it into LoRA"):
        export.start(ws, "ann", ink.id, "diffusers")
    assert export.start(ws, "ann", ink.id, "diffusers", rank=4)


# ---------------------------------------------------------------- drafts


def test_drafts_keep_what_was_typed(ws):
    assert drafts.load(ws, "ann", "train") == {}
    values = {"trigger": "sks <b>dog</b>", "steps": 40, "none": None, "list": [1, 2.5]}
    drafts.save(ws, "ann", "train", values)
    assert drafts.load(ws, "ann", "train") == values
    assert drafts.load(ws, "bob", "train") == {}
    drafts.forget(ws, "ann", "train")
    assert drafts.load(ws, "ann", "train") == {}


@pytest.mark.parametrize("values", [{"a": object()}, {"a": float("nan")}, {"a": "x" * 300_000}, ["a"]])
def test_what_no_form_holds_is_refused(ws, values):
    with pytest.raises(StudioError, match="form"):
        drafts.save(ws, "ann", "train", values)


def test_a_damaged_draft_is_an_empty_form(ws):
    drafts.save(ws, "ann", "train", {"a": 1})
    ws.draft("ann", "train").write_text("{")
    assert drafts.load(ws, "ann", "train") == {}


@pytest.mark.parametrize("form", ["../card", "a/b", "", "A" * 40])
def test_other_forms_are_refused(ws, form):
    with pytest.raises(StudioError, match="no form"):
        drafts.save(ws, "ann", form, {})
