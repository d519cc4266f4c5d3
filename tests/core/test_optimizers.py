"""LoRA+ and LoRA-FA against `peft`, step by step."""

import sys
from copy import deepcopy
from types import SimpleNamespace

import peft
import peft.optimizers
import pytest
import torch
import veneer
from torch import nn
from veneer import LoraConfig, create_lorafa_optimizer, create_loraplus_optimizer, get_peft_model

from .test_reference import quiet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(10, 8), nn.Linear(8, 12)
        self.norm, self.conv, self.head = nn.LayerNorm(12), nn.Conv1d(12, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.linear(self.embed(tokens)))
        return self.head(self.conv(x.mT).mT)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


TOKENS = torch.arange(12).view(2, 6) % 10
OPTIONS = {"r": 3, "lora_alpha": 5, "target_modules": ["embed", "linear", "conv"], "init_lora_weights": False}


def pair(**options):
    """A model of each library with equal weights, and the names of our tensors in PEFT's."""
    with quiet():
        theirs = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS | options))
    ours = get_peft_model(net(), LoraConfig(**OPTIONS | options))
    veneer.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_tensors(theirs, ours, **tolerance) -> None:
    expected = peft.get_peft_model_state_dict(theirs)
    found = veneer.get_peft_model_state_dict(ours)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **tolerance)


LORAPLUS = {
    "plain": {},
    "decay": {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3},
    "more": {"betas": (0.8, 0.9), "eps": 1e-4},
}


@pytest.mark.parametrize("name", LORAPLUS)
@pytest.mark.parametrize("adapter", [{}, {"modules_to_save": ["norm", "head"]}, {"bias": "all", "use_dora": True}])
def test_loraplus_takes_the_steps_of_peft(name, adapter):
    theirs, ours = pair(**adapter)
    options = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-2, "loraplus_lr_ratio": 4, **LORAPLUS[name]}
    one, two = peft.optimizers.create_loraplus_optimizer(theirs, **options), create_loraplus_optimizer(ours, **options)
    sizes = [[(len(g["params"]), g["lr"], g["weight_decay"]) for g in o.param_groups] for o in (one, two)]
    assert sizes[0] == sizes[1]
    train(theirs, one)
    train(ours, two)
    assert_same_tensors(theirs, ours)


def test_embeddings_stay_in_32_bits_in_8_bit_optimizers(monkeypatch):
    """Against a double of bitsandbytes, which needs an accelerator."""
    told = []
    manager = SimpleNamespace(register_module_override=lambda *arguments: told.append(arguments))
    library = SimpleNamespace(
        optim=SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager)),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    kind = type("AdamW8bit", (torch.optim.AdamW,), {})
    _, ours = pair()
    create_loraplus_optimizer(ours, kind, lr=1e-3, loraplus_lr_ratio=4)
    (arguments,) = told
    assert arguments[1:] == ("weight", {"optim_bits": 32})
    assert isinstance(arguments[0], nn.Embedding)
    create_loraplus_optimizer(ours, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    assert len(told) == 1


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"linear": 2}}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lorafa_takes_the_steps_of_peft(options, decay, monkeypatch):
    """In float32: where it can, PEFT projects in bfloat16."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    theirs, ours = pair(**options, target_modules=["linear", "head"])
    rates = {"r": 3, "lora_alpha": 5, "lr": 1e-2, "weight_decay": decay}
    one, two = peft.optimizers.create_lorafa_optimizer(theirs, **rates), create_lorafa_optimizer(ours, **rates)
    before = veneer.get_peft_model_state_dict(ours)["base_model.model.linear.lora_A.weight"].clone()
    train(theirs, one)
    train(ours, two)
    assert_same_tensors(theirs, ours, atol=1e-5, rtol=1e-4)
    assert torch.equal(veneer.get_peft_model_state_dict(ours)["base_model.model.linear.lora_A.weight"], before)


def test_lorafa_at_every_layer_and_beside_other_parameters():
    """Embeddings, convolutions, magnitudes and a head, which PEFT's pairing by order mixes up."""
    _, ours = pair(use_dora=True, modules_to_save=["head"])
    optimizer = create_lorafa_optimizer(ours, lr=1e-2)
    before = {key: tensor.clone() for key, tensor in veneer.get_peft_model_state_dict(ours).items()}
    first = ours(TOKENS).square().mean().item()
    train(ours, optimizer, 10)
    assert ours(TOKENS).square().mean().item() < 0.9 * first
    same = {key for key, tensor in veneer.get_peft_model_state_dict(ours).items() if torch.equal(tensor, before[key])}
    assert same == {
        f"base_model.model.{n}" for n in ("embed.lora_embedding_A", "linear.lora_A.weight", "conv.lora_A.weight")
    }


def test_lorafa_resumes_from_a_state_dict():
    _, ours = pair()
    optimizer = create_lorafa_optimizer(ours, lr=1e-2)
    train(ours, optimizer, 2)
    saved = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(ours).items()}, deepcopy(optimizer.state_dict())
    _, other = pair()
    veneer.set_peft_model_state_dict(other, saved[0])
    again = create_lorafa_optimizer(other, lr=1e-2)
    again.load_state_dict(saved[1])
    train(ours, optimizer, 2)
    train(other, again, 2)
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_lorafa_errors():
    _, ours = pair()
    with pytest.raises(ValueError, match="lora_alpha=7, but adapter 'default' has 5"):
        create_lorafa_optimizer(ours, r=3, lora_alpha=7)
    ours.set_requires_grad("default", False)
    with pytest.raises(ValueError, match="has nothing to optimise"):
        create_lorafa_optimizer(ours)
