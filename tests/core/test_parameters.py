"""`target_parameters`: LoRA of experts and other bare parameters, as in `peft`."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from veneer import LoraConfig, PeftModel, get_peft_model, save_as_lora
from veneer.core.tuners.parameters import Changed, Stack

from .conftest import stir
from .test_reference import (
    adapt_theirs,
    assert_same_files,
    assert_same_outputs,
    changed,
    read_theirs,
    save_theirs,
)


class Experts(nn.Module):
    """Stacks (E, out, in) of which a call uses some, and a gate that is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 6, 8)), nn.Parameter(0.3 * torch.randn(4, 8, 6))
        self.gate = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        gate = torch.sigmoid(F.linear(x, self.gate))
        return sum(F.linear(gate * F.linear(x, self.up[i]).tanh(), self.down[i]) for i in used)


class Transposed(nn.Module):
    """Stacks (E, in, out), all used at once, as in GPT-OSS."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(0.3 * torch.randn(4, 8, 6)), nn.Parameter(0.3 * torch.randn(4, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up).tanh(), self.down).sum(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.transposed = nn.Linear(8, 8), Experts(), Transposed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.transposed(self.experts(self.first(x), used=[0, 2]))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = (torch.arange(40.0).view(5, 8).sin(),)
NAMES = ["experts.up", "experts.down", "transposed.up", "transposed.down"]
OPTIONS = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": [], "target_parameters": NAMES}
CASES = {
    "stacks": {},
    "one each": {"target_parameters": ["experts.down", "transposed.up"]},
    "a matrix": {"target_parameters": ["experts.gate"]},
    "with layers": {"target_modules": ["first"], "target_parameters": ["up", "gate"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"experts.down": 2}, "alpha_pattern": {"transposed.up": 2}},
}


@pytest.mark.parametrize("name", CASES)
def test_files_go_both_ways(name, tmp_path):
    options = OPTIONS | CASES[name]
    theirs = changed(adapt_theirs(net(), "LoraConfig", options))
    save_theirs(theirs, tmp_path / "theirs")
    assert_same_outputs(theirs, PeftModel.from_pretrained(net(), tmp_path / "theirs"), X)
    ours = changed(get_peft_model(net(), LoraConfig(**options)))
    ours.save_pretrained(tmp_path / "ours")
    assert_same_outputs(ours, read_theirs(net(), tmp_path / "ours"), X)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_mixtral(implementation, tmp_path):
    base, inputs = mixtral(), {"input_ids": torch.arange(10).view(2, 5)}
    base.set_experts_implementation(implementation)
    options = OPTIONS | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    options |= {"target_modules": ["q_proj"]}
    ours = changed(get_peft_model(deepcopy(base), LoraConfig(**options)))
    ours.save_pretrained(tmp_path)
    assert_same_outputs(ours, read_theirs(deepcopy(base), tmp_path), inputs)
    expected = ours(**inputs).logits
    torch.testing.assert_close(ours.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_merged_parameters():
    model = changed(get_peft_model(net(), LoraConfig(**OPTIONS)))
    parameters = model.base_model.parameters_of("default")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    found = torch.autograd.grad(model(*X).square().mean(), parameters)
    twin = net()
    tensors = {}
    for path, adapter in model.base_model.adapters("default").items():
        for name, tensor in adapter.fold_parameters(dict(twin.get_submodule(path)._parameters)).items():
            tensors[f"{path}.{name}"] = tensor
    expected = torch.autograd.grad(torch.func.functional_call(twin, tensors, X).square().mean(), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_several_adapters_switch_stack_and_unmerge_exactly():
    base = net()
    before, plain = deepcopy(base.state_dict()), base(*X)
    model = get_peft_model(base, LoraConfig(**OPTIONS), "a")
    model.add_adapter("b", LoraConfig(**OPTIONS | CASES["one each"]))
    stir(model.base_model, "a", "b")
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model(*X)
    assert not torch.allclose(alone["a"], alone["b"])
    model.set_adapter(["a", "b"])
    both = model(*X)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(*X), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(*X), both)
    with model.disable_adapter():
        assert torch.equal(model(*X), plain)
    model.base_model.set_weight("a", 0.0)
    torch.testing.assert_close(model(*X), alone["b"])
    back = model.unload()
    assert all(torch.equal(tensor, before[key]) for key, tensor in back.state_dict().items())
    assert set(vars(back.experts)) == set(vars(net().experts))


def test_only_the_experts_that_are_used_are_computed(monkeypatch):
    model = changed(
        get_peft_model(net(), LoraConfig(**OPTIONS | {"target_parameters": ["experts.up", "experts.down"]}))
    )
    expected = model(*X)
    monkeypatch.setattr(Stack, "changed", lambda *_: pytest.fail("the whole stack was built"))
    assert torch.equal(model(*X), expected)


def test_a_changed_stack_is_as_good_as_its_tensor():
    model = changed(get_peft_model(net(), LoraConfig(**OPTIONS)))
    stack, weight = model.base_model.layers["experts"].adapters["default"].stacks["up"], net().experts.up
    found = Changed(weight, stack, 0.5)
    one = found[torch.tensor(2)]
    whole = stack.changed(weight, 0.5)
    torch.testing.assert_close(one, whole[2])
    torch.testing.assert_close(torch.stack(list(found)), whole)
    assert (found.shape, found.dtype, len(found), found.ndim) == (weight.shape, weight.dtype, 4, 3)
    torch.testing.assert_close(found[1:3], whole[1:3])
    torch.testing.assert_close(found[torch.tensor([True, False, True, False])], whole[::2])
    torch.testing.assert_close(torch.bmm(found, whole.mT), torch.bmm(whole, whole.mT))
    torch.testing.assert_close(found @ whole.mT, whole @ whole.mT)
    torch.testing.assert_close(whole.mT @ found, whole.mT @ whole)
    torch.testing.assert_close(found.transpose(1, 2), whole.mT)


def test_errors_leave_the_model_as_it_was(tmp_path):
    base = net()
    cases = [
        ({"target_parameters": ["experts.upp"]}, r"\['experts.upp'\] matches no parameter of Net; near: experts.up"),
        ({"target_parameters": ["first.weight"], "target_modules": ["first"]}, "first is in target_modules, and"),
        ({"target_parameters": ["first.bias"]}, r"first.bias has shape \(8,\): target_parameters are matrices"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, LoraConfig(**OPTIONS | options))
        assert type(base.experts) is Experts
        assert type(base.first) is nn.Linear
    patterns = LoraConfig(**OPTIONS, rank_pattern={"experts.nowhere": 2})
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        get_peft_model(net(), patterns)
    for option in ({"use_dora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ValueError, match=f"target_parameters does not go with {next(iter(option))}"):
            LoraConfig(**OPTIONS | option)
    model = get_peft_model(base, LoraConfig(**OPTIONS))
    for rank in (None, 2):
        with pytest.raises(ValueError, match="adapters of bare parameters"):
            save_as_lora(tmp_path, model, rank)
    with pytest.raises(ValueError, match="adapters of bare parameters"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="experts is one of a layer of experts"):
        model(*X, adapter_names=["default", "__base__", "default", "default", "default"])
    model.add_adapter("layer", LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="first has adapter 'layer' already"):
        model.add_adapter("other", LoraConfig(**OPTIONS | {"target_parameters": ["first.weight"]}))
