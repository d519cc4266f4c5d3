"""Every method and option against `peft`, files both ways, and against the papers' formulas in float64."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from math import prod, sqrt
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import transformers
import veneer
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .conftest import KINDS, Net


class Layers(nn.Module):
    """One layer of every kind that adapters know, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 12)
        self.transposed = Conv1D(12, 12)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 4, 1)
        self.conv3 = nn.Conv3d(4, 6, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens, x1, x2, x3):
        text = self.head(self.transposed(self.linear(self.embed(tokens))))
        return text, self.conv1(x1), self.point(self.conv2(x2)), self.conv3(x3)


def layers(seed: int = 0) -> Layers:
    torch.manual_seed(seed)
    return Layers().eval()


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    shapes = (2, 4, 9), (2, 4, 8, 8), (2, 4, 5, 5, 5)
    return torch.randint(0, 10, (2, 5)), *(torch.randn(s, dtype=dtype) for s in shapes)


DENSE = ["linear", "transposed"]
CONVS = ["conv1", "conv2", "point", "conv3"]
EVERY = ["embed", *DENSE, *CONVS]
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
LYCORIS = {"r": 1, "alpha": 6, "init_weights": False}
TOKENS_3 = {"token_indices": [4, 0, 7], "init_weights": False}
VERA = {"r": 3, "projection_prng_key": 3, "init_weights": False}
ADALORA = {"init_r": 4, "lora_alpha": 6, "target_r": 2, "total_step": 10, "init_lora_weights": False}
OFT = {"oft_block_size": 2, "init_weights": False}

CASES = {
    "lora": ("LoraConfig", LORA | {"target_modules": EVERY}),
    "lora gaussian": ("LoraConfig", LORA | {"target_modules": EVERY, "init_lora_weights": "gaussian"}),
    "lora regex": ("LoraConfig", LORA | {"target_modules": r"conv\d|lin.*"}),
    "lora rslora": ("LoraConfig", LORA | {"target_modules": EVERY, "use_rslora": True}),
    "lora lora_bias": ("LoraConfig", LORA | {"target_modules": [*DENSE, "conv2"], "lora_bias": True}),
    "lora bias=all": ("LoraConfig", LORA | {"target_modules": ["linear", "conv2"], "bias": "all"}),
    "lora bias=lora_only": ("LoraConfig", LORA | {"target_modules": ["linear", "conv2"], "bias": "lora_only"}),
    "lora patterns": (
        "LoraConfig",
        LORA
        | {"target_modules": EVERY, "rank_pattern": {"linear": 2, "^conv.": 3}, "alpha_pattern": {"conv2|embed": 1}},
    ),
    "lora modules_to_save": ("LoraConfig", LORA | {"target_modules": ["linear"], "modules_to_save": ["head", "conv2"]}),
    "dora": ("LoraConfig", LORA | {"target_modules": EVERY, "use_dora": True}),
    "dora rslora": ("LoraConfig", LORA | {"target_modules": DENSE, "use_dora": True, "use_rslora": True}),
    "loha": ("LoHaConfig", LYCORIS | {"target_modules": ["linear", "conv1", "conv2", "point"], "r": 2}),
    "loha effective": (
        "LoHaConfig",
        LYCORIS | {"target_modules": ["linear", "conv1", "conv2", "point"], "r": 2, "use_effective_conv2d": True},
    ),
    "loha patterns": (
        "LoHaConfig",
        LYCORIS | {"target_modules": ["linear", "conv2"], "rank_pattern": {"linear": 3}, "alpha_pattern": {"conv2": 2}},
    ),
    "lokr": ("LoKrConfig", LYCORIS | {"target_modules": ["linear", "conv1", "conv2", "point"]}),
    "lokr decompose_both": ("LoKrConfig", LYCORIS | {"target_modules": ["linear", "conv2"], "decompose_both": True}),
    "lokr factor": ("LoKrConfig", LYCORIS | {"target_modules": ["linear", "conv2", "point"], "decompose_factor": 2}),
    "lokr full": ("LoKrConfig", LYCORIS | {"target_modules": ["linear", "conv2", "point"], "r": 8}),
    "lokr effective": (
        "LoKrConfig",
        LYCORIS | {"target_modules": ["linear", "point"], "use_effective_conv2d": True},
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": [*DENSE, "conv2", "conv3"], "feedforward_modules": [], "init_ia3_weights": False},
    ),
    "ia3 both sides": (
        "IA3Config",
        {
            "target_modules": [*DENSE, "conv2", "point"],
            "feedforward_modules": ["linear", "conv2"],
            "init_ia3_weights": False,
        },
    ),
    "tokens": ("TrainableTokensConfig", TOKENS_3 | {"target_modules": ["embed"]}),
    "lora tokens": (
        "LoraConfig",
        LORA | {"target_modules": ["linear"], "trainable_token_indices": {"embed": [5, 2]}},
    ),
    "vera": ("VeraConfig", VERA | {"target_modules": DENSE}),
    "vera drawn again": ("VeraConfig", VERA | {"target_modules": DENSE, "save_projection": False}),
    "vera bias=vera_only": ("VeraConfig", VERA | {"target_modules": ["linear", "head"], "bias": "vera_only"}),
    "adalora": ("AdaLoraConfig", ADALORA | {"target_modules": [*DENSE, "conv2", "point"]}),
    "adalora bias=lora_only": ("AdaLoraConfig", ADALORA | {"target_modules": ["linear", "conv2"], "bias": "lora_only"}),
    "oft": ("OFTConfig", OFT | {"target_modules": ["embed", "linear", "point"]}),
    "oft r": ("OFTConfig", OFT | {"target_modules": ["linear", "point"], "r": 2, "oft_block_size": 0}),
    "oft exact Cayley": ("OFTConfig", OFT | {"target_modules": ["linear", "point"], "use_cayley_neumann": False}),
    "oft three terms": ("OFTConfig", OFT | {"target_modules": ["linear", "point"], "num_cayley_neumann_terms": 3}),
    "oft coft": ("OFTConfig", OFT | {"target_modules": ["linear", "point"], "coft": True, "eps": 0.1}),
    "oft block_share": ("OFTConfig", OFT | {"target_modules": ["linear", "point"], "block_share": True}),
    "oft bias=oft_only": ("OFTConfig", OFT | {"target_modules": ["linear"], "bias": "oft_only"}),
}


def changed(model: nn.Module) -> nn.Module:
    """The model with every trainable tensor moved, as training would: biases, magnitudes and copies too."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much, while a warning of ours is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@quiet()
def adapt_theirs(base: nn.Module, kind: str, options: dict) -> nn.Module:
    return peft.get_peft_model(base, getattr(peft, kind)(**options))


def adapt_ours(base: nn.Module, kind: str, options: dict) -> veneer.PeftModel:
    return veneer.get_peft_model(base, getattr(veneer, kind)(**options))


@quiet()
def read_theirs(base: nn.Module, directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, directory).eval()


@quiet()
def save_theirs(model: nn.Module, directory: Path) -> None:
    model.save_pretrained(directory)


def outputs(model: nn.Module, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return list(found) if isinstance(found, tuple) else [found[0]]


def assert_same_outputs(one: nn.Module, two: nn.Module, inputs) -> None:
    for a, b in zip(outputs(one, inputs), outputs(two, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def fields(directory) -> dict:
    """What `adapter_config.json` says about the adapter; lists of names have no order.

    PEFT turns `fan_in_fan_out` on when it meets a transposed layer, and on reading does so again if need be.
    """
    values = json.loads((directory / "adapter_config.json").read_text())
    values.pop("fan_in_fan_out", None)
    unordered = ("target_modules", "exclude_modules", "feedforward_modules")
    return {k: sorted(v) if k in unordered and isinstance(v, list) else v for k, v in values.items()}


def assert_same_files(theirs, ours) -> None:
    """The same keys and shapes; the same fields, and those of PEFT that ours leaves out have PEFT's default."""
    a, b = (load_file(d / "adapter_model.safetensors") for d in (theirs, ours))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    expected, found = fields(theirs), fields(ours)
    assert found == {key: expected[key] for key in found}
    needed = {"total_step": expected["total_step"]} if "total_step" in expected else {}
    defaults = vars(peft.PEFT_TYPE_TO_CONFIG_MAPPING[expected["peft_type"]](**needed))
    left_out = expected.keys() - found.keys()
    assert all(expected[key] == defaults[key] for key in left_out), left_out


def exchange(base: nn.Module, kind: str, options: dict, inputs, directory) -> None:
    """Files of each side give equal outputs on the other, and are equal in form."""
    theirs = changed(adapt_theirs(deepcopy(base), kind, options))
    save_theirs(theirs, directory / "theirs")
    read_by_us = veneer.PeftModel.from_pretrained(deepcopy(base), directory / "theirs")
    assert_same_outputs(theirs, read_by_us, inputs)
    before, after = outputs(base, inputs), outputs(read_by_us, inputs)
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))

    ours = changed(adapt_ours(deepcopy(base), kind, options))
    ours.save_pretrained(directory / "ours")
    read_by_them = read_theirs(deepcopy(base), directory / "ours")
    assert_same_outputs(ours, read_by_them, inputs)
    assert_same_files(directory / "theirs", directory / "ours")


@pytest.mark.parametrize("name", CASES)
def test_files_go_both_ways(name, tmp_path):
    exchange(layers(), *CASES[name], batch(), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_what_is_trainable_is_the_same(name):
    theirs, ours = adapt_theirs(layers(), *CASES[name]), adapt_ours(layers(), *CASES[name])
    constants = sum("ranknum" in key for key, _ in theirs.named_parameters())
    trained, every = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (trained, every - constants)


UNLIKE_GRADIENTS = {"loha effective": "PEFT's own backward of Tucker products fails gradcheck"}


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNLIKE_GRADIENTS])
def test_gradients_are_the_same(name, tmp_path):
    theirs = changed(adapt_theirs(layers(), *CASES[name]))
    save_theirs(theirs, tmp_path)
    ours = veneer.PeftModel.from_pretrained(layers(), tmp_path, is_trainable=True).eval()
    for model in (theirs, ours):
        sum(y.square().sum() for y in model(*batch())).backward()
    norms = [sorted(p.grad.norm().item() for p in m.parameters() if p.grad is not None) for m in (theirs, ours)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-5)


def test_gradients_of_tucker_products():
    config = veneer.LoHaConfig(r=2, target_modules=["conv2"], use_effective_conv2d=True, init_weights=False)
    model = veneer.get_peft_model(layers().double(), config)
    adapter = model.base_model.layers["conv2"].adapters["default"]
    assert torch.autograd.gradcheck(lambda *_: adapter.delta(), tuple(adapter.parameters()))


def test_loras_on_grouped_convolutions_are_not_exchanged(tmp_path):
    """PEFT's A sees the channels of all groups, which no grouped weight expresses: refused rather than misread."""
    options = LORA | {"target_modules": ["layer"]}
    save_theirs(adapt_theirs(Net("conv2d-groups"), "LoraConfig", options), tmp_path)
    with pytest.raises(ValueError, match=r"layer\.lora_A\.weight has shape \(4, 4, 3, 3\), expected \(4, 2, 3, 3\)"):
        veneer.PeftModel.from_pretrained(Net("conv2d-groups"), tmp_path)


# ---------------------------------------------------------------- real models

TOKENS = torch.tensor([[1, 5, 9, 3, 2], [4, 4, 7, 8, 6]])


def llama():
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


def bert():
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": TOKENS}


def gpt2():
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def t5():
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 12)}
    return model, inputs


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
REAL = [
    (llama, "LoraConfig", LORA | {"task_type": "CAUSAL_LM"}),
    (llama, "LoraConfig", LORA | {"target_modules": "all-linear"}),
    (
        llama,
        "LoraConfig",
        LORA | {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    (llama, "LoraConfig", LORA | {"target_modules": ["down_proj"], "modules_to_save": ["lm_head"], "use_dora": True}),
    (llama, "LoHaConfig", LYCORIS | {"target_modules": ["q_proj", "up_proj"]}),
    (llama, "LoKrConfig", LYCORIS | {"target_modules": "all-linear"}),
    (llama, "IA3Config", {"init_ia3_weights": False, "task_type": "CAUSAL_LM"}),
    (llama, "OFTConfig", OFT | {"target_modules": ["q_proj", "v_proj"]}),
    (llama, "VeraConfig", VERA | {"target_modules": "all-linear"}),
    (gpt2, "VeraConfig", VERA | {"task_type": "CAUSAL_LM", "d_initial": 0.2}),
    (llama, "LNTuningConfig", {"task_type": "CAUSAL_LM"}),
    (bert, "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    (gpt2, "LNTuningConfig", {"task_type": "CAUSAL_LM"}),
    (t5, "LNTuningConfig", {"task_type": "SEQ_2_SEQ_LM"}),
    (llama, "TrainableTokensConfig", {"token_indices": [9, 4], "task_type": "CAUSAL_LM"}),
    (gpt2, "TrainableTokensConfig", {"token_indices": [9, 4], "task_type": "CAUSAL_LM"}),
    (llama, "LoraConfig", LORA | {"task_type": "CAUSAL_LM", "trainable_token_indices": [4, 9]}),
    (gpt2, "LoraConfig", LORA | {"task_type": "CAUSAL_LM", "trainable_token_indices": {"wte": [5], "wpe": [1, 3]}}),
    (t5, "LoraConfig", LORA | {"task_type": "SEQ_2_SEQ_LM", "trainable_token_indices": [5, 1]}),
    (llama, "AdaLoraConfig", ADALORA | {"task_type": "CAUSAL_LM"}),
    (bert, "LoraConfig", LORA | {"task_type": "SEQ_CLS"}),
    (
        bert,
        "LoKrConfig",
        LYCORIS | {"task_type": "SEQ_CLS", "target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    ),
    (bert, "IA3Config", {"init_ia3_weights": False, "task_type": "SEQ_CLS"}),
    (gpt2, "LoraConfig", LORA | {"task_type": "CAUSAL_LM"}),
    (gpt2, "LoraConfig", LORA | {"target_modules": ["c_attn", "c_proj", "wpe"], "use_dora": True}),
    (gpt2, "IA3Config", {"init_ia3_weights": False, "task_type": "CAUSAL_LM"}),
    (t5, "LoraConfig", LORA | {"task_type": "SEQ_2_SEQ_LM"}),
    (t5, "IA3Config", {"init_ia3_weights": False, "task_type": "SEQ_2_SEQ_LM"}),
    (unet, "LoraConfig", LORA | {"target_modules": [*ATTENTION, "conv1", "proj_in"]}),
    (unet, "LoraConfig", LORA | {"target_modules": [*ATTENTION, "conv2"], "use_dora": True}),
    (unet, "LoHaConfig", LYCORIS | {"target_modules": [*ATTENTION, "conv1"], "use_effective_conv2d": True}),
    (unet, "LoKrConfig", LYCORIS | {"target_modules": [*ATTENTION, "conv1"], "use_effective_conv2d": True}),
]


@pytest.mark.parametrize(("make", "kind", "options"), REAL, ids=lambda v: getattr(v, "__name__", v) if v else None)
def test_files_of_real_models_go_both_ways(make, kind, options, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    exchange(model.eval(), kind, options, inputs, tmp_path)


def test_embeddings_that_peft_saves_along_are_read(tmp_path):
    """PEFT adds the base's embedding to the file of an adapter that targets it: its model may have been changed."""
    torch.manual_seed(0)
    base, inputs = llama()
    changed_base = deepcopy(base)
    with torch.no_grad():
        changed_base.model.embed_tokens.weight.mul_(2)
    theirs = changed(adapt_theirs(changed_base, "LoraConfig", LORA | {"target_modules": ["embed_tokens", "q_proj"]}))
    save_theirs(theirs, tmp_path)
    assert any("embed_tokens.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = veneer.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    assert_same_outputs(theirs, ours, inputs)


# ---------------------------------------------------------------- the papers' formulas, in float64


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight as (out, cols)."""
    transposed = isinstance(layer, (nn.Embedding, Conv1D))
    return layer.weight.detach().T if transposed else layer.weight.detach().flatten(1)


def product(core, a, b):
    """Tucker product of core (r, r, *k) with a (r, out) and b (r, in), as (out, in * k)."""
    return torch.einsum("ijk,ip,jq->pqk", core.flatten(2), a, b).flatten(1)


def lora(t, w, o):
    scale = o["lora_alpha"] / (sqrt(o["r"]) if o.get("use_rslora") else o["r"])
    b, a = (t.get(f"lora_{x}.weight", t.get(f"lora_embedding_{x}")).flatten(1) for x in "BA")
    return w + scale * b @ a


def loha(t, w, o):
    b1, a1, b2, a2 = (t[f"hada_{k}"] for k in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "hada_t1" in t:
        return w + o["alpha"] / o["r"] * product(t["hada_t1"], b1, a1) * product(t["hada_t2"], b2, a2)
    return w + o["alpha"] / o["r"] * (b1 @ a1) * (b2 @ a2)


def lokr(t, w, o):
    c = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]  # (a, c)
    if "lokr_w2" in t:
        d = t["lokr_w2"]
    elif "lokr_t2" in t:
        d = product(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        d = t["lokr_w2_a"] @ t["lokr_w2_b"]
    out, taps = w.shape[0] // c.shape[0], o.get("taps", 1)
    d = d.reshape(out, -1, taps)  # (b, d, taps)
    return w + o["alpha"] / o["r"] * torch.einsum("ac,bdk->abcdk", c, d).reshape(w.shape)


def ia3(t, w, o):
    return t["ia3_l"].flatten()[:, None] * w


def ia3_input(t, w, o):
    taps = o.get("taps", 1)
    return w * t["ia3_l"].flatten().repeat_interleave(taps)


def oft(t, w, o):
    angles = t.get("oft_R.weight", t.get("oft_embedding_R.weight"))
    blocks, size = angles.shape[0], o["oft_block_size"]
    q = torch.zeros(blocks, size, size, dtype=w.dtype)
    q[:, *torch.triu_indices(size, size, 1)] = angles
    q = q - q.mT
    if o.get("coft"):
        q = q * (o["eps"] / sqrt(blocks) / q.norm(dim=(1, 2), keepdim=True)).clamp(max=1)
    eye = torch.eye(size, dtype=w.dtype)
    rotation = torch.block_diag(*(eye - q) @ torch.linalg.inv(eye + q))
    if "oft_embedding_R.weight" in t:
        return rotation.T @ w
    return w @ torch.block_diag(*[rotation] * (w.shape[1] // len(rotation))).T


def dora(direction):
    def formula(t, w, o):
        v = direction(t, w, o)
        return t["lora_magnitude_vector"].flatten()[:, None] * v / v.norm(dim=1, keepdim=True)

    return formula


LAYERS = ["linear", "gpt2", "conv1d", "conv2d", "conv2d-1x1", "conv3d", "embedding"]
NO_LOOKUP = LAYERS[:-1]
L, Y = {"r": 2, "lora_alpha": 5}, {"r": 1, "alpha": 3}
TUCKER, BOTH, DORA = {"use_effective_conv2d": True}, {"decompose_both": True}, {"use_dora": True}
EXACT = {"oft_block_size": 2, "use_cayley_neumann": False}
FORMULAS = {
    "lora": (lora, "LoraConfig", L, [*LAYERS, "conv2d-groups"]),
    "lora rslora": (lora, "LoraConfig", L | {"use_rslora": True}, LAYERS),
    "dora": (dora(lora), "LoraConfig", L | DORA, [*LAYERS, "conv2d-groups"]),
    "loha": (loha, "LoHaConfig", Y, LAYERS),
    "loha effective": (loha, "LoHaConfig", Y | TUCKER, NO_LOOKUP),
    "loha dora": (dora(loha), "LoHaConfig", Y | DORA, LAYERS),
    "lokr": (lokr, "LoKrConfig", Y, LAYERS),
    "lokr full": (lokr, "LoKrConfig", Y | {"r": 8}, LAYERS),
    "lokr decompose_both": (lokr, "LoKrConfig", Y | BOTH, LAYERS),
    "lokr effective": (lokr, "LoKrConfig", Y | TUCKER, NO_LOOKUP),
    "lokr effective, both": (lokr, "LoKrConfig", Y | TUCKER | BOTH, NO_LOOKUP),
    "lokr factor": (lokr, "LoKrConfig", Y | {"decompose_factor": 2}, LAYERS),
    "lokr dora": (dora(lokr), "LoKrConfig", Y | DORA, LAYERS),
    "ia3": (ia3, "IA3Config", {"feedforward_modules": []}, LAYERS),
    "ia3 input": (ia3_input, "IA3Config", {"feedforward_modules": ["layer"]}, NO_LOOKUP),
    "oft": (oft, "OFTConfig", EXACT, LAYERS),
    "oft shared": (oft, "OFTConfig", EXACT | {"block_share": True}, NO_LOOKUP),
    "oft coft": (oft, "OFTConfig", EXACT | {"coft": True, "eps": 0.2}, NO_LOOKUP),
}


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, (*_, kinds) in FORMULAS.items() for layer in kinds]
)
def test_weight_is_the_papers_formula(name, layer):
    """Covers what PEFT gets wrong: LoKr with a Tucker core (it crashes at some shapes), full LoKr on Conv1d (it
    scrambles), OFT on kernels above 1x1 (its forward is not its merge), and LoRA on dilated convolutions."""
    formula, kind, options, _ = FORMULAS[name]
    torch.manual_seed(0)
    base = Net(layer).double().eval()
    x = KINDS[layer].sample()
    x = x.double() if x.is_floating_point() else x
    model = changed(adapt_ours(base, kind, {"target_modules": ["layer"]} | options))
    tensors = {k.removeprefix("layer."): v.clone() for k, v in model.base_model.tensors("default").items()}
    taps = prod(getattr(base.layer, "kernel_size", ()))
    expected = formula(tensors, matrix(base.layer.base_layer), options | {"taps": taps})
    y = model(x)
    assert not torch.allclose(y, base.layer.base_layer(x))
    merged = model.merge_and_unload()
    torch.testing.assert_close(matrix(merged.layer), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(y, merged(x), atol=1e-12, rtol=1e-12)


def test_lora_bias_is_scaled_like_the_delta():
    base = Net("linear").double()
    config = veneer.LoraConfig(**L, target_modules=["layer"], lora_bias=True, init_lora_weights=False)
    model = veneer.get_peft_model(base, config)
    bias, extra = base.layer.base_layer.bias.detach().clone(), model.base_model.tensors("default")["layer.lora_B.bias"]
    torch.testing.assert_close(model.merge_and_unload().layer.bias.detach(), bias + 5 / 2 * extra)


def test_neumann_series_tends_to_the_cayley_transform():
    """The series turns in the opposite sense of the exact solve, as PEFT's files have it: Q and -Q."""
    model = veneer.get_peft_model(
        Net("linear").double(),
        veneer.OFTConfig(target_modules=["layer"], oft_block_size=4, num_cayley_neumann_terms=12),
    )
    changed(model)
    (angles,) = model.base_model.tensors("default").values()
    weight = matrix(model.base_model.model.layer.base_layer)
    expected = oft({"oft_R.weight": -angles}, weight, {"oft_block_size": 4})
    torch.testing.assert_close(matrix(model.merge_and_unload().layer), expected, atol=1e-7, rtol=1e-7)
