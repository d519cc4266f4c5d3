"""Trainable tokens over tied weights: what is tied stays tied, whatever is done."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
import transformers
import veneer
from safetensors.torch import load_file
from torch import nn
from veneer.core import AdaptedModel

from .test_reference import LORA, assert_same_outputs, changed, quiet, read_theirs, save_theirs

IDS = torch.tensor([[1, 5, 9, 3, 2], [4, 4, 7, 8, 6]])
INPUTS = {"input_ids": IDS}
KINDS = {
    "tokens": ("TrainableTokensConfig", {"token_indices": [9, 4, 1]}),
    "lora": ("LoraConfig", LORA | {"target_modules": ["q_proj"], "trainable_token_indices": [9, 4, 1]}),
    "named twice": (
        "LoraConfig",
        LORA | {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [9, 4]}},
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def tied(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, **changes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ours(kind: str, model: nn.Module | None = None) -> veneer.PeftModel:
    name, options = KINDS[kind]
    return changed(veneer.get_peft_model(model or tied(), getattr(veneer, name)(task_type="CAUSAL_LM", **options)))


@quiet()
def theirs(kind: str) -> nn.Module:
    name, options = KINDS[kind]
    return changed(peft.get_peft_model(tied(), getattr(peft, name)(task_type="CAUSAL_LM", **options)))


def rows_of(model: veneer.PeftModel) -> set[int]:
    return {id(p) for n, p in model.named_parameters() if "trainable_tokens" in n}


@each_kind
def test_both_ends_see_the_same_rows_and_files_go_both_ways(kind, tmp_path):
    one, two = theirs(kind), ours(kind)
    assert len(rows_of(two)) == 1
    save_theirs(one, tmp_path / "theirs")
    two.save_pretrained(tmp_path / "ours")
    assert_same_outputs(one, veneer.PeftModel.from_pretrained(tied(), tmp_path / "theirs"), INPUTS)
    assert_same_outputs(two, read_theirs(tied(), tmp_path / "ours"), INPUTS)
    keys = [load_file(tmp_path / side / "adapter_model.safetensors").keys() for side in ("theirs", "ours")]
    assert keys[0] == keys[1]


@each_kind
def test_gradients_are_those_of_peft(kind, tmp_path):
    save_theirs(theirs(kind), tmp_path)
    with quiet():
        read = peft.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True)
    found = veneer.PeftModel.from_pretrained(tied(), tmp_path, is_trainable=True)
    grads = []
    for model in (read, found):
        model.eval()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append(next(p.grad for n, p in model.named_parameters() if "trainable_tokens" in n))
    torch.testing.assert_close(*grads)


@each_kind
def test_merged_it_is_a_tied_model(kind, tmp_path):
    model = ours(kind)
    before = model(**INPUTS).logits
    original = model.get_base_model().model.embed_tokens.base_layer.weight
    model.merge_adapter()
    torch.testing.assert_close(model(**INPUTS).logits, before, atol=1e-5, rtol=1e-5)
    assert (
        model.get_base_model().lm_head.base_layer.weight is model.get_base_model().model.embed_tokens.base_layer.weight
    )
    model.unmerge_adapter()
    assert model.get_base_model().lm_head.base_layer.weight is original
    assert model.get_base_model().model.embed_tokens.base_layer.weight is original
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**INPUTS).logits, before, atol=1e-5, rtol=1e-5)


def test_adapters_with_different_tokens_run_together_and_apart():
    model = AdaptedModel(tied())
    for name, tokens in {"a": [9, 4], "b": [1, 5, 2]}.items():
        model.add(name, veneer.TrainableTokensConfig(token_indices=tokens, init_weights=False))
    base = model.model.model.embed_tokens.base_layer.weight
    model.activate("b", "a")
    rows = model.model.model.embed_tokens(torch.arange(20))
    a, b = (model.adapters(n)["model.embed_tokens"].trainable_tokens_delta for n in ("a", "b"))
    expected = base.detach().clone().index_copy(0, torch.tensor([9, 4]), a).index_copy(0, torch.tensor([1, 5, 2]), b)
    assert torch.equal(rows, expected)
    y = model(**INPUTS).logits
    model.merge()
    torch.testing.assert_close(model(**INPUTS).logits, y, atol=1e-5, rtol=1e-5)
    model.unmerge()
    model.delete("b")
    model.activate("a")
    assert torch.equal(model.model.model.embed_tokens(torch.tensor([1])), base[1:2])
    with model.disabled():
        assert torch.equal(model.model.model.embed_tokens(torch.arange(20)), base)


def test_both_ends_named_are_tied_too():
    config = veneer.TrainableTokensConfig(token_indices=[9, 4], target_modules=["embed_tokens", "lm_head"])
    model = veneer.get_peft_model(tied(), config)
    assert len(rows_of(model)) == 1
    assert model.get_nb_trainable_parameters()[0] == 2 * 16


def test_a_copy_keeps_its_own_rows_tied():
    model = ours("tokens")
    twin = deepcopy(model)
    assert len(rows_of(twin)) == 1
    assert not rows_of(twin) & rows_of(model)


def test_two_layers_of_a_lora_with_tokens_of_their_own():
    options = LORA | {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3]}}
    model = veneer.get_peft_model(tied(), veneer.LoraConfig(**options))
    adapters = {path: a for path, a in model.base_model.adapters("default").items() if "q_proj" not in path}
    assert {path: a.token_indices for path, a in adapters.items()} == {"model.embed_tokens": [1, 2], "lm_head": [3]}
    assert len(rows_of(model)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_indices": []}, "embed_tokens: token_indices is empty"),
        ({"token_indices": [3, 20]}, r"tokens \[20\] are not among the 20 of this Embedding"),
        ({"token_indices": [3, 3]}, r"tokens \[3\] are named twice"),
        ({"token_indices": [3], "target_modules": ["input_layernorm"]}, "LlamaRMSNorm"),
    ],
)
def test_tokens_that_are_none_are_named(options, message):
    model = tied()
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(model, veneer.TrainableTokensConfig(**options))
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"trainable_token_indices": {"embed_token": [1]}},
            "names 'embed_token', which matches no module; near: embed_tokens",
        ),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "embed_tokens has trainable tokens"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "embed_tokens has trainable tokens"),
    ],
)
def test_loras_whose_tokens_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        veneer.get_peft_model(tied(), veneer.LoraConfig(**{"target_modules": ["q_proj"]} | options))
