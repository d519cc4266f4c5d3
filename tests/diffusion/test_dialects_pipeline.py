"""Adapters of different dialects together on the embedded pipeline: loaded, blended, saved again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from veneer.core import AdaptedModel, LoHaConfig, LoKrConfig, LoraConfig
from veneer.core.weighted import parse_weighted
from veneer.diffusion import adapted_models, detach, load_adapter, load_pipeline, read_adapter, save_adapter
from veneer.diffusion.blend import BLEND, CombineOptions, combine
from veneer.diffusion.dialects.names import Names

TARGETS = ["to_q", "to_k", "to_v"]
CONFIGS = {
    "lora": lambda: LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False),
    "lokr": lambda: LoKrConfig(r=2, alpha=1, target_modules=TARGETS, init_weights=False),
    "loha": lambda: LoHaConfig(r=2, alpha=1, target_modules=TARGETS, init_weights=False),
}
FILES = {"lora": ("lora", None), "lokr": ("lokr.safetensors", "comfy"), "loha": ("loha.safetensors", "kohya")}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("embedded")


@pytest.fixture
def files(pipe, tmp_path):
    """A LoRA as PEFT's folders, a LoKr for ComfyUI, a LoHa of kohya's: one layer's delta by name, and the paths."""
    deltas = {}
    for method, make in CONFIGS.items():
        torch.manual_seed(0)
        model = AdaptedModel(pipe.unet)
        model.add(method, make())
        deltas[method] = pipe.unet.get_submodule(LAYER).get_delta_weight(method).clone()
        adapters = {"unet": (model.configs[method], {k: t.clone() for k, t in model.tensors(method).items()})}
        model.detach()
        names = Names.of_pipeline(pipe)
        save_adapter(tmp_path / FILES[method][0], adapters, {}, FILES[method][1], names)
    return deltas, [tmp_path / name for name, _ in FILES.values()]


def test_three_dialects_blend_into_the_exact_sum(pipe, files):
    deltas, paths = files
    inputs = parse_weighted([f"{path}={weight}" for path, weight in zip(paths, (1.0, 0.5, -2.0), strict=True)])
    blended = combine(pipe, inputs, CombineOptions(combination_type="cat"))
    try:
        delta = pipe.unet.get_submodule(LAYER).get_delta_weight(BLEND)
        expected = deltas["lora"] + 0.5 * deltas["lokr"] - 2 * deltas["loha"]
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
        assert blended.adapters.keys() == {"unet"}
        assert adapted_models(pipe)["unet"].configs.keys() == {*(i.name for i in inputs), BLEND}
    finally:
        detach(pipe)


def test_what_is_read_is_saved_as_folders_of_peft(pipe, files, tmp_path):
    deltas, (_, _, kohya) = files
    save_adapter(tmp_path / "again", read_adapter_for(pipe, kohya), {"trigger": "sks"}, names=Names.of_pipeline(pipe))
    load_adapter(pipe, tmp_path / "again" / "unet" / "adapter_model.safetensors", "again")
    try:
        delta = pipe.unet.get_submodule(LAYER).get_delta_weight("again")
        torch.testing.assert_close(delta, deltas["loha"], atol=1e-5, rtol=1e-4)
        assert isinstance(adapted_models(pipe)["unet"].configs["again"], LoHaConfig)
    finally:
        detach(pipe)


def read_adapter_for(pipe, path):
    """As the pipeline holds it."""
    load_adapter(pipe, path)
    model = adapted_models(pipe)["unet"]
    held = {"unet": (model.configs["default"], {key: t.clone() for key, t in model.tensors("default").items()})}
    detach(pipe)
    return held


def test_a_stored_family_is_guessed_without_a_pipeline(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {"down": (2, 1280, 1, 1), "up": (1280, 2, 1, 1)}
    tensors = {f"{name}.lora_{end}.weight": torch.ones(shape) for end, shape in shapes.items()}
    save_file(tensors, tmp_path / "file.safetensors")
    config, tensors = read_adapter(tmp_path / "file.safetensors")["unet"]
    assert config.layers.keys() == {"mid_block.attentions.0.proj_in"}
    assert tensors["mid_block.attentions.0.proj_in.lora_A.weight"].shape == (2, 1280, 1, 1)


def test_a_folder_with_one_file_is_that_file(pipe, files, tmp_path):
    kohya = files[1][-1]
    folder = tmp_path / "download"
    folder.mkdir()
    kohya.rename(folder / "style_v2.safetensors")
    load_adapter(pipe, folder)
    detach(pipe)
    save_file({"x.lora_down.weight": torch.ones(1, 1)}, folder / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has 2 \.safetensors files, of which one has to be named"):
        load_adapter(pipe, folder)


def test_a_file_for_another_family_changes_nothing(pipe, tmp_path):
    before = {name: id(module) for name, module in pipe.unet.named_modules()}
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 3072), f"{name}.lora_up.weight": torch.ones(9216, 2)},
              tmp_path / "flux.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no module of this name"):
        load_adapter(pipe, tmp_path / "flux.safetensors")
    assert before == {name: id(module) for name, module in pipe.unet.named_modules()}


@pytest.mark.parametrize("factor", [-1, 4, 80])
def test_either_split_of_a_lokr_survives(factor, pipe, tmp_path):
    """ "swaps so m <= n" in LyCORIS; PEFT "keeps (factor, n)": a left factor of any shape is read as it is."""
    model = AdaptedModel(pipe.unet)
    config = LoKrConfig(
        r=1, alpha=3, decompose_factor=factor, target_modules=["to_q", "ff.net.0.proj"], init_weights=False
    )
    model.add("lokr", config)
    expected = pipe.unet.get_submodule(LAYER).get_delta_weight("lokr").clone()
    adapters = {"unet": (config, {k: t.clone() for k, t in model.tensors("lokr").items()})}
    model.detach()
    for dialect in ("kohya", "comfy", "peft"):
        out = tmp_path / (dialect if dialect == "peft" else f"{dialect}.safetensors")
        save_adapter(out, adapters, {}, dialect, Names.of_pipeline(pipe))
        load_adapter(pipe, out)
        try:
            delta = pipe.unet.get_submodule(LAYER).get_delta_weight("default")
            torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)
        finally:
            detach(pipe)


def test_a_split_that_peft_cannot_name_is_refused(pipe, tmp_path):
    path = LAYER
    width = pipe.unet.get_submodule(path).in_features
    shapes = {"lokr_w1": (4, 8), "lokr_w2": (width // 4, width // 8)}
    save_file({f"unet.{path}.{key}": torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "f.safetensors")
    adapters = read_adapter_for(pipe, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"no decompose_factor that splits every layer .*--method lora --rank N"):
        save_adapter(tmp_path / "out", adapters, {}, "peft", Names.of_pipeline(pipe))
    assert not (tmp_path / "out").exists()


def test_folders_of_peft_report_what_has_no_layer(pipe, files):
    _, (folder, *_) = files
    tensors = load_file(folder / "unet" / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)},
        folder / "unet" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"no place for \['nowhere.lora_A.weight'\]"):
        load_adapter(pipe, folder)
    assert load_adapter(pipe, folder, strict=False).unmatched == {"unet.nowhere.lora_A.weight": "no layer for it"}
    detach(pipe)
