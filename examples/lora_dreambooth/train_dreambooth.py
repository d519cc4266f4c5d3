"""DreamBooth with LoRA on Stable Diffusion: the well-known command line, on `veneer.diffusion`.

    accelerate launch train_dreambooth.py --pretrained_model_name_or_path=embedded --instance_data_dir=photos \
        --instance_prompt="a photo of sks dog" --output_dir=run --use_lora --train_text_encoder

A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from veneer.diffusion import AdapterOptions, DreamBoothConfig
from veneer.diffusion.dreambooth import main
from veneer.diffusion.script_flags import add_common_flags, to_config

UNET_TARGETS = ("to_q", "to_v")
TEXT_ENCODER_TARGETS = ("q_proj", "v_proj")


def lora_options(args: argparse.Namespace, prefix: str, targets: tuple[str, ...]) -> AdapterOptions:
    values = {name: getattr(args, f"lora_{prefix}{name}") for name in ("r", "alpha", "dropout", "bias")}
    return AdapterOptions(
        rank=values["r"],
        alpha=values["alpha"],
        dropout=values["dropout"],
        targets=targets,
        learning_rate=args.learning_rate,
        options={"bias": values["bias"]},
    )


def parse(arguments: Sequence[str] | None = None) -> DreamBoothConfig:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    parser.add_argument("--use_lora", action="store_true", help="the only method here; kept for old command lines")
    for prefix, part in {"": "UNet", "text_encoder_": "text encoder"}.items():
        parser.add_argument(f"--lora_{prefix}r", type=int, default=8, help=f"rank, {part}")
        parser.add_argument(f"--lora_{prefix}alpha", type=float, default=32, help=f"strength is alpha / rank, {part}")
        parser.add_argument(f"--lora_{prefix}dropout", type=float, default=0.0, help=f"dropout, {part}")
        parser.add_argument(f"--lora_{prefix}bias", default="none", help=f"none, all or lora_only, {part}")
    args = parser.parse_args(arguments)
    unet, text_encoder = lora_options(args, "", UNET_TARGETS), lora_options(args, "text_encoder_", TEXT_ENCODER_TARGETS)
    return to_config(args, unet, text_encoder)


if __name__ == "__main__":
    main(parse())
