"""`veneer inspect`: dialects, methods, ranks and scales, from headers alone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from veneer import cli
from veneer.diffusion.inspect import inspect_path

Q, K = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
)
FC = "text_model.encoder.layers.0.mlp.fc1"
LORA = {"lora_A.weight": (4, 32), "lora_B.weight": (16, 4)}


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def peft_dir(folder, config, shapes):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    keyed = {f"base_model.model.{key}": value for key, value in tensors(shapes).items()}
    save_file(keyed, folder / "adapter_model.safetensors", {"format": "pt"})


def test_peft_directories_of_two_components(tmp_path):
    unet = {f"{module}.{name}": shape for module in (Q, K) for name, shape in LORA.items()}
    peft_dir(tmp_path / "run" / "unet", {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 2}}, unet)
    text = {f"{FC}.{name}": shape for name, shape in LORA.items()}
    peft_dir(tmp_path / "run" / "text_encoder", {"r": 4, "lora_alpha": 4, "use_rslora": True}, text)
    peft_dir(tmp_path / "run" / "checkpoints" / "step-1" / "unet", {"r": 4}, unet)

    text_encoder, unet = inspect_path(tmp_path / "run")
    assert (text_encoder.dialect, unet.dialect) == ("PEFT directory", "PEFT directory")
    (part,) = unet.parts
    assert (part.component, part.method, part.ranks, part.scales) == ("unet", "LoRA", [4], [0.5, 2.0])
    assert (part.modules, part.parameters) == (2, 2 * (4 * 32 + 16 * 4))
    assert text_encoder.parts[0].scales == [2.0]


@pytest.mark.parametrize(
    ("method", "shapes", "ranks"),
    [
        ("DoRA", {**LORA, "lora_magnitude_vector": (16,)}, [4]),
        ("LoHa", {"hada_w1_a": (16, 3), "hada_w1_b": (3, 32), "hada_w2_a": (16, 3), "hada_w2_b": (3, 32)}, [3]),
        ("LoKr", {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 8)}, [2]),
        ("LoKr", {"lokr_w1": (4, 4), "lokr_w2": (4, 8)}, []),
        ("IA3", {"ia3_l": (16, 1)}, []),
    ],
    ids=["dora", "loha", "lokr", "lokr of full factors", "ia3"],
)
def test_methods(tmp_path, method, shapes, ranks):
    peft_dir(tmp_path / "unet", {"alpha": 6}, {f"{Q}.{name}": shape for name, shape in shapes.items()})
    (part,) = inspect_path(tmp_path)[0].parts
    assert (part.method, part.ranks, part.scales) == (method, ranks, [6 / rank for rank in ranks])
    assert part.modules == 1


def test_diffusers_file_with_and_without_its_header(tmp_path):
    shapes = {
        f"{prefix}.{name}": shape for prefix in (f"unet.{Q}", f"text_encoder.{FC}") for name, shape in LORA.items()
    }
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2}), "trigger": "sks bear"}
    save_file(tensors(shapes), tmp_path / "pytorch_lora_weights.safetensors", header)
    (report,) = inspect_path(tmp_path / "pytorch_lora_weights.safetensors")
    assert report.dialect == "diffusers file"
    assert report.metadata["trigger"] == "sks bear"
    assert [(part.component, part.scales) for part in report.parts] == [("unet", [0.5]), ("text_encoder", [])]


def test_an_unknown_dialect_shows_its_first_keys(tmp_path):
    save_file(tensors({"lora_unet_mid_block.lora_down.weight": (4, 32)}), tmp_path / "x.safetensors")
    (report,) = inspect_path(tmp_path)
    assert (report.dialect, report.parts) == ("unknown dialect", [])
    assert report.first_keys == ["lora_unet_mid_block.lora_down.weight"]


def test_table_and_json(tmp_path, capsys):
    peft_dir(tmp_path / "unet", {"r": 4, "lora_alpha": 8}, {f"{Q}.{name}": shape for name, shape in LORA.items()})
    cli.main(["inspect", str(tmp_path)])
    table = capsys.readouterr().out
    assert "PEFT directory" in table
    assert table.splitlines()[-1].split() == ["unet", "LoRA", "4", "2", "1", "192"]
    cli.main(["inspect", str(tmp_path), "--json"])
    (report,) = json.loads(capsys.readouterr().out)
    assert report["parts"] == [
        {"component": "unet", "method": "LoRA", "ranks": [4], "scales": [2.0], "modules": 1, "parameters": 192}
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere", None, "nowhere does not exist"),
        ("empty", "", "holds no .safetensors file"),
        ("torn.safetensors", "not a header", "torn.safetensors is not a readable safetensors file"),
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
    assert words in capsys.readouterr().err
