"""`veneer convert`: the same effect in another dialect, or a clear refusal and nothing written."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from veneer import cli
from veneer.diffusion import load_pipeline
from veneer.diffusion.base import BaseModel
from veneer.diffusion.convert import ConvertConfig, convert_adapter
from veneer.diffusion.dialects.reading import read
from veneer.diffusion.inspect import inspect_adapter
from veneer.diffusion.to_lora import built

BASE = BaseModel("embedded")
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{Q}".replace(".", "_")
CONV = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
DIALECTS = ("peft", "diffusers", "kohya", "comfy")


def filed(path: Path, module: str = FLAT, **factors: torch.Tensor | float) -> Path:
    made = {name: torch.as_tensor(value) for name, value in factors.items()}
    save_file({f"{module}.{name.replace('_weight', '.weight')}": value for name, value in made.items()}, path)
    return path


def lora(path: Path, rank: int = 4, alpha: float = 2.0, **more) -> Path:
    return filed(
        path, lora_down_weight=torch.randn(rank, 160), lora_up_weight=torch.randn(160, rank), alpha=alpha, **more
    )


def lokr(path: Path) -> Path:
    return filed(path, lokr_w1=torch.randn(4, 4), lokr_w2_a=torch.randn(40, 2), lokr_w2_b=torch.randn(2, 40), alpha=1.0)


def dora(path: Path) -> Path:
    return lora(path, dora_scale=5 + torch.rand(160, 1))


def full(path: Path) -> Path:
    return filed(path, diff=torch.randn(160, 160))


def loha_kernel(path: Path) -> Path:
    shapes = {"hada_w1_a": (160, 3), "hada_w1_b": (3, 1440), "hada_w2_a": (160, 3), "hada_w2_b": (3, 1440)}
    return filed(path, CONV, alpha=1.0, **{name: torch.randn(shape) for name, shape in shapes.items()})


def text(path: Path) -> Path:
    return filed(path, TEXT, lora_down_weight=torch.randn(4, 192), lora_up_weight=torch.randn(768, 4), alpha=2.0)


SOURCES = {"lora": lora, "lokr": lokr, "dora": dora, "full": full, "loha of a kernel": loha_kernel, "text": text}
"""Methods and places, in kohya's dialect."""
ONLY_LYCORIS = {"full": ("peft", "diffusers"), "lokr": ("diffusers",), "loha of a kernel": ("diffusers",)}
"""What PEFT or diffusers have no form for."""


def effect(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """What a file changes of the weights of the pipeline in the box."""
    changes = {}
    for (component, name), layer in read(path, BASE.names).layers().items():
        weight = BASE.weights(component, name)[0].float()
        own = built(layer, name, tuple(weight.shape))
        changes[component, name] = own.fold(weight.flatten(1), None)[0].detach() - weight.flatten(1)
    return changes


def same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    a, b = effect(one), effect(other)
    assert a.keys() == b.keys()
    for place in a:
        assert (a[place] - b[place]).norm() <= tolerance * a[place].norm()


def config(source: Path, to: str, **options) -> ConvertConfig:
    out = source.parent / (f"out-{to}" if to == "peft" else f"out-{to}.safetensors")
    return ConvertConfig(**{"source": source, "out": out, "to": to} | options)


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    return tmp_path / "x.safetensors"


CASES = [(name, to) for name in SOURCES for to in DIALECTS if to not in ONLY_LYCORIS.get(name, ())]


@pytest.mark.parametrize(("name", "to"), CASES)
def test_the_effect_is_the_same_in_every_dialect_and_back(source, name, to):
    SOURCES[name](source)
    done = convert_adapter(config(source, to))
    assert (done.source, done.to, done.family, done.layers, done.error) == ("kohya / LyCORIS", to, "embedded", 1, None)
    same(source, done.out)
    assert inspect_adapter(done.out).verdicts[0].reads == "whole"
    back = convert_adapter(config(done.out, "kohya", out=source.with_name("back.safetensors")))
    same(source, back.out)


@pytest.mark.parametrize(("name", "to"), [(name, to) for name, lost in ONLY_LYCORIS.items() for to in lost])
def test_what_a_dialect_cannot_express_is_refused_with_the_way_out(source, name, to):
    SOURCES[name](source)
    wanted = config(source, to)
    with pytest.raises(ValueError, match="--method lora --rank N"):
        convert_adapter(wanted)
    assert not wanted.out.exists()
    done = convert_adapter(config(source, to, method="lora", rank=160))
    same(source, done.out, tolerance=1e-3)


def test_turning_into_lora_states_its_error(source):
    loha_kernel(source)
    done = convert_adapter(config(source, "kohya", method="lora", rank=2))
    (before,), (after,) = effect(source).values(), effect(done.out).values()
    assert done.error == pytest.approx(((before - after).norm() / before.norm()).item(), abs=1e-4)
    assert f"as LoRA of rank 2, with a relative error of {done.error:.2%} in all" in done.notes[0]
    close = convert_adapter(config(source, "kohya", method="lora", tolerance=0.1, overwrite=True))
    assert close.error <= 0.1


def test_dora_becomes_lora_with_its_base_at_hand(source):
    dora(source)
    wanted = {"method": "lora", "rank": 160}
    with pytest.raises(ValueError, match="depends on the base model's weights: give --base"):
        convert_adapter(config(source, "diffusers", **wanted))
    done = convert_adapter(config(source, "diffusers", **wanted, base="embedded"))
    same(source, done.out, tolerance=1e-3)


def test_diffusers_applies_a_converted_file_as_we_do(source):
    lokr(source)
    done = convert_adapter(config(source, "diffusers", method="lora", rank=16))
    pipe = load_pipeline("embedded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(done.out, adapter_name="x")
    theirs = pipe.unet.get_submodule(Q).get_delta_weight("x")
    torch.testing.assert_close(theirs, effect(source)["unet", Q], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- options


def test_keys_without_a_place_are_refused_or_left_out(source):
    lora(source)
    save_file(load_file(source) | {"odd.one": torch.ones(2)}, source)
    with pytest.raises(ValueError, match=r"odd\.one"):
        convert_adapter(config(source, "kohya"))
    done = convert_adapter(config(source, "kohya", strict=False))
    assert done.notes[0].startswith("left out: 1 keys, the first odd.one")
    assert not any("odd" in key for key in load_file(done.out))


@pytest.mark.parametrize("to", DIALECTS)
def test_numbers_are_stored_as_asked(source, to):
    lora(source)
    done = convert_adapter(config(source, to, dtype="float16"))
    file = done.out / "unet" / "adapter_model.safetensors" if to == "peft" else done.out
    assert {t.dtype for key, t in load_file(file).items() if not key.endswith(".alpha")} == {torch.float16}


def test_numbers_too_large_for_a_dtype_are_named(source):
    filed(source, lora_down_weight=torch.full((4, 160), 1e9), lora_up_weight=torch.ones(160, 4))
    with pytest.raises(ValueError, match=r"to_q\.lora_A\.weight has numbers too large for float16: use bfloat16"):
        convert_adapter(config(source, "kohya", dtype="float16"))


def test_scales_are_spoken_of(source):
    lora(source)
    said = {to: convert_adapter(config(source, to)).notes for to in DIALECTS}
    assert all(notes[0].startswith("scales other than 1 (0.5) ") for notes in said.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "rank belongs to --method lora"),
        ({"tolerance": 0.1}, "tolerance belongs to --method lora"),
        ({"method": "lora"}, "needs --rank N or --tolerance E"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        config(tmp_path / "x", "kohya", **options)


# ---------------------------------------------------------------- where it is written


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("taken.safetensors", "kohya", "is there already: .* --overwrite"),
        ("taken", "peft", "is there already: .* --overwrite"),
        ("new.safetensors", "peft", "PEFT's adapters are folders"),
        ("new.pt", "kohya", "is a file ending in .safetensors"),
        ("new", "comfy", "is a file ending in .safetensors"),
    ],
)
def test_nothing_is_replaced_unasked(source, out, to, words):
    lora(source)
    source.with_name("taken").mkdir()
    source.with_name("taken").joinpath("notes.txt").write_text("mine")
    source.with_name("taken.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=words):
        convert_adapter(config(source, to, out=source.with_name(out)))
    assert source.with_name("taken.safetensors").read_text() == "mine"
    assert [p.name for p in source.with_name("taken").iterdir()] == ["notes.txt"]


def test_a_file_can_be_converted_in_place(source):
    lora(source)
    before = shutil.copy(source, source.with_name("before.safetensors"))
    convert_adapter(config(source, "comfy", out=source, overwrite=True))
    same(before, source)


def test_a_peft_directory_is_not_mixed_with_another(source):
    done = convert_adapter(config(text(source), "peft"))
    lora(source)
    with pytest.raises(ValueError, match="holds an adapter of text_encoder that the new one would be mixed with"):
        convert_adapter(config(source, "peft", overwrite=True))
    text(source)
    convert_adapter(config(source, "peft", overwrite=True))
    same(source, done.out)


@pytest.mark.parametrize("to", DIALECTS)
def test_a_crash_while_writing_leaves_what_was_there(source, monkeypatch, to):
    lora(source)
    done = convert_adapter(config(source, to))
    contents = {p: p.read_bytes() for p in source.parent.rglob("*") if p.is_file()}
    lora(source, rank=2)
    contents[source] = source.read_bytes()

    def crash(*_, **__):
        raise OSError("disk full")

    for owner, name in ((safetensors.torch, "save_file"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crash)
            with pytest.raises(OSError, match="disk full"):
                convert_adapter(config(source, to, out=done.out, overwrite=True))
        assert {p: p.read_bytes() for p in source.parent.rglob("*") if p.is_file()} == contents


def test_the_command_says_what_was_done(source, capsys):
    lokr(source)
    out = source.with_name("out.safetensors")
    cli.main(["convert", str(source), str(out), "--to", "kohya", "--method", "lora", "--rank", "8"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 1 layers for embedded, from kohya / LyCORIS to kohya"
    assert "as LoRA of rank 8" in said[1]
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(source), str(out), "--to", "kohya"])
    assert stop.value.code == 1
    assert "is there already" in capsys.readouterr().err
