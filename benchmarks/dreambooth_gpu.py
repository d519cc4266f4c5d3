"""DreamBooth on the SD-1.4 architecture at 512 px: step time and peak memory, beside `peft` in a plain loop.

    python benchmarks/dreambooth_gpu.py [--steps 30] [--json out.json] [--tiny]

Weights are random, sizes and configs those of Stable Diffusion 1.4; rank-16 LoRA on the UNet's to_q, to_v and the text
encoder's q_proj, v_proj, one subject and one class image a step, AdamW. The loop of the peer encodes images in every
step, as PEFT's example does, or takes cached latents, as ours does. `--tiny` tries the program out on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel
from veneer.core.runs.events import Done, Step
from veneer.diffusion import DreamBooth, DreamBoothConfig
from veneer.diffusion.config import AdapterOptions
from veneer.diffusion.families import EMBEDDED_PATH, load_pipeline

UNET_TARGETS, TEXT_TARGETS = ["to_q", "to_v"], ["q_proj", "v_proj"]
PEFT_GB = {"fp32": 7.80, "fp32, checkpointing": 6.02, "bf16": 5.13, "bf16, checkpointing": 3.34}
"""PEFT 0.21.2 measured on an H100 before this program was written; bf16 there adapts q, k, v and out."""


def build_pipeline(folder: Path, tiny: bool, device: torch.device) -> None:
    """A pipeline of SD 1.4's shapes with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_PATH / "tokenizer", model_max_length=77)
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width, text, vae = ((32, 64), 32, (32, 32)) if tiny else ((320, 640, 1280, 1280), 768, (128, 256, 512, 512))
    down = ("CrossAttnDownBlock2D",) * (len(width) - 1) + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(width) - 1)
    with device:
        unet = UNet2DConditionModel(
            sample_size=8 if tiny else 64, block_out_channels=width, down_block_types=down, up_block_types=up,
            cross_attention_dim=text, attention_head_dim=8, norm_num_groups=32,
        )  # fmt: skip
        encoder = AutoencoderKL(
            block_out_channels=vae, down_block_types=("DownEncoderBlock2D",) * len(vae),
            up_block_types=("UpDecoderBlock2D",) * len(vae), layers_per_block=2, scaling_factor=0.18215,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=text, intermediate_size=4 * text, num_hidden_layers=2 if tiny else 12,
                num_attention_heads=2 if tiny else 12, max_position_embeddings=77, hidden_act="quick_gelu", **ids,
            )
        )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    StableDiffusionPipeline(
        vae=encoder, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_images(folder: Path, count: int, size: int) -> Path:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def ours(work: Path, name: str, precision: str, checkpointing: bool, args: argparse.Namespace) -> dict[str, float]:
    options = {"rank": 16, "alpha": 16}
    config = DreamBoothConfig(
        model=str(work / "pipeline"),
        instance_data_dir=work / "subject",
        instance_prompt="a photo of sks dog",
        class_prompt="a photo of a dog",
        class_data_dir=work / "class",
        num_class_images=4,
        output_dir=work / name,
        unet=AdapterOptions(targets=tuple(UNET_TARGETS), **options),
        text_encoder=AdapterOptions(targets=tuple(TEXT_TARGETS), **options),
        resolution=args.size,
        mixed_precision=precision,
        gradient_checkpointing=checkpointing,
        max_train_steps=args.steps,
        checkpointing_steps=10**6,
        sample_seeds=(),
    )
    seconds, peak = [], 0.0
    for event in DreamBooth(config).run():
        if isinstance(event, Step):
            seconds.append(event.seconds)
        elif isinstance(event, Done):
            peak = (event.peak_memory or 0) / 1e9
    return {"step_s": statistics.median(seconds[3:]), "peak_gb": peak}


def peer(
    work: Path, dtype: torch.dtype, checkpointing: bool, cached: bool, device: torch.device, args: argparse.Namespace
) -> dict[str, float]:
    """The plain loop of PEFT's DreamBooth example."""
    pipe = load_pipeline(str(work / "pipeline"))
    unet, text, vae = pipe.unet.to(dtype), pipe.text_encoder.to(dtype), pipe.vae.to(dtype)
    unet = peft.get_peft_model(unet, peft.LoraConfig(r=16, lora_alpha=16, target_modules=UNET_TARGETS)).to(device)
    text = peft.get_peft_model(text, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TEXT_TARGETS)).to(device)
    vae = vae.to(device)
    unet.train(), text.train()
    if checkpointing:
        unet.base_model.model.enable_gradient_checkpointing()
        text.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    trained = [p for m in (unet, text) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = pipe.tokenizer(
        ["a photo of sks dog", "a photo of a dog"], padding="max_length", max_length=77, return_tensors="pt"
    )
    ids = tokens.input_ids.to(device)
    pixels = torch.rand(2, 3, args.size, args.size, device=device, dtype=dtype) * 2 - 1
    latents = encode(vae, pixels)
    if cached:
        vae.to("cpu")
    gc.collect()
    reset_peak(device)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        clean = latents if cached else encode(vae, pixels)
        noise, times = torch.randn_like(clean), torch.randint(1000, (2,), device=device)
        noisy = schedule.add_noise(clean, noise, times)
        loss = F.mse_loss(unet(noisy, times, text(ids)[0]).sample.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return {"step_s": statistics.median(seconds[3:]), "peak_gb": peak_gb(device)}


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def runs(work: Path, device: torch.device, args: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, float]]]:
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        for checkpointing in (False, True):
            label = ("fp32" if precision == "no" else "bf16") + (", checkpointing" if checkpointing else "")
            yield label, "veneer", ours(work, f"run-{label}", precision, checkpointing, args)
            clear()
            yield label, "peft loop", peer(work, dtype, checkpointing, False, device, args)
            clear()
            yield label, "peft, cached latents", peer(work, dtype, checkpointing, True, device, args)
            clear()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.size = 64 if args.tiny else 512
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, peft {peft.__version__}", flush=True)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build_pipeline(work / "pipeline", args.tiny, device)
        write_images(work / "subject", 4, args.size)
        write_images(work / "class", 4, args.size)
        for label, who, result in runs(work, device, args):
            table.append({"setting": label, "who": who} | result)
            print(f"{label:22s}{who:22s}{result['step_s']:8.3f} s{result['peak_gb']:8.2f} GB", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
