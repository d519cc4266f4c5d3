"""transformers' `Trainer` over our adapters: what checkpoints hold, resuming, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import veneer
from transformers import TrainerCallback, TrainingArguments
from veneer.text import Trainer
from veneer.text.trainer import load_checkpoint

from .tiny import llama, rows

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def model(config: veneer.PeftConfig | None = None, bits: int = 0) -> veneer.PeftModel:
    base = llama()
    if bits:
        base = veneer.prepare_model_for_kbit_training(veneer.quantize_model(base, bits))
    torch.manual_seed(1)
    return veneer.get_peft_model(base, config or veneer.LoraConfig(**LORA))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(options | changes))


def train(folder: Path, net: veneer.PeftModel, *, stop: int | None = None, resume: bool = False, **changes: Any):
    callbacks = [Stop(stop)] if stop else []
    trainer = Trainer(net, arguments(folder, **changes), train_dataset=rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def tensors(net: veneer.PeftModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for name in net.peft_config for k, v in net.base_model.tensors(name).items()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


CASES = {
    "lora": lambda: model(),
    "dora-4bit": lambda: model(veneer.LoraConfig(**LORA, use_dora=True), bits=4),
    "lora-8bit": lambda: model(bits=8),
    "head": lambda: model(veneer.LoraConfig(**LORA, modules_to_save=["lm_head"])),
    "adalora": lambda: model(
        veneer.AdaLoraConfig(
            init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=6, target_modules=["q_proj", "v_proj"]
        )
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_hold_adapters_only_and_resume_exactly(case, tmp_path):
    if case == "adalora" and not hasattr(veneer, "AdaLoraConfig"):
        pytest.skip("no AdaLoRA yet")
    whole = CASES[case]()
    losses = [entry["loss"] for entry in train(tmp_path / "whole", whole).state.log_history if "loss" in entry]
    assert min(losses[3:]) < losses[0]
    half = CASES[case]()
    train(tmp_path / "halves", half, stop=3)
    checkpoint = tmp_path / "halves" / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert not {"model.safetensors", "config.json", "pytorch_model.bin"} & names
    other = CASES[case]()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1)  # to be overwritten
    resumed = train(tmp_path / "halves", other, resume=True)
    assert_equal(tensors(other), tensors(whole))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    again = veneer.PeftModel.from_pretrained(llama(), checkpoint) if "bit" not in case else None
    assert again is None or set(again.peft_config) == {"default"}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    net = model()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = Trainer(
        net,
        arguments(tmp_path, **options, learning_rate=0.5, metric_for_best_model="eval_loss"),
        train_dataset=rows(),
        eval_dataset=rows(seed=1),
    )
    trainer.train()
    found = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(found, key=found.__getitem__)
    assert best < 6  # so large a rate spoils it
    assert trainer.state.best_model_checkpoint.endswith(f"-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-4)
    expected = veneer.PeftModel.from_pretrained(llama(), trainer.state.best_model_checkpoint)
    assert_equal(tensors(net), tensors(expected))
    assert sum(p.requires_grad for p in net.parameters()) == 8


def test_several_adapters_are_saved_and_resumed(tmp_path):
    def two() -> veneer.PeftModel:
        net = model()
        net.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
        net.base_model.activate("default", "other")
        net.base_model.set_trainable(["default", "other"])
        return net

    whole = two()
    train(tmp_path / "whole", whole)
    train(tmp_path / "halves", two(), stop=3)
    assert (tmp_path / "halves" / "checkpoint-3" / "other" / "adapter_model.safetensors").is_file()
    other = two()
    train(tmp_path / "halves", other, resume=True)
    assert_equal(tensors(other), tensors(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(tmp_path, model(), stop=3)
    other = model(veneer.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(ValueError, match="no checkpoint of adapter 'default'"):
        load_checkpoint(other, tmp_path / "checkpoint-3")


def test_evaluation_accumulation_and_smoothing_are_those_of_the_base_model(tmp_path):
    net = model()
    options = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "max_steps": 1, "save_steps": 9}
    trainer = Trainer(net, arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows(seed=1))
    plain = transformers.Trainer(llama(), arguments(tmp_path, **options), eval_dataset=rows(seed=1))
    for name in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(trainer, name) == getattr(plain, name), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    trainer.train()


def test_without_adapters_it_is_the_plain_trainer(tmp_path):
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=1, save_steps=1), train_dataset=rows())
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_the_plain_trainer_trains_but_saves_everything(tmp_path):
    """What the subclass is for; should this fail, transformers has learnt about us."""
    net = model(bits=4)
    options = {"max_steps": 1, "save_steps": 1, "remove_unused_columns": False}  # it cannot tell which are used
    trainer = transformers.Trainer(net, arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert trainer.label_names == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_number(reentrant, tmp_path):
    plain, saving = model(veneer.LoraConfig(r=4, target_modules=["q_proj"])), None
    train(tmp_path / "plain", plain, max_steps=2)
    saving = model(veneer.LoraConfig(r=4, target_modules=["q_proj"]))
    fields = TrainingArguments.__dataclass_fields__
    kind = "activation" if "activation_checkpointing" in fields else "gradient"  # transformers 5 renames it
    options = {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(tmp_path / "saving", saving, max_steps=2, **options)
    for key, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(saving)[key], tensor, atol=1e-6, rtol=1e-4)


def test_a_model_that_transformers_quantized_may_be_trained(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = type(llama()).from_pretrained(tmp_path / "base", quantization_config=options, device_map="cpu")
    net = veneer.get_peft_model(veneer.prepare_model_for_kbit_training(base), veneer.LoraConfig(**LORA))
    train(tmp_path / "run", net, max_steps=1, save_steps=1)
    assert (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").is_file()
