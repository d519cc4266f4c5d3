"""Adapters that started from the base weight, saved as plain LoRA: the same outputs over the original base."""

from pathlib import Path

import peft
import pytest
import torch
from veneer import LoraConfig, PeftModel, get_peft_model, save_as_lora
from veneer.core.files import read_config

from .test_init import OPTIONS, PATTERNS, SUBTRACTING, TOKENS, net
from .test_reference import assert_same_outputs, changed, quiet, read_theirs

CASES = {
    **{init: {"init_lora_weights": init} for init in SUBTRACTING},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {"init_lora_weights": "pissa"} | PATTERNS,
    "patterns, rslora": {"init_lora_weights": "pissa", "use_rslora": True} | PATTERNS,
}


def trained(name: str, initial: Path | None = None) -> PeftModel:
    """A trained adapter; as it was before is saved as users of PEFT do."""
    model = get_peft_model(net(), LoraConfig(**OPTIONS | CASES[name]))
    if initial:
        start = model.peft_config["default"].init_lora_weights
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = start
    return changed(model)


@pytest.mark.parametrize("name", CASES)
def test_with_the_initial_adapter(name, tmp_path):
    model = trained(name, tmp_path / "initial")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    config = read_config(tmp_path / "plain")
    assert (config.r, config.init_lora_weights) == (2 * OPTIONS["r"], True)
    assert model.peft_config["default"].r == OPTIONS["r"]
    assert_same_outputs(model, PeftModel.from_pretrained(net(), tmp_path / "plain"), TOKENS)
    assert_same_outputs(model, read_theirs(net(), tmp_path / "plain"), TOKENS)


@pytest.mark.parametrize("name", CASES)
def test_with_nothing_else(name, tmp_path):
    model = trained(name)
    report = save_as_lora(tmp_path, model)
    assert report.error == 0
    assert set(report.ranks.values()) == ({4, 8} if "patterns" in name else {8})
    assert_same_outputs(model, PeftModel.from_pretrained(net(), tmp_path), TOKENS)
    assert_same_outputs(model, read_theirs(net(), tmp_path), TOKENS)


def test_same_tensors_as_peft(tmp_path):
    with quiet():
        theirs = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS, init_lora_weights="pissa"))
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "initial")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        changed(theirs).save_pretrained(
            tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    ours = trained("pissa")
    ours.base_model.assign("default", {k.removeprefix("base_model.model."): v for k, v in peft_tensors(theirs).items()})
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "initial")
    expected, found = (peft.load_peft_weights(tmp_path / who, device="cpu") for who in ("theirs", "ours"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def peft_tensors(model) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model)


def test_refusals(tmp_path):
    model = trained("pissa", tmp_path / "initial")
    other = get_peft_model(net(), LoraConfig(**OPTIONS | {"r": 2}))
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(2, 16\), and the initial adapter has"):
        other.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=tmp_path / "initial")
    dora = get_peft_model(net(), LoraConfig(**OPTIONS, use_dora=True, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="no DoRA"):
        dora.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with pytest.raises(ValueError, match="DoRA has no rank of its own: give one"):
        save_as_lora(tmp_path / "no", dora)
    options = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(ValueError, match="runs over a quantised weight"):
        save_as_lora(tmp_path / "no", get_peft_model(net(), LoraConfig(**OPTIONS | options)))
    assert model.peft_config["default"].init_lora_weights == "pissa"


def test_other_dialects_refuse_factors_without_their_base():
    from veneer.diffusion.dialects.writing import from_core

    model = trained("pissa")
    with pytest.raises(ValueError, match="init_lora_weights='pissa' needs the base weights"):
        from_core({"unet": (model.peft_config["default"], model.base_model.tensors("default"))})
