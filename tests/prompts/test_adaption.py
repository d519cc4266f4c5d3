"""Adaption prompts: PEFT's numbers and files, and what they promise beside other adapters."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
import veneer
from safetensors.torch import load_file
from veneer.core.tuners.adaption_prompt import AttentionLayer

from .conftest import CAUSAL, batch, make

each_model = pytest.mark.parametrize("model", CAUSAL)
OPTIONS = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def _pefts_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


def config(library: Any, **changes: Any) -> Any:
    return library.AdaptionPromptConfig(**OPTIONS | changes)


def prompts(model: Any) -> dict[str, torch.nn.Parameter]:
    """The running ones by PEFT's names, without an adapter's."""
    named = model.named_parameters()
    return {
        n.replace(".adapters.default", ""): p
        for n, p in named
        if "adaption_" in n and p.requires_grad and (".adapters." not in n or ".adapters.default." in n)
    }


def stir(model: Any, seed: int = 3) -> Any:
    """Gates that are open: at their start of 0 nothing shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def ours(model: str, **changes: Any) -> Any:
    return stir(veneer.get_peft_model(make(model), config(veneer, **changes)))


def theirs(model: str, **changes: Any) -> Any:
    return stir(peft.get_peft_model(make(model), config(peft, **changes)))


def logits(model: Any, name: str = "llama", **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(name), **options).logits


@each_model
@pytest.mark.parametrize("layers", [1, 2])
def test_numbers_and_gradients_are_pefts(model, layers):
    mine, reference = ours(model, adapter_layers=layers), theirs(model, adapter_layers=layers)
    assert len(prompts(mine)) == 2 * layers
    assert prompts(mine).keys() == prompts(reference).keys()
    inputs = batch(model)
    inputs["attention_mask"][0, :2] = 0
    y, expected = mine(**inputs), reference(**inputs)
    torch.testing.assert_close(y.logits, expected.logits)
    assert not torch.allclose(y.logits, make(model)(**inputs).logits, atol=1e-2)
    y.loss.backward()
    expected.loss.backward()
    for name, parameter in prompts(reference).items():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(prompts(mine)[name].grad, parameter.grad)
    assert all("adaption_" in n for n, p in mine.named_parameters() if p.requires_grad)


@each_model
def test_a_new_one_changes_nothing(model):
    tuned = veneer.get_peft_model(make(model), config(veneer)).eval()
    assert torch.equal(logits(tuned), logits(make(model)))
    assert tuned.peft_config["default"].is_adaption_prompt
    assert not tuned.peft_config["default"].is_prompt_learning


@each_model
def test_generation_is_pefts_and_needs_no_cache(model):
    mine, reference = ours(model), theirs(model)
    inputs = {k: v for k, v in batch(model).items() if k != "labels"}
    inputs["attention_mask"][0, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    y = mine.generate(**inputs, **options)
    assert torch.equal(y, reference.generate(**inputs, **options))
    assert torch.equal(y, mine.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(y, make(model).generate(**inputs, **options))


@each_model
def test_files_both_ways(model, tmp_path):
    mine, reference = ours(model), theirs(model)
    mine.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    written, known = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("ours", "theirs"))
    assert {k: written[k] for k in known} == known
    back = peft.PeftModel.from_pretrained(make(model), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), logits(mine))
    again = veneer.PeftModel.from_pretrained(make(model), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(reference))
    assert not any(p.requires_grad for p in again.parameters())
    mine.load_adapter(tmp_path / "theirs", "second")
    mine.set_adapter("second")
    torch.testing.assert_close(logits(mine), logits(reference))


@each_model
def test_several_switch_add_up_and_leave_no_trace(model):
    base = make(model)
    modules = [type(m) for m in base.modules()]
    tuned = stir(veneer.get_peft_model(base, config(veneer)))
    plain, first = logits(make(model)), logits(tuned)
    tuned.add_adapter("other", config(veneer, adapter_len=2, adapter_layers=2))
    assert torch.equal(logits(tuned), first)
    tuned.set_requires_grad("other")
    tuned.set_adapter("other")
    second = logits(stir(tuned, seed=4))
    assert not torch.allclose(first, second)
    tuned.set_adapter(["default", "other"])
    both = logits(tuned)
    assert not any(torch.allclose(both, y) for y in (plain, first, second))
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    tuned.base_model.set_weight("other", 0.0)
    torch.testing.assert_close(logits(tuned), first)
    tuned.delete_adapter("default")
    tuned.base_model.set_weight("other", 1.0)
    torch.testing.assert_close(logits(tuned), second)
    tuned.delete_adapter("other")
    assert torch.equal(logits(tuned), plain)
    assert [type(m) for m in tuned.unload().modules()] == modules


@each_model
def test_every_row_its_own(model):
    tuned = ours(model)
    tuned.add_adapter("other", config(veneer, adapter_layers=2))
    target = "c_attn" if model == "gpt2" else "k_proj"
    tuned.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    tuned.set_adapter("other")
    alone = {"__base__": logits(make(model)), "lora": None, "default": None}
    for name in ("lora", "default"):
        tuned.set_adapter(name)
        alone[name] = logits(tuned)
    names = ["default", "__base__", "lora"]
    mixed = logits(tuned, adapter_names=names)
    torch.testing.assert_close(mixed, torch.stack([alone[n][i] for i, n in enumerate(names)]), atol=1e-5, rtol=1e-4)
    inputs = {k: v for k, v in batch(model).items() if k != "labels"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    tuned.set_adapter("default")
    beams = tuned.generate(**inputs, **options)
    assert torch.equal(tuned.generate(**inputs, adapter_names=names, **options)[0], beams[0])


@each_model
def test_beside_a_lora_and_never_merged(model):
    tuned = ours(model)
    target = "c_attn" if model == "gpt2" else "v_proj"
    tuned.add_adapter("lora", veneer.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    alone = logits(tuned)
    tuned.set_adapter(["default", "lora"])
    together = logits(tuned)
    assert not torch.allclose(alone, together)
    for merge in (tuned.merge_adapter, tuned.merge_and_unload):
        with pytest.raises(veneer.NotMergeableError, match="further tokens"):
            merge()
        assert torch.equal(logits(tuned), together)
    with pytest.raises(ValueError, match="further tokens"):
        tuned.add_weighted_adapter(["default", "lora"], [1.0, 1.0], "sum", "linear")


def test_half_precision_keeps_the_prompt_in_float32():
    tuned = veneer.get_peft_model(make("llama").bfloat16(), config(veneer))
    assert {p.dtype for p in prompts(tuned).values()} == {torch.float32}
    output = stir(tuned)(**batch("llama"))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    torch.testing.assert_close(output.logits.float(), logits(ours("llama")), atol=0.15, rtol=0.1)


def test_what_does_not_fit_is_refused_by_name():
    for changes, message in (
        ({"adapter_len": None}, "adapter_len=None"),
        ({"adapter_layers": 0}, "adapter_layers=0"),
        ({"adapter_layers": 3}, "the model has 2 modules 'self_attn'"),
        ({"target_modules": "mlp"}, "mlp has no q_proj"),
        ({"target_modules": ["self_attn"]}, "take one name"),
    ):
        base = make("llama")
        with pytest.raises(ValueError, match=message):
            veneer.get_peft_model(base, config(veneer, **changes))
        assert not any(isinstance(m, AttentionLayer) for m in base.modules())
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'bert'"):
        veneer.get_peft_model(make("bert-features"), config(veneer, task_type="FEATURE_EXTRACTION"))
    whole = veneer.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["self_attn"])
    tuned = veneer.get_peft_model(make("llama"), whole)
    with pytest.raises(ValueError, match="modules_to_save"):
        tuned.add_adapter("prompt", config(veneer))
    tuned = ours("llama")
    tuned.add_adapter("whole", whole)
    tuned.set_adapter(["default", "whole"])
    torch.testing.assert_close(logits(tuned), logits(ours("llama")))  # the copy is still equal
    with pytest.raises(ValueError, match="mixed batch"):
        logits(tuned, adapter_names=["default", "whole", "__base__"], use_cache=False)
