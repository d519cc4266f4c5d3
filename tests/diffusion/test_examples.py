"""The example scripts take the well-known command lines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import veneer
from safetensors.torch import load_file

EXAMPLES = Path(veneer.__file__).parent / "examples"


def load(folder: str):
    path = EXAMPLES / folder / "train_dreambooth.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verbatim(images: Path, folder: Path) -> list[str]:
    """Every flag of the published command, in its order and spelling; only the numbers are small."""
    return [
        "--pretrained_model_name_or_path=embedded",
        f"--instance_data_dir={images}",
        f"--class_data_dir={folder / 'class'}",
        f"--output_dir={folder / 'run'}",
        "--train_text_encoder",
        *("--with_prior_preservation", "--prior_loss_weight=1.0"),
        "--instance_prompt=a photo of sks dog",
        "--class_prompt=a photo of dog",
        "--resolution=64",
        "--train_batch_size=1",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        "--num_class_images=2",
        "--use_lora",
        *("--lora_r", "16"),
        *("--lora_alpha", "27"),
        *("--lora_text_encoder_r", "16"),
        *("--lora_text_encoder_alpha", "17"),
        "--learning_rate=1e-4",
        "--gradient_accumulation_steps=1",
        "--gradient_checkpointing",
        "--max_train_steps=2",
    ]


def test_the_published_command_runs_under_accelerate(images: Path, tmp_path: Path):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=1"]
    script = str(EXAMPLES / "lora_dreambooth" / "train_dreambooth.py")
    command = [*launch, script, *verbatim(images, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    tensors = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert {key.partition(".")[0] for key in tensors} == {"unet", "text_encoder"}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {16}


def test_the_published_flags_mean_what_they_say(images: Path, tmp_path: Path):
    config = load("lora_dreambooth").parse(verbatim(images, tmp_path))
    config.validate()
    assert (config.unet.rank, config.unet.alpha, config.text_encoder.alpha) == (16, 27, 17)
    assert config.unet.targets == ("to_q", "to_v")
    assert config.unet.learning_rate == config.text_encoder.learning_rate == 1e-4
    assert (config.class_prompt, config.num_class_images, config.gradient_checkpointing) == ("a photo of dog", 2, True)


def test_without_the_flag_the_text_encoder_is_left_alone(images: Path, tmp_path: Path):
    flags = [flag for flag in verbatim(images, tmp_path) if flag != "--train_text_encoder"]
    assert load("lora_dreambooth").parse(flags).adapters().keys() == {"unet"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["lora", "--unet_r=4", "--unet_alpha=6", "--unet_dropout=0.1", "--te_r=2"], {"dropout": 0.1, "options": {}}),
        (
            ["loha", "--unet_r=4", "--unet_alpha=6", "--unet_rank_dropout=0.1", "--unet_use_effective_conv2d"],
            {"options": {"rank_dropout": 0.1, "use_effective_conv2d": True}},
        ),
        (
            ["lokr", "--unet_r=4", "--unet_alpha=6", "--unet_decompose_both", "--unet_decompose_factor=8"],
            {"options": {"decompose_both": True, "decompose_factor": 8}},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_method_is_a_subcommand(images: Path, tmp_path: Path, flags, expected):
    common = [
        "--pretrained_model_name_or_path=embedded",
        f"--instance_data_dir={images}",
        f"--output_dir={tmp_path / 'run'}",
        *(
            "--instance_prompt=a photo of sks dog",
            "--train_text_encoder",
            "--max_train_steps=1",
            "--train_batch_size=1",
        ),
        *("--learning_rate=1e-3", "--lr_warmup_steps=0", "--seed=3"),
    ]
    example = load("stable_diffusion")
    config = example.parse([*common, *flags])
    assert (config.unet.method, config.unet.rank, config.unet.alpha, config.seed) == (flags[0], 4, 6, 3)
    assert {name: getattr(config.unet, name) for name in expected} == expected
    example.main(config)
    assert (tmp_path / "run" / "unet" / "adapter_model.safetensors").exists()
