"""Tiny models with the module names of the families, and LyCORIS' adapters of single layers of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from veneer.diffusion.dialects.names import Names


class Pipe:
    """What the functions under test need of a pipeline."""

    def __init__(self, **components: nn.Module):
        self.__dict__.update(components)


def _unet(**options: Any) -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        **options,
    )


def _sdxl() -> nn.Module:
    return _unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    )


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


_DENOISERS = {"sd1": ("unet", _unet), "sdxl": ("unet", _sdxl), "flux": ("transformer", _flux)}

_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS: dict[str, dict[str, str]] = {
    "sd1": {
        "linear": f"{_BLOCK}.attn2.to_k",
        "conv1x1": "down_blocks.0.attentions.0.proj_in",
        "conv3x3": "down_blocks.1.resnets.0.conv1",
        "bias": "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2",
        "norm": f"{_BLOCK}.norm1",
        "groupnorm": "up_blocks.0.resnets.1.norm2",
    },
    "sdxl": {
        "linear": f"{_BLOCK}.attn1.to_out.0",
        "conv1x1": "up_blocks.0.resnets.2.conv_shortcut",
        "conv3x3": "up_blocks.0.upsamplers.0.conv",
        "bias": "add_embedding.linear_1",
        "norm": "mid_block.attentions.0.transformer_blocks.0.norm3",
        "groupnorm": "conv_norm_out",
    },
    "flux": {"linear": "transformer_blocks.0.ff.net.0.proj", "bias": "single_transformer_blocks.0.proj_out"},
}
"""Family -> a layer of each kind."""
KOHYA_NAMES = {
    "sd1": {kind: f"lora_unet_{path.replace('.', '_')}" for kind, path in LAYERS["sd1"].items()},
    "sdxl": {
        "linear": "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
        "conv1x1": "lora_unet_output_blocks_2_0_skip_connection",
        "conv3x3": "lora_unet_output_blocks_2_1_conv",
        "bias": "lora_unet_label_emb_0_0",
        "norm": "lora_unet_middle_block_1_transformer_blocks_0_norm3",
        "groupnorm": "lora_unet_out_0",
    },
    "flux": {"linear": "lora_unet_double_blocks_0_img_mlp_0", "bias": "lora_unet_single_blocks_0_linear2"},
}
PLACES = [(family, kind) for family, kinds in LAYERS.items() for kind in kinds]


@cache
def pipe_of(family: str) -> Pipe:
    """A pipeline of one tiny denoiser."""
    torch.manual_seed(0)
    name, make = _DENOISERS[family]
    model = make().eval()
    for module in model.modules():  # norms and biases that can be told apart
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.normal_(module.weight)
    return Pipe(**{name: model})


def denoiser_of(family: str) -> nn.Module:
    return getattr(pipe_of(family), _DENOISERS[family][0])


@cache
def names_of(family: str) -> Names:
    return Names.of_pipeline(pipe_of(family))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Away from the identity, deterministically."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(parameter * (1 + 0.2 * noise) if "dora" in name or "rescale" in name else 0.5 * noise)


def weights(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a layer is equal to, adapted or not."""
    if hasattr(layer, "folded"):
        weight, bias = layer.folded(tuple(layer.adapters))
        return layer.site.from_matrix(weight), bias
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
