"""`save_embedding_layers`: base embeddings in adapter files, both ways with `peft`."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import veneer
from safetensors.torch import load_file
from torch import nn
from veneer.core.errors import PeftWarning

from .test_kbit import TOKENS, llama

CASES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ".*(q_proj|lm_head)"},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 33]},
]
KIND = type(llama())
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied"])
def directory(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(tie_word_embeddings=request.param).save_pretrained(folder)
    return folder


def base(directory, size: int = 36, seed: int = 0):
    torch.manual_seed(seed)
    model = KIND.from_pretrained(directory).eval()
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def files(folder) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_changed_vocabulary_travels_with_the_adapter(case, directory, tmp_path):
    options = {"r": 2, "init_lora_weights": False} | case
    if "trainable_token_indices" in case and KIND.from_pretrained(directory).config.tie_word_embeddings:
        pytest.skip("PEFT stores the tied tokens of a LoRA twice then")
    for source, target, config in (
        (veneer.get_peft_model, peft.PeftModel, veneer.LoraConfig),
        (peft.get_peft_model, veneer.PeftModel, peft.LoraConfig),
        (veneer.get_peft_model, veneer.PeftModel, veneer.LoraConfig),
    ):
        model = source(base(directory), config(**options)).eval()
        model.save_pretrained(tmp_path)
        loaded = target.from_pretrained(base(directory, seed=1), tmp_path).eval()
        if source is peft.get_peft_model:  # which leaves out the other embedding where one is targeted
            model = peft.PeftModel.from_pretrained(base(directory, seed=1), tmp_path).eval()
        torch.testing.assert_close(loaded(TOKENS + 22).logits, model(TOKENS + 22).logits)


@pytest.mark.parametrize("choice", ["auto", True, False])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_what_is_saved_is_what_peft_saves(choice, case, directory):
    for size in (32, 36):
        ours, theirs = (
            set(library.get_peft_model_state_dict(model, save_embedding_layers=choice))
            for library in (veneer, peft)
            for model in [library.get_peft_model(base(directory, size), library.LoraConfig(r=2, **case))]
        )
        if case is CASES[0] or choice is False or (choice == "auto" and size == 32):
            assert ours == theirs
        else:  # PEFT leaves out the other embedding where one is targeted
            assert theirs < ours
            assert len(ours - theirs) == 1


def test_a_given_state_dict_has_the_embeddings(directory):
    model = veneer.get_peft_model(base(directory), veneer.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    given = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    plain = veneer.get_peft_model_state_dict(model, save_embedding_layers=True)
    changed = veneer.get_peft_model_state_dict(model, given, save_embedding_layers=True)
    assert plain.keys() == changed.keys()
    assert "base_model.model.model.embed_tokens.base_layer.weight" in plain
    for key, tensor in plain.items():
        torch.testing.assert_close(changed[key], tensor + 1)


def test_an_unknown_base_is_told(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    model = veneer.get_peft_model(base(copy), veneer.LoraConfig(r=2, target_modules=["q_proj"]))
    shutil.rmtree(copy)
    with pytest.warns(PeftWarning, match="Could not find a config file"):
        model.save_pretrained(tmp_path)
    assert not any("embed_tokens" in key for key in files(tmp_path))


def test_another_size_says_what_to_do_and_changes_nothing(directory, tmp_path):
    veneer.get_peft_model(base(directory), veneer.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = KIND.from_pretrained(directory).eval()
    before = model(TOKENS).logits
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        veneer.PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(model(TOKENS).logits, before)


def test_choices_that_cannot_be_followed_are_refused(directory, tmp_path):
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="Sequential has no get_input_embeddings"):
        model.save_pretrained(tmp_path / "out", save_embedding_layers=True)
    with pytest.raises(ValueError, match="'always' is unknown"):
        model.save_pretrained(tmp_path / "out", save_embedding_layers="always")
    assert not (tmp_path / "out").exists()
