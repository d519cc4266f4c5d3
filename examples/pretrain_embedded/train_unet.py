"""Step 4: the UNet and the text encoder together, from scratch, on the VAE's latents.

    python train_unet.py --data data --tokenizer tokenizer --state state --minutes 14

The same command goes on where the last call ended. The results are the folders `state/unet` and
`state/text_encoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import training
import tyro
from diffusers import AutoencoderKL, UNet2DConditionModel
from models import TOKENS, make_scheduler, make_text_encoder, make_unet
from tokenizers import Tokenizer
from torch import Tensor
from train_vae import encode, held_out_psnr
from training import DEVICE, Optimizer, log, mixed_precision
from transformers import CLIPTextModel


@dataclass(frozen=True, kw_only=True)
class Options(training.Options):
    """Train the UNet and the text encoder."""

    tokenizer: Path
    """Folder that `make_tokenizer.py` wrote."""
    minutes: float = 14
    pool: int = 800_000
    batch: int = 512
    learning_rate: float = 1.4e-3
    text_learning_rate: float = 8e-4
    warmup: int = 300
    prepare: bool = False
    """Only invent the pool and compile, then end: the training itself then starts at once. Run it beside step 3."""


def read_vae(state: Path) -> AutoencoderKL:
    """The trained VAE, frozen."""
    vae = AutoencoderKL.from_pretrained(state / "vae", dtype=torch.float32, low_cpu_mem_usage=False)
    return vae.to(DEVICE, memory_format=torch.channels_last).eval().requires_grad_(False)


def tokenize(folder: Path, captions: list[str]) -> tuple[Tensor, int]:
    """Token numbers (n, TOKENS), started, ended and padded as CLIP does, and the vocabulary's size."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = tokenizer.get_vocab_size()
    start, end = size - 2, size - 1
    numbers = torch.full((len(captions), TOKENS), end)
    numbers[:, 0] = start
    for row, encoded in enumerate(tokenizer.encode_batch(captions, add_special_tokens=False)):
        ids = encoded.ids[: TOKENS - 2]
        numbers[row, 1 : 1 + len(ids)] = torch.tensor(ids)
    return numbers, size


def loss_function(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Squared error of the predicted velocity."""
    kept = make_scheduler().alphas_cumprod.to(DEVICE)

    def loss(tokens: Tensor, latents: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        signal = kept[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * latents
        with mixed_precision():
            words = text_encoder(tokens).last_hidden_state
            predicted = unet(noisy, times, words, return_dict=False)[0]
        return F.mse_loss(predicted.float(), velocity)

    return loss


def main(options: Options) -> None:
    rows, captions = training.pool_of(options, seed=2)
    tokens, vocabulary = tokenize(options.tokenizer, captions)
    training.prepare_torch()
    unet = make_unet().to(DEVICE, memory_format=torch.channels_last)
    text_encoder = make_text_encoder(vocabulary).to(DEVICE)
    loss_of = loss_function(unet, text_encoder)
    loss_of = torch.compile(loss_of) if options.compile else loss_of
    if options.prepare:
        loss_of(*random_batch(options.batch, vocabulary)).backward()
        log("prepared")
        return
    vae = read_vae(options.state)
    log(f"VAE: held-out PSNR {held_out_psnr(vae, options):.2f} dB")
    images = training.draw(options, rows)
    latents = torch.cat([encode(vae, part).bfloat16() for part in images.split(2048)])
    del images, rows, captions
    log(f"latents: mean {latents[:4096].float().mean():.3f}, std {latents[:4096].float().std():.3f}")
    tokens = tokens.to(DEVICE)
    optimizer = Optimizer([(unet, options.learning_rate), (text_encoder, options.text_learning_rate)], average=0.9997)

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (options.batch,), device=DEVICE)
        clean = latents[chosen].float()
        times = torch.randint(0, 1000, (options.batch,), device=DEVICE)
        return loss_of(tokens[chosen], clean, times, torch.randn_like(clean))

    training.train(options, options.state / "unet.pt", {"unet": unet, "text_encoder": text_encoder}, optimizer, loss)
    unet.half().save_pretrained(options.state / "unet")
    text_encoder.half().save_pretrained(options.state / "text_encoder")


def random_batch(size: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the loss in the right shapes."""
    tokens, times = (
        torch.randint(0, n, shape, device=DEVICE) for n, shape in ((vocabulary, (size, TOKENS)), (1000, (size,)))
    )
    latents = torch.randn(size, 4, 16, 16, device=DEVICE)
    return tokens, latents, times, torch.randn_like(latents)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
