"""Low-rank adapters of one layer run together as they run one by one."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import nn
from veneer import LoraConfig
from veneer.core import AdaptedModel
from veneer.core.kernels import GroupedFactors

from .conftest import Net, stir

ASSIGNMENTS = {
    "in order": ["a", "a", "b", "b", "c", "c"],
    "in turn": ["a", "b", "c", "a", "b", "c"],
    "uneven": ["c", "a", "a", "a", "a", "b"],
    "with the base": ["__base__", "a", "b", "__base__", "a", "c"],
    "one each": ["b", "a", "__base__", "c"],
    "mostly the base": ["__base__", "__base__", "__base__", "__base__", "a", "__base__"],
}


def prepared(dtype=torch.float64, kind="linear", **options) -> AdaptedModel:
    torch.manual_seed(0)
    model = AdaptedModel(Net(kind).to(dtype).eval())
    for name, rank in zip("abc", (2, 5, 3), strict=True):
        config = LoraConfig(r=rank, lora_alpha=4, target_modules=["layer"], init_lora_weights=False, **options)
        model.add(name, config, autocast_adapter_dtype=False)
    stir(model, *"abc")
    model.set_weight("b", 0.3)
    return model


def both_ways(run):
    """The result of `run` on the grouped path, which must have been taken, and on the general one."""
    with mock.patch.object(GroupedFactors, "run", autospec=True, side_effect=GroupedFactors.run) as used:
        grouped = run()
    assert used.called
    with mock.patch.object(GroupedFactors, "dropout", return_value=None):
        return grouped, run()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", ["linear", "gpt2"])
@pytest.mark.parametrize("names", ASSIGNMENTS.values(), ids=ASSIGNMENTS.keys())
def test_equal_in_float64_with_equal_gradients(names, kind, tokens):
    model = prepared(kind=kind)
    x = torch.randn(len(names), tokens, 8, dtype=torch.float64, requires_grad=True)

    def run():
        parameters = [p for name in set(names) - {"__base__"} for p in model.parameters_of(name)]
        with model.rows(names):
            y = model(x)
            return y, torch.autograd.grad(y.square().sum(), [x, *parameters])

    (y, gradients), (plain_y, plain_gradients) = both_ways(run)
    torch.testing.assert_close(y, plain_y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-11, rtol=1e-11)


def test_equal_in_half_precision_to_one_rounding():
    model, x = prepared(torch.bfloat16), torch.randn(6, 3, 8, dtype=torch.bfloat16)

    @torch.no_grad()
    def run():
        with model.rows(ASSIGNMENTS["in turn"]):
            return model(x)

    grouped, plain = both_ways(run)
    assert grouped.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, plain, atol=0.05, rtol=0.02)


@torch.no_grad()
def test_changes_of_the_adapters_are_noticed():
    model, x, names = prepared(), torch.randn(6, 8, dtype=torch.float64), ASSIGNMENTS["in turn"]

    def check():
        grouped, plain = both_ways(lambda: model(x))
        torch.testing.assert_close(grouped, plain, atol=1e-12, rtol=1e-12)
        return grouped

    with model.rows(names):
        seen = [check()]
        stir(model, "a")
        seen.append(check())
        model.set_weight("c", 0.5)
        seen.append(check())
        factor = model.adapters("b")["layer"].lora_A
        factor.weight = nn.Parameter(factor.weight * 2)
        seen.append(check())
    assert all(not torch.allclose(one, two) for one, two in pairwise(seen))
    with model.rows(names[::-1]):
        check()


def test_stacks_are_made_once_for_inference():
    model, x, names = prepared(), torch.randn(6, 8, dtype=torch.float64), ASSIGNMENTS["in turn"]
    with mock.patch("veneer.core.kernels.stack_factors", side_effect=ValueError("made")) as make:
        with model.rows(names), pytest.raises(ValueError, match="made"):
            model(x)
        make.side_effect = None
        make.return_value = torch.zeros(3, 5, 8).double(), torch.zeros(3, 12, 5).double()
        for _ in range(3):
            with torch.no_grad(), model.rows(names):
                model(x)
    assert make.call_count == 2


def test_one_dropout_is_shared_and_different_ones_run_apart():
    names, x = ASSIGNMENTS["one each"], torch.ones(4, 50, 8, dtype=torch.float64)
    model = prepared(lora_dropout=0.5).train()
    with model.rows(names), torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
        expected = model(x)
        model.train()
        mean = torch.stack([model(x) for _ in range(200)]).mean((0, 2))
    torch.testing.assert_close(mean, expected[:, 0], atol=0.2, rtol=0.1)
    model.add("d", LoraConfig(r=2, target_modules=["layer"]))
    with mock.patch.object(GroupedFactors, "run", side_effect=AssertionError), model.rows(["a", "d", "b", "c"]):
        model.train()(x)


def test_a_bias_of_an_adapter_runs_apart():
    model, x = prepared(lora_bias=True), torch.randn(4, 3, 8, dtype=torch.float64)
    with mock.patch.object(GroupedFactors, "run", side_effect=AssertionError), model.rows(ASSIGNMENTS["one each"]):
        model(x)


def test_compiles_as_one_graph():
    model, x = prepared(), torch.randn(6, 3, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with model.rows(ASSIGNMENTS["uneven"]):
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
