"""Any sequence of merges, unmerges, switches, weights, casts, copies, saves, loads and deletes.

After every step the model's output is that of float64 mathematics on what should run, and unmerging gives the bits from
before the merge. A step that is refused changes nothing.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from veneer.core import (
    AdaptedModel,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MergedError,
    OFTConfig,
    PeftConfig,
    load_adapter,
    save_adapter,
)

WIDTH = 6
NAMES = ["one", "two", "three"]
PATHS = ["down.q", "up.q", "up.v"]

# ---------------------------------------------------------------- the methods, once more, in float64

Weights = tuple[Tensor, Tensor]
Fold = Callable[[dict[str, Tensor], Tensor, Tensor], Weights]


def lora(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    return w + 4 / 2 * t["lora_B.weight"] @ t["lora_A.weight"], b


def dora(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    v, _ = lora(t, w, b)
    return t["lora_magnitude_vector"][:, None] * v / v.norm(dim=1, keepdim=True), b


def loha(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    return w + 3 / 2 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]), b


def lokr(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    return w + 2 / 1 * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]), b


def ia3(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    scale = t["ia3_l"].flatten()
    return scale[:, None] * w, scale * b


def oft(t: dict[str, Tensor], w: Tensor, b: Tensor) -> Weights:
    turns = []
    for angle in t["oft_R.weight"].flatten():
        q = torch.tensor([[0.0, angle], [-angle, 0.0]], dtype=torch.float64)
        turns.append((torch.eye(2) - q) @ torch.linalg.inv(torch.eye(2) + q))
    return w @ torch.block_diag(*turns).T, b


METHODS: dict[str, tuple[Fold, Callable[[], PeftConfig]]] = {
    "lora": (lora, lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["q", "v"], init_lora_weights=False)),
    "dora": (dora, lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["up.q"], use_dora=True)),
    "loha": (loha, lambda: LoHaConfig(r=2, alpha=3, target_modules=["q"], init_weights=False)),
    "lokr": (lokr, lambda: LoKrConfig(r=1, alpha=2, decompose_factor=2, target_modules=["q", "v"], init_weights=False)),
    "ia3": (ia3, lambda: IA3Config(target_modules=["v"], feedforward_modules=[], init_ia3_weights=False)),
    "oft": (oft, lambda: OFTConfig(oft_block_size=2, use_cayley_neumann=False, target_modules=["up.q", "v"])),
}
ADDITIVE = ("lora", "loha", "lokr")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH)})
        self.up = nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH), "v": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return self.up["v"](torch.tanh(self.up["q"](torch.tanh(self.down["q"](x)))))


@dataclass
class Expected:
    """One adapter, as it should be."""

    method: str
    tensors: dict[str, Tensor]
    strengths: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PATHS, 1.0))

    def fold(self, path: str, w: Tensor, b: Tensor) -> Weights:
        here = {k.removeprefix(path + "."): t.double() for k, t in self.tensors.items() if k.startswith(path + ".")}
        if not here:
            return w, b
        new = METHODS[self.method][0](here, w, b)
        strength = self.strengths[path]
        return torch.lerp(w, new[0], strength), torch.lerp(b, new[1], strength)

    @property
    def paths(self) -> set[str]:
        return {path for path in PATHS if any(key.startswith(path + ".") for key in self.tensors)}


names = st.sampled_from(NAMES)
lists_of_names = st.lists(names, max_size=3, unique=True)
numbers = st.sampled_from([1.0, 0.5, 0.0, -0.7])
patterns = st.sampled_from(["q", "up", "down.q", "v", "up.v"])
weights_ = numbers | st.dictionaries(patterns, numbers, min_size=1, max_size=1)


class Merging(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 99), methods=st.lists(st.sampled_from([*METHODS]), min_size=2, max_size=3))
    def start(self, seed: int, methods: list[str]) -> None:
        torch.manual_seed(seed)
        self.model = AdaptedModel(Net().eval())
        self.x = torch.randn(4, WIDTH)
        self.base = {path: tuple(t.detach().clone() for t in self.stored(path)) for path in PATHS}
        self.adapters: dict[str, Expected] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.kept: dict[str, bool] = {}
        self.enabled = True
        self.dtype, self.rounded = torch.float32, False
        for name, method in zip(NAMES, methods, strict=False):
            self.add(name, method)

    # ------------------------------------------------------------ looking at the model

    def stored(self, path: str) -> Weights:
        module = self.model.model.get_submodule(path)
        module = getattr(module, "base_layer", module)
        return module.weight, module.bias

    def snapshot(self) -> Any:
        state, strengths = self.model.state, []
        for name in self.model.configs:
            strengths += [(name, path, a.strength) for path, a in self.model.adapters(name).items()]
        tensors = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        return tensors, (state.active, state.enabled, state.running, state.merged, [*state.configs], strengths)

    def step(self, error: type[Exception] | None, action: Callable[[], Any]) -> None:
        """Do it, or see it refused with every bit as before."""
        if error is None:
            action()
            return
        tensors, others = self.snapshot()
        try:
            action()
        except error:
            pass
        else:
            raise AssertionError(f"no {error.__name__}")
        after, others_after = self.snapshot()
        assert others_after == others
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())

    # ------------------------------------------------------------ steps

    def add(self, name: str, method: str) -> None:
        error = ValueError if name in self.adapters else None
        self.step(error, lambda: self.model.add(name, METHODS[method][1]()))
        if error:
            return
        for parameter in self.model.parameters_of(name):
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        self.arrived(name, method)

    def arrived(self, name: str, method: str) -> None:
        self.adapters[name] = Expected(method, {k: t.clone() for k, t in self.model.tensors(name).items()})
        if not self.active and not self.merged:
            self.active = (name,)

    @rule(name=names, method=st.sampled_from([*METHODS]))
    def add_an_adapter(self, name: str, method: str) -> None:
        self.add(name, method)

    @rule(name=names, new=names)
    def save_and_load(self, name: str, new: str) -> None:
        if name not in self.adapters or new in self.adapters:
            return
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(folder, self.model.configs[name], self.model.tensors(name))
            self.model.load(new, *load_adapter(folder))
        self.arrived(new, self.adapters[name].method)
        loaded, saved = self.adapters[new].tensors, self.adapters[name].tensors
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key].float(), saved[key].float()) for key in saved)

    @rule(chosen=lists_of_names)
    def activate(self, chosen: list[str]) -> None:
        unknown = not set(chosen) <= self.adapters.keys()
        error = ValueError if unknown else MergedError if self.merged and tuple(chosen) != self.active else None
        self.step(error, lambda: self.model.activate(*chosen))
        if not error:
            self.active = tuple(chosen)

    @rule(flag=st.booleans())
    def enable(self, flag: bool) -> None:
        error = MergedError if self.merged and not flag else None
        self.step(error, lambda: self.model.enable(flag))
        if not error:
            self.enabled = flag

    @rule(name=names, weight=weights_)
    def set_weight(self, name: str, weight: Any) -> None:
        error = self.no_weight(name, weight)
        self.step(error, lambda: self.model.set_weight(name, weight))
        if not error:
            self.weigh(name, weight)

    def no_weight(self, name: str, weight: Any) -> type[Exception] | None:
        if name not in self.adapters:
            return ValueError
        if name in self.merged:
            return MergedError
        matching = self.adapters[name].paths & set(self.matching(weight))
        return None if matching else ValueError

    def matching(self, weight: Any) -> dict[str, float]:
        if not isinstance(weight, dict):
            return dict.fromkeys(PATHS, weight)
        ((pattern, number),) = weight.items()
        return {path: number for path in PATHS if f".{pattern}." in f".{path}."}

    def weigh(self, name: str, weight: Any) -> None:
        self.adapters[name].strengths = dict.fromkeys(PATHS, 1.0) | self.matching(weight)

    @rule(name=names)
    def delete(self, name: str) -> None:
        stuck = name in self.merged or (self.merged and name in self.active)
        error = ValueError if name not in self.adapters else MergedError if stuck else None
        self.step(error, lambda: self.model.delete(name))
        if error:
            return
        del self.adapters[name]
        if name in self.active:
            left = tuple(n for n in self.active if n != name)
            self.active = left or tuple(self.adapters)[:1]

    @rule(
        chosen=st.none() | lists_of_names,
        keep=st.sampled_from(["cpu", "cpu", "device", "cpu", "none"]),
        safe=st.booleans(),
    )
    def merge(self, chosen: list[str] | None, keep: str, safe: bool) -> None:
        wanted = self.active if chosen is None else tuple(chosen)
        error = None if self.enabled and set(wanted) <= self.adapters.keys() else ValueError
        self.step(error, lambda: self.model.merge(chosen, safe, keep))
        if not error:
            self.note_merged(wanted, keep)

    @rule(weights=st.dictionaries(names, weights_, min_size=1, max_size=2))
    def merge_with_weights(self, weights: dict[str, Any]) -> None:
        unknown = not weights.keys() <= self.adapters.keys()
        refusals = (self.no_weight(name, weight) for name, weight in weights.items())
        error = ValueError if unknown or not self.enabled else next((e for e in refusals if e), None)
        self.step(error, lambda: self.model.merge(weights=weights))
        if not error:
            for name, weight in weights.items():
                self.weigh(name, weight)
            self.note_merged(tuple(weights), "cpu")

    def note_merged(self, wanted: tuple[str, ...], keep: str) -> None:
        new = tuple(n for n in wanted if n not in self.merged)
        for path in {path for name in new for path in self.adapters[name].paths}:
            self.kept.setdefault(path, keep != "none")
        self.merged += new

    @rule()
    def unmerge(self) -> None:
        error = None if all(self.kept.values()) else MergedError
        self.step(error, self.model.unmerge)
        if not error:
            self.merged, self.kept = (), {}
            self.base = {path: tuple(t.to(self.dtype) for t in pair) for path, pair in self.base.items()}
            self.rounded = self.dtype == torch.bfloat16

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        if self.merged and self.dtype == torch.bfloat16:
            return  # a cast up while merged brings back the bits of what was kept, and of nothing else
        self.model.to(dtype)
        self.dtype = dtype
        self.rounded = dtype == torch.bfloat16 or (self.rounded and bool(self.merged))
        for name, adapter in self.adapters.items():
            adapter.tensors = {key: tensor.clone() for key, tensor in self.model.tensors(name).items()}
        if not self.merged:
            self.base = {path: tuple(t.to(dtype) for t in pair) for path, pair in self.base.items()}

    @rule()
    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    # ------------------------------------------------------------ what must hold

    @invariant()
    @precondition(lambda self: hasattr(self, "model"))
    def output_is_that_of_what_runs(self) -> None:
        running = self.merged or (self.active if self.enabled else ())
        y = self.x.double()
        for i, path in enumerate(PATHS):
            w, b = (t.double() for t in self.base[path])
            for name in running:
                w, b = self.adapters[name].fold(path, w, b)
            y = F.linear(torch.tanh(y) if i else y, w, b)
        got = self.model(self.x.to(self.dtype)).detach().double()
        tolerance = 0.1 if self.rounded else 1e-5
        torch.testing.assert_close(got, y, atol=tolerance * (1 + y.abs().max().item()), rtol=0)

    @invariant()
    @precondition(lambda self: hasattr(self, "model") and not self.merged)
    def weights_are_those_from_before(self) -> None:
        for path, before in self.base.items():
            assert all(torch.equal(now, then) for now, then in zip(self.stored(path), before, strict=True)), path


Merging.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # to shrink a failure takes minutes
    suppress_health_check=list(HealthCheck),
)
TestMerging = Merging.TestCase
