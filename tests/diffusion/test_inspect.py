"""`veneer inspect`: what a file holds, where it fits, who reads it; from headers alone."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from veneer import cli
from veneer.diffusion import load_pipeline
from veneer.diffusion.base import BaseModel
from veneer.diffusion.inspect import adapters_at, inspect_adapter
from veneer.diffusion.verdicts import NO, PART, WHOLE

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FC = "text_model.encoder.layers.0.mlp.fc1"
FLAT_Q, FLAT_FC = f"lora_unet_{Q}".replace(".", "_"), f"lora_te_{FC}".replace(".", "_")


def lora(out: int, cols: int, rank: int = 4, names: tuple[str, str] = ("lora_down", "lora_up")) -> dict:
    down, up = names
    return {f"{down}.weight": (rank, cols), f"{up}.weight": (out, rank)}


def under(prefix: str, factors: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in factors.items()}


def filed(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    """A file of zeros of these shapes; numbers become alphas."""
    made = {k: torch.tensor(v) if isinstance(v, float) else torch.zeros(v) for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made, path, {"format": "pt"} | (metadata or {}))
    return path


def peft_dir(folder: Path, config: dict, shapes: dict) -> Path:
    filed(folder / "adapter_model.safetensors", under("base_model.model", shapes))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PEFT_LORA = ("lora_A", "lora_B")
FILES = {
    "kohya, sd1": (under(FLAT_Q, {**lora(1280, 1280), "alpha": 2.0}) | under(FLAT_FC, lora(3072, 768)),
                   "kohya / LyCORIS", "sd1", [("text_encoder", [4], [1.0]), ("unet", [4], [0.5])]),
    "kohya, sd2": (under(FLAT_FC, lora(4096, 1024)), "kohya / LyCORIS", "sd2", [("text_encoder", [4], [1.0])]),
    "kohya, sdxl": (under("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k", lora(1280, 2048)),
                    "kohya / LyCORIS", "sdxl", [("unet", [4], [1.0])]),
    "kohya, flux": (under("lora_unet_double_blocks_0_img_attn_qkv", lora(9216, 3072)),
                    "kohya / LyCORIS", "flux", [("transformer", [4], [1.0])]),
    "xlabs": (under("double_blocks.0.processor.qkv_lora1", lora(9216, 3072, names=("down", "up"))),
              "XLabs", "flux", [("transformer", [4], [1.0])]),
    "diffusers": (under(f"unet.{Q}", lora(1280, 1280, names=PEFT_LORA)), "diffusers", "sd1", [("unet", [4], [1.0])]),
    "comfy": (under("diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k", lora(1280, 2048, 4, PEFT_LORA)),
              "ComfyUI", "sdxl", [("unet", [4], [1.0])]),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "dialect", "family", "parts"), FILES.values(), ids=FILES.keys())
def test_dialects_and_families_are_told_by_names_and_shapes(tmp_path, shapes, dialect, family, parts):
    report = inspect_adapter(filed(tmp_path / "x.safetensors", shapes))
    assert (report.dialect, report.family, report.unmatched) == (dialect, family, {})
    assert [(part.component, part.ranks, part.scales) for part in report.parts] == parts
    assert report.verdicts[0].reads == WHOLE
    assert report.problem is None


METHODS = {
    "LoRA": (lora(1280, 1280), [4]),
    "DoRA": ({**lora(1280, 1280), "dora_scale": (1280, 1)}, [4]),
    "LoHa": ({"hada_w1_a": (1280, 3), "hada_w1_b": (3, 1280), "hada_w2_a": (1280, 3), "hada_w2_b": (3, 1280)}, [3]),
    "LoKr": ({"lokr_w1": (4, 4), "lokr_w2_a": (320, 2), "lokr_w2_b": (2, 320)}, [2]),
    "LoKr + DoRA": ({"lokr_w1": (4, 4), "lokr_w2": (320, 320), "dora_scale": (1, 1280)}, []),
    "OFT": ({"oft_blocks": (4, 320, 320), "alpha": 1.0}, []),
    "BOFT": ({"oft_blocks": (2, 4, 320, 320)}, []),
    "full": ({"diff": (1280, 1280)}, []),
    "GLoRA": (
        {"a1.weight": (4, 1280), "a2.weight": (1280, 4), "b1.weight": (1280, 4), "b2.weight": (4, 1280)}, [4]
    ),
    "IA3": ({"weight": (1280,), "on_input": 0.0}, []),
}  # fmt: skip


@pytest.mark.parametrize(("method", "shapes", "ranks"), [(m, *v) for m, v in METHODS.items()], ids=METHODS.keys())
def test_methods(tmp_path, method, shapes, ranks):
    (part,) = inspect_adapter(filed(tmp_path / "x.safetensors", under(FLAT_Q, shapes))).parts
    assert (part.method, part.ranks, part.layers) == (method, ranks, 1)


def test_tucker_kernels_are_named(tmp_path):
    shapes = {"lora_down.weight": (4, 1280, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (1280, 4, 1, 1)}
    report = inspect_adapter(filed(tmp_path / "x.safetensors", under("lora_unet_mid_block_resnets_0_conv1", shapes)))
    assert [part.method for part in report.parts] == ["LoRA, Tucker"]
    assert {v.program: v.reads for v in report.verdicts}["diffusers"] == NO


def test_parameters_of_fused_layers_count_once(tmp_path):
    shapes = FILES["kohya, flux"][0]
    (part,) = inspect_adapter(filed(tmp_path / "x.safetensors", shapes)).parts
    assert (part.layers, part.parameters) == (3, 4 * (9216 + 3072))


# ---------------------------------------------------------------- PEFT directories and folders


def test_a_run_is_its_peft_directory_and_its_file(tmp_path):
    run = tmp_path / "run"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 2}}
    k = Q.replace("to_q", "to_k")
    shapes = {name: shape for path in (Q, k) for name, shape in under(path, lora(1280, 1280, 4, PEFT_LORA)).items()}
    peft_dir(run / "unet", config, shapes)
    text = under(FC, lora(3072, 768, names=PEFT_LORA))
    peft_dir(run / "text_encoder", {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": True}, text)
    peft_dir(run / "checkpoints" / "step-1" / "unet", config, shapes)
    filed(run / "pytorch_lora_weights.safetensors", under("unet", shapes), {"trigger": "sks bear"})

    both, file = (inspect_adapter(path) for path in adapters_at(run))
    assert (both.dialect, file.dialect, both.family) == ("PEFT directory", "diffusers", "sd1")
    text_encoder, unet = both.parts
    assert (unet.component, unet.ranks, unet.scales, unet.layers) == ("unet", [4], [0.5, 2.0], 2)
    assert unet.parameters == 2 * 4 * (1280 + 1280)
    assert (text_encoder.component, text_encoder.scales) == ("text_encoder", [2.0])
    assert file.metadata["trigger"] == "sks bear"
    assert both.size == sum(p.stat().st_size for p in run.glob("*/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("shapes", "method"),
    [
        ({"ia3_l": (32, 1)}, "IA3"),
        ({"ia3_l": (1, 32)}, "IA3"),
        ({"oft_R.weight": (4, 28)}, "OFT"),
        ({"lora_embedding_A": (4, 100), "lora_embedding_B": (32, 4)}, "LoRA"),
        ({**lora(16, 32, names=PEFT_LORA), "lora_magnitude_vector": (16,)}, "DoRA"),
    ],
)
def test_adapters_of_other_models_are_taken_at_their_word(tmp_path, shapes, method):
    peft_dir(tmp_path / "x", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, under("model.layers.0.q_proj", shapes))
    report = inspect_adapter(tmp_path / "x")
    assert [(p.component, p.method, p.layers, p.coverage) for p in report.parts] == [("model", method, 1, None)]
    assert {v.program: v.reads for v in report.verdicts}["PEFT"] == WHOLE


def test_a_folder_without_an_adapter_shows_what_lies_deeper(tmp_path):
    shapes = FILES["diffusers"][0]
    deep = filed(tmp_path / "a" / "b" / "x.safetensors", shapes)
    assert adapters_at(tmp_path) == [deep]
    assert adapters_at(deep) == [deep]


# ---------------------------------------------------------------- where it fits


def embedded_file(path: Path, width: int = 160, names: tuple[str, str] = PEFT_LORA) -> Path:
    return filed(path, under(f"unet.{Q}", lora(width, width, names=names)))


def test_the_base_is_read_by_its_headers_alone():
    names, pipe = BaseModel("embedded").names, load_pipeline("embedded")
    for component, table in names.tables.items():
        own = {n.removeprefix("text_model."): m for n, m in getattr(pipe, component).named_modules()}
        weights = {n: tuple(m.weight.shape) for n, m in own.items() if getattr(m, "weight", None) is not None}
        assert {path.removeprefix("text_model."): shape for path, shape in table.items()} == weights


def test_the_pipeline_in_the_box_is_known_without_being_named(tmp_path):
    file = embedded_file(tmp_path / "x.safetensors")
    report = inspect_adapter(file)
    assert (report.family, report.unmatched) == ("embedded", {})
    assert report == inspect_adapter(file, BaseModel("embedded").names)
    (part,) = report.parts
    adaptable = sum(len(shape) > 1 for shape in BaseModel("embedded").names.tables["unet"].values())
    assert part.coverage == round(100 / adaptable, 1)


def test_a_file_for_another_model_fails_with_its_first_key(tmp_path, capsys):
    file = embedded_file(tmp_path / "x.safetensors", width=1280)
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(file), "--base", "embedded"])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert "fits a layer of 1280 x 1280, and this one is 160 x 160: another model's file? (and 1 more keys)" in said.err
    assert "Veneer      no" in said.out


def test_a_misspelt_key_is_named_with_near_ones(tmp_path):
    shapes = under(FLAT_Q, lora(1280, 1280)) | under(FLAT_FC.replace("fc1", "fc3"), lora(3072, 768)) | {"odd": (1,)}
    report = inspect_adapter(filed(tmp_path / "x.safetensors", shapes))
    assert report.verdicts[0].reads == PART
    assert "keys without a place: 3" in report.verdicts[0].why
    assert report.unmatched["odd"] == "no adapter's tensor ends so"
    why = report.unmatched[f"{FLAT_FC.replace('fc1', 'fc3')}.lora_up.weight"]
    assert FLAT_FC in why.partition("sd1 has no module of this name; near: ")[2].split(", ")


@pytest.mark.parametrize("model", ["nowhere", "."])
def test_a_base_that_is_no_pipeline(tmp_path, model):
    with pytest.raises(ValueError, match="is not a diffusers pipeline: no weights of unet"):
        BaseModel(str(tmp_path / model))


# ---------------------------------------------------------------- what is odd


def test_oddities_are_warned_of(tmp_path):
    wide = under(FLAT_Q, lora(1280, 1280, rank=2000))
    (warning,) = inspect_adapter(filed(tmp_path / "wide.safetensors", wide)).warnings
    assert "ranks larger than their layers in 1 of 1" in warning
    assert "rank 2000 where 1280 is all" in warning
    full = under(FLAT_Q, {"lokr_w1": (4, 4), "lokr_w2": (320, 320), "alpha": 1.0})
    (warning,) = inspect_adapter(filed(tmp_path / "full.safetensors", full, {"ss_network_dim": "32"})).warnings
    assert "alpha 1 at dim 32: read at scale 1" in warning


@pytest.mark.parametrize("alpha", [float("inf"), 9999999999.0])
def test_poisoned_alphas_of_full_lokr_mean_nothing(tmp_path, alpha):
    shapes = under(FLAT_Q, {"lokr_w1": (4, 4), "lokr_w2": (320, 320), "alpha": alpha})
    report = inspect_adapter(filed(tmp_path / "x.safetensors", shapes))
    assert report.parts[0].scales == [1.0]
    json.loads(json.dumps(report.parts[0].scales), parse_constant=pytest.fail)


def test_metadata_cannot_write_to_the_terminal(tmp_path, capsys):
    tricky = {"title": "x\x1b]0;owned\x07\x1b[2J", "\x1b[31mkey": "{" * 3000, "deep": "[" * 100_000}
    cli.main(["inspect", str(filed(tmp_path / "x.safetensors", FILES["diffusers"][0], tricky))])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert max(map(len, out.splitlines())) < 260


# ---------------------------------------------------------------- who reads it

ALPHAS = under(FLAT_Q, {**lora(1280, 1280), "alpha": 2.0}) | under(
    FLAT_Q.replace("to_q", "to_k"), {**lora(1280, 1280), "alpha": 4.0}
)
SCALED = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
VERDICTS = {  # Veneer, diffusers, PEFT, sd-scripts, ComfyUI, A1111
    "kohya": (FILES["kohya, sd1"][0], {}, "whole whole no whole whole whole"),
    "kohya, sdxl": (FILES["kohya, sdxl"][0], {}, "whole whole no whole whole whole"),
    "kohya, flux": (FILES["kohya, flux"][0], {}, "whole whole no whole whole no"),
    "mixed alphas": (ALPHAS, {}, "whole part no whole whole whole"),
    "loha": (under(FLAT_Q, METHODS["LoHa"][0]), {}, "whole no no whole whole whole"),
    "dora": (under(FLAT_Q, METHODS["DoRA"][0]), {}, "whole part no whole whole whole"),
    "ia3": (under(FLAT_Q, METHODS["IA3"][0]), {}, "whole no no whole no whole"),
    "xlabs": (FILES["xlabs"][0], {}, "whole whole no no no no"),
    "comfy": (FILES["comfy"][0], {}, "whole no no no whole no"),
    "diffusers": (FILES["diffusers"][0], {}, "whole whole no no no no"),
    "diffusers, outside attention": (
        under("unet.mid_block.resnets.0.time_emb_proj", lora(1280, 1280, names=PEFT_LORA)), {},
        "whole whole no no whole no",
    ),
    "diffusers, scaled": (
        under("unet.mid_block.resnets.0.time_emb_proj", lora(1280, 1280, names=PEFT_LORA)), SCALED,
        "whole whole no no part no",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "metadata", "expected"), VERDICTS.values(), ids=VERDICTS.keys())
def test_verdicts(tmp_path, shapes, metadata, expected):
    report = inspect_adapter(filed(tmp_path / "x.safetensors", shapes, metadata))
    assert [v.reads.replace("in part", "part") for v in report.verdicts] == expected.split()
    assert all(v.why for v in report.verdicts if v.reads != WHOLE)


def small(method: str) -> dict:
    shapes = {
        "LoRA": lora(160, 160),
        "LoHa": {"hada_w1_a": (160, 3), "hada_w1_b": (3, 160), "hada_w2_a": (160, 3), "hada_w2_b": (3, 160)},
        "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (40, 40)},
    }
    return under(FLAT_Q, shapes[method])


ORACLE = {
    "diffusers": under(f"unet.{Q}", lora(160, 160, names=PEFT_LORA)),
    "kohya": small("LoRA"),
    "loha": small("LoHa"),
    "lokr": small("LoKr"),
    "comfy": under(f"diffusion_model.{Q}", lora(160, 160, names=PEFT_LORA)),
    "text without out_proj": under(FLAT_FC.replace("mlp_fc1", "self_attn_q_proj"), lora(192, 192)),
}


@pytest.mark.parametrize("name", ORACLE)
def test_what_diffusers_does_is_what_is_said_of_it(tmp_path, name):
    file = filed(tmp_path / "x.safetensors", ORACLE[name])
    verdict = next(v for v in inspect_adapter(file, BaseModel("embedded").names).verdicts if v.program == "diffusers")
    pipe = load_pipeline("embedded")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe.load_lora_weights(file)
            loaded = bool(pipe.get_list_adapters())
        except (ValueError, KeyError, IndexError):
            loaded = False
    assert loaded == (verdict.reads != NO), verdict


# ---------------------------------------------------------------- the command


def test_table_and_json(tmp_path, capsys):
    file = filed(tmp_path / "x.safetensors", FILES["kohya, sd1"][0], {"ss_network_dim": "4"})
    cli.main(["inspect", str(file)])
    table = capsys.readouterr().out
    assert table.startswith(f"{file}: kohya / LyCORIS for sd1, ")
    assert [line.split()[:5] for line in table.splitlines()[1:4]] == [
        ["component", "method", "rank", "scale", "layers"],
        ["text_encoder", "LoRA", "4", "1", "1"],
        ["unet", "LoRA", "4", "0.5", "1"],
    ]
    cli.main(["inspect", str(file), "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "path", "dialect", "family", "size", "parts", "warnings", "unmatched", "verdicts", "metadata"
    ]  # fmt: skip
    assert list(report["parts"][0]) == ["component", "method", "ranks", "scales", "layers", "coverage", "parameters"]
    assert report["verdicts"][0] == {"program": "Veneer", "reads": "whole", "why": ""}
    assert report["metadata"] == {"ss_network_dim": 4}


def test_of_a_folder_what_can_be_read_is_shown_before_the_error(tmp_path, capsys):
    filed(tmp_path / "good.safetensors", FILES["diffusers"][0])
    (tmp_path / "torn.safetensors").write_text("not a header")
    filed(tmp_path / "other.safetensors", {"conv.weight": (3, 3)})
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(tmp_path)])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert "good.safetensors: diffusers for sd1" in said.out
    assert "other.safetensors" in said.err
    assert said.err.endswith("and 1 files more\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere", None, "nowhere does not exist"),
        ("empty", "", "empty holds no .safetensors file"),
        ("torn.safetensors", "not a header", "torn.safetensors is not a whole safetensors file"),
        ("model.ckpt", "pickle", "model.ckpt is a pickle, which could run any code when loaded, so it is not read"),
    ],
)
def test_errors_name_the_file(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(path)])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_no_model_library_is_needed(tmp_path):
    file = filed(tmp_path / "x.safetensors", FILES["kohya, sdxl"][0])
    code = (
        "import sys; from veneer import cli; cli.main(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    for more in ([], ["--json"]):
        command = [sys.executable, "-c", code, "inspect", str(file), *more]
        child = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
        assert child.returncode == 0, child.stderr
        assert child.stdout.endswith("\n[]\n")
