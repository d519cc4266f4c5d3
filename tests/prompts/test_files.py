"""Files: both ways with `peft`, resuming p-tuning from its network, and the classes that load by file alone."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
import veneer
from safetensors.torch import load_file

from .conftest import CONFIGS, MODELS, SEQ2SEQ, batch, make, ours, theirs
from .test_reference import BROKEN

MODELS_TRIED = ["llama", "t5", "bert-sequence"]
CASES = [(k, m) for k in CONFIGS for m in MODELS_TRIED if (k, m) not in BROKEN]


def scores(model, kind):
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    if kind == "multitask":
        inputs["task_ids"] = torch.tensor([0, 2, 1])
    if "T5" in type(model.get_base_model()).__name__:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs).logits


def _same(ours, theirs, kind):
    y, expected = scores(ours, kind), scores(theirs, kind)
    if y.ndim == 3:
        expected = expected[:, -y.shape[1] :]
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)


def _sizes(kind, model):
    seq2seq = model in SEQ2SEQ and kind != "multitask"
    return {"num_transformer_submodules": 2} if seq2seq else {}


@pytest.mark.parametrize(("kind", "model"), [c for c in CASES if c != ("multitask", "t5")])
def test_peft_reads_ours(kind, model, tmp_path):
    mine = ours(kind, model, **_sizes(kind, model))
    mine.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.PeftModel.from_pretrained(make(model), tmp_path)
    _same(mine, reference.eval(), kind)


@pytest.mark.parametrize(("kind", "model"), [c for c in CASES if c != ("multitask", "t5")])
def test_we_read_pefts(kind, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = theirs(kind, model, **_sizes(kind, model))
        reference.save_pretrained(tmp_path)
    mine = veneer.PeftModel.from_pretrained(make(model), tmp_path)
    _same(mine, reference, kind)
    assert type(mine).__name__ == type(reference).__name__
    assert not any(p.requires_grad for p in mine.parameters())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_round_trip(kind, tmp_path):
    mine = ours(kind, "llama")
    mine.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    torch.testing.assert_close(scores(again, kind), scores(mine, kind))
    mine.load_adapter(tmp_path, "second")
    mine.set_adapter("second")
    torch.testing.assert_close(scores(mine, kind), scores(again, kind))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_modules" not in config


@pytest.mark.parametrize("kind", ["p-mlp", "p-lstm", "projected"])
def test_training_goes_on_from_the_network(kind, tmp_path):
    mine = ours(kind, "llama").train()
    mine.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True).train()
    for model in (mine, again):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            model(**batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    mine_now, again_now = (dict(m.base_model.tensors("default")) for m in (mine, again))
    assert mine_now.keys() == again_now.keys()
    for key in mine_now:
        torch.testing.assert_close(again_now[key], mine_now[key])


def test_tokens_without_a_network_are_trained_themselves(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs("p-mlp", "llama").save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    mine = veneer.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert [p.shape for p in mine.parameters() if p.requires_grad] == [(4, 16)]


@pytest.mark.parametrize("kind", ["prompt", "lora"])
def test_auto_classes(kind, tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    base = type(make("llama")).from_pretrained(tmp_path / "base")
    if kind == "lora":
        config = veneer.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
        mine = veneer.get_peft_model(base, config).eval()
    else:
        mine = ours(kind, "llama", base)
    mine.save_pretrained(tmp_path / "adapter")
    for auto in (veneer.AutoPeftModelForCausalLM, veneer.AutoPeftModel):
        again = auto.from_pretrained(tmp_path / "adapter")
        assert isinstance(again, veneer.PeftModelForCausalLM)
        torch.testing.assert_close(scores(again, kind), scores(mine, kind))
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        veneer.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        veneer.AutoPeftModel()


@pytest.mark.parametrize("model", list(MODELS))
def test_every_task_has_pefts_class(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = type(theirs("prompt", model)).__name__
    tuned = ours("prompt", model)
    assert type(tuned).__name__ == expected
    assert tuned.prompt_encoder["default"].embedding.weight.shape[1] == 16


def test_peft_s_mixed_model_is_one_of_any_methods():
    config = veneer.LoraConfig(task_type="CAUSAL_LM", r=2)
    tuned = veneer.get_peft_model(make("llama"), config, mixed=True)
    assert isinstance(tuned, veneer.PeftMixedModel)
    tuned.add_adapter("prompt", veneer.PromptTuningConfig(num_virtual_tokens=2))
    tuned.set_adapter(["default", "prompt"])
    assert tuned(**batch("llama")).logits.shape == (3, 7, 61)
