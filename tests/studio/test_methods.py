"""The methods that the form offers: read from sources, equal to what is registered, trained by what the recipe sets."""

import dataclasses

import pytest
from veneer.core.config import config_classes
from veneer.core.runs.docs import field_docs
from veneer.core.runs.events import Done
from veneer.diffusion.config import DreamBoothConfig
from veneer.diffusion.dreambooth import DreamBooth
from veneer.studio.services import datasets, library, recipes
from veneer.studio.services.methods import methods

REGISTRY = {
    kind.value.lower(): found
    for kind, found in config_classes().items()
    if not found.prompts  # they change no layer
}


def test_the_sources_tell_what_is_registered():
    assert methods().keys() == REGISTRY.keys()


@pytest.mark.parametrize("key", REGISTRY)
def test_a_methods_options_are_its_configs_fields(key):
    declared = {field.name: field for field in dataclasses.fields(REGISTRY[key])}
    assert methods()[key].fields == declared.keys()
    for option in methods()[key].options:
        assert option.default == declared[option.name].default
        assert option.help == field_docs(REGISTRY[key])[option.name] != ""


OTHERS = [method for method in recipes.METHODS if method not in ("lora", "dora", "loha", "lokr")]


@pytest.mark.parametrize("method", OTHERS)
def test_what_the_recipe_sets_trains_and_is_read_again(ws, method):
    """Those four are trained elsewhere."""
    dataset = datasets.copy_sample(ws, "me", "robot")
    settings = recipes.build(dataset, "subject", method, "sks face", advanced={"max_train_steps": 2})
    quick = {"sample_seeds": (), "class_prompt": None, "train_batch_size": 1}
    places = {"instance_data_dir": dataset.folder, "output_dir": ws.root / "run", "device": "cpu"}
    *_, last = DreamBooth(recipes.from_plain(DreamBoothConfig, settings | quick | places)).run()
    assert isinstance(last, Done)
    path = ws.root / "import" / "me" / "made"
    path.parent.mkdir(parents=True)
    (ws.root / "run" / "unet").rename(path)
    (report,) = library.import_waiting(ws, "me", "made")
    assert report.adapter, report.message
