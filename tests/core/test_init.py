"""LoRA's starts that look at the weight: equal to `peft`, and the base model is never lost."""

from copy import deepcopy

import peft
import pytest
import torch
import veneer
from torch import nn
from transformers.pytorch_utils import Conv1D
from veneer import LoraConfig, PeftModel, get_peft_model

from .conftest import stir
from .test_reference import exchange, quiet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.linear, self.transposed = nn.Linear(16, 24), Conv1D(16, 24)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.transposed(self.linear(self.embed(tokens)).tanh())


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.normal_(model.transposed.weight, std=0.3)
    return model


TOKENS = (torch.arange(12).view(2, 6),)
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ["linear", "transposed"]}
PATTERNS = {"rank_pattern": {"linear": 2}, "alpha_pattern": {"transposed": 3}}
CASES = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, patterns": {"init_lora_weights": "pissa"} | PATTERNS,
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora", "target_modules": ["linear"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
}
SUBTRACTING = ["pissa", "pissa_niter_3", "olora"]
"""Those that train from B A unlike zero."""


@pytest.mark.parametrize("name", CASES)
def test_files_go_both_ways(name, tmp_path):
    exchange(net(), "LoraConfig", OPTIONS | CASES[name], TOKENS, tmp_path)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("orthogonal", "eva")])
def test_starts_with_the_factors_of_peft(name):
    """Up to the signs of singular vectors, which B and A share."""
    with quiet():
        theirs = peft.get_peft_model(net(), peft.LoraConfig(**OPTIONS | CASES[name]))
    ours = get_peft_model(net(), LoraConfig(**OPTIONS | CASES[name]))
    for module in ("linear", *(["transposed"] if name != "olora" else [])):
        one, two = (m.base_model.model.get_submodule(module) for m in (theirs, ours))
        torch.testing.assert_close(
            one.lora_A["default"].weight.abs(), two.lora_A["default"].weight.abs(), atol=1e-5, rtol=1e-4
        )
        product = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in (one, two)]
        torch.testing.assert_close(*product, atol=1e-5, rtol=1e-4)


def test_iterating_comes_near_the_exact_start():
    exact, near = (
        get_peft_model(net(), LoraConfig(**OPTIONS, init_lora_weights=i)) for i in ("pissa", "pissa_niter_9")
    )
    for module in ("linear", "transposed"):
        layers = [model.base_model.model.get_submodule(module) for model in (exact, near)]
        product = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in layers]
        torch.testing.assert_close(*product, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("init", [*SUBTRACTING, "orthogonal", "eva"])
def test_training_starts_from_the_base_model(init):
    base = net()
    before = base(*TOKENS)
    model = get_peft_model(base, LoraConfig(**OPTIONS, init_lora_weights=init))
    torch.testing.assert_close(model(*TOKENS), before)
    model(*TOKENS).square().mean().backward()
    layer = base.linear
    grads = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    assert grads[1].any()
    assert grads[0].any() == (init != "eva")


@pytest.mark.parametrize("init", [*SUBTRACTING, "loftq"])
@pytest.mark.parametrize("leave", ["unload", "delete", "merge and unmerge"])
def test_the_base_comes_back_bit_for_bit(init, leave):
    base = net().bfloat16()
    before = deepcopy(base.state_dict())
    config = LoraConfig(**OPTIONS, init_lora_weights=init, loftq_config={"loftq_bits": 4} if init == "loftq" else {})
    model = get_peft_model(base, config)
    stir(model.base_model, "default")
    if leave == "merge and unmerge":
        model.merge_adapter()
        model.unmerge_adapter()
    if leave == "delete":
        model.delete_adapter("default")
    plain = model.unload()
    assert all(torch.equal(plain.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("init", SUBTRACTING)
def test_disabled_the_true_base_model_runs(init):
    base = net()
    before = base(*TOKENS)
    model = get_peft_model(base, LoraConfig(**OPTIONS, init_lora_weights=init))
    stir(model.base_model, "default")
    with model.disable_adapter():
        assert torch.equal(model(*TOKENS), before)


def test_several_share_a_model():
    """In PEFT the second would decompose what the first has left of the base."""
    alone = {}
    for init in SUBTRACTING:
        model = get_peft_model(net(), LoraConfig(**OPTIONS, init_lora_weights=init), init)
        stir(model.base_model, init)
        alone[init] = model.base_model.tensors(init), model(*TOKENS)
    model = get_peft_model(net(), LoraConfig(**OPTIONS, init_lora_weights="olora"), "olora")
    for init in SUBTRACTING[:2]:
        model.add_adapter(init, LoraConfig(**OPTIONS, init_lora_weights=init))
    for init, (tensors, expected) in alone.items():
        model.base_model.assign(init, tensors)
        model.set_adapter(init)
        torch.testing.assert_close(model(*TOKENS), expected)


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_makes_up_for_the_rounding(bits, rounds):
    """With its factors the quantised layer is nearer to the original than without."""
    weight = net().linear.weight.detach()
    options = {"loftq_bits": bits, "loftq_iter": rounds}
    config = LoraConfig(**OPTIONS | {"lora_alpha": 4}, init_lora_weights="loftq", loftq_config=options)
    model = get_peft_model(net(), config)
    layer = model.base_model.model.linear
    rounded = layer.base_layer.weight.detach().clone()
    levels = {4: 16 * rounded.numel() // 64, 8: 255 * len(rounded)}[bits]
    assert len(rounded.unique()) <= levels
    assert 0 < (rounded - weight).norm() < {4: 0.15, 8: 0.01}[bits] * weight.norm()
    merged = model.merge_and_unload().linear.weight
    assert (merged - weight).norm() < 0.9 * (rounded - weight).norm()


def test_loftq_refuses_a_second_and_stays_as_it_was():
    options = OPTIONS | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}
    model = get_peft_model(net(), LoraConfig(**options))
    before = model(*TOKENS)
    with pytest.raises(ValueError, match="'default' runs this Linear with a weight of its own"):
        model.add_adapter("other", LoraConfig(**options))
    assert torch.equal(model(*TOKENS), before)
    model.add_adapter("plain", LoraConfig(**OPTIONS))


def test_loftq_reloads_over_the_original_base(tmp_path):
    config = LoraConfig(**OPTIONS, init_lora_weights="loftq", loftq_config=veneer.LoftQConfig(loftq_bits=4))
    model = get_peft_model(net(), config)
    stir(model.base_model, "default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(*TOKENS), model(*TOKENS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa", "r": 17}, "linear: PiSSA takes r=17 directions .* has only 16"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, and r is 3"),
        ({"init_lora_weights": "loftq", "r": 17, "loftq_config": {"loftq_bits": 4}}, "linear: LoftQ takes r=17"),
    ],
)
def test_a_start_that_does_not_exist_changes_nothing(options, message):
    base = net()
    before = base(*TOKENS)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraConfig(**OPTIONS | {"target_modules": ["transposed", "linear"]} | options))
    assert type(base.linear) is nn.Linear
    assert torch.equal(base(*TOKENS), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pisa"}, "'pisa' is unknown; expected True, False, 'gaussian', .*'pissa'"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}},
            r"loftq_bits=3 .* expected one of \[4, 8\]",
        ),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config has an effect only with init_lora_weights='loftq'"),
        ({"init_lora_weights": "olora", "lora_bias": True}, "lora_bias=True goes only with a plain start"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)
