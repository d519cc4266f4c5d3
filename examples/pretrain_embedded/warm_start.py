"""A UNet and text encoder that know an older VAE's latents, turned to a new VAE's.

Latents of two VAEs of one shape, both whitened, say much the same in other coordinates. The orthogonal matrix that
turns one into the other best (Schönemann 1966, doi:10.1007/BF02289451) keeps noise white, and goes into the UNet's
first and last convolution. What was learnt in between is kept, and training goes on from there.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from train_vae import encode
from transformers import CLIPTextModel


def rotation(old: Tensor, new: Tensor) -> Tensor:
    """The orthogonal R (c, c) that brings ``R @ new`` nearest to ``old``: latents (n, c, h, w) of the same images."""
    correlation = torch.einsum("nihw,njhw->ij", old.double(), new.double())
    left, _, right = torch.linalg.svd(correlation)
    return (left @ right).float()


@torch.no_grad()
def turn(unet: UNet2DConditionModel, matrix: Tensor) -> None:
    """Have a UNet that knows latents ``R z`` take and give ``z``."""
    into, out = unet.conv_in, unet.conv_out
    into.weight.copy_(torch.einsum("oihw,ij->ojhw", into.weight, matrix))
    out.weight.copy_(torch.einsum("ji,johw->iohw", matrix, out.weight))
    out.bias.copy_(out.bias @ matrix)


def started_from(
    pipeline: Path, old_vae: AutoencoderKL, new_vae: AutoencoderKL, images: Tensor
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder of `pipeline`, in float32, turned from its VAE's latents to those of `new_vae`.

    images: uint8 (n, 3, 64, 64) to compare the latents on; some hundred are enough.
    """
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", dtype=torch.float32, low_cpu_mem_usage=False)
    text_encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32)
    turn(unet, rotation(encode(old_vae, images), encode(new_vae, images)).cpu())
    return unet, text_encoder
