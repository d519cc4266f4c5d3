"""transformers' methods for adapters, on any model and without `peft`."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from veneer import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model, text
from veneer.core import AdapterFileError, NotMergeableError
from veneer.core.config import config_classes
from veneer.core.steps import penalty

from ..core.conftest import SETTINGS
from .conftest import tiny_llama

PROMPTS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
}
"""Methods without target modules. Multitask prompts are told their tasks by a `PeftModel`'s forward only."""
METHODS = [m.value for m in config_classes() if m.value != "MULTITASK_PROMPT_TUNING"]
RANDOM = LoraConfig(r=2, init_lora_weights=False)


def lora(**changes) -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, **changes)


@pytest.fixture
def model(llama_directory):
    return text.attach(LlamaForCausalLM.from_pretrained(llama_directory))


def test_adapters_come_switch_and_go(model, tokens):
    plain, modules = model(tokens).logits, list(model.modules())
    model.add_adapter(lora(), "a")
    with_a = model(tokens).logits
    model.add_adapter(LoHaConfig(r=2, init_weights=False, target_modules=["q_proj"]), adapter_name="b")
    assert model.active_adapters() == ["b"]
    assert model.active_adapter() == "b"
    assert not torch.equal(with_a, model(tokens).logits)
    model.set_adapter("a")
    assert torch.equal(with_a, model(tokens).logits)
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    model.disable_adapters()
    assert torch.equal(plain, model(tokens).logits)
    model.enable_adapters()
    assert not torch.allclose(plain, model(tokens).logits)
    model.delete_adapter("a")
    assert model.active_adapters() == ["b"]
    model.delete_adapter(["b"])
    assert torch.equal(plain, model(tokens).logits)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert not model._hf_peft_config_loaded
    assert not hasattr(model, "peft_config")


def test_without_a_name_the_next_free_one_is_taken(model):
    model.add_adapter(lora())
    model.add_adapter(lora())
    assert list(model.peft_config) == ["default", "default_2"]
    assert model.active_adapters() == ["default_2"]


def test_only_the_new_adapter_learns_while_it_is_active(model, tokens):
    model.add_adapter(lora(modules_to_save=["lm_head"]), "a")
    model(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all(".a." in name or "lora" in name for name in trained)
    assert any("lm_head" in name for name in trained)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.set_adapter("a"), "No adapter loaded"),
        (lambda m: m.disable_adapters(), "No adapter loaded"),
        (lambda m: m.active_adapters(), "No adapter loaded"),
        (lambda m: m.delete_adapter("a"), "No adapter loaded"),
        (lambda m: (m.add_adapter(lora(), "a"), m.add_adapter(lora(), "a")), "already exists"),
        (lambda m: (m.add_adapter(lora(), "a"), m.set_adapter("b")), r"b not found.*\['a'\]"),
        (lambda m: (m.add_adapter(lora(), "a"), m.delete_adapter(["a", "b"])), "not present and cannot be deleted: b"),
        (lambda m: m.load_adapter(), "pass either"),
        (lambda m: m.load_adapter("here", peft_config=RANDOM, adapter_state_dict={}), "pass either"),
        (lambda m: (m.add_adapter(lora(), "a"), m.load_adapter("x", adapter_name="a")), "already exists"),
    ],
)
def test_mistakes_are_errors_that_change_nothing(model, act, message):
    with pytest.raises(ValueError, match=message):
        act(model)
    assert set(getattr(model, "peft_config", {})) <= {"a"}


def test_a_foreign_config_or_option_is_a_type_error(model, tmp_path):
    with pytest.raises(TypeError, match="should be an instance of PeftConfig"):
        model.add_adapter({"r": 2})
    with pytest.raises(TypeError, match="key_mappings"):
        model.load_adapter(tmp_path, key_mappings={})


def test_saving_writes_the_active_adapter_only_and_loading_restores_it(model, llama_directory, tokens, tmp_path):
    model.add_adapter(lora(), "a")
    model.add_adapter(lora(), "b")
    expected = model(tokens).logits
    model.save_pretrained(tmp_path, max_shard_size="5GB")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    other = text.attach(LlamaForCausalLM.from_pretrained(llama_directory))
    result = other.load_adapter(tmp_path)
    assert result == ([], [])
    assert torch.equal(other(tokens).logits, expected)
    assert not any(p.requires_grad for p in other.parameters())
    oracle = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_directory), tmp_path)
    assert torch.equal(oracle(tokens).logits, expected)
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "both", selected_adapters=["b", "a"])
    assert (tmp_path / "both" / "a" / "adapter_model.safetensors").is_file()
    other.load_adapter(tmp_path / "both", "again")
    assert torch.equal(other(tokens).logits, expected)


def test_the_state_dict_goes_out_and_comes_in(model, llama_directory, tokens):
    model.add_adapter(lora(), "a")
    state = model.get_adapter_state_dict()
    assert set(state) == set(model.get_adapter_state_dict("a"))
    assert all(not key.startswith("base_model") for key in state)
    other = text.attach(LlamaForCausalLM.from_pretrained(llama_directory))
    other.load_adapter(peft_config=lora(), adapter_state_dict=state, adapter_name="b")
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    for key, value in model.get_adapter_state_dict("a", doubled).items():
        assert torch.equal(value, 2 * state[key])


def test_blends_and_merges(model, tokens, tmp_path):
    model.add_adapter(lora(), "a")
    model.add_adapter(IA3Config(init_ia3_weights=False), "c")
    model.add_adapter(lora(), "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both", "cat")
    model.set_adapter("both")
    expected = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, expected)
    merged = model.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)  # a plain model again
    assert (tmp_path / "model.safetensors").is_file()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_a_model_of_its_own(model, tokens, through):
    model.add_adapter(lora(), "a")
    twin = through(model)
    twin.disable_adapters()
    assert model.active_adapters() == twin.active_adapters() == ["a"]
    assert not torch.equal(model(tokens).logits, twin(tokens).logits)
    twin.delete_adapter("a")
    assert list(model.peft_config) == ["a"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_through_a_file_and_into_the_weights(method, model, llama_directory, tokens, tmp_path):
    options = PROMPTS.get(method) or SETTINGS[method][0] | {"target_modules": ["q_proj", "down_proj"]}
    model.add_adapter(config_classes()[method](**options), "a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    other = text.attach(LlamaForCausalLM.from_pretrained(llama_directory))
    other.load_adapter(tmp_path, "b")
    torch.testing.assert_close(other(tokens).logits, expected)
    other.disable_adapters()
    assert not torch.allclose(other(tokens).logits, expected)
    other.enable_adapters()
    try:
        other.merge_and_unload()
    except NotMergeableError:
        assert other.active_adapters() == ["b"]
    torch.testing.assert_close(other(tokens).logits, expected, atol=1e-4, rtol=1e-3)


class TestLoadModel:
    @pytest.fixture
    def adapter(self, llama_directory, tmp_path, tokens):
        peft = get_peft_model(LlamaForCausalLM.from_pretrained(llama_directory), lora(task_type="CAUSAL_LM"))
        peft.eval().save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", peft(tokens).logits

    def test_base_and_adapter_from_the_adapter_alone(self, adapter, tokens):
        model = text.load_model(adapter[0])
        assert torch.equal(model(tokens).logits, adapter[1])
        assert model.active_adapters() == ["default"]
        assert not any(p.requires_grad for p in model.parameters())

    def test_options_reach_the_base_model(self, adapter):
        model = text.load_model(adapter[0], "mine", is_trainable=True, dtype=torch.bfloat16)
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert model.active_adapter() == "mine"

    def test_without_a_task_the_class_that_it_was_made_for_loads_it(self, llama_directory, tmp_path, tokens):
        peft = get_peft_model(LlamaForCausalLM.from_pretrained(llama_directory), lora()).eval()
        peft.save_pretrained(tmp_path)
        assert torch.equal(text.load_model(tmp_path)(tokens).logits, peft(tokens).logits)

    def test_without_a_base_model_it_says_so(self, adapter):
        peft = get_peft_model(tiny_llama(), lora(task_type="CAUSAL_LM"))
        peft.peft_config["default"].base_model_name_or_path = None
        peft.save_pretrained(adapter[0])
        with pytest.raises(ValueError, match="names no base model"):
            text.load_model(adapter[0])

    def test_no_adapter_is_an_error(self, tmp_path):
        with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
            text.load_model(tmp_path)


class TestInstall:
    @pytest.fixture(autouse=True)
    def _installed(self):
        before = PreTrainedModel.add_adapter, PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub
        text.install()
        text.install()
        yield
        text.uninstall()
        assert before == (PreTrainedModel.add_adapter, PreTrainedModel.save_pretrained, PreTrainedModel.push_to_hub)
        assert "set_adapter" not in vars(PreTrainedModel)

    def test_every_model_has_the_methods(self, llama_directory, tokens, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(llama_directory)
        model.add_adapter(lora(), "a")
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        for opener in (AutoModelForCausalLM, LlamaForCausalLM):
            opened = opener.from_pretrained(tmp_path)
            assert torch.equal(opened(tokens).logits, expected)
            assert opened.active_adapters() == ["default"]
        named, info = AutoModelForCausalLM.from_pretrained(tmp_path, adapter_name="b", output_loading_info=True)
        assert named.active_adapters() == ["b"]
        assert not info["missing_keys"]

    def test_models_without_adapters_are_saved_as_before(self, tmp_path):
        tiny_llama().save_pretrained(tmp_path)
        text.attach(tiny_llama()).save_pretrained(tmp_path / "attached")
        for directory in (tmp_path, tmp_path / "attached"):
            assert (directory / "model.safetensors").is_file()

    def test_a_subfolder_is_the_adapters(self, llama_directory, tokens, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(llama_directory)
        model.add_adapter(lora(), "a")
        model.save_pretrained(tmp_path / "inner")
        for kwargs in ({"subfolder": "inner"}, {"adapter_kwargs": {"subfolder": "inner"}}):
            opened = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
            assert torch.equal(opened(tokens).logits, model(tokens).logits)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # importing it fails
import importlib.util, torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
from transformers import AutoModelForCausalLM
from transformers.utils import is_peft_available
assert not is_peft_available()
from veneer import LoraConfig, text
base, folder = sys.argv[1:]
text.install()
model = AutoModelForCausalLM.from_pretrained(base)
model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
tokens = torch.arange(1, 9)[None]
expected = model(tokens).logits
model.save_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder)
assert torch.equal(again(tokens).logits, expected)
again.merge_and_unload()
torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=1e-4)
text.uninstall()
try:
    AutoModelForCausalLM.from_pretrained(base).add_adapter(LoraConfig())
except Exception as error:
    print("transformers alone:", error)
"""


def test_it_works_without_peft(llama_directory, tmp_path):
    command = [sys.executable, "-c", WITHOUT_PEFT, str(llama_directory), str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=os.sep)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "PEFT is not installed" in child.stdout


def test_what_a_method_adds_to_the_loss_is_added(model, tokens, monkeypatch):
    from veneer.core.tuners.lora import LoRA

    monkeypatch.setattr(LoRA, "penalty", classmethod(lambda cls, adapters: torch.tensor(1.5)))
    plain = model(tokens, labels=tokens).loss
    model.add_adapter(LoraConfig(r=2), "a")
    model.add_adapter(LoraConfig(r=2), "b")
    assert penalty(model) == 1.5
    torch.testing.assert_close(model(tokens, labels=tokens).loss, plain + 1.5)
    model.delete_adapter(["a", "b"])
    torch.testing.assert_close(model(tokens, labels=tokens).loss, plain)


class TestHotswap:
    @pytest.fixture
    def files(self, llama_directory, tmp_path):
        for rank in (2, 4):
            maker = text.attach(LlamaForCausalLM.from_pretrained(llama_directory))
            maker.add_adapter(LoraConfig(r=rank, lora_alpha=3 * rank + 1, init_lora_weights=False))
            maker.save_pretrained(tmp_path / str(rank))
        return tmp_path / "2", tmp_path / "4"

    def test_mistakes_say_what_to_do(self, model, files):
        with pytest.raises(ValueError, match="already be an existing adapter"):
            model.load_adapter(files[0], hotswap=True)
        model.load_adapter(files[0])
        with pytest.raises(ValueError, match="already exists"):
            model.load_adapter(files[0])
        with pytest.raises(RuntimeError, match="before loading the first adapter"):
            model.enable_peft_hotswap()
