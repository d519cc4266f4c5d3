"""Base models: what may be added, and by whom."""

import shutil

import pytest
from veneer.diffusion.demo import MATERIAL
from veneer.studio.errors import NotFound, PermissionDenied, StudioError
from veneer.studio.services import models
from veneer.studio.workspace import ME, Workspace


@pytest.fixture
def ws(tmp_path):
    return Workspace(tmp_path / "data")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MATERIAL / "pipeline", tmp_path / "mine")


def test_a_folder_is_added_and_taken_off(ws, folder):
    assert [model.name for model in models.list_models(ws)] == ["embedded"]
    model = models.add(ws, ME, str(folder), "Mine")
    assert models.source_of(ws, model.name) == str(folder)
    with pytest.raises(StudioError, match="already"):
        models.add(ws, ME, str(folder), "Mine")
    models.remove(ws, ME, model.name)
    with pytest.raises(NotFound):
        models.source_of(ws, model.name)
    assert (folder / "model_index.json").exists()


def test_who_logged_in_names_no_folders_of_the_machine(ws, folder):
    with pytest.raises(PermissionDenied, match="whoever runs the studio"):
        models.add(ws, "ann", str(folder))
    with pytest.raises(PermissionDenied):
        models.remove(ws, "ann", "embedded")


@pytest.mark.parametrize("source", ["no/such/folder/here", "", "/"])
def test_what_is_no_model_is_refused_with_a_next_step(ws, source):
    with pytest.raises(StudioError):
        models.add(ws, ME, source)
    assert len(models.list_models(ws)) == 1
