"""A training step of SD-1.4's UNet under each tuner, ours and PEFT's, in one process.

    python benchmarks/tuners_gpu.py [--rounds 12] [--dtype bf16] [--json out.json] [--tiny]

Attention and feed-forward layers adapted at rank 16, batch 2 at 512 px (64 x 64 latents), float32 adapters, forward
and backward of the squared error. The two libraries take turns on one model; medians. LoRA of the same library is 1x.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import veneer
from diffusers import UNet2DConditionModel
from torch import nn

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 16, "lora_alpha": 16}),
    "dora": ("LoraConfig", {"r": 16, "lora_alpha": 16, "use_dora": True}),
    "lokr": ("LoKrConfig", {"r": 16, "alpha": 16}),
    "loha": ("LoHaConfig", {"r": 16, "alpha": 16}),
    "loha r4": ("LoHaConfig", {"r": 4, "alpha": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["ff.net.2"]}),
    "oft": ("OFTConfig", {"oft_block_size": 32}),
}


def make_unet(tiny: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    small = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    small |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8}
    with device:
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, **(small if tiny else {}))
    return nn.Module.to(unet, dtype)


class Step:
    """Forward and backward of one library's model."""

    def __init__(self, lib: Any, config: Any, unet: nn.Module, size: int, dtype: torch.dtype, device: torch.device):
        self.model = lib.get_peft_model(unet, config).train()
        self.inputs = torch.randn(2, 4, size, size, device=device, dtype=dtype)
        self.text = torch.randn(2, 77, 768, device=device, dtype=dtype)
        self.times = torch.tensor([10, 500], device=device)

    def __call__(self) -> float:
        synchronise()
        start = time.perf_counter()
        y = self.model(self.inputs, self.times, self.text).sample
        y.float().square().mean().backward()
        synchronise()
        spent = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return spent


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(step: Step) -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    unets = {lib: make_unet(args.tiny, device, dtype) for lib in (peft, veneer)}
    size = 8 if args.tiny else 64
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {args.dtype}")
    print(f"{'':10s}{'peft ms':>9s}{'GB':>7s}{'x lora':>8s}{'veneer ms':>11s}{'GB':>7s}{'x lora':>8s}{'gain':>8s}")
    table: dict[str, Any] = {}
    for method, (config_class, options) in METHODS.items():
        steps = {}
        for lib, unet in unets.items():
            config = getattr(lib, config_class)(target_modules=TARGETS, **options)
            steps[lib.__name__] = Step(lib, config, unet, size, dtype, device)
        for step in steps.values():
            step(), step()
        spent: dict[str, list[float]] = {who: [] for who in steps}
        for _ in range(args.rounds):
            for who, step in steps.items():
                spent[who].append(step())
        row = {f"{who}_s": statistics.median(times) for who, times in spent.items()}
        row |= {f"{who}_gb": peak(step) for who, step in steps.items()}
        for step in steps.values():
            step.model.unload()
        table[method] = row
        first = table["lora"]
        cells = [
            f"{row[f'{who}_s'] * 1e3:{width}.1f}{row[f'{who}_gb']:7.2f}{row[f'{who}_s'] / first[f'{who}_s']:7.2f}x"
            for who, width in (("peft", 9), ("veneer", 11))
        ]
        print(f"{method:10s}{cells[0]}{cells[1]}{row['peft_s'] / row['veneer_s']:7.2f}x", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": name, "dtype": args.dtype, "table": table}, indent=1))


if __name__ == "__main__":
    main()
