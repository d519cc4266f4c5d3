"""From choices to settings, and the forms that are made from the config."""

import shlex
from types import SimpleNamespace

import pytest
from veneer import cli
from veneer.core import combination_types
from veneer.core.combinations.registry import REQUIRED
from veneer.core.runs.settings import from_plain, plain
from veneer.diffusion import DreamBoothConfig
from veneer.diffusion.blend import CombineOptions
from veneer.studio.errors import StudioError
from veneer.studio.services import blending, estimates, recipes

DATASET = SimpleNamespace(pictures=range(8))
PLACES = {"instance_data_dir": "IMAGES", "output_dir": "RUN"}


def build(goal="subject", method="lora", trigger="sks face", preset="fast", advanced=None, **more):
    return recipes.build(DATASET, goal, method, trigger, preset, advanced, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("goal", recipes.GOALS)
@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("model", ["embedded", "owner/name"])
def test_every_choice_is_a_run_and_its_command_line_is_the_same_one(goal, method, preset, model):
    settings = build(goal, method, "zwx face", preset, model=model)
    config = from_plain(DreamBoothConfig, settings | PLACES)
    program, command, *arguments = shlex.split(recipes.command_line(settings))
    assert (program, command) == ("veneer", "dreambooth")
    assert cli._parse("veneer dreambooth", DreamBoothConfig, arguments) == config
    assert plain(config) == settings | PLACES | {"device": "auto"}
    cost = estimates.estimate(settings, 8)
    assert cost.seconds > 0
    assert cost.basis


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_field_of_a_form_has_a_place_and_words(method):
    settings = recipes.values(build(method=method))
    for field in recipes.fields_for(method):
        assert field.help, field.name
        assert field.name in settings or ".options." in field.name
        assert (field.type == "choice") == bool(field.choices)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_a_form_sent_back_as_it_was_changes_nothing(method):
    settings = build(method=method)
    shown = recipes.values(settings)
    sent = {field.name: shown[field.name] for field in recipes.fields_for(method) if field.name in shown}
    assert build(method=method, advanced=sent) == settings


def test_forms_show_what_the_method_knows_and_can_be_searched():
    names = {method: {field.name for field in recipes.fields_for(method)} for method in recipes.METHODS}
    assert "unet.options.decompose_factor" in names["lokr"]
    assert "unet.options.decompose_factor" not in names["lora"]
    assert "unet.dora" not in names["lora"]
    assert "unet.dora" in names["loha"]
    assert {field.name for field in recipes.fields_for("lora", "RANK unet")} >= {"unet.rank"}
    assert recipes.fields_for("lora", "no such words") == []


def test_what_is_typed_wins_and_what_is_empty_does_not():
    advanced = {"unet.rank": "4", "sample_seeds": "3, 4", "sample_prompts": "a, b\nc", "flip": True, "unet.alpha": " "}
    settings = build(advanced=advanced)
    assert settings["unet"]["rank"] == 4
    assert settings["sample_seeds"] == [3, 4]
    assert settings["sample_prompts"] == ["a, b", "c"]
    assert settings["flip"] is True
    assert settings["unet"]["alpha"] is None


@pytest.mark.parametrize(
    ("advanced", "says"),
    [
        ({"unet.rank": "many"}, "no whole number"),
        ({"unet.rank": 1.5}, "no whole number"),
        ({"unet.rank": 10**9}, "more than"),
        ({"unet.rank": 0}, "at least 1"),
        ({"unet.rank": ["a"]}, "no whole number"),
        ({"unet.rank": float("nan")}, "no whole number"),
        ({"unet.rank": True}, "no whole number"),
        ({"flip": "yes"}, "neither on nor off"),
        ({"mixed_precision": ["fp16"]}, "none of"),
        ({"output_dir": "/etc"}, "no setting"),
        ({"instance_data_dir": "/etc"}, "no setting"),
        ({"class_data_dir": "/etc"}, "no setting"),
        ({"sample_seeds": "one"}, "whole numbers"),
        ({"lr_scheduler": "none"}, "none of"),
        ({"class_prompt": "a" * 2000}, "1000 letters"),
        ({"unet.method": "none", "text_encoder.method": "none"}, "nothing to train"),
    ],
)
def test_what_cannot_be_is_refused_in_words(advanced, says):
    with pytest.raises(StudioError, match=says):
        build(advanced=advanced)


def test_all_problems_are_told_at_once():
    with pytest.raises(StudioError) as error:
        build(advanced={"unet.rank": "many", "views": "few"})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("wrong", [{"goal": "both"}, {"method": ["lora"]}, {"preset": ""}, {"trigger": "  "}])
def test_choices_that_are_none(wrong):
    with pytest.raises(StudioError):
        build(**wrong)


# ---------------------------------------------------------------- the ways to blend


def test_the_ways_to_blend_are_the_cores():
    assert {kind.name for kind in blending.KINDS} == set(combination_types())
    for kind in blending.KINDS:
        core = combination_types()[kind.name]
        assert set(kind.options) == set(core.options) - {"svd_clamp", "svd_driver"}, kind.name
        assert kind.adapters == core.adapters
        assert kind.on_factors == any(check.__name__ == "equal_ranks" for check in core.checks)
        usual = {name: blending.OPTIONS[name].default for name in kind.options}
        given = {name: value for name, value in usual.items() if value is not None}
        assert CombineOptions(combination_type=kind.name, **given).arguments()  # type: ignore[arg-type]
        assert all(name in given for name, default in core.options.items() if default is REQUIRED)
