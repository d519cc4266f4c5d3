"""`veneer blend` and `veneer generate` on the embedded pipeline, with adapters of random weights."""

import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from veneer import LoKrConfig, LoraConfig, OFTConfig, cli
from veneer.core import AdaptedModel, combination_types
from veneer.diffusion.blend import CombineOptions
from veneer.diffusion.families import load_pipeline
from veneer.diffusion.inspect import adapters_at, inspect_adapter
from veneer.diffusion.pipeline import adapter_metadata, read_adapter, save_adapter

TRIGGERS = {"told": "a sks cat", "told-too": "zwx style"}
FAST = ("--steps", "2", "--seeds", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters: `both` for UNet and text encoder at rank 2, `unet` for the UNet only at rank 3."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipeline("embedded")
    parts = {
        "both": {"unet": (2, ["to_q", "conv1"]), "text_encoder": (2, ["q_proj"])},
        "unet": {"unet": (3, ["to_q", "to_v"])},
        **{name: {"unet": (2, ["to_q"])} for name in TRIGGERS},
    }
    torch.manual_seed(0)
    for name, components in parts.items():
        made = {}
        for component, (rank, targets) in components.items():
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
            model = AdaptedModel(getattr(pipe, component))
            model.add(name, config)
            made[component] = config, model.tensors(name)
            model.detach()
        save_adapter(folder / name, made, {"trigger": TRIGGERS[name]} if name in TRIGGERS else {})
    others = {
        "lokr": LoKrConfig(r=64, target_modules=["to_q"], init_weights=False),
        "oft": OFTConfig(oft_block_size=4, target_modules=["to_q"], init_weights=False),
    }
    for name, config in others.items():
        model = AdaptedModel(pipe.unet)
        model.add(name, config)
        save_adapter(folder / name, {"unet": (config, model.tensors(name))}, {})
        model.detach()
    return folder


def run(*arguments) -> None:
    cli.main([str(argument) for argument in arguments])


def picture(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int16)


def delta(folder, component, module) -> torch.Tensor:
    """The weight change (out, in * kernel) of one linear or convolution."""
    config, tensors = read_adapter(folder)[component]
    down, up = (tensors[f"{module}.lora_{part}.weight"].flatten(1) for part in "AB")
    return config.lora_alpha / down.shape[0] * up @ down


def test_cat_is_the_weighted_sum(adapters, tmp_path):
    out = tmp_path / "blend"
    run("blend", "--adapters", f"{adapters}/both=0.5", f"{adapters}/unet=-1", "--out", out, *FAST)
    tensors = read_adapter(out)["unet"][1]
    shared = next(key.rpartition(".lora_A")[0] for key in tensors if key.endswith("to_q.lora_A.weight"))
    expected = 0.5 * delta(adapters / "both", "unet", shared) - delta(adapters / "unet", "unet", shared)
    torch.testing.assert_close(delta(out, "unet", shared), expected, rtol=1e-4, atol=1e-5)
    assert set(read_adapter(out)) == {"unet", "text_encoder"}


def test_a_blend_draws_what_its_inputs_draw_together(adapters, tmp_path):
    both, unet, out = adapters / "both", adapters / "unet", tmp_path / "blend"
    run("blend", "--adapters", f"{both}=0.3", f"{unet}=0.2", "--out", out, *FAST)
    run("generate", "--prompts", "a cat", "--adapters", f"{both}=0.3", f"{unet}=0.2", "--out", tmp_path / "two", *FAST)
    run("generate", "--prompts", "a cat", "--adapters", out, "--out", tmp_path / "one", *FAST)
    run("generate", "--prompts", "a cat", "--out", tmp_path / "none", *FAST)
    two, one, none = (picture(tmp_path / name / "000-a-cat-3.png") for name in ("two", "one", "none"))
    assert np.abs(two - one).max() <= 2
    assert np.abs(two - none).max() > 20


def test_preview_shows_baseline_inputs_and_blend(adapters, tmp_path, capsys):
    out = tmp_path / "blend"
    inputs = f"{adapters}/both=0.5", f"{adapters}/unet"
    run("blend", "--adapters", *inputs, "--out", out, "--prompts", "a cat", "a dog", *FAST)
    height, width, _ = picture(out / "sheet.png").shape
    assert height > 4 * 128
    assert width > 2 * 128
    assert str(out / "sheet.png") in capsys.readouterr().out
    assert yaml.safe_load((out / "config.yaml").read_text())["adapters"] == list(inputs)


def test_without_prompts_the_preview_shows_what_the_inputs_answer_to(adapters, tmp_path, capsys):
    run("blend", "--adapters", f"{adapters}/told", f"{adapters}/told-too", "--out", tmp_path / "blend", *FAST)
    assert picture(tmp_path / "blend" / "sheet.png").shape[1] > 3 * 128  # the two triggers, and both in one prompt
    assert adapter_metadata(tmp_path / "blend")["trigger"] == "a sks cat, zwx style"
    capsys.readouterr()
    run("blend", "--adapters", f"{adapters}/both", f"{adapters}/unet", "--out", tmp_path / "mute", *FAST)
    assert "give --prompts" in capsys.readouterr().out
    assert not (tmp_path / "mute" / "sheet.png").exists()


NEEDED = {kind: ["--density", "0.5"] for kind, c in combination_types().items() if "density" in c.options}


@pytest.mark.parametrize("kind", [kind for kind in combination_types() if kind != "cat"])
def test_other_combinations(adapters, tmp_path, kind):
    options = kind, *NEEDED.get(kind, [])
    out = tmp_path / "blend"
    same_rank = f"{adapters}/both", f"{adapters}/both=0.5"
    run("blend", "--adapters", *same_rank, "--out", out, "--combination-type", *options, *FAST)
    for report in map(inspect_adapter, adapters_at(out)):
        assert all(part.ranks == [2] for part in report.parts)


def test_the_command_has_every_kind_and_every_option():
    hints = get_type_hints(CombineOptions)
    assert set(get_args(hints.pop("combination_type"))) == set(combination_types())
    assert set(hints) == {option for kind in combination_types().values() for option in kind.options}


def test_adapters_of_different_methods_blend(adapters, tmp_path, capsys):
    """At a rank, with the error told, or at an error."""
    inputs = f"{adapters}/both", f"{adapters}/lokr=0.5", f"{adapters}/oft"
    run("blend", "--adapters", *inputs, "--out", tmp_path / "a", "--combination-type", "svd", "--svd-rank", "4", *FAST)
    assert re.search(r"unet: ranks 2 to 4, [\d.]+% from the exact 'svd'", capsys.readouterr().out)
    tensors = read_adapter(tmp_path / "a")["unet"][1]
    assert {tensor.shape[0] for key, tensor in tensors.items() if key.endswith("to_q.lora_A.weight")} == {4}
    exact = "--combination-type", "svd", "--max-error", "0.01"
    run("blend", "--adapters", *inputs, "--out", tmp_path / "b", *exact, *FAST)
    told = [float(n) for n in re.findall(r"([\d.]+)% from", capsys.readouterr().out)]
    assert told
    assert max(told) <= 1


def test_weights_by_block(adapters, tmp_path):
    out, inputs = tmp_path / "blend", (f"{adapters}/both=0.5", f"{adapters}/unet=-1")
    run("blend", "--adapters", *inputs, "--block-weights", "both:unet.mid_block=0", "--out", out, *FAST)
    keys = {key.rpartition(".lora_A")[0] for key in read_adapter(out)["unet"][1] if key.endswith("to_q.lora_A.weight")}
    for module in keys:
        share = 0.0 if module.startswith("mid_block") else 0.5
        expected = share * delta(adapters / "both", "unet", module) - delta(adapters / "unet", "unet", module)
        torch.testing.assert_close(delta(out, "unet", module), expected, rtol=1e-4, atol=1e-5)
    assert {module.startswith("mid_block") for module in keys} == {True, False}
    assert "mid_block" in inspect_adapter(adapters_at(out)[0]).metadata["recipe"]


def test_the_recipe_is_kept(adapters, tmp_path):
    run("blend", "--adapters", f"{adapters}/both=0.5", f"{adapters}/unet", "--out", tmp_path / "blend", *FAST)
    for report in map(inspect_adapter, adapters_at(tmp_path / "blend")):
        made = yaml.safe_load(report.metadata["recipe"])
        assert made == {"blend": {"both": 0.5, "unet": 1.0}, "combination_type": "cat"}
        assert report.metadata["base_model"] == "embedded"


def test_generate_writes_pictures_sheet_and_config(tmp_path):
    run("generate", "--prompts", "a cat", "a red apple!", "--out", tmp_path, "--steps", "1", "--seeds", "0", "7")
    names = ["000-a-cat-0.png", "001-a-cat-7.png", "002-a-red-apple-0.png", "003-a-red-apple-7.png", "sheet.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    assert picture(tmp_path / names[0]).shape == (64, 64, 3)
    again = tmp_path / "again"
    run("generate", "--config", tmp_path / "config.yaml", "--out", again)
    assert (picture(again / names[3]) == picture(tmp_path / names[3])).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("blend", "--adapters", "{}/both"), "a blend needs two adapters or more, not 1"),
        (("blend", "--adapters", "{}/both", "{}/nowhere"), "nowhere"),
        (("blend", "--adapters", "{}/both", "{}/unet", "--combination-type", "linear"), "rank"),
        (
            ("blend", "--adapters", "{}/both", "{}/unet", "--density", "0.5"),
            "'cat' has no density: it reads no",
        ),
        (("blend", "--adapters", "{}/both", "{}/oft", "--combination-type", "svd"), "OFT has no rank to go by"),
        (("blend", "--adapters", "{}/both", "{}/unet", "--block-weights", "both"), "expected NAME:BLOCK=WEIGHT"),
        (("blend", "--adapters", "{}/both", "{}/unet", "--block-weights", "b:mid=1"), "'b' is none of the adapters"),
        (("blend", "--adapters", "{}/both", "{}/unet", "--block-weights", "both:unet.mid=1"), "near: unet.mid_block"),
        (("blend", "--adapters", "{}/both", "{}/unet", "--combination-type", "ties"), "'ties' needs density"),
        (("generate", "--prompts"), "nothing to draw"),
        (("generate", "--prompts", "a cat", "--model", "nowhere"), "nowhere"),
        (("generate", "--prompts", "a cat", "--adapters", "{}"), "holds no adapter"),
    ],
)
def test_errors_are_one_line(adapters, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        run(*(argument.format(adapters) for argument in arguments), "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.count("\n") == 1
    assert words in said
