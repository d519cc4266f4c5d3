"""Adapters on models of which parts wait in memory or on disk (accelerate's `device_map`)."""

from __future__ import annotations

import pytest
import torch
import veneer
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from veneer.core.sites import find

from .test_kbit import TOKENS, llama

TARGETS = ["q_proj", "down_proj"]


def offloaded(where: str, folder) -> nn.Module:
    model = llama().eval()
    if where == "all on disk":
        return disk_offload(model, str(folder), execution_device="cpu")
    if where == "all in memory":
        return cpu_offload(model, "cpu")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WHERE = pytest.mark.parametrize("where", ["all on disk", "all in memory", "layer by layer"])
CONFIGS = {
    "lora": veneer.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "dora": veneer.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "oft": veneer.OFTConfig(oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "head": veneer.LoraConfig(
        r=2, target_modules=TARGETS, init_lora_weights=False, modules_to_save=["lm_head", "norm"]
    ),
}


@WHERE
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_load_run_merge_and_unmerge(where, name, tmp_path):
    reference = veneer.get_peft_model(llama().eval(), CONFIGS[name])
    for parameter in reference.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.data += 0.1
    reference.save_pretrained(tmp_path / "adapter")
    base = offloaded(where, tmp_path / "weights")
    bare = base(TOKENS).logits
    model = veneer.PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = reference(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, bare)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert model.base_model.layers["model.layers.0.self_attn.q_proj"].base_layer.weight.is_meta
    model.unmerge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, bare)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_stay_on_devices_may_be_dispatched_after_the_adapters(name):
    model = veneer.get_peft_model(llama().eval(), CONFIGS[name]).eval()
    expected = model(TOKENS).logits
    places = {"model": "cpu", "lm_head": "cpu"}
    base = dispatch_model(model.get_base_model(), places, main_device="cpu", force_hooks=True)
    assert hasattr(base.lm_head, "_hf_hook") or hasattr(base.model, "_hf_hook")
    assert torch.equal(model(TOKENS).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(TOKENS).logits, expected)


def test_adapters_on_offloaded_layers_are_trained(tmp_path):
    model = veneer.get_peft_model(offloaded("layer by layer", tmp_path), CONFIGS["lora"])
    reference = veneer.get_peft_model(llama(), CONFIGS["lora"])
    reference.base_model.assign("default", model.base_model.tensors("default"))
    for each in (model, reference):
        each(TOKENS, labels=TOKENS).loss.backward()
    for got, want in zip(
        model.base_model.parameters_of("default"), reference.base_model.parameters_of("default"), strict=True
    ):
        torch.testing.assert_close(got.grad, want.grad)


def test_a_quantized_weight_that_is_elsewhere_cannot_be_read():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    site = find(type(layer))(layer)
    layer.weight = nn.Parameter(torch.empty(64, 64, dtype=torch.int8, device="meta"), requires_grad=False)
    layer.weight.SCB = None
    with pytest.raises(NotImplementedError, match="keep these layers on a device"):
        site.read()
