"""Merging: in place and in tiles, with weights per adapter and block, all layers or none."""

from __future__ import annotations

import re
from copy import deepcopy

import peft
import pytest
import torch
import veneer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from veneer.core import AdaptedModel, LoHaConfig, LoKrConfig, LoraConfig, MergedError, NotMergeableError, layer
from veneer.core.adapter import Adapter
from veneer.core.stack import fold

from .conftest import METHODS, UNFIT, build, each_case, make_config, stir


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are alive, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if StorageWeakRef(storage) not in given:
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Blocks(nn.Module):
    """Two blocks of two layers."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.down = nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})
        self.up = nn.ModuleDict({"q": nn.Linear(width, width), "v": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.down, self.up):
            x = block["v"](torch.tanh(block["q"](x)))
        return x


CONFIGS = {
    "subject": LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False),
    "style": LoKrConfig(r=1, target_modules=["q"], init_weights=False),
    "light": LoHaConfig(r=2, target_modules=["v"], use_dora=True, init_weights=False),
}


def blocks(*names: str) -> tuple[AdaptedModel, Tensor]:
    model = AdaptedModel(Blocks().eval())
    for name in names or CONFIGS:
        model.add(name, deepcopy(CONFIGS[name]))
    stir(model, *model.configs)
    return model, torch.randn(3, 6)


# ---------------------------------------------------------------- in tiles, in place


@each_case
@pytest.mark.parametrize("keep", ["cpu", "none"])
def test_tiles_give_the_folded_weight(method, variant, kind, keep, monkeypatch):
    monkeypatch.setattr(layer, "TILE", 24)  # one row to three
    model, _ = build(method, variant, kind, "a", "b")
    module = model.model.layer.base_layer.double()
    site, adapters = model.model.layer.site, model.model.layer.adapters
    weight, bias = site.read()
    for name in ("a", "b"):
        weight, bias = adapters[name].double().fold(weight, bias)
    address = module.weight.data_ptr()
    model.merge(["a", "b"], keep_original=keep)
    assert (module.weight.data_ptr() == address) == (keep == "none")
    torch.testing.assert_close(site.read(), (weight, bias), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["conv2d", "conv2d-groups"])
@pytest.mark.parametrize(("method", "variant"), [m for m in METHODS if (m.id, "conv2d") not in UNFIT])
def test_merging_overwrites_weights_in_other_memory_formats(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    model.to(memory_format=torch.channels_last)
    y, weight = model(x), model.model.layer.weight
    strides = weight.stride()
    plain = model.merge_and_detach()
    assert plain.layer.weight is weight
    assert weight.stride() == strides
    torch.testing.assert_close(plain(x), y, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "variant", "layers"),
    # the float32 copies of one layer's weight that merging two adapters takes: 0 stands for tiles. What does
    # not fold by rows is widened whole in half precision
    [
        ("LORA", 0, 0), ("LORA", 2, 0), ("LOHA", 0, 0), ("LOHA", 3, 0), ("LOKR", 0, 0), ("LOKR", 2, 0),
        ("LOKR", 4, 0), ("OFT", 0, 0), ("IA3", 0, 1), ("IA3", 1, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_a_merge_is_that_of_one_layer(name, variant, layers, dtype, monkeypatch):
    monkeypatch.setattr(layer, "TILE", 2**12)
    model = AdaptedModel(nn.ModuleDict({str(i): nn.ModuleDict({"layer": nn.Linear(256, 512)}) for i in range(3)}))
    for adapter in ("a", "b"):
        model.add(adapter, make_config(name, variant))
    model.model.to(dtype)
    with PeakMemory() as memory:
        model.merge(["a", "b"], keep_original="none")
    size = 256 * 512 * 4
    widened = 1.5 * size if layers and dtype != torch.float32 else 0
    assert memory.peak <= layers * size + widened + size / 3, memory.peak / size


def test_keeping_the_original_takes_one_new_weight_per_layer(monkeypatch):
    monkeypatch.setattr(layer, "TILE", 2**12)
    model = AdaptedModel(nn.Sequential(nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)))
    model.add("a", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    with PeakMemory() as memory:
        model.merge(keep_original="device")
    assert memory.peak <= 2 * 256 * 512 * 4 * 1.1


# ---------------------------------------------------------------- weights by adapter and by block


def folded(model: AdaptedModel, path: str, strengths: dict[str, float]) -> Tensor:
    """W of a layer in float64 with adapters at these strengths."""
    copy = deepcopy(model.layers[path]).double()
    weight, bias = copy.site.read()
    for name, strength in strengths.items():
        if name in copy.adapters:
            copy.adapters[name].strength = strength
            weight, bias = fold(copy.adapters[name], weight, bias)
    return weight


@pytest.mark.parametrize("for_good", [False, True])
def test_weights_by_adapter_and_block(for_good):
    model, _ = blocks()
    weights = {"subject": 0.8, "style": {"up": 1.0, ".*": 0.3}, "light": {"down.v": -0.5}}
    expected = {
        "down.q": folded(model, "down.q", {"subject": 0.8, "style": 0.3}),
        "down.v": folded(model, "down.v", {"subject": 0.8, "light": -0.5}),
        "up.q": folded(model, "up.q", {"subject": 0.8, "style": 1.0}),
        "up.v": folded(model, "up.v", {"subject": 0.8, "light": 1.0}),
    }
    if for_good:
        plain = model.merge_and_detach(weights=weights)
    else:
        model.merge(weights=weights)
        plain = model.model
    for path, weight in expected.items():
        torch.testing.assert_close(plain.get_submodule(path).weight, weight.float(), atol=1e-5, rtol=1e-4)


def test_weights_hold_after_unmerging():
    model, x = blocks()
    model.merge(weights={"subject": {"up": 0.5, ".*": 0}, "style": 2.0})
    y = model(x)
    model.unmerge()
    model.activate("subject", "style")
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": {"subjekt": 1.0}}, ValueError, "Adapter subjekt not found"),
        ({"weights": {"subject": 1.0, "style": {"mid": 1.0}}}, ValueError, "'mid' matches none of the 2 layers"),
        ({"weights": {"subject": float("nan")}}, ValueError, "expected a finite number"),
        ({"names": ["subject"], "weights": {"style": 1.0}}, ValueError, r"weights has \['style'\], which are not"),
        ({"names": ["subject"], "keep_original": "disk"}, ValueError, "expected 'cpu', 'device' or 'none'"),
    ],
)
def test_a_refused_merge_changes_nothing(arguments, error, message):
    model, x = blocks()
    before, y = bits(model), model(x)
    with pytest.raises(error, match=message):
        model.merge(**arguments)
    assert_same_bits(model, before)
    assert torch.equal(model(x), y)
    assert model.state.merged == ()
    if "keep_original" not in arguments:
        with pytest.raises(error, match=message):
            model.check_merge(**arguments)


def test_weights_of_merged_adapters_are_refused():
    model, _ = blocks()
    model.merge(["subject"])
    with pytest.raises(MergedError, match="'subject' is merged"):
        model.merge(weights={"style": 1.0, "subject": 0.5})
    assert model.state.merged == ("subject",)


# ---------------------------------------------------------------- what runs


def test_exactly_the_merged_adapters_run():
    model, x = blocks()
    model.activate("style", "light")
    both = model(x)
    model.activate("subject")
    alone = model(x)
    model.merge(["style", "light", "style"])
    torch.testing.assert_close(model(x), both, atol=1e-5, rtol=1e-4)
    assert model.state.active == ("subject",)
    model.unmerge()
    assert torch.equal(model(x), alone)


def test_gradients_follow_what_runs():
    model, _ = blocks()
    model.merge(["style"])
    assert not any(p.requires_grad for p in model.parameters_of("subject"))
    model.set_trainable("subject", False)
    model.set_trainable("subject", True)
    model.unmerge()
    assert all(p.requires_grad for p in model.parameters_of("subject"))


def test_two_copies_of_one_module_do_not_merge_together():
    model, _ = blocks("subject")
    for name in ("a", "b"):
        model.add(name, LoraConfig(target_modules=["q"], modules_to_save=["up.v"]))
    model.merge(["a"])
    with pytest.raises(ValueError, match=r"Only one active adapter may replace up\.v"):
        model.merge(["b"])
    assert model.state.merged == ("a",)


def test_deleting_an_idle_adapter_activates_nothing():
    model, x = blocks()
    model.activate()
    y = model(x)
    model.delete("style")
    assert model.state.active == ()
    assert torch.equal(model(x), y)


# ---------------------------------------------------------------- all layers, or none


def test_an_interrupted_merge_is_undone(monkeypatch):
    model, x = blocks()
    model.merge(["style"])
    before, y, merge = bits(model), model(x), layer.AdaptedLayer.merge

    def out_of_memory(self, names, *args, **kwargs):
        if self is model.layers["up.q"] and "subject" in names:
            raise MemoryError
        merge(self, names, *args, **kwargs)

    monkeypatch.setattr(layer.AdaptedLayer, "merge", out_of_memory)
    with pytest.raises(MemoryError):
        model.merge(weights={"subject": 0.5})
    assert_same_bits(model, before)
    assert torch.equal(model(x), y)
    assert model.state.merged == ("style",)
    monkeypatch.undo()
    assert {a.strength for a in model.adapters("subject").values()} == {1.0}
    model.merge(["subject"])
    model.unmerge()


def test_an_unmerge_that_cannot_be_whole_changes_nothing():
    model, _ = blocks("style", "light")  # on different layers
    model.merge(["style"])
    model.merge(["light"], keep_original="none")
    before = bits(model)
    with pytest.raises(MergedError, match="were not kept"):
        model.unmerge()
    with pytest.raises(MergedError, match="were not kept"):
        model.detach()
    assert_same_bits(model, before)
    assert model.state.merged == ("style", "light")


def test_safe_merge_sees_what_overflows_in_half_precision():
    model = AdaptedModel(nn.Sequential(nn.Linear(4, 4)).half())
    model.add("a", LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False))
    for parameter in model.parameters_of("a"):
        parameter.data.fill_(300)
    before = bits(model)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of 0"):
        model.merge(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of 0"):
        model.merge_and_detach(safe_merge=True)
    assert_same_bits(model, before)


def test_merging_for_good_is_refused_before_anything_changes():
    model, _ = blocks("subject")
    model.add("gate", make_config("LORA", 0, target_modules=["q"]))
    model.layers["up.q"].adapters["gate"] = Gate(model.configs["gate"], model.layers["up.q"].site, "", *PLACE)
    model.activate("subject", "gate")
    model.enable(False)
    before = bits(model)
    with pytest.raises(NotMergeableError, match="Gate is not a change of weights"):
        model.merge_and_detach()
    assert_same_bits(model, before)
    assert not model.state.enabled


PLACE = torch.device("cpu"), torch.float32


class Gate(Adapter):
    """Not linear, so no weight is equal to it."""

    def forward(self, x, inner):
        return inner(x).sigmoid()


# ---------------------------------------------------------------- PEFT's face


def pair(adapters: dict[str, dict]) -> tuple[peft.PeftModel, veneer.PeftModel, Tensor]:
    """The same model with the same adapters in both libraries."""
    models = []
    for lib in (peft, veneer):
        torch.manual_seed(0)
        configs = {name: lib.LoraConfig(init_lora_weights=False, **options) for name, options in adapters.items()}
        (first, config), *others = configs.items()
        model = lib.get_peft_model(Blocks().eval(), config, first)
        for name, config in others:
            model.add_adapter(name, config)
        models.append(model.eval())
    theirs, ours = models
    for name in adapters:
        veneer.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, adapter_name=name), name)
    return theirs, ours, torch.randn(3, 6)


@pytest.mark.filterwarnings("ignore:Already following:UserWarning", "ignore:All adapters are already:UserWarning")
@pytest.mark.parametrize("active", ["one", ["one", "two"]])
@pytest.mark.parametrize("names", [None, [], ["one"], ["two"], ["two", "one"]])
@pytest.mark.parametrize("merged_before", [None, ["one"]])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_as_in_peft(active, names, merged_before, safe):
    theirs, ours, x = pair(
        {"one": {"r": 2, "target_modules": ["q", "v"]}, "two": {"r": 3, "target_modules": ["down.q"]}}
    )
    plain = []
    for model in (theirs, ours):
        (model.base_model if model is theirs else model).set_adapter(active)
        if merged_before:
            model.merge_adapter(merged_before)
        plain.append(model.merge_and_unload(safe_merge=safe, adapter_names=names))
    assert plain[0].state_dict().keys() == plain[1].state_dict().keys()
    assert {type(m) for m in plain[1].modules()} == {Blocks, nn.ModuleDict, nn.Linear}
    torch.testing.assert_close(plain[1](x), plain[0](x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_progress_bar_counts_the_layers(safe, capsys):
    _, ours, _ = pair({"one": {"r": 2, "target_modules": ["q"]}})
    ours.merge_and_unload(progressbar=True, safe_merge=safe)
    shown = capsys.readouterr().err
    assert re.search(r"merging: 100%.*2/2", shown)
    assert bool(re.search(r"checking: 100%.*2/2", shown)) == safe


def test_no_progress_bar_unless_asked(capsys):
    _, ours, _ = pair({"one": {"r": 2, "target_modules": ["q"]}})
    ours.merge_and_unload()
    assert capsys.readouterr().err == ""


def test_peft_face_takes_weights():
    _, ours, x = pair({name: {"r": 2, "target_modules": ["q", "v"]} for name in ("one", "two")})
    ours.set_adapter(["one", "two"])
    ours.base_model.set_weight("one", {"up": 0.5, ".*": 0.25})
    ours.base_model.set_weight("two", -1.0)
    y = ours(x)
    weights = {"one": {"up": 0.5, ".*": 0.25}, "two": -1.0}
    ours.base_model.set_weight("one", 3.0)
    ours.merge_adapter(weights=weights)
    torch.testing.assert_close(ours(x), y, atol=1e-5, rtol=1e-4)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours.merge_and_unload(weights=weights)(x), y, atol=1e-5, rtol=1e-4)
