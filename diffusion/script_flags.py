"""The DreamBooth command line that diffusion scripts share, read into a `DreamBoothConfig`: underscores and old names.

For scripts that take the place of older ones; `veneer dreambooth` has the settings as they are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .config import AdapterOptions, DreamBoothConfig

_TRANSLATED = {
    *("pretrained_model_name_or_path", "with_prior_preservation", "class_prompt", "class_data_dir", "center_crop"),
    *("train_text_encoder", "learning_rate", "mixed_precision"),
    *("validation_prompt", "num_validation_images", "validation_steps"),
}
"""Flags that are called or meant differently in the config."""


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every method shares; those left out keep the defaults of `DreamBoothConfig`."""
    flag, off = parser.add_argument, argparse.SUPPRESS
    flag("--pretrained_model_name_or_path", required=True, help='directory, hub id, or "embedded"')
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--instance_data_dir", type=Path, required=True, help="images of the subject")
    flag("--instance_prompt", required=True, help="what they show, with a rare word as its name")
    flag("--output_dir", type=Path, default=Path("text-inversion-model"), help="the run's directory")
    flag("--with_prior_preservation", action="store_true", help="learn class images alongside")
    flag("--class_data_dir", type=Path, help="class images; missing ones are generated")
    flag("--class_prompt", help="what the subject is one of")
    flag("--num_class_images", type=int, default=100)
    flag("--prior_loss_weight", type=float, default=1.0)
    flag("--train_text_encoder", action="store_true")
    flag("--resolution", type=int, default=None, help="side of the training squares; the pipeline's own if not given")
    flag("--center_crop", action="store_true", help="cut squares from the centre instead of at random")
    flag("--train_batch_size", type=int, default=4)
    flag("--sample_batch_size", type=int, default=4)
    flag("--max_train_steps", type=int, default=400)
    flag("--checkpointing_steps", type=int, default=500)
    flag("--gradient_accumulation_steps", type=int, default=1)
    flag("--gradient_checkpointing", action="store_true")
    flag("--learning_rate", type=float, default=5e-6, help="of both components")
    flag("--lr_scheduler", default="constant")
    flag("--lr_warmup_steps", type=int, default=500)
    for name in ("lr_num_cycles", "seed"):
        flag(f"--{name}", type=int, default=off)
    for name in ("lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"):
        flag(f"--{name}", type=float, default=off)
    flag("--allow_tf32", action="store_true")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="what accelerate was launched with, if not given")
    flag("--validation_prompt", help="drawn at step 0, now and then, and at the end")
    flag("--num_validation_images", type=int, default=4)
    flag("--validation_steps", type=int, default=100)


def to_config(args: argparse.Namespace, unet: AdapterOptions, text_encoder: AdapterOptions) -> DreamBoothConfig:
    """The library's settings for parsed flags. Flags of one name on both sides are passed on as they are."""
    if args.with_prior_preservation and args.class_prompt is None:
        raise SystemExit("--with_prior_preservation needs --class_prompt")
    names = DreamBoothConfig.__dataclass_fields__.keys() - _TRANSLATED - {"unet", "text_encoder"}
    prior = args.with_prior_preservation
    precision: Any = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return DreamBoothConfig(
        **{name: value for name, value in vars(args).items() if name in names},
        model=args.pretrained_model_name_or_path,
        unet=unet,
        text_encoder=text_encoder if args.train_text_encoder else AdapterOptions(method="none"),
        class_prompt=args.class_prompt if prior else None,
        class_data_dir=args.class_data_dir if prior else None,
        random_crop=not args.center_crop,
        mixed_precision=precision,
        sample_prompts=(args.validation_prompt,) if args.validation_prompt else (),
        sample_seeds=tuple(range(args.num_validation_images if args.validation_prompt else 0)),
        sample_every=args.validation_steps,
    )
