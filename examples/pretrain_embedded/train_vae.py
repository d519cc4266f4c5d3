"""Step 3: the VAE, from scratch, ended by whitening its latents.

    python train_vae.py --data data --state state --minutes 4

The same command goes on where the last call ended. The result is the folder `state/vae`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import training
import tyro
from diffusers import AutoencoderKL
from models import make_vae
from render import load_sprites, render
from scenes import Emoji, one
from torch import Tensor
from training import DEVICE, Optimizer, log, mixed_precision, model_input


@dataclass(frozen=True, kw_only=True)
class Options(training.Training, training.Pool):
    """Train the VAE."""

    minutes: float = 4
    pool: int = 100_000
    batch: int = 256
    learning_rate: float = 2e-3
    kl: float = 3e-4
    """Weight of the KL term per latent number: enough to keep the latents together; more would soften the pictures."""
    channels: tuple[int, int, int] = (64, 128, 128)
    """Channels at 64, 32 and 16 pixels."""


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def difference(drawn: Tensor, true: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of the edges, which keeps thin lines."""
    loss = F.l1_loss(drawn, true) + 0.5 * F.mse_loss(drawn, true)
    for line, true_line in zip(edges(drawn), edges(true), strict=True):
        loss = loss + 0.5 * F.l1_loss(line, true_line)
    return loss


def loss_of(vae: AutoencoderKL, x: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    with mixed_precision():
        latents = vae.encode(x).latent_dist
        mean, logvar = latents.mean.float(), latents.logvar.float()
        drawn = vae.decode(mean + (0.5 * logvar).exp() * noise).sample
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return difference(drawn.float(), x) + kl_weight * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents of uint8 images, float32."""
    with mixed_precision():
        return vae.encode(model_input(images)).latent_dist.mean.float()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1, by changing the 1 x 1 convolutions on both sides of the latents.

    Pictures stay the same, and `scaling_factor` is exactly 1.
    """
    latents = torch.cat([encode(vae, part) for part in images.split(512)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log("latents: mean", [round(v, 3) for v in mean.tolist()], "std", [round(v, 3) for v in std.tolist()])
    into, out, n = vae.quant_conv, vae.post_quant_conv, len(mean)
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std.view(1, -1, 1, 1)
    into.weight[:n] /= std.view(-1, 1, 1, 1)
    into.bias[:n] = (into.bias[:n] - mean) / std
    into.bias[n:] -= 2 * std.log()  # the log-variances


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKL, options: training.Pool) -> float:
    """dB, mean over the concepts that no scene shows, drawn in the first style."""
    emoji = Emoji(options.data)
    sprites = [emoji.sprite["noto", i] for i, concept in enumerate(emoji.concepts) if concept["held_out"]]
    rows = torch.stack([torch.from_numpy(one(i)) for i in range(len(sprites))]).to(DEVICE)
    true = render(rows, load_sprites(options.data, sprites).to(DEVICE))
    drawn = vae.decode(vae.encode(true * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    error = (drawn.clamp(0, 1) - true).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def main(options: Options) -> None:
    rows, _ = training.pool_of(options, seed=1)
    images = torch.cat(list(training.drawn(options, rows)))
    training.prepare_torch()
    vae = make_vae(options.channels).to(DEVICE, memory_format=torch.channels_last)
    optimizer = Optimizer([(vae, options.learning_rate)], average=0.998, weight_decay=1e-4)
    loss_function = torch.compile(loss_of) if options.compile else loss_of

    def loss() -> Tensor:
        x = model_input(images[torch.randint(len(images), (options.batch,), device=DEVICE)])
        return loss_function(vae, x, torch.randn(len(x), 4, 16, 16, device=DEVICE), options.kl)

    training.train(options, options.state / "vae.pt", {"vae": vae}, optimizer, loss)
    log(f"held-out PSNR {held_out_psnr(vae, options):.2f} dB")
    whiten(vae, images[:20_480])
    vae.half().save_pretrained(options.state / "vae")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
