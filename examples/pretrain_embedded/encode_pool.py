"""Step 4: a pool of scenes as the UNet is trained on it: the VAE's latents, and the captions' tokens.

    python encode_pool.py --data data --tokenizer tokenizer --state state

The result is `state/latents.safetensors`. Compiling the UNet takes longer, so start step 5 beside it: that waits for
the file.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import training
import tyro
from diffusers import AutoencoderKL
from models import TOKENS
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from train_vae import encode, held_out_psnr
from training import DEVICE, log


@dataclass(frozen=True, kw_only=True)
class Options(training.Pool):
    """Invent, draw and encode the scenes."""

    tokenizer: Path
    """Folder that `make_tokenizer.py` wrote."""
    pool: int = 800_000


def latents_file(state: Path) -> Path:
    return state / "latents.safetensors"


def tokenize(folder: Path, captions: list[str]) -> Tensor:
    """Token numbers (n, TOKENS), started, ended and padded as CLIP does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start, end = vocabulary_size(folder) - 2, vocabulary_size(folder) - 1
    numbers = torch.full((len(captions), TOKENS), end)
    numbers[:, 0] = start
    for row, encoded in enumerate(tokenizer.encode_batch(captions, add_special_tokens=False)):
        ids = encoded.ids[: TOKENS - 2]
        numbers[row, 1 : 1 + len(ids)] = torch.tensor(ids)
    return numbers


def vocabulary_size(folder: Path) -> int:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def read_vae(folder: Path) -> AutoencoderKL:
    """A trained VAE, frozen."""
    vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    return vae.to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)


def read_pool(state: Path) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 16, 16) and tokens (n, TOKENS) on the device, once `encode_pool.py` has written them."""
    file = latents_file(state)
    if not file.exists():
        log(f"waiting for {file}, which encode_pool.py writes")
    while not file.exists():
        time.sleep(0.5)
    stored = load_file(file, DEVICE)
    return stored["latents"], stored["tokens"].long()


def main(options: Options) -> None:
    rows, captions = training.pool_of(options, seed=2)
    tokens = tokenize(options.tokenizer, captions)
    training.prepare_torch()
    vae = read_vae(options.state / "vae")
    log(f"VAE: held-out PSNR {held_out_psnr(vae, options):.2f} dB")
    latents = torch.cat([encode(vae, images).bfloat16() for images in training.drawn(options, rows)]).contiguous()
    log(f"latents: mean {latents[:4096].float().mean():.3f}, std {latents[:4096].float().std():.3f}")
    file = latents_file(options.state)
    save_file({"latents": latents, "tokens": tokens.short()}, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)  # whole or not at all: step 5 may be waiting for it
    log(f"{len(latents)} scenes encoded")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
