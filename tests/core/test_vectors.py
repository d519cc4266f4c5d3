"""Sums of IA3 adapters, against `peft`; and the default targets of every model type."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
import veneer
from peft.utils import constants
from torch import nn
from veneer.core import defaults

from .test_reference import assert_same_outputs, llama, quiet, read_theirs

OPTIONS = {"init_ia3_weights": False, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
OTHER = OPTIONS | {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}


def both() -> tuple[nn.Module, veneer.PeftModel, dict]:
    """Two adapters each of PEFT and of ours, with the same vectors."""
    torch.manual_seed(0)
    base, inputs = llama()
    with quiet():
        theirs = peft.get_peft_model(deepcopy(base.eval()), peft.IA3Config(**OPTIONS), "a")
        theirs.add_adapter("b", peft.IA3Config(**OTHER))
    ours = veneer.get_peft_model(base, veneer.IA3Config(**OPTIONS), "a")
    ours.add_adapter("b", veneer.IA3Config(**OTHER))
    for name in ("a", "b"):
        tensors = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        assert not veneer.set_peft_model_state_dict(ours, tensors, name).missing_keys
    return theirs.eval(), ours.eval(), inputs


def test_a_sum_of_vectors_is_that_of_peft_and_is_an_ia3(tmp_path):
    theirs, ours, inputs = both()
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    ours.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="sum")
    found = veneer.get_peft_model_state_dict(ours, adapter_name="sum")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    theirs.set_adapter("sum")
    ours.set_adapter("sum")
    assert_same_outputs(theirs, ours, inputs)
    assert isinstance(ours.peft_config["sum"], veneer.IA3Config)
    assert not any(p.requires_grad for p in ours.base_model.parameters_of("sum"))
    ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    assert_same_outputs(ours, read_theirs(llama()[0].eval(), tmp_path / "sum"), inputs)


def test_a_kind_that_is_named_makes_a_lora():
    _, ours, _ = both()
    ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd", svd_rank=4)
    assert isinstance(ours.peft_config["sum"], veneer.LoraConfig)


def test_vectors_of_different_sides_are_not_added():
    _, ours, _ = both()
    ours.add_adapter("c", veneer.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"down_proj: some of \['a', 'c'\] scale its input and others its output"):
        ours.add_weighted_adapter(["a", "c"], [1.0, 1.0], "sum")
    assert "sum" not in ours.peft_config


TABLES = {
    "IA3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    "ADALORA": constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    "VERA": constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    "LN_TUNING": constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
}


@pytest.mark.parametrize("method", TABLES)
def test_default_targets_are_those_of_peft(method):
    for model_type, targets in TABLES[method].items():
        found = defaults.targets_for(method, model_type)
        assert found == (targets if isinstance(targets, str) else set(targets)), model_type


def test_default_feedforward_modules_are_those_of_peft():
    for model_type, targets in constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        assert defaults.feedforward_for(model_type) == set(targets)
