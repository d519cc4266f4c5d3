"""DreamBooth on Stable Diffusion with LoRA, LoHa or LoKr, attention and convolutions, on `veneer.diffusion`.

    accelerate launch train_dreambooth.py --pretrained_model_name_or_path=embedded --instance_data_dir=photos \\
        --instance_prompt="a photo of sks dog" --output_dir=run --train_text_encoder \\
        loha --unet_r=8 --unet_alpha=8 --unet_use_effective_conv2d

The method comes last, followed by its own options. A run that was interrupted goes on when the same command is given
again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from veneer.diffusion import AdapterOptions, DreamBoothConfig
from veneer.diffusion.dreambooth import main
from veneer.diffusion.script_flags import add_common_flags, to_config

UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj", "proj_in", "proj_out", "ff.net.2"),
    *("conv", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
)
TEXT_ENCODER_TARGETS = ("fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj")

DROPOUTS = {"rank_dropout": float, "module_dropout": float}
DECOMPOSITION = {"decompose_both": bool, "decompose_factor": int}
EFFECTIVE = {"use_effective_conv2d": bool}
METHODS: dict[str, dict[str, dict[str, type]]] = {
    "lora": {"unet": {"dropout": float, "bias": str}, "te": {"dropout": float, "bias": str}},
    "loha": {"unet": DROPOUTS | EFFECTIVE, "te": DROPOUTS},
    "lokr": {"unet": DROPOUTS | EFFECTIVE | DECOMPOSITION, "te": DROPOUTS | DECOMPOSITION},
}
"""Options of each method and part beside rank and alpha, with their types."""


def add_method(parser: argparse.ArgumentParser, method: str) -> None:
    """Flags `--unet_r`, `--te_alpha`, ...; an option that is not given keeps the method's default."""
    for part, options in METHODS[method].items():
        parser.add_argument(f"--{part}_r", type=int, default=8, help="rank")
        parser.add_argument(f"--{part}_alpha", type=float, default=8, help="strength is alpha / rank")
        for name, kind in options.items():
            how = {"action": "store_true"} if kind is bool else {"type": kind}
            parser.add_argument(f"--{part}_{name}", default=argparse.SUPPRESS, help=name.replace("_", " "), **how)


def adapter_options(args: argparse.Namespace, part: str, targets: tuple[str, ...]) -> AdapterOptions:
    given = vars(args)
    options = {n: given[f"{part}_{n}"] for n in METHODS[args.adapter][part] if f"{part}_{n}" in given}
    return AdapterOptions(
        method=args.adapter,
        rank=given[f"{part}_r"],
        alpha=given[f"{part}_alpha"],
        dropout=options.pop("dropout", 0.0),
        targets=targets,
        learning_rate=args.learning_rate,
        options=options,
    )


def parse(arguments: Sequence[str] | None = None) -> DreamBoothConfig:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser)
    methods = parser.add_subparsers(dest="adapter", required=True)
    for method in METHODS:
        add_method(methods.add_parser(method), method)
    args = parser.parse_args(arguments)
    unet, text_encoder = adapter_options(args, "unet", UNET_TARGETS), adapter_options(args, "te", TEXT_ENCODER_TARGETS)
    return to_config(args, unet, text_encoder)


if __name__ == "__main__":
    main(parse())
