"""The hooks that few methods need, tried on a method that needs them all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from veneer.core import (
    AdaptedModel,
    Branch,
    LoraConfig,
    PeftConfig,
    after_step,
    get_peft_model,
    load_training_state,
    method,
    penalty,
    save_adapter,
    training_state,
)
from veneer.core.files import read_weights


@dataclass
class BankConfig(PeftConfig):
    """Options of the method below."""


class BankOfRows(nn.Module):
    """What all layers share."""

    def __init__(self, width: int):
        super().__init__()
        self.bank = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("derived", torch.zeros(3), persistent=False)


@method(BankConfig)
class Bank(Branch):
    """Adds `own * bank`, which all layers share, and halves `own` after every step; its tensors want to be small."""

    steps = 0

    def __init__(self, config, site, path, device, dtype):
        super().__init__(config, site, path, device, dtype)
        self.own = self.new(1)

    @classmethod
    def shared(cls, adapters):
        return BankOfRows(max(a.site.out for a in adapters.values()))

    def reset(self):
        nn.init.ones_(self.own)

    def branch(self, x):
        return (self.own * self.common.bank[: self.site.out]).expand(*x.shape[:-1], -1)

    @classmethod
    def penalty(cls, adapters):
        return sum(a.own.square().sum() for a in adapters.values())

    @classmethod
    def after_step(cls, adapters, step):
        for adapter in adapters.values():
            adapter.steps = step
            with torch.no_grad():
                adapter.own.mul_(0.5)

    def training_state(self):
        return {"steps": torch.tensor(self.steps)}

    def load_training_state(self, state):
        self.steps = int(state["steps"])


def bank(*names: str) -> AdaptedModel:
    torch.manual_seed(0)
    model = AdaptedModel(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    for name in names:
        model.add(name, BankConfig(target_modules=["0", "1"]))
    return model


def test_what_layers_share_is_one_tensor_by_adapter_saved_once(tmp_path):
    model, x = bank("a", "b"), torch.randn(3, 4)
    commons = {name: {id(a.common) for a in model.adapters(name).values()} for name in ("a", "b")}
    assert all(len(found) == 1 for found in commons.values())
    assert commons["a"] != commons["b"]
    assert model.tensors("a").keys() == {"0.own", "1.own", "bank"}
    assert len(model.parameters_of("a")) == 3
    y = model(x)
    y.sum().backward()
    assert model.layers["0"].adapters["a"].common.bank.grad.any()
    save_adapter(tmp_path, model.configs["a"], model.tensors("a"))
    tensors = read_weights(tmp_path, config=model.configs["a"])
    other = bank()
    other.load("c", BankConfig(target_modules=["0", "1"]), tensors, trainable=True)
    assert torch.equal(other(x), y)
    assert all(p.requires_grad for p in other.parameters_of("c"))
    assert not any(b.is_meta for b in other.buffers())
    with pytest.raises(ValueError, match=r"missing \['bank'\]"):
        bank().load("c", BankConfig(target_modules=["0", "1"]), {k: t for k, t in tensors.items() if "own" in k})


def test_hooks_reach_the_running_trainable_adapters():
    model = bank("a", "b")
    assert penalty(model).item() == 2
    after_step(model, 7)
    assert penalty(model).item() == 0.5
    model.activate("a", "b")
    assert penalty(model).item() == 2.5
    model.set_trainable("b", False)
    assert penalty(model).item() == 0.5
    after_step(model, 8)
    assert model.layers["1"].adapters["b"].own.item() == 1
    with model.disabled():
        assert penalty(model) == 0.0


def test_training_state_goes_to_another_model():
    model, other = bank("a", "b"), bank("a", "b")
    after_step(model, 5)
    state = training_state(model)
    assert state["a"]["0"] == {"steps": torch.tensor(5)}
    load_training_state(other, state)
    assert [a.steps for a in other.adapters("a").values()] == [5, 5]
    with pytest.raises(ValueError, match=r"no adapter for: \['a: 2'\]"):
        load_training_state(other, {"a": {"2": {"steps": torch.tensor(1)}}})


def test_methods_without_hooks_have_none():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(target_modules=["0"]))
    assert penalty(model) == 0.0
    assert training_state(model) == {}
    after_step(model, 1)


def test_a_peft_model_adds_the_penalty_to_the_loss_it_returns():
    class Losing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return Output(self.layer(x).mean())

    @dataclass
    class Output:
        loss: torch.Tensor

    x, base = torch.randn(2, 4), Losing()
    model = get_peft_model(base, BankConfig(target_modules=["layer"]))
    assert torch.equal(model(x).loss, base(x).loss + 1)
    model.set_requires_grad("default", False)
    assert torch.equal(model(x).loss, base(x).loss)
