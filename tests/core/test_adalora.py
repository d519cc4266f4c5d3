"""AdaLoRA's schedule: a whole training against `peft`, resumed exactly, files both ways at every stage."""

from __future__ import annotations

from copy import deepcopy

import peft
import pytest
import torch
import veneer
from veneer.core import after_step, load_training_state, penalty, training_state
from veneer.core.files import load_adapter

from .test_reference import assert_same_files, assert_same_outputs, llama, quiet, read_theirs, save_theirs

OPTIONS = {
    "task_type": "CAUSAL_LM",  # without, PEFT drops the penalty
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 14,
    "lora_alpha": 6,
    "init_lora_weights": False,
}


def base():
    torch.manual_seed(0)
    return llama()[0].eval()


def inputs(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


PROBE = {"input_ids": inputs(99)["input_ids"]}


@quiet()
def theirs():
    torch.manual_seed(1)
    return peft.get_peft_model(base(), peft.AdaLoraConfig(**OPTIONS))


def ours(directory, **options):
    return veneer.PeftModel.from_pretrained(base(), directory, is_trainable=True, **options).eval()


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(model, optimizer, steps, update) -> list[float]:
    losses = []
    for step in steps:
        loss = model(**inputs(step)).loss
        loss.backward()
        optimizer.step()
        update(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_steps(model, optimizer, steps) -> list[float]:
    return train(model, optimizer, steps, lambda step: after_step(model, step))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The directory of a fresh adapter, and PEFT's model after the whole training, with its losses."""
    directory = tmp_path_factory.mktemp("adalora")
    model = theirs()
    save_theirs(model, directory)
    losses = train(model, optimizer_of(model), range(14), model.base_model.update_and_allocate)
    return directory, model, losses


def test_a_whole_training_is_the_same(start, tmp_path):
    directory, expected, losses = start
    model = ours(directory)
    found = train(model, optimizer_of(model), range(14), model.base_model.update_and_allocate)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == {k.replace(".default", ""): v for k, v in expected.peft_config["default"].rank_pattern.items()}
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    assert len({sum(kept) for kept in pattern.values()}) > 1
    assert_same_outputs(expected, model, PROBE)
    save_theirs(expected, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert_same_outputs(expected, veneer.PeftModel.from_pretrained(base(), tmp_path / "theirs"), PROBE)
    assert_same_outputs(expected, read_theirs(base(), tmp_path / "ours"), PROBE)


def test_the_trained_adapter_merges(start, tmp_path):
    _, expected, _ = start
    save_theirs(expected, tmp_path)
    merged = veneer.PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    assert_same_outputs(expected, merged, PROBE)


@pytest.mark.parametrize("stop", [5, 12], ids=["in the middle", "after the choice"])
def test_a_resumed_training_is_the_same(start, tmp_path, stop):
    directory, _, _ = start
    whole = ours(directory)
    losses = own_steps(whole, optimizer_of(whole), range(14))

    first = ours(directory)
    optimizer = optimizer_of(first)
    own_steps(first, optimizer, range(stop))
    first.save_pretrained(tmp_path)
    state = deepcopy((training_state(first), optimizer.state_dict()))

    second = ours(directory)
    optimizer = optimizer_of(second)
    second.base_model.assign("default", load_adapter(tmp_path)[1])
    assert_same_outputs(first, second, PROBE)
    load_training_state(second, state[0])
    optimizer.load_state_dict(state[1])
    assert own_steps(second, optimizer, range(stop, 14)) == losses[stop:]
    assert second.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern


def test_several_adapters_are_trained_at_once_each_on_its_own(start):
    directory, _, losses = start
    model = ours(directory)
    config = veneer.AdaLoraConfig(**OPTIONS | {"total_step": 20, "init_r": 5, "init_lora_weights": True})
    model.add_adapter("other", config)
    model.base_model.activate("default", "other")
    both = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    assert penalty(model) > 0
    own_steps(model, both, range(20))
    chosen = {name: model.peft_config[name].rank_pattern for name in ("default", "other")}
    assert all(sum(map(sum, pattern.values())) == 2 * len(pattern) for pattern in chosen.values())
    assert {len(kept) for kept in chosen["other"].values()} == {5}
    alone = ours(directory)
    alone.add_adapter("other", deepcopy(config))
    alone.base_model.activate("default")
    found = own_steps(alone, optimizer_of(alone), range(14))  # one that waits does not disturb
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)


def test_one_config_for_two_adapters_is_two_choices(start):
    config = veneer.AdaLoraConfig(**OPTIONS)
    model = veneer.get_peft_model(base(), config)
    model.add_adapter("other", config)
    own_steps(model, optimizer_of(model), range(12))
    assert model.peft_config["default"].rank_pattern
    assert model.peft_config["other"].rank_pattern is None


def test_training_goes_on_from_a_finished_file(start, tmp_path):
    """Its triplets are fewer; what a second training drops of them is stored as zeros."""
    _, expected, _ = start
    save_theirs(expected, tmp_path)
    model = ours(tmp_path)
    before = deepcopy(model.peft_config["default"].rank_pattern)
    model.peft_config["default"].target_r = 1
    own_steps(model, optimizer_of(model), range(14))
    values = [a.lora_E for a in model.base_model.adapters("default").values()]
    assert sum(e.count_nonzero().item() for e in values) == len(values)
    assert model.peft_config["default"].rank_pattern == before
    model.save_pretrained(tmp_path / "again")
    assert_same_outputs(model, read_theirs(base(), tmp_path / "again"), PROBE)
    assert_same_outputs(model, veneer.PeftModel.from_pretrained(base(), tmp_path / "again"), PROBE)


def test_what_is_done_wrong_is_said(start):
    directory, _, _ = start
    model = ours(directory)
    with pytest.raises(ValueError, match="found no gradients: call after_step before they are cleared"):
        after_step(model, 3)
    with pytest.raises(ValueError, match="it saw nothing"):
        after_step(model, 12)
    with pytest.raises(ValueError, match="total_step"):
        veneer.AdaLoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="leave no step of total_step=10"):
        veneer.AdaLoraConfig(total_step=10, tinit=5, tfinal=5)
    with pytest.raises(ValueError, match="set init_r"):
        veneer.AdaLoraConfig(total_step=10, r=4)
    with pytest.raises(ValueError, match="target_r=20 is not between"):
        veneer.AdaLoraConfig(total_step=10, target_r=20)
