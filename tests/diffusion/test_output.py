"""What a run writes, read by diffusers, by `peft` and by us: the same pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from veneer.diffusion import (
    AdapterOptions,
    DreamBooth,
    DreamBoothConfig,
    detach,
    load_adapter,
    load_pipeline,
    read_adapter,
    remove_adapter,
    set_weights,
)
from veneer.diffusion.dialects.diffusers_file import FILE_NAME
from veneer.diffusion.sample import generate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

OPTIONS = {
    "lora": AdapterOptions(
        rank=4, alpha=6, learning_rate=2e-2, conv=True, rank_pattern={"to_k": 2}, alpha_pattern={"attn2.to_v": 1}
    ),
    "dora": AdapterOptions(rank=2, learning_rate=2e-2, dora=True),
    "loha": AdapterOptions(method="loha", rank=2, learning_rate=2e-2),
    "lokr": AdapterOptions(method="lokr", rank=2, learning_rate=2e-2),
}
TEXT = {
    "lora": AdapterOptions(rank=3, alpha=5, learning_rate=2e-2),
    "dora": AdapterOptions(rank=2, learning_rate=2e-2, dora=True),
    "loha": OPTIONS["loha"],
    "lokr": OPTIONS["lokr"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Method -> a finished run of three steps, made when first asked for."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            (folder / "images").mkdir()
            for index in range(2):
                noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / "images" / f"{index}.png")
            config = DreamBoothConfig(
                instance_data_dir=folder / "images",
                instance_prompt="a photo of sks disc",
                output_dir=folder / "run",
                unet=OPTIONS[method],
                text_encoder=TEXT[method],
                max_train_steps=3,
                sample_seeds=(),
                device="cpu",
            )
            list(DreamBooth(config).run())
            made[method] = config.output_dir
        return made[method]

    return make


@pytest.fixture
def pipe():
    return load_pipeline("embedded")


def pictures(pipe) -> np.ndarray:
    """(2, 64, 64, 3)"""
    return np.stack(
        [np.asarray(row[0], dtype=int) for row in generate(pipe, ["a photo of sks disc", "a cat"], [3], steps=2)]
    )


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_diffusers_draws_the_same_from_our_file(finished, pipe, method):
    base = pictures(pipe)
    load_adapter(pipe, finished(method))
    ours = pictures(pipe)
    assert difference(ours, base) > 20
    detach(pipe)
    load_adapter(pipe, finished(method) / FILE_NAME)
    assert difference(pictures(pipe), ours) <= 1

    theirs = load_pipeline("embedded")
    theirs.load_lora_weights(str(finished(method)), weight_name=FILE_NAME)
    assert difference(pictures(theirs), ours) <= 1


@pytest.mark.parametrize("method", list(OPTIONS))
def test_peft_draws_the_same_from_our_folders(finished, pipe, method):
    from peft import PeftModel

    load_adapter(pipe, finished(method))
    theirs = load_pipeline("embedded")
    for name in ("unet", "text_encoder"):
        PeftModel.from_pretrained(getattr(theirs, name), finished(method) / name)  # adapts the module in place
    assert difference(pictures(theirs), pictures(pipe)) <= 1


def test_only_lora_and_dora_get_a_diffusers_file(finished):
    assert (finished("lora") / FILE_NAME).exists()
    assert not (finished("loha") / FILE_NAME).exists()


def test_we_draw_the_same_from_diffusers_file_without_header(finished, pipe, tmp_path):
    """A file as trainers write it that know no header: alpha equals rank, whatever the rank of each module."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = load_pipeline("embedded")
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], rank_pattern={"attn2.to_q": 2})
    config.alpha_pattern = {"attn2.to_q": 2}
    theirs.unet.add_adapter(config)
    random = torch.Generator().manual_seed(0)
    for parameter in theirs.unet.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.2
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs.unet))
    load_adapter(pipe, tmp_path / FILE_NAME)
    assert difference(pictures(pipe), pictures(theirs)) <= 1


def test_keys_of_old_and_new_clip_both_fit(finished, pipe, tmp_path):
    source = finished("lora") / FILE_NAME
    with safe_open(source, "pt") as file:
        header = file.metadata()
    tensors = load_file(source)
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0") for key in tensors)
    flat = {key.replace("text_encoder.text_model.", "text_encoder."): tensor for key, tensor in tensors.items()}
    save_file(flat, tmp_path / "flat.safetensors", header)
    load_adapter(pipe, source)
    expected = pictures(pipe)
    detach(pipe)
    load_adapter(pipe, tmp_path / "flat.safetensors")
    assert difference(pictures(pipe), expected) == 0


def test_the_file_says_what_it_is(finished):
    with safe_open(finished("lora") / FILE_NAME, "pt") as file:
        header = file.metadata()
    assert (header["base_model"], header["trigger"], header["steps"]) == ("embedded", "a photo of sks disc", "3")
    assert "learning_rate: 0.02" in header["recipe"]
    assert "output_dir" not in header["recipe"]
    scales = json.loads(header["lora_adapter_metadata"])
    # alpha is multiplied into the factors, for the many readers that take alpha = rank without looking
    assert (scales["unet.r"], scales["unet.lora_alpha"], scales["text_encoder.lora_alpha"]) == (4, 4, 3)


def test_weights_blend_and_detaching_leaves_nothing(finished, pipe):
    base = pictures(pipe)
    modules = {name: id(module) for part in (pipe.unet, pipe.text_encoder) for name, module in part.named_modules()}
    load_adapter(pipe, finished("lora"), "one", weight=0.5)
    half = pictures(pipe)
    load_adapter(pipe, finished("loha"), "two")
    both = pictures(pipe)
    set_weights(pipe, {"two": 0.0})
    assert difference(pictures(pipe), half) == 0
    assert min(difference(both, half), difference(half, base)) > 0
    set_weights(pipe, {"one": 0.0})
    assert difference(pictures(pipe), base) == 0
    detach(pipe)
    assert modules == {n: id(m) for part in (pipe.unet, pipe.text_encoder) for n, m in part.named_modules()}
    assert difference(pictures(pipe), base) == 0


def test_one_adapter_comes_off_and_the_other_stays(finished, pipe):
    load_adapter(pipe, finished("lora"), "one")
    alone = pictures(pipe)
    load_adapter(pipe, finished("lokr"), "two")
    remove_adapter(pipe, "two")
    assert difference(pictures(pipe), alone) == 0


def test_half_an_adapter_is_not_left_behind(finished, pipe, tmp_path):
    """The UNet's part loads, the text encoder's does not fit: the pipeline is as it was."""
    tensors = load_file(finished("lora") / FILE_NAME)
    wrong = {key: t[:, :1] if "text_encoder" in key else t for key, t in tensors.items()}
    with safe_open(finished("lora") / FILE_NAME, "pt") as file:
        save_file({key: t.contiguous() for key, t in wrong.items()}, tmp_path / "wrong.safetensors", file.metadata())
    base = pictures(pipe)
    with pytest.raises(ValueError, match="should be of one rank"):
        load_adapter(pipe, tmp_path / "wrong.safetensors")
    assert difference(pictures(pipe), base) == 0
    load_adapter(pipe, finished("lora"))  # the name is free


def test_mistakes_are_named(finished, pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapter(pipe, tmp_path)
    with pytest.raises(ValueError, match="no adapter ink; it has none"):
        set_weights(pipe, {"ink": 1.0})
    load_adapter(pipe, finished("lora"), "bear")
    with pytest.raises(ValueError, match="'bear' already"):
        load_adapter(pipe, finished("lora"), "bear")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="no module of this name"):
        read_adapter(tmp_path / "kohya.safetensors")
