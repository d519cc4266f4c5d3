"""The modules of the model families, path by path with the shapes of their weights, from a few numbers each.

So a file can be judged without its model at hand, and without torch. Paths are diffusers' and transformers', the latter
with CLIP's `text_model.`. The tests hold every table to the libraries' own models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache

from .canonical import Shape

Rows = Iterator[tuple[str, Shape]]
Table = dict[str, Shape]
"""Module path -> shape of its weight."""


def unet(channels: Sequence[int], depths: Sequence[int], context: int, *, linear: bool, extra: int = 0) -> Table:
    """UNet2DConditionModel with two resnets a block.

    Arguments:
        depths: transformer blocks at each resolution, 0 for none.
        context: width of the text embeddings.
        linear: whether the transformers' projections are linear layers, not 1x1 convolutions.
        extra: width of SDXL's pooled text and sizes, 0 for none.
    """
    return dict(_unet(channels, depths, context, (1, 1) if not linear else (), extra))


def _unet(channels: Sequence[int], depths: Sequence[int], context: int, kernel: Shape, extra: int) -> Rows:
    first, time = channels[0], 4 * channels[0]
    last = len(channels) - 1
    yield "conv_in", (first, 4, 3, 3)
    for name, width in (("time_embedding", first), ("add_embedding", extra)):
        if width:
            yield f"{name}.linear_1", (time, width)
            yield f"{name}.linear_2", (time, time)

    skips = [first]
    for i, width in enumerate(channels):
        for j in range(2):
            yield from _resnet(f"down_blocks.{i}.resnets.{j}", skips[-1], width, time)
            yield from _transformer(f"down_blocks.{i}.attentions.{j}", width, depths[i], context, kernel)
            skips.append(width)
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)

    width = channels[-1]
    for j in range(2):
        yield from _resnet(f"mid_block.resnets.{j}", width, width, time)
    yield from _transformer("mid_block.attentions.0", width, depths[-1] or 1, context, kernel)

    for i, at in enumerate(reversed(range(len(channels)))):
        for j in range(3):
            yield from _resnet(f"up_blocks.{i}.resnets.{j}", width + skips.pop(), channels[at], time)
            width = channels[at]
            yield from _transformer(f"up_blocks.{i}.attentions.{j}", width, depths[at], context, kernel)
        if i < last:
            yield f"up_blocks.{i}.upsamplers.0.conv", (width, width, 3, 3)
    yield "conv_norm_out", (first,)
    yield "conv_out", (4, first, 3, 3)


def _resnet(path: str, inputs: int, width: int, time: int) -> Rows:
    yield f"{path}.norm1", (inputs,)
    yield f"{path}.conv1", (width, inputs, 3, 3)
    yield f"{path}.time_emb_proj", (width, time)
    yield f"{path}.norm2", (width,)
    yield f"{path}.conv2", (width, width, 3, 3)
    if inputs != width:
        yield f"{path}.conv_shortcut", (width, inputs, 1, 1)


def _transformer(path: str, width: int, depth: int, context: int, kernel: Shape) -> Rows:
    if not depth:
        return
    yield f"{path}.norm", (width,)
    for name in ("proj_in", "proj_out"):
        yield f"{path}.{name}", (width, width, *kernel)
    for i in range(depth):
        block = f"{path}.transformer_blocks.{i}"
        for j in (1, 2, 3):
            yield f"{block}.norm{j}", (width,)
        for name, inputs in (("attn1", width), ("attn2", context)):
            yield f"{block}.{name}.to_q", (width, width)
            yield f"{block}.{name}.to_k", (width, inputs)
            yield f"{block}.{name}.to_v", (width, inputs)
            yield f"{block}.{name}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)


def clip(width: int, layers: int, projection: int = 0) -> Table:
    """CLIP's text encoder, with `projection` the CLIPTextModelWithProjection."""
    table: Table = {
        "text_model.embeddings.token_embedding": (49408, width),
        "text_model.embeddings.position_embedding": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        table |= {f"{layer}.self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        table |= {f"{layer}.layer_norm{j}": (width,) for j in (1, 2)}
        table |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    table["text_model.final_layer_norm"] = (width,)
    if projection:
        table["text_projection"] = (projection, width)
    return table


def t5(width: int, inner: int, layers: int, heads: int) -> Table:
    """T5's encoder with gated feed-forward layers."""
    table: Table = {"shared": (32128, width), "encoder.final_layer_norm": (width,)}
    table["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] = (32, heads)
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        table |= {f"{block}.0.SelfAttention.{name}": (width, width) for name in "qkvo"}
        table |= {f"{block}.1.DenseReluDense.{name}": (inner, width) for name in ("wi_0", "wi_1")}
        table[f"{block}.1.DenseReluDense.wo"] = (width, inner)
        table |= {f"{block}.{j}.layer_norm": (width,) for j in (0, 1)}
    return table


def flux(width: int, double: int, single: int, *, inputs: int = 64, text: int = 4096, pooled: int = 768) -> Table:
    """FluxTransformer2DModel of the guidance-distilled kind, heads 128 wide."""
    table: Table = {
        "x_embedder": (width, inputs),
        "context_embedder": (width, text),
        "norm_out.linear": (2 * width, width),
        "proj_out": (inputs, width),
    }
    for name, size in (("timestep_embedder", 256), ("guidance_embedder", 256), ("text_embedder", pooled)):
        table |= {f"time_text_embed.{name}.linear_1": (width, size), f"time_text_embed.{name}.linear_2": (width, width)}
    square = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for i in range(double):
        block = f"transformer_blocks.{i}"
        table |= {f"{block}.attn.{name}": (width, width) for name in square}
        table |= {f"{block}.attn.norm_{name}": (128,) for name in ("q", "k", "added_q", "added_k")}
        table |= {f"{block}.{name}.linear": (6 * width, width) for name in ("norm1", "norm1_context")}
        for name in ("ff", "ff_context"):
            table |= {f"{block}.{name}.net.0.proj": (4 * width, width), f"{block}.{name}.net.2": (width, 4 * width)}
    for i in range(single):
        block = f"single_transformer_blocks.{i}"
        table |= {f"{block}.attn.{name}": (width, width) for name in square[:3]}
        table |= {f"{block}.attn.norm_{name}": (128,) for name in "qk"}
        table |= {f"{block}.norm.linear": (3 * width, width), f"{block}.proj_mlp": (4 * width, width)}
        table[f"{block}.proj_out"] = (width, 5 * width)
    return table


ARCHITECTURES: dict[str, Callable[[], Mapping[str, Table]]] = {
    "sd1": lambda: {
        "unet": unet((320, 640, 1280, 1280), (1, 1, 1, 0), 768, linear=False),
        "text_encoder": clip(768, 12),
    },
    "sd2": lambda: {
        "unet": unet((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, linear=True),
        "text_encoder": clip(1024, 23),
    },
    "sdxl": lambda: {
        "unet": unet((320, 640, 1280), (0, 2, 10), 2048, linear=True, extra=2816),
        "text_encoder": clip(768, 12),
        "text_encoder_2": clip(1280, 32, projection=1280),
    },
    "flux": lambda: {
        "transformer": flux(3072, 19, 38),
        "text_encoder": clip(768, 12),
        "text_encoder_2": t5(4096, 10240, 24, 64),
    },
}
"""Family -> its components' tables."""


@cache
def architecture(family: str) -> Mapping[str, Table]:
    """The tables of a family, by component."""
    return ARCHITECTURES[family]()
