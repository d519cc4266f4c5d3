"""Step 5: the UNet and the text encoder together, on the VAE's latents.

    python train_unet.py --data data --tokenizer tokenizer --state state --minutes 14

Starts from nothing, or from another pipeline (`--start`). The same command goes on where the last call ended. The
results are the folders `state/unet` and `state/text_encoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import training
import tyro
from diffusers import UNet2DConditionModel
from encode_pool import read_pool, read_vae, vocabulary_size
from models import TOKENS, make_scheduler, make_text_encoder, make_unet
from scenes import Emoji, scenes
from torch import Tensor
from training import DEVICE, Optimizer, log, mixed_precision
from transformers import CLIPTextModel
from warm_start import started_from


@dataclass(frozen=True, kw_only=True)
class Options(training.Training, training.Pool):
    """Train the UNet and the text encoder."""

    tokenizer: Path
    """Folder of the tokenizer that the captions were encoded with."""
    start: Path | None = None
    """Pipeline to start from: its UNet and text encoder, turned to the latents of this VAE. Its tokenizer must be the
    same. None starts from scratch."""
    minutes: float = 14
    batch: int = 512
    learning_rate: float = 1.4e-3
    text_learning_rate: float = 8e-4
    average: float = 0.9997
    """Decay of the averaged weights, a step: the average should span the last tenth of the training or so."""
    warmup: int = 300


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


def models(options: Options) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder as training starts with them."""
    vocabulary = vocabulary_size(options.tokenizer)
    if options.start is None:
        unet, text_encoder = make_unet(), make_text_encoder(vocabulary)
    else:
        rows, _ = scenes(Emoji(options.data), 1024, seed=3)
        vaes = read_vae(options.start / "vae"), read_vae(options.state / "vae")
        unet, text_encoder = started_from(options.start, *vaes, torch.cat(list(training.drawn(options, rows))))
        known = text_encoder.config.vocab_size
        if known != vocabulary:
            raise ValueError(f"{options.tokenizer} has {vocabulary} tokens, {options.start} knows {known}: use its own")
    return unet.to(DEVICE, memory_format=torch.channels_last).train(), text_encoder.to(DEVICE).train()


def main(options: Options) -> None:
    training.prepare_torch()
    unet, text_encoder = models(options)
    loss_of = loss_function(unet, text_encoder)
    if options.compile:
        loss_of = torch.compile(loss_of)
        loss_of(*random_batch(options.batch, text_encoder.config.vocab_size)).backward()
        log("compiled")
    latents, tokens = read_pool(options.state)
    rates = [(unet, options.learning_rate), (text_encoder, options.text_learning_rate)]
    optimizer = Optimizer(rates, average=options.average)

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (options.batch,), device=DEVICE)
        clean = latents[chosen].float()
        times = torch.randint(0, 1000, (options.batch,), device=DEVICE)
        return loss_of(tokens[chosen], clean, times, torch.randn_like(clean))

    trained = {"unet": unet, "text_encoder": text_encoder}
    training.train(options, options.state / "unet.pt", trained, optimizer, loss, out=options.state)


def random_batch(size: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the loss in the right shapes."""
    tokens, times = (
        torch.randint(0, n, shape, device=DEVICE) for n, shape in ((vocabulary, (size, TOKENS)), (1000, (size,)))
    )
    latents = torch.randn(size, 4, 16, 16, device=DEVICE)
    return tokens, latents, times, torch.randn_like(latents)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
