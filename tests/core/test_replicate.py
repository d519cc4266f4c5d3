"""`layer_replication`: deeper models out of shared layers, as `peft` builds them."""

from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn
from veneer import LoraConfig, PeftModel, get_peft_model

from .conftest import stir
from .test_reference import adapt_theirs, assert_same_files, assert_same_outputs, changed, read_theirs, save_theirs

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
INPUTS = {"input_ids": torch.arange(10).view(2, 5)}
RANGES = [(0, 3), (1, 4)]
OPTIONS = {"r": 2, "init_lora_weights": False, "layer_replication": RANGES}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    make = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, num_key_value_heads=2)),
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=2)),
        "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    }
    return make[kind]().eval()


TARGETS = {"gpt_neox": ["query_key_value"], "bert": ["query"]}


@pytest.mark.parametrize("kind", ["llama", "mistral", "bert"])
def test_files_go_both_ways(kind, tmp_path):
    base = build(kind)
    options = OPTIONS | {"target_modules": TARGETS.get(kind, ["q_proj"])}
    theirs = changed(adapt_theirs(deepcopy(base), "LoraConfig", options))
    save_theirs(theirs, tmp_path / "theirs")
    assert_same_outputs(theirs, PeftModel.from_pretrained(deepcopy(base), tmp_path / "theirs"), INPUTS)
    ours = changed(get_peft_model(deepcopy(base), LoraConfig(**options)))
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(ours, read_theirs(deepcopy(base), tmp_path / "ours"), INPUTS)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_generates_as_a_model_of_that_depth(kind):
    base = build(kind)
    deep = deepcopy(base)
    model = get_peft_model(base, LoraConfig(**OPTIONS | {"target_modules": TARGETS.get(kind, ["q_proj"])}))
    stir(model.base_model, "default")
    found = model.generate(**INPUTS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(**INPUTS, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(found, expected)
    assert model.get_base_model().config.num_hidden_layers == 6
    with model.disable_adapter():
        bare = model(**INPUTS).logits
    at, attribute = (deep.gpt_neox, "layers") if kind == "gpt_neox" else (deep.model, "layers")
    setattr(at, attribute, nn.ModuleList(getattr(at, attribute)[i] for i in (0, 1, 2, 1, 2, 3)))
    deep.config.num_hidden_layers = 6
    deep.config.layer_types = getattr(model.get_base_model().config, "layer_types", None)  # 6, where there are any
    torch.testing.assert_close(bare, deep(**INPUTS, use_cache=False).logits)


def test_base_weights_are_shared_and_adapters_are_not():
    base = build("llama")
    size = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, LoraConfig(**OPTIONS, target_modules=["q_proj"]))
    adapters = sum(p.numel() for p in model.base_model.parameters_of("default"))
    assert sum(p.numel() for p in model.parameters()) == size + adapters
    layers = model.get_base_model().model.layers
    assert layers[1].self_attn.q_proj.weight is layers[3].self_attn.q_proj.weight
    assert len({id(layer.self_attn.q_proj.lora_A["default"].weight) for layer in layers}) == 6
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(6))


@pytest.mark.parametrize("leave", ["unload", "delete_adapter"])
def test_the_model_gets_its_own_layers_back(leave):
    base = build("llama")
    layers, expected = base.model.layers, base(**INPUTS).logits
    model = get_peft_model(base, LoraConfig(**OPTIONS, target_modules=["q_proj"]))
    model.unload() if leave == "unload" else model.delete_adapter("default")
    assert base.model.layers is layers
    assert base.config.num_hidden_layers == 4
    assert torch.equal(base(**INPUTS).logits, expected)


def test_merged_it_stays_deep():
    model = get_peft_model(build("llama"), LoraConfig(**OPTIONS, target_modules=["q_proj"]))
    expected = model(**INPUTS).logits
    plain = model.merge_and_unload()
    assert len(plain.model.layers) == 6
    torch.testing.assert_close(plain(**INPUTS).logits, expected, atol=1e-5, rtol=1e-4)


def test_adapters_of_one_model_need_the_same_layers(tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(**OPTIONS, target_modules=["q_proj"]))
    model.add_adapter("same", LoraConfig(**OPTIONS, target_modules=["v_proj"]))
    for other in (None, [(0, 2)]):
        with pytest.raises(ValueError, match=r"made for \[\[0, 3\], \[1, 4\]\]: all adapters"):
            model.add_adapter("other", LoraConfig(**OPTIONS | {"layer_replication": other}, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default", "same"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: build("llama"), {"layer_replication": [(0, 5)]}, r"\[0, 5\] is no range .* 0 <= start < end <= 4"),
        (lambda: build("llama"), {"target_modules": ["nowhere"]}, "matches no layer"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            {"target_modules": ["0"]},
            "one list of layers, and Sequential has none",
        ),
        (
            lambda: nn.ModuleDict({n: nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for n in ("down", "up")}),
            {"target_modules": ["0"]},
            "has several: down, up",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(make, options, message):
    model = make()
    before = [(path, id(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(**OPTIONS | {"target_modules": ["q_proj"]} | options))
    assert [(path, id(module)) for path, module in model.named_modules()] == before
