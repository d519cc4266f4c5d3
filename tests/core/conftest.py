"""Methods and layer kinds that the laws are tried on. A new method is tested by being registered and given one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from veneer.core import AdaptedModel, PeftConfig
from veneer.core.config import config_classes

RANDOM = {"LN_TUNING": "", "LORA": "init_lora_weights", "ADALORA": "init_lora_weights", "IA3": "init_ia3_weights"}
"""The option that turns a method's identity start into a random one, where it is not `init_weights`; "" for none."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {"r": 3, "lora_alpha": 5},
        {"r": 2, "use_rslora": True, "init_lora_weights": "gaussian"},
        {"r": 2, "use_dora": True},
        {"r": 2, "use_dora": True, "dora_on_input": True},
        {"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa"},
    ],
    "LOHA": [{"r": 2, "alpha": 3}, {"r": 1}, {"r": 2, "use_effective_conv2d": True}, {"r": 2, "use_dora": True}],
    "LOKR": [
        {"r": 1, "alpha": 2},
        {"r": 8},
        {"r": 1, "use_effective_conv2d": True, "decompose_both": True},
        {"r": 1, "init_weights": "lycoris", "decompose_factor": 2},
        {"r": 1, "use_dora": True},
        {"r": 8, "left_shape": (2, 1)},
    ],
    "IA3": [{"feedforward_modules": []}, {"feedforward_modules": ["layer"], "target_modules": ["layer"]}],
    "LN_TUNING": [{}],
    "TRAINABLE_TOKENS": [{"token_indices": [7, 1, 3]}],
    "VERA": [{"r": 3}, {"r": 2, "save_projection": False, "projection_prng_key": 7}],
    "ADALORA": [{"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}],
    "OFT": [{"oft_block_size": 2}, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True}],
    "FULL": [{"scale": 1.5}, {"train_bias": True}],
    "GLORA": [{"r": 2, "alpha": 1}],
    "DIAG_OFT": [{"block_size": 2, "rescaled": True}, {"block_size": 2, "butterflies": 1, "constraint": 0.1}],
}


@dataclass(frozen=True)
class Kind:
    """One kind of layer, and inputs for it."""

    make: Callable[[], nn.Module]
    sample: Callable[[], Tensor]


def _batch(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


KINDS = {
    "linear": Kind(lambda: nn.Linear(8, 12), _batch(5, 3, 8)),
    "linear-nobias": Kind(lambda: nn.Linear(8, 12, bias=False), _batch(5, 8)),
    "gpt2": Kind(lambda: Conv1D(12, 8), _batch(5, 3, 8)),
    "conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, padding=1), _batch(5, 4, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), _batch(5, 4, 9, 9)),
    "conv2d-1x1": Kind(lambda: nn.Conv2d(4, 6, 1), _batch(5, 4, 3, 3)),
    "conv2d-reflect": Kind(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), _batch(5, 4, 7, 7)),
    "conv2d-same": Kind(lambda: nn.Conv2d(4, 6, (3, 5), padding="same", padding_mode="circular"), _batch(5, 4, 8, 8)),
    "conv2d-groups": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), _batch(5, 4, 9, 9)),
    "conv3d": Kind(lambda: nn.Conv3d(4, 6, 2), _batch(5, 4, 4, 4, 4)),
    "embedding": Kind(lambda: nn.Embedding(12, 8, padding_idx=0), lambda: torch.randint(0, 12, (5, 7))),
}
NORMS = {
    "layernorm": Kind(lambda: nn.LayerNorm(8), _batch(5, 3, 8)),
    "rmsnorm": Kind(lambda: nn.RMSNorm(8), _batch(5, 3, 8)),
    "groupnorm": Kind(lambda: nn.GroupNorm(2, 8), _batch(5, 8, 4, 4)),
}
"""Layers that only methods with `norms` adapt."""

UNFIT = {
    ("ia31", "embedding"),
    *(("trainable_tokens", k) for k in [*KINDS] if k not in ("linear", "linear-nobias", "embedding")),
    *(("full1", kind) for kind in ("embedding", "rmsnorm", "linear-nobias", "conv2d-groups")),
}
"""An embedding has no input features to scale, tokens are rows, and a change of the bias needs a layer that has one."""

METHODS = [
    pytest.param(method.value, i, id=f"{method.value.lower()}{i or ''}")
    for method, config_class in config_classes().items()
    if not config_class.prompts  # which are no change of layers; tests/prompts has their laws
    for i in range(len(SETTINGS[method.value]))
]
CASES = [
    pytest.param(*m.values, kind, id=f"{m.id}-{kind}")
    for m in METHODS
    for kind in [*KINDS, *(NORMS if config_classes()[m.values[0]].norms else ())]
    if (m.id, kind) not in UNFIT
]
each_case = pytest.mark.parametrize(("method", "variant", "kind"), CASES)
MATRIX_CASES = [case for case in CASES if case.values[2] in KINDS]
"""Layers that a LoRA can change."""
each_matrix_case = pytest.mark.parametrize(("method", "variant", "kind"), MATRIX_CASES)


def make_config(method: str, variant: int, random: bool = True, **changes: Any) -> PeftConfig:
    """A small config; `random` starts it away from the identity."""
    options = {"target_modules": ["layer"]} | SETTINGS[method][variant] | changes
    if random and options.get("init_lora_weights") != "pissa":  # which moves from its start when stirred
        options |= {option: False for option in [RANDOM.get(method, "init_weights")] if option}
    return config_classes()[method](**options)


class Net(nn.Module):
    """One layer of a kind between nothing."""

    def __init__(self, kind: str):
        super().__init__()
        self.layer = (KINDS | NORMS)[kind].make()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def stir(model: AdaptedModel, *names: str) -> None:
    """Move every adapter tensor, as training would: magnitudes included, which random starts leave alone."""
    with torch.no_grad():
        for name in names:
            for parameter in model.parameters_of(name):
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))


def build(method: str, variant: int, kind: str, *names: str, random: bool = True) -> tuple[AdaptedModel, Tensor]:
    """A net with adapters of these names (the first is active), and a batch for it."""
    torch.manual_seed(0)
    model = AdaptedModel(Net(kind).eval())
    for name in names:
        model.add(name, make_config(method, variant, random))
    if random:
        stir(model, *names)
    return model, (KINDS | NORMS)[kind].sample()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
