"""What files mean: scales, names, fused layers. Each rule is quoted where it is tested."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from lycoris.modules import full, glora, locon, loha, lokr
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from veneer.core import AdapterFileError, PeftWarning
from veneer.diffusion import detach, load_adapter, load_pipeline
from veneer.diffusion.dialects.architectures import architecture
from veneer.diffusion.dialects.canonical import Header
from veneer.diffusion.dialects.names import Names, clip_path, family_names
from veneer.diffusion.dialects.plan import plan
from veneer.diffusion.dialects.reading import read
from veneer.diffusion.dialects.writing import write

from .tiny_models import denoiser_of, names_of, pipe_of, randomise

XL = {
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def clip(model, width, layers, **more):
    return model(CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, **more))


MODELS = {
    ("sd1", "unet"): lambda: UNet2DConditionModel(cross_attention_dim=768),
    ("sd2", "unet"): lambda: UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True),
    ("sdxl", "unet"): lambda: UNet2DConditionModel(cross_attention_dim=2048, **XL),
    ("flux", "transformer"): lambda: FluxTransformer2DModel(guidance_embeds=True),
    ("sd1", "text_encoder"): lambda: clip(CLIPTextModel, 768, 12),
    ("sd2", "text_encoder"): lambda: clip(CLIPTextModel, 1024, 23),
    ("sdxl", "text_encoder_2"): lambda: clip(CLIPTextModelWithProjection, 1280, 32, projection_dim=1280),
    ("flux", "text_encoder_2"): lambda: T5EncoderModel(
        T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    ),
}


@pytest.mark.parametrize(("family", "component"), MODELS)
def test_stored_architectures_are_those_of_the_libraries(family, component):
    with torch.device("meta"):
        model = MODELS[family, component]()
    weights = {n: tuple(m.weight.shape) for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    weights.pop("encoder.embed_tokens", None)  # T5's `shared` under a second name
    assert architecture(family)[component] == {clip_path(n, nested=True): shape for n, shape in weights.items()}


# ---------------------------------------------------------------- scales

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"  # 1280 x 1280


def lora(r, alpha=None):
    return {"lora_down.weight": (r, 1280), "lora_up.weight": (1280, r)}, alpha


def loha_(r, alpha):
    return {f"hada_w{i}_{x}": (1280, r) if x == "a" else (r, 1280) for i in "12" for x in "ab"}, alpha


LEFT = {"lokr_w1": (32, 32)}
LOW_LEFT = {"lokr_w1_a": (32, 4), "lokr_w1_b": (4, 32)}
RIGHT = {"lokr_w2": (40, 40)}
LOW_RIGHT = {"lokr_w2_a": (40, 8), "lokr_w2_b": (8, 40)}
GLORA = {f"{x}{i}.weight": (1280, 4) if i == 1 else (4, 1280) for x in "ab" for i in (1, 2)}
SCALES = {
    "LoRA: s = alpha / r, r = down.shape[0]": (*lora(4, 2.0), 0.5),
    "LoRA: alpha absent means s = 1": (*lora(4), 1.0),
    "LoRA: kohya's alpha 0 means alpha = rank": (*lora(4, 0.0), 1.0),
    "LoRA: rs_lora is baked, saved alpha = alpha * sqrt(r), readers stay alpha / r": (*lora(16, 2 * 4.0), 0.5),
    "LoRA: a negative alpha is a negative scale": (*lora(4, -4.0), -1.0),
    "LoHa: alpha / r, r = w1_b.shape[0]": (*loha_(4, 2.0), 0.5),
    "LoKr: r = w2_b.shape[0]": (LEFT | LOW_RIGHT, 4.0, 0.5),
    "LoKr: r = w2_b.shape[0] with both low": (LOW_LEFT | LOW_RIGHT, 4.0, 0.5),
    "LoKr: else r = w1_b.shape[0]": (LOW_LEFT | RIGHT, 2.0, 0.5),
    "LoKr both full: s = 1, LyCORIS writes alpha = dim": (LEFT | RIGHT, 64.0, 1.0),
    "LoKr both full: s = 1, without alpha too": (LEFT | RIGHT, None, 1.0),
    "LoKr both full: ai-toolkit stores alpha = 9999999999": (LEFT | RIGHT, 9999999999.0, 1.0),
    "LoKr both full: which is inf when saved fp16": (LEFT | RIGHT, math.inf, 1.0),
    "full difference: s = 1": ({"diff": (1280, 1280)}, 8.0, 1.0),
    "GLoRA: alpha / r": (GLORA, 2.0, 0.5),
    "OFT alpha is the constraint, not a scale": ({"oft_blocks": (320, 4, 4)}, 0.01, 1.0),
}


@pytest.mark.parametrize("rule", SCALES)
def test_scale_rules_of_lycoris_kohya_and_comfy(rule):
    shapes, alpha, expected = SCALES[rule]
    keys = {f"{Q}.{key}": shape for key, shape in shapes.items()} | ({f"{Q}.alpha": ()} if alpha is not None else {})
    (entry,) = plan(Header(keys, {}, {f"{Q}.alpha": alpha})).entries
    assert entry.scale == expected


@pytest.mark.parametrize("alpha", [math.inf, math.nan, 9999999999.0, -math.inf])
def test_a_poisoned_alpha_is_refused_where_it_would_count(alpha):
    shapes, _ = lora(4)
    keys = {f"{Q}.{key}": shape for key, shape in shapes.items()} | {f"{Q}.alpha": ()}
    found = plan(Header(keys, {}, {f"{Q}.alpha": alpha}))
    assert not found.entries
    assert all("which is no scale" in why for why in found.unmatched.values())


def test_a_scalar_saved_apart_multiplies_the_scale():
    """use_scalar: "multiplied into lora_up / hada_w1_a / lokr_w1(_a) at save", unless a trainer stores it."""
    shapes, _ = lora(4)
    keys = {f"{Q}.{key}": shape for key, shape in shapes.items()} | {f"{Q}.alpha": (), f"{Q}.scalar": (1,)}
    (entry,) = plan(Header(keys, {}, {f"{Q}.alpha": 2.0, f"{Q}.scalar": 3.0})).entries
    assert entry.scale == 1.5


@pytest.mark.parametrize(("alpha", "dim", "noted"), [(1.0, "32", True), (32.0, "32", False), (1e10, "32", False)])
def test_a_full_lokr_whose_alpha_is_not_its_dim_is_noted(alpha, dim, noted):
    """ "both-full, alpha 1, dim 32, trainer used 1/32": warn and offer override when finite alpha != ss_network_dim."""
    keys = {f"{Q}.{key}": shape for key, shape in (LEFT | RIGHT).items()} | {f"{Q}.alpha": ()}
    notes = plan(Header(keys, {"ss_network_dim": dim}, {f"{Q}.alpha": alpha})).notes
    assert [note for note in notes if "use it at weight 0.03125" in note] == list(notes)
    assert bool(notes) == noted


PEFT_SCALES = [
    ("LoRA: lora_alpha / r", {"lora_A.weight": (4, 1280), "lora_B.weight": (1280, 4)}, {"r": 4, "lora_alpha": 2}, 0.5),
    ("LoRA: or / sqrt(r) with use_rslora", {"lora_A.weight": (4, 1280), "lora_B.weight": (1280, 4)},
     {"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
    ("LoRA: patterns", {"lora_A.weight": (4, 1280), "lora_B.weight": (1280, 4)},
     {"r": 8, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 4}, "alpha_pattern": {"to_q": 12}}, 3.0),
    ("LoKr both full: s = alpha / r always: r = 64, alpha = 128 gives 2.0", LEFT | RIGHT, {"r": 64, "alpha": 128}, 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "shapes", "config", "expected"), PEFT_SCALES, ids=[c[0] for c in PEFT_SCALES])
def test_scale_rules_of_peft(rule, shapes, config, expected):
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    header = Header({f"unet.{path}.{key}": shape for key, shape in shapes.items()}, configs={"unet": config})
    (entry,) = plan(header).entries
    assert entry.scale == expected


def test_a_warning_comes_with_a_file_of_two_readings(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lokr_w1": torch.ones(4, 4),
        f"{name}.lokr_w2": torch.ones(4, 4, 1, 1),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "file.safetensors", {"ss_network_dim": "32"})
    with pytest.warns(PeftWarning, match="read at scale 1"):
        load_adapter(pipe_of("sd1"), tmp_path / "file.safetensors")
    detach(pipe_of("sd1"))


# ---------------------------------------------------------------- names

SPELLED = [
    ("diffusers-old", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
     "unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    ("diffusers-old", "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.down.weight",
     "text_encoder", "text_model.encoder.layers.3.self_attn.q_proj"),
    ("diffusers", "text_encoder.encoder.layers.3.self_attn.q_proj.lora_A.weight",
     "text_encoder", "text_model.encoder.layers.3.self_attn.q_proj"),
    ("kohya", "lora_te_text_model_encoder_layers_0_mlp_fc2.lora_down.weight",
     "text_encoder", "text_model.encoder.layers.0.mlp.fc2"),
    ("kohya", "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_down.weight",
     "text_encoder_2", "text_model.encoder.layers.31.mlp.fc2"),
    ("kohya", "lora_te2_text_projection.lora_down.weight", "text_encoder_2", "text_projection"),
    ("kohya", "lora_te3_encoder_block_7_layer_1_DenseReluDense_wi_0.lora_down.weight",
     "text_encoder_2", "encoder.block.7.layer.1.DenseReluDense.wi_0"),
    ("kohya", "lora_te2_encoder_block_7_layer_0_SelfAttention_o.lora_down.weight",
     "text_encoder_2", "encoder.block.7.layer.0.SelfAttention.o"),
    ("kohya", "lycoris_mid_block_attentions_0_proj_in.lora_down.weight", "unet", "mid_block.attentions.0.proj_in"),
    ("kohya", "lora_unet_middle_block_1_proj_in.lora_down.weight", "unet", "mid_block.attentions.0.proj_in"),
    ("kohya", "lora_unet_label_emb_0_2.lora_down.weight", "unet", "add_embedding.linear_2"),
    ("kohya", "lora_unet_input_blocks_6_0_op.lora_down.weight", "unet", "down_blocks.1.downsamplers.0.conv"),
    ("comfy", "diffusion_model.output_blocks.2.2.conv.lora_down.weight", "unet", "up_blocks.0.upsamplers.0.conv"),
    ("comfy", "diffusion_model.input_blocks.4.0.in_layers.2.lora_A.weight", "unet", "down_blocks.1.resnets.0.conv1"),
    ("comfy", "text_encoders.clip_g.transformer.text_model.encoder.layers.30.mlp.fc1.lora_A.weight",
     "text_encoder_2", "text_model.encoder.layers.30.mlp.fc1"),
    ("comfy", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
     "text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q"),
    ("comfy", "diffusion_model.single_blocks.37.linear2.lora_A.weight",
     "transformer", "single_transformer_blocks.37.proj_out"),
    ("diffusers", "transformer.single_transformer_blocks.7.proj_out.lora_A.weight",
     "transformer", "single_transformer_blocks.7.proj_out"),
    ("kohya", "lora_unet_double_blocks_18_txt_mod_lin.lora_down.weight",
     "transformer", "transformer_blocks.18.norm1_context.linear"),
    ("kohya", "lora_transformer_transformer_blocks_0_attn_to_add_out.lora_down.weight",
     "transformer", "transformer_blocks.0.attn.to_add_out"),
    ("xlabs", "single_blocks.3.processor.proj_lora.down.weight", "transformer", "single_transformer_blocks.3.proj_out"),
    ("xlabs", "double_blocks.3.processor.proj_lora2.down.weight",
     "transformer", "transformer_blocks.3.attn.to_add_out"),
]  # fmt: skip


def pair(key: str, shape: tuple[int, ...], r: int = 4) -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA whose down has this key, for a weight of `shape`."""
    up = re.sub(r"lora_A\.weight$|down\.weight$", lambda m: "lora_B.weight" if "A" in m[0] else "up.weight", key)
    return {key: (r, *shape[1:]), up: (shape[0], r, *[1] * len(shape[2:]))}


@pytest.mark.parametrize(("dialect", "key", "component", "path"), SPELLED, ids=[c[1] for c in SPELLED])
def test_names_are_looked_up(dialect, key, component, path):
    shape = next(
        t[component][path] for f in ("flux", "sdxl", "sd2", "sd1") if path in (t := architecture(f)).get(component, {})
    )
    found = plan(Header(pair(key, shape)))
    assert not found.unmatched
    assert (found.dialect.name, found.entries[0].component, found.entries[0].path) == (dialect, component, path)
    assert found.entries[0].scale == 1.0


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "flux"])
def test_no_name_means_two_modules(family):
    """Only layers that are fused have several places, and those share them out without gap or overlap."""
    names = family_names(family)
    for name, places in names.places.items():
        rows = sorted(edge for place in places for edge in place.rows or ())
        assert len(places) == 1 or rows
        assert all(one[1] == two[0] for one, two in itertools.pairwise(rows)), name


def test_embeddings_bundled_by_onetrainer_are_named():
    key = "bundle_emb.sks.string_to_param.*"
    found = plan(
        Header(pair("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", (1280, 1280, 1, 1)) | {key: (2, 768)})
    )
    assert len(found.entries) == 1
    assert "textual inversion" in found.unmatched[key]


def test_a_layer_that_is_adapted_twice_has_no_meaning():
    shape, names = (640, 640), ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in")
    found = plan(Header(pair(f"{names[0]}.lora_down.weight", shape) | pair(f"{names[1]}.lora_down.weight", shape)))
    assert len(found.entries) == 1
    assert set(found.unmatched.values()) == {
        "another module of the file adapts unet.down_blocks.1.attentions.0.proj_in already"
    }


def test_what_has_no_place_is_named_with_near_misses(tmp_path):
    good, bad = ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_inn")
    tensors = {
        f"{name}.lora_{end}.weight": torch.ones(shape)
        for name in (good, bad)
        for end, shape in (("down", (2, 16, 1, 1)), ("up", (16, 2, 1, 1)))
    }
    save_file(tensors, tmp_path / "file.safetensors")
    with pytest.raises(AdapterFileError, match=rf"2 tensors have no place: {bad}\S+ \(.* near: {good}.*strict=False"):
        load_adapter(pipe_of("sd1"), tmp_path / "file.safetensors")
    report = load_adapter(pipe_of("sd1"), tmp_path / "file.safetensors", strict=False)
    assert report.unmatched.keys() == {f"{bad}.lora_down.weight", f"{bad}.lora_up.weight"}
    detach(pipe_of("sd1"))
    save_file({key: t for key, t in tensors.items() if bad in key}, tmp_path / "none.safetensors")
    with pytest.raises(AdapterFileError, match="2 tensors have no place"):
        load_adapter(pipe_of("sd1"), tmp_path / "none.safetensors", strict=False)


# ---------------------------------------------------------------- fused layers

FUSED = {
    "lora_unet_double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "lora_unet_single_blocks_0_linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
}
FUSED_METHODS = {
    "lora": (locon.LoConModule, {}),
    "dora": (locon.LoConModule, {"weight_decompose": True}),
    "loha": (loha.LohaModule, {}),
    "lokr": (lokr.LokrModule, {"lora_dim": 1}),
    "lokr-whole-blocks": (lokr.LokrModule, {"lora_dim": 1, "factor": 8}),
    "lokr-low": (lokr.LokrModule, {"lora_dim": 1, "factor": 2}),
    "lokr-full": (lokr.LokrModule, {"lora_dim": 99, "factor": 3}),
    "full": (full.FullModule, {}),
    "glora": (glora.GLoRAModule, {}),
}


def fused_file(method: str, name: str, path) -> torch.Tensor:
    """LyCORIS' adapter of a fused layer; the outputs of its parts side by side."""
    parts = [denoiser_of("flux").get_submodule(p) for p in FUSED[name]]
    whole = nn.Linear(parts[0].in_features, sum(p.out_features for p in parts))
    whole.weight.data, whole.bias.data = (torch.cat([getattr(p, n).data for p in parts]) for n in ("weight", "bias"))
    make, options = FUSED_METHODS[method]
    module = make("name", whole, **({"lora_dim": 2, "alpha": 3} | options))
    randomise(module)
    x = torch.randn(3, whole.in_features, generator=torch.Generator().manual_seed(1))
    module.apply_to()
    with torch.no_grad():
        y, saved = whole(x), module.custom_state_dict() or module.state_dict()
    save_file({f"{name}.{key}": t.detach().clone().contiguous() for key, t in saved.items()}, path)
    return x, y


@pytest.fixture
def flux():
    yield pipe_of("flux")
    detach(pipe_of("flux"))


def outputs(name: str, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([denoiser_of("flux").get_submodule(path)(x) for path in FUSED[name]], -1)


DENSE = {"lokr-full"}
"""Where a share cuts through the blocks of a right factor that is full."""


@pytest.mark.filterwarnings("ignore:.*multiplied out:veneer.core.PeftWarning")
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("method", FUSED_METHODS)
def test_fused_layers_split_exactly(method, name, flux, tmp_path):
    x, theirs = fused_file(method, name, tmp_path / "file.safetensors")
    report = load_adapter(flux, tmp_path / "file.safetensors")
    assert any("multiplied out" in note for note in report.notes) == (method in DENSE and "linear1" in name)
    torch.testing.assert_close(outputs(name, x), theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "full"])
def test_split_layers_are_fused_again(method, name, dialect, flux, tmp_path):
    x, theirs = fused_file(method, name, tmp_path / "file.safetensors")
    write(
        tmp_path / "again.safetensors", read(tmp_path / "file.safetensors", names_of("flux")), dialect, names_of("flux")
    )
    before, after = (load_file(tmp_path / f"{n}.safetensors") for n in ("file", "again"))
    assert {k.rpartition(".")[2]: t.shape for k, t in before.items()} == {
        k.rpartition(".")[2]: t.shape for k, t in after.items()
    }  # no larger than it was
    load_adapter(flux, tmp_path / "again.safetensors")
    torch.testing.assert_close(outputs(name, x), theirs, atol=5e-5, rtol=1e-4)


def test_parts_of_their_own_fuse_into_one_of_the_summed_rank(flux, tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for path, rank in zip(FUSED[name][::2], (2, 3), strict=True):  # q and v; k is left alone
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, 16, generator=random)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(16, rank, generator=random)
    save_file(tensors, tmp_path / "parts.safetensors")
    x = torch.randn(3, 16, generator=random)
    load_adapter(flux, tmp_path / "parts.safetensors")
    expected = outputs(name, x)
    detach(flux)
    write(
        tmp_path / "fused.safetensors",
        read(tmp_path / "parts.safetensors", names_of("flux")),
        "kohya",
        names_of("flux"),
    )
    assert load_file(tmp_path / "fused.safetensors")[f"{name}.lora_down.weight"].shape == (5, 16)
    load_adapter(flux, tmp_path / "fused.safetensors")
    torch.testing.assert_close(outputs(name, x), expected, atol=1e-5, rtol=1e-4)


def test_a_kronecker_product_of_a_part_is_none_of_the_whole(tmp_path):
    path = FUSED["lora_unet_double_blocks_0_img_attn_qkv"][0]
    save_file(
        {f"transformer.{path}.lokr_w1": torch.ones(4, 4), f"transformer.{path}.lokr_w2": torch.ones(4, 4)},
        tmp_path / "file.safetensors",
    )
    adapter = read(tmp_path / "file.safetensors", names_of("flux"))
    with pytest.raises(ValueError, match=r"img_attn_qkv: in this dialect it is one layer, and lokr .*--method lora"):
        write(tmp_path / "out.safetensors", adapter, "kohya", names_of("flux"))


def test_the_last_modulation_swaps_shift_and_scale(flux, tmp_path):
    """Black Forest Labs' adaLN has shift before scale, diffusers' norm_out scale before shift."""
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=random), torch.randn(32, 2, generator=random)
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "file.safetensors")
    before = denoiser_of("flux").norm_out.linear.weight.clone()
    load_adapter(flux, tmp_path / "file.safetensors")
    delta = denoiser_of("flux").norm_out.linear.get_delta_weight("default")
    torch.testing.assert_close(delta, torch.cat([up[16:], up[:16]]) @ down)
    assert torch.equal(denoiser_of("flux").norm_out.linear.weight, before)


# ---------------------------------------------------------------- text encoders, on a real pipeline

TE = "text_model.encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.0.mlp.fc1.lora.{}.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight",
    ],
)
def test_both_forms_of_clip_are_found(key, tmp_path):
    pipe = load_pipeline("embedded")
    layer = pipe.text_encoder.get_submodule(clip_path(TE, nested=hasattr(pipe.text_encoder, "text_model")))
    random = torch.Generator().manual_seed(0)
    down = torch.randn(2, layer.in_features, generator=random)
    up = torch.randn(layer.out_features, 2, generator=random)
    save_file({key.format("down"): down, key.format("up"): up}, tmp_path / "file.safetensors")
    load_adapter(pipe, tmp_path / "file.safetensors")
    adapted = pipe.text_encoder.get_submodule(clip_path(TE, nested=hasattr(pipe.text_encoder, "text_model")))
    torch.testing.assert_close(adapted.get_delta_weight("default"), up @ down)


def test_diffusers_reads_our_kohya_files(tmp_path):
    """The UNet and the text encoder of one file, through `load_lora_weights`."""
    pipe = load_pipeline("embedded")
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for component, ends in (
        ("unet", ("to_q", "to_k", "to_v", "to_out.0")),
        ("text_encoder", ("q_proj", "k_proj", "v_proj", "out_proj")),
    ):
        for path, module in getattr(pipe, component).named_modules():
            if path.endswith(ends) and isinstance(module, nn.Linear):
                prefix = f"{component}.{clip_path(path, nested=True)}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(2, module.in_features, generator=random) * 0.1
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=random) * 0.1
    save_file(tensors, tmp_path / "file.safetensors")
    names = Names.of_pipeline(pipe)
    write(tmp_path / "kohya.safetensors", read(tmp_path / "file.safetensors", names), "kohya", names)
    theirs = copy.deepcopy(pipe)
    theirs.load_lora_weights(str(tmp_path / "kohya.safetensors"))
    load_adapter(pipe, tmp_path / "kohya.safetensors")
    tokens = torch.arange(pipe.tokenizer.model_max_length)[None] % 50
    with torch.no_grad():
        ours_text, their_text = (p.text_encoder(tokens)[0] for p in (pipe, theirs))
        torch.testing.assert_close(ours_text, their_text, atol=1e-4, rtol=1e-4)
        x = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=random)
        ours, other = (p.unet(x, 5, encoder_hidden_states=ours_text).sample for p in (pipe, theirs))
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)
