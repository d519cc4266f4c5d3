"""Readying quantized models for training, against `peft`."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import veneer
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .quantized import bnb

BITS = pytest.mark.parametrize("bits", [4, 8])
TOKENS = torch.arange(14).view(2, 7)


def llama(dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).to(dtype)


def checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@BITS
def test_quantizing_a_loaded_model_is_what_bitsandbytes_does(bits):
    plain = llama()
    model = veneer.quantize_model(copy.deepcopy(plain), bits, threshold=0.0)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    chosen = [m for m in model.modules() if isinstance(m, kind)]
    assert len(chosen) == 14
    assert type(model.lm_head) is nn.Linear
    layer, linear = model.model.layers[1].mlp.up_proj, plain.model.layers[1].mlp.up_proj
    expected = kind(64, 128, bias=False, **({"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}))
    expected.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, expected.to("cpu").weight)
    error = (model(TOKENS).logits - plain(TOKENS).logits).norm() / plain(TOKENS).logits.norm()
    assert 0 < error < (0.3 if bits == 4 else 0.03)


def test_quantizing_names_what_stays():
    model = veneer.quantize_model(llama(), 4, skip_modules=["mlp.up_proj", "lm_head"])
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, bnb.nn.Linear4bit)
    with pytest.raises(ValueError, match="no linear layer"):
        veneer.quantize_model(nn.Sequential(nn.ReLU()))


@BITS
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_it_prepares_as_peft_does(bits, options):
    model = veneer.quantize_model(llama(torch.bfloat16), bits)
    theirs = peft.prepare_model_for_kbit_training(
        copy.deepcopy(model), gradient_checkpointing_kwargs=options or {"use_reentrant": True}
    )
    ours = veneer.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert ours.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in ours.parameters())
    assert checkpoints(ours)
    adapted = veneer.get_peft_model(ours.train(), veneer.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = copy.deepcopy(adapted)
    plain.get_base_model().activation_checkpointing_disable()
    for each in (adapted, plain):
        each(TOKENS, labels=TOKENS).loss.backward()
    for got, want in zip(adapted.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad)
            assert got.grad.any()


def test_checkpointing_is_for_quantized_models_that_have_it():
    assert not checkpoints(veneer.prepare_model_for_kbit_training(llama()))
    bare = nn.Sequential(bnb.nn.Linear4bit(64, 64).to("cpu"))
    with pytest.raises(ValueError, match="use_gradient_checkpointing=False"):
        veneer.prepare_model_for_kbit_training(bare)
    veneer.prepare_model_for_kbit_training(bare, use_gradient_checkpointing=False)
    assert not bare[0].support_avx512bf16_for_cpu


@BITS
def test_dequantizing_first_merges_without_rounding(bits):
    model = veneer.quantize_model(llama(), bits, threshold=0.0).train()
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = adapted(TOKENS).logits
    for path, layer in adapted.base_model.layers.items():
        base, linear = layer.base_layer, nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(layer.site.read()[0])
        layer.base_layer = linear  # as transformers' `dequantize` does
        assert layer.site.module is linear, path
        assert base is not linear
    torch.testing.assert_close(adapted(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    plain = adapted.merge_and_unload()
    torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not [m for m in plain.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def test_a_model_that_transformers_quantized_trains_merges_and_is_dequantized(tmp_path):
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=options, device_map="cpu")
    model = veneer.prepare_model_for_kbit_training(model)
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(use_dora=True, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    before = adapted.eval()(TOKENS).logits
    with pytest.warns(veneer.PeftWarning, match="dequantize the model first"):
        adapted.merge_adapter()
    assert max(r.weight for r in adapted.rounding.values()) < 0.15
    adapted.unmerge_adapter()
    assert torch.equal(adapted(TOKENS).logits, before)
    adapted.get_base_model().dequantize()
    torch.testing.assert_close(adapted.merge_and_unload()(TOKENS).logits, before, atol=1e-3, rtol=1e-2)


# ---------------------------------------------------------------- LoftQ on a quantized base


def saved_and_quantized(folder, **options) -> veneer.PeftModel:
    plain = llama()
    plain.save_pretrained(folder, **options)
    model = veneer.quantize_model(plain, 4)
    return veneer.get_peft_model(model, veneer.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]))


def distance(model: veneer.PeftModel) -> float:
    """Of the adapted weights to those before quantizing."""
    plain = llama()
    total = 0.0
    for path, layer in model.base_model.layers.items():
        weight, _ = layer.adapters["default"].fold(layer.site.read()[0], None)
        total += (weight - plain.get_submodule(path).weight).square().sum().item()
    return total**0.5


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["file", "shards"])
def test_loftq_comes_nearer_to_the_weights_before_quantizing(options, tmp_path):
    model = saved_and_quantized(tmp_path, **options)
    before = distance(model)
    veneer.replace_lora_weights_loftq(model, tmp_path)
    assert distance(model) < 0.85 * before
    path, layer = next(iter(model.base_model.layers.items()))
    residual = llama().get_submodule(path).weight - layer.site.read()[0]
    u, s, v = torch.linalg.svd(residual.detach())
    best = (u[:, :8] * s[:8]) @ v[:8]
    torch.testing.assert_close(layer.get_delta_weight("default"), best, atol=1e-5, rtol=1e-3)


def test_a_callback_decides_layer_by_layer(tmp_path):
    model = saved_and_quantized(tmp_path)
    before = {k: v.clone() for k, v in model.base_model.tensors("default").items()}
    asked = []

    def keep(given, path):
        assert given is model
        asked.append(path)
        return path.endswith("q_proj")

    veneer.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    assert asked == list(model.base_model.layers)
    after = model.base_model.tensors("default")
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]) == ("down_proj" in key), key


def test_loftq_says_what_it_misses(tmp_path):
    model = saved_and_quantized(tmp_path / "model")
    with pytest.raises(veneer.AdapterFileError, match=r"no model\.safetensors"):
        veneer.replace_lora_weights_loftq(model, tmp_path)
    with pytest.raises(ValueError, match="model_path is needed"):
        veneer.replace_lora_weights_loftq(model)
    other = nn.Sequential(nn.Linear(2, 2))
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(veneer.AdapterFileError, match="is it the model that was quantized"):
        veneer.replace_lora_weights_loftq(model, tmp_path)
    plain = veneer.get_peft_model(llama(), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no LoRA on a 4-bit layer"):
        veneer.replace_lora_weights_loftq(plain, tmp_path)
