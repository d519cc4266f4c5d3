"""What a method's author writes: a config, a base, one function. Everything else follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from veneer.core import AdaptedModel, Folded, PeftConfig, method

from .conftest import KINDS, Net


@dataclass
class HadamardConfig(PeftConfig):
    """Options of the method below."""


@method(HadamardConfig)
class Hadamard(Folded):
    """``W' = W * (1 + b a^T)``: no sum, no map, just another weight."""

    def __init__(self, config, site, path, device, dtype):
        super().__init__(config, site, path, device, dtype)
        self.hada_a, self.hada_b = self.new(site.cols), self.new(site.out)

    def reset(self):
        nn.init.normal_(self.hada_a)
        nn.init.normal_(self.hada_b)

    def fold(self, weight, bias):
        return weight * (1 + torch.outer(self.hada_b, self.hada_a)), bias


def test_runs_merges_saves_and_weighs_at_every_kind_of_layer():
    for kind, spec in KINDS.items():
        model, x = AdaptedModel(Net(kind)), spec.sample()
        model.add("a", HadamardConfig(target_modules=["layer"]))
        y, base = model(x), model.model.layer.base_layer(x)
        assert not torch.allclose(y, base, atol=1e-3)
        model.set_weight("a", 0.5)
        torch.testing.assert_close(model(x), torch.lerp(base, y, 0.5))
        model.set_weight("a", 1.0)
        model.merge()
        torch.testing.assert_close(model(x), y)
        model.unmerge()
        model.load("b", HadamardConfig(target_modules=["layer"]), model.tensors("a"))
        model.activate("b")
        assert torch.equal(model(x), y)
