"""More than fifty damaged files: each is one clear error, from Python and from the shell, and changes nothing."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from veneer import cli
from veneer.diffusion import detach, load_adapter, load_pipeline
from veneer.diffusion.base import BaseModel
from veneer.diffusion.dialects.canonical import Header
from veneer.diffusion.dialects.methods import ENDINGS
from veneer.diffusion.dialects.plan import plan

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = f"lora_unet_{Q}".replace(".", "_")
CONV = "mid_block.resnets.0.conv1"


def lora(**changes) -> dict[str, torch.Tensor]:
    """A LoRA of one layer that fits the pipeline in the box; None leaves a factor out."""
    tensors = {"lora_A.weight": torch.ones(4, 160), "lora_B.weight": torch.ones(160, 4)}
    for name, value in changes.items():
        tensors[name.replace("_weight", ".weight")] = value
    return {f"unet.{Q}.{name}": value for name, value in tensors.items() if value is not None}


def kohya(path: str = FLAT, **factors) -> dict[str, torch.Tensor]:
    return {f"{path}.{name.replace('_weight', '.weight')}": value for name, value in factors.items()}


WHOLE = save(lora(), {"format": "pt"})
DATA = 4 * 2 * 4 * 160


def header(change: Callable[[dict], object]) -> bytes:
    """The whole file with its header changed in place, or replaced by what is returned."""
    length = int.from_bytes(WHOLE[:8], "little")
    entries = json.loads(WHOLE[8 : 8 + length])
    entries = change(entries) or entries
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + WHOLE[8 + length :]


def entry(**changes) -> Callable[[dict], None]:
    """Change what the header says of `lora_A`."""
    return lambda entries: entries[f"unet.{Q}.lora_A.weight"].update(changes)


TWICE = b'{"a": 1, "a": 2}'
HEADERS = {
    "a header that is no JSON": (header(lambda _: b"{nonsense"), "header is not JSON"),
    "a header that is not UTF-8": (header(lambda _: b'{"\xff\xfe": 1}'), "not UTF-8"),
    "a header of half characters": (header(lambda _: b'{"\\ud800": 1}'), "lone surrogates"),
    "a header nested deeply": (header(lambda _: b'{"a": ' + b"[" * 99999 + b"]" * 99999 + b"}"), "nested too deeply"),
    "a header with a name twice": (header(lambda _: TWICE), "names 'a' twice"),
    "metadata of numbers": (header(lambda e: e.update(__metadata__={"r": 4})), "not an object of strings"),
    "a tensor without a shape": (header(lambda e: e[f"unet.{Q}.lora_A.weight"].pop("shape") and None), "not described"),
    "an unknown dtype": (header(entry(dtype="F31")), "dtype \"F31\"; known are"),
    "a negative size": (header(entry(shape=[-4, 160])), r"shape \[-4, 160\]"),
    "a fractional size": (header(entry(shape=[4.0, 160])), r"shape \[4\.0, 160\]"),
    "an astronomic size": (header(entry(shape=[2**40, 2**40])), "takes .* bytes, has 2560"),
    "nine dimensions": (header(entry(shape=[1] * 7 + [4, 160])), "has 9 dimensions"),
    "offsets beyond the file": (header(entry(shape=[2**50], data_offsets=[0, 2**52])), "overlaps|cut short"),
    "offsets backwards": (header(entry(data_offsets=[2560, 0])), "takes 2560 bytes, has -2560"),
    "offsets that overlap": (header(entry(data_offsets=[4, 2564])), "overlaps|belong to no tensor"),
    "a shape against its offsets": (header(entry(shape=[5, 160])), "takes 3200 bytes, has 2560"),
    "a dtype against its offsets": (header(entry(dtype="F64")), "takes 5120 bytes, has 2560"),
    "a tensor taken out": (header(lambda e: e.pop(f"unet.{Q}.lora_A.weight") and None), "belong to no tensor"),
}  # fmt: skip

BYTES = {
    "an empty file": (b"", "it is empty"),
    "three bytes": (b"abc", "3 bytes, too few"),
    "cut within the length": (WHOLE[:5], "5 bytes, too few"),
    "cut within the header": (WHOLE[:60], "cut short, or no header"),
    "cut by one byte": (WHOLE[:-1], f"take {DATA} bytes, and {DATA - 1} are there"),
    "cut in half": (WHOLE[: len(WHOLE) // 2], "cut short"),
    "a byte too many": (WHOLE + b"\0", "1 bytes after its last tensor"),
    "the first byte lost": (WHOLE[1:], "no header follows|cut short, or no header"),
    "zeros": (bytes(4096), "no header follows"),
    "a length of 2**63": (struct.pack("<Q", 2**63) + WHOLE[8:], "cut short, or no header"),
    "a pickle by content": (pickle.dumps({"a": [1.0] * 99}), "is a pickle, which could run any code"),
    "a zip by content": (b"PK\x03\x04" + bytes(99), "is a zip archive"),
    "a web page": (b"<!DOCTYPE html><html>sign in</html>", "is a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a JSON answer": (b'{"error": "Invalid credentials"}', "is a JSON file"),
    "a GGUF model": (b"GGUF" + bytes(99), "is a GGUF file"),
}

NAN, INF = torch.full((4, 160), torch.nan), torch.full((160, 4), torch.inf)
VALUES = {
    "NaN": (lora(lora_A_weight=NAN), "NaN or infinity in .*lora_A"),
    "infinity": (lora(lora_B_weight=INF), "NaN or infinity in .*lora_B"),
}
"""Told by the tensors' values, which `inspect` does not read: the command that does is `convert`."""

TENSORS = {
    "factors of two ranks": (lora(lora_B_weight=torch.ones(160, 5)), "rank"),
    "a factor on its side": (lora(lora_B_weight=torch.ones(4, 160)), "fits a layer of 4 x 160|rank"),
    "a factor of one number": (lora(lora_A_weight=torch.tensor(1.0)), r"shapes? .*\[\]"),
    "rank 0": (lora(lora_A_weight=torch.ones(0, 160), lora_B_weight=torch.ones(160, 0)), "rank"),
    "a factor missing": (lora(lora_B_weight=None), "needs lora_A.weight, lora_B.weight, and here are lora_A.weight"),
    "an alpha of two numbers": (
        kohya(lora_down_weight=torch.ones(4, 160), lora_up_weight=torch.ones(160, 4), alpha=torch.ones(2)),
        r"shape \[2\], expected one number",
    ),
    "an alpha of NaN": (
        kohya(lora_down_weight=torch.ones(4, 160), lora_up_weight=torch.ones(160, 4), alpha=torch.tensor(torch.nan)),
        "alpha is nan at rank 4, which is no scale",
    ),
    "a kernel of another size": (
        {f"unet.{CONV}.lora_A.weight": torch.ones(4, 160, 5, 5), f"unet.{CONV}.lora_B.weight": torch.ones(160, 4)},
        "fits a layer of 160 x 4000, and this one is 160 x 1440",
    ),
    "magnitudes of another size": (
        kohya(lora_down_weight=torch.ones(4, 160), lora_up_weight=torch.ones(160, 4), dora_scale=torch.ones(99, 1)),
        r"dora_scale has shape \[99, 1\]",
    ),
    "two methods for one layer": (
        kohya(lora_down_weight=torch.ones(4, 160), hada_w1_a=torch.ones(160, 4)),
        "of one method, and these are of loha and lora",
    ),
    "half a Kronecker product": (kohya(lokr_w1=torch.ones(4, 4)), "a lokr needs .*, and here are lokr_w1"),
    "no tensors": ({}, "no adapter of a known dialect .* no tensors at all"),
    "a model, not an adapter": ({"conv_in.weight": torch.ones(112, 4, 3, 3)}, "no adapter of a known dialect"),
    "a stray tensor": (lora() | {"unet.extra": torch.ones(3)}, "no adapter's tensor ends so"),
    "a misspelt layer": (
        {key.replace("to_q", "to_qq"): value for key, value in lora().items()},
        "has no module of this name; near: .*to_q",
    ),
    "SD1.5's text encoder": (
        {f"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{x}.weight": torch.ones(*shape)
         for x, shape in (("A", (4, 768)), ("B", (3072, 4)))},
        "fits a layer of 3072 x 768, and this one is 768 x 192: another model's file",
    ),
    "SDXL's UNet": (
        kohya("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
              lora_down_weight=torch.ones(1, 2048), lora_up_weight=torch.ones(1280, 1)),
        "no module of this name",
    ),
    "Flux": (
        {f"transformer.single_transformer_blocks.7.proj_out.lora_{x}.weight": torch.ones(*shape)
         for x, shape in (("A", (1, 15360)), ("B", (3072, 1)))},
        "no module of this name|does not have",
    ),
}  # fmt: skip


def bare(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def peft_dir(tmp_path: Path, weights: str | None = "adapter_model.safetensors", config: object = ...) -> Path:
    folder = tmp_path / "adapter" / "unet"
    folder.mkdir(parents=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"]}
    tensors = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in lora().items()}
    if weights:
        (folder / weights).write_bytes(save(tensors))
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(values if config is ... else values | dict(config))
        (folder / "adapter_config.json").write_text(text)
    return folder.parent


def linked(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere"))
    return path


FOLDERS = {
    "nothing there": (lambda p: p / "nowhere.safetensors", "does not exist|neither a file nor a folder"),
    "a link to nothing": (lambda p: linked(p / "x.safetensors"), "link to nothing|neither a file nor a folder"),
    "an empty folder": (lambda p: (p / "empty").mkdir() or p / "empty", "holds no"),
    "a checkpoint by name": (lambda p: bare(p / "x.ckpt", WHOLE), "is a pickle, which could run any code"),
    "a torch file by name": (lambda p: bare(p / "x.pt", WHOLE), "is a pickle, which could run any code"),
    "PEFT without its config": (lambda p: peft_dir(p, config=None), "holds no adapter|no adapter of a known dialect"),
    "PEFT without its weights": (lambda p: peft_dir(p, weights=None), "adapter_model.safetensors"),
    "PEFT with a pickle": (lambda p: peft_dir(p, weights="adapter_model.bin"), "is a pickle|adapter_model.safetensors"),
    "PEFT's config torn": (lambda p: peft_dir(p, config='{"peft_type": "LO'), "adapter_config.json is not a JSON file"),
    "PEFT's config a list": (lambda p: peft_dir(p, config="[]"), "adapter_config.json does not hold a JSON object"),
    "PEFT's rank in words": (lambda p: peft_dir(p, config={"lora_alpha": "four"}), "four"),
    "PEFT of no method": (lambda p: peft_dir(p, config={"peft_type": "MAGIC"}), "peft_type='MAGIC' is no method"),
}  # fmt: skip

DAMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{
        name: (lambda p, d=data: bare(p / "x.safetensors", d), words)
        for name, (data, words) in (HEADERS | BYTES).items()
    },
    **{
        name: (lambda p, t=t: bare(p / "x.safetensors", save(t)), words)
        for name, (t, words) in (TENSORS | VALUES).items()
    },
    **FOLDERS,
}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("embedded")


def test_there_are_fifty():
    assert len(DAMAGES) >= 50


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_loading_says_what_is_wrong_and_changes_nothing(pipe, tmp_path, damage, words):
    path = damage(tmp_path)
    before = [id(module) for module in (*pipe.unet.modules(), *pipe.text_encoder.modules())]
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_adapter(pipe, path)
    assert "\n" not in str(caught.value)
    assert [id(module) for module in (*pipe.unet.modules(), *pipe.text_encoder.modules())] == before


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, (_, words) in DAMAGES.items()], ids=DAMAGES.keys())
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys, name, words):
    path = DAMAGES[name][0](tmp_path)
    command = ["convert", str(path), str(tmp_path / "out.safetensors"), "--to", "kohya"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*(command if name in VALUES else ["inspect", str(path)]), "--base", "embedded"])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.startswith("veneer: error: ")
    assert said.count("\n") == 1
    assert re.search(words, said), said
    assert not (tmp_path / "out.safetensors").exists()


# ---------------------------------------------------------------- any shapes at all

NAMES = BaseModel("embedded").names
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 40, 160, 192, 320]), max_size=5).map(tuple)
MODULES = (FLAT, f"unet.{CONV}", f"unet.{Q}", "unet.conv_norm_out", "lora_te_text_model_final_layer_norm", "odd")


@settings(max_examples=300, deadline=None)
@given(
    module=st.sampled_from(MODULES),
    shapes=st.dictionaries(st.sampled_from(sorted(ENDINGS)), SHAPES, min_size=1, max_size=6),
    value=st.floats(),
)
def test_any_shapes_have_a_meaning_or_a_reason(module, shapes, value):
    """From the header alone: never another exception, and no key is forgotten."""
    named = {f"{module}.{ending}": shape for ending, shape in shapes.items()}
    scalars = {key: value for key, shape in named.items() if all(size == 1 for size in shape)}
    header = Header(named, {"ss_network_dim": "four"}, scalars)
    try:
        meant = plan(header, NAMES)
    except ValueError as error:
        assert "no adapter of a known dialect" in str(error)  # noqa: PT017
        return
    used = {key for entry in meant.entries for key in entry.keys.values()}
    single = {key for key in named if key.endswith((".alpha", ".scalar", ".on_input"))}
    assert used | set(meant.unmatched) | single == set(named)


RIGHT = {
    "lora": {"lora_down.weight": (4, 160), "lora_up.weight": (160, 4), "dora_scale": (160, 1), "alpha": ()},
    "loha": {"hada_w1_a": (160, 3), "hada_w1_b": (3, 160), "hada_w2_a": (160, 3), "hada_w2_b": (3, 160), "alpha": (1,)},
    "lokr": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (40, 2), "lokr_w2_b": (2, 40)},
    "full lokr": {"lokr_w1": (4, 4), "lokr_w2": (40, 40), "scalar": (), "dora_scale": (1, 160)},
    "full": {"diff": (160, 160)},
    "glora": {"a1.weight": (160, 4), "a2.weight": (4, 160), "b1.weight": (160, 4), "b2.weight": (4, 160)},
    "ia3": {"weight": (160,), "on_input": ()},
    "oft": {"oft_blocks": (4, 40, 40), "rescale": (160, 1)},
    "boft": {"oft_blocks": (2, 4, 40, 40)},
}
KERNELS = {
    "tucker lora": {
        "lora_down.weight": (4, 160, 1, 1),
        "lora_mid.weight": (4, 4, 3, 3),
        "lora_up.weight": (160, 4, 1, 1),
    },
    "tucker loha": {f"hada_w{i}_{x}": (3, 160) for i in "12" for x in "ab"}
    | {f"hada_t{i}": (3, 3, 3, 3) for i in "12"},
    "tucker lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (2, 40), "lokr_w2_b": (2, 40), "lokr_t2": (2, 2, 3, 3)},
}
WRONG = {
    "a number": lambda shape: (),
    "one": lambda shape: (1,),
    "turned": lambda shape: shape[::-1],
    "flat": lambda shape: (math.prod(shape),),
    "an axis more": lambda shape: (*shape, 1),
    "an axis in front": lambda shape: (1, *shape),
    "an axis less": lambda shape: shape[:-1],
    "larger": lambda shape: tuple(size + 1 for size in shape),
    "no rows": lambda shape: (0, *shape[1:]),
    "twice": lambda shape: tuple(2 * size for size in shape[:1]) + shape[1:],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("method", [*RIGHT, *KERNELS])
def test_one_wrong_shape_is_a_clear_error_or_harmless(pipe, tmp_path, method, wrong):
    """Whichever factor it is: what loads at all also runs."""
    path = Q if method in RIGHT else CONV
    module, right = f"lora_unet_{path}".replace(".", "_"), (RIGHT | KERNELS)[method]
    for name in right:
        shapes = right | {name: wrong(right[name])}
        tensors = {f"{module}.{key}": torch.full(size, 0.1) for key, size in shapes.items()}
        try:
            load_adapter(pipe, bare(tmp_path / "x", save(tensors)))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            pipe.unet.get_submodule(path)(torch.ones(1, 160, *[4, 4] * (method in KERNELS)))
            detach(pipe)
