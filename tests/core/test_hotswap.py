"""Hotswap: another adapter under the same name, in tensors and graphs that stay."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn
from veneer import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    set_peft_model_state_dict,
)
from veneer.core import AdaptedModel, MergedError, hotswap_adapter_from_state_dict
from veneer.core.hotswap import hotswap

from .conftest import KINDS, NORMS, Net, each_case, make_config, stir


@contextmanager
def no_recompiles():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def other(net: nn.Module, config, seed: int = 1):
    """An adapter of its own, its config and tensors, and what its model gives for an input."""
    torch.manual_seed(seed)
    model = AdaptedModel(net)
    model.add("o", config)
    stir(model, "o")
    tensors = {key: t.clone() for key, t in model.tensors("o").items()}

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        fresh = AdaptedModel(net)
        fresh.load("o", config, tensors)
        try:
            return fresh(x)
        finally:
            fresh.detach()

    model.detach()
    return config, tensors, run


@each_case
def test_a_swapped_adapter_is_the_new_one(method, variant, kind):
    torch.manual_seed(0)
    net, x = Net(kind).eval(), (KINDS | NORMS)[kind].sample()
    config, tensors, run = other(net, make_config(method, variant))
    expected = run(x)
    model = AdaptedModel(net)
    model.add("a", make_config(method, variant))
    stir(model, "a")
    held = {key: id(tensor) for key, tensor in model.held_tensors("a").items()}
    with torch.no_grad():
        assert not torch.allclose(model(x), expected, atol=1e-4)
        hotswap(model, "a", config, tensors)
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    assert {key: id(tensor) for key, tensor in model.held_tensors("a").items()} == held
    assert model.configs == {"a": config}
    for key, tensor in model.tensors("a").items():
        assert torch.equal(tensor, tensors[key])


RANKED = [("LORA", 0), ("LORA", 2), ("LORA", 3), ("LOHA", 0), ("LOHA", 2), ("LOHA", 3), ("GLORA", 0)]
"""Methods and variants whose rank may change."""


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-groups", "embedding"])
@pytest.mark.parametrize(("method", "variant"), RANKED)
def test_padding_changes_nothing_and_makes_room_for_other_ranks(method, variant, kind):
    torch.manual_seed(0)
    net, x = Net(kind).double().eval(), KINDS[kind].sample()
    x = x.double() if x.is_floating_point() else x
    alpha = make_config(method, variant).alpha_field
    first = make_config(method, variant, r=1, **{alpha: 3})
    second = other(net, make_config(method, variant, r=2, **{alpha: 7}))
    third = other(net, replace(first), seed=2)
    expected = second[2](x), third[2](x)
    model = AdaptedModel(net)
    model.add("a", first)
    stir(model, "a")
    before, tensors = model(x), model.tensors("a")
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    torch.testing.assert_close(model(x), before, atol=1e-9, rtol=1e-9)
    after = model.tensors("a")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensors[key]) for key in tensors)
    for (config, new, _), y in zip((second, third), expected, strict=True):
        hotswap(model, "a", config, new)
        torch.testing.assert_close(model(x), y, atol=1e-6, rtol=1e-6)
        saved = model.tensors("a")
        assert saved.keys() == new.keys()
        assert all(torch.equal(saved[key], new[key]) for key in new)
        model.merge()
        torch.testing.assert_close(model(x), y, atol=1e-6, rtol=1e-6)
        model.unmerge()


def test_kronecker_factors_are_padded_too():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 30)).double(), torch.randn(5, 24).double()
    config, tensors, run = other(net, make_config("LOKR", 0, target_modules=["0"], r=2))
    expected = run(x)
    model = AdaptedModel(net)
    model.add("a", make_config("LOKR", 0, target_modules=["0"], r=1))
    with pytest.raises(ValueError, match="choose another rank"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    prepare_model_for_compiled_hotswap(model, target_rank=2)
    hotswap(model, "a", config, tensors)
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


class Layers(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.two(torch.relu(self.one(x)))))


def saved(path, config, seed: int = 1):
    """The directory of an adapter, and what its model gives."""
    torch.manual_seed(seed)
    model = get_peft_model(base(), config)
    stir(model.base_model, "default")
    model.save_pretrained(path)
    return path, PeftModel.from_pretrained(base(), path)


def base() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["one", "two"], "init_lora_weights": False} | options)


SWAPS = {
    "rank and alpha": lora(r=2, lora_alpha=9),
    "fewer layers": lora(r=4, target_modules=["two"]),
    "patterns": lora(r=3, rank_pattern={"one": 5}, alpha_pattern={"two": 1}),
    "rslora": lora(r=4, use_rslora=True, lora_dropout=0.1),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dora", [False, True])
def test_nothing_is_compiled_again(tmp_path, backend, dora):
    first, _ = saved(tmp_path / "first", lora(r=4, use_dora=dora))
    others = [saved(tmp_path / key, replace(config, use_dora=dora), 2) for key, config in SWAPS.items()]
    model = PeftModel.from_pretrained(base(), first)
    model.enable_peft_hotswap(target_rank=6)
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend=backend), torch.randn(3, 8)
    with torch.no_grad():
        compiled(x)
        with no_recompiles():
            for path, alone in [*others, (first, PeftModel.from_pretrained(base(), first))]:
                hotswap_adapter(compiled, path, "default")
                torch.testing.assert_close(compiled(x), alone(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "GLORA", "IA3", "OFT", "FULL", "DIAG_OFT"])
def test_other_methods_are_not_compiled_again_either(method):
    torch.manual_seed(0)
    net, x = Net("linear").eval(), KINDS["linear"].sample()
    changes = {"r": 2, "alpha": 7} if method in ("LOHA", "GLORA") else {}
    config, tensors, run = other(net, make_config(method, 0, **changes))
    expected = run(x)
    model = AdaptedModel(net)
    model.add("a", make_config(method, 0))
    prepare_model_for_compiled_hotswap(model, target_rank=1 if method == "LOKR" else 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with no_recompiles():
            hotswap(model, "a", config, tensors)
            torch.testing.assert_close(compiled(x), expected, atol=1e-6, rtol=1e-5)


IMPORTS = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
"""What inductor warns of when it is imported."""


@IMPORTS
def test_the_machine_code_of_inductor_stays(tmp_path):
    first, _ = saved(tmp_path / "first", lora(r=4))
    path, alone = saved(tmp_path / "second", SWAPS["patterns"], 2)
    model = PeftModel.from_pretrained(base(), first)
    model.enable_peft_hotswap(target_rank=6)
    torch._dynamo.reset()
    compiled, x = torch.compile(model, dynamic=False), torch.randn(3, 8)
    with torch.no_grad():
        compiled(x)
        with no_recompiles():
            model.load_adapter(path, "default", hotswap=True)
            torch.testing.assert_close(compiled(x), alone(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("key", SWAPS)
def test_saving_after_a_swap_writes_the_new_adapter(tmp_path, key):
    first, _ = saved(tmp_path / "first", lora(r=4, modules_to_save=["head"]))
    path, alone = saved(tmp_path / "second", SWAPS[key], 2)
    model, x = PeftModel.from_pretrained(base(), first), torch.randn(3, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.load_adapter(path, "default", hotswap=True)
    torch.testing.assert_close(model(x), alone(x), atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (PeftModel.from_pretrained(base(), tmp_path / d) for d in ("again", "second"))
    assert ours.peft_config == theirs.peft_config
    ours, theirs = (get_peft_model_state_dict(m) for m in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    reference = peft.PeftModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(reference(x), alone(x), atol=1e-5, rtol=1e-4)


def test_layers_that_were_swapped_away_come_back(tmp_path):
    first, alone = saved(tmp_path / "first", lora(r=4, modules_to_save=["head"]))
    fewer, _ = saved(tmp_path / "fewer", lora(r=2, target_modules=["two"]), 2)
    model, x = PeftModel.from_pretrained(base(), first), torch.randn(3, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    state = torch.get_rng_state()
    model.load_adapter(fewer, "default", hotswap=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(".one." in key or "head" in key for key in get_peft_model_state_dict(model))
    model.load_adapter(first, "default", hotswap=True)
    torch.testing.assert_close(model(x), alone(x), atol=1e-6, rtol=1e-5)


def test_a_swapped_adapter_trains_and_its_padding_stays_zero(tmp_path):
    path, _ = saved(tmp_path / "second", lora(r=2))
    model, x = get_peft_model(base(), lora(r=4)), torch.randn(16, 8)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    model.load_adapter(path, "default", hotswap=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = model.base_model.tensors("default")
    assert {t.shape for key, t in trained.items() if "lora_A" in key} == {(2, 8)}
    assert not model.base_model.held_tensors("default")["one.lora_A.weight"][2:].any()
    copy = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, {key: tensor * 2 for key, tensor in copy.items()})
    assert torch.equal(
        model.base_model.tensors("default")["one.lora_A.weight"], 2 * copy["base_model.model.one.lora_A.weight"]
    )


def test_state_dicts_of_pefts_models_are_taken(tmp_path):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules=["one", "two"], init_lora_weights=False))
    state = {key: value for key, value in theirs.state_dict().items() if "lora_" in key}
    model, x = get_peft_model(base(), lora(r=4)), torch.randn(3, 8)
    hotswap_adapter_from_state_dict(model, state, "default", lora(r=4, lora_alpha=8))
    torch.testing.assert_close(model(x), theirs.eval()(x), atol=1e-6, rtol=1e-5)
    hotswap_adapter_from_state_dict(model, model.base_model.tensors("default"), "default", lora(r=4))


def test_what_cannot_be_swapped_is_refused_and_changes_nothing(tmp_path):
    path, _ = saved(tmp_path / "second", lora(r=8))
    more, _ = saved(tmp_path / "more", lora(r=4, target_modules=["one", "two", "head"]))
    model, x = PeftModel.from_pretrained(base(), saved(tmp_path / "first", lora(r=4))[0]), torch.randn(3, 8)
    before = model(x)
    with pytest.raises(ValueError, match=r"room for \(4, 8\): call prepare_model_for_compiled_hotswap"):
        hotswap_adapter(model, path, "default")
    with pytest.raises(ValueError, match=r"no place for .*head.*2 unexpected keys"):
        hotswap_adapter(model, more, "default")
    with pytest.raises(ValueError, match="Adapter x not found"):
        model.load_adapter(path, "x", hotswap=True)
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap(model.base_model, "default", IA3Config(), {})
    tensors = {key: torch.ones(1) for key in model.base_model.tensors("default")}
    with pytest.raises(ValueError, match="is a LoRA, and the new one is a DoRA"):
        hotswap(model.base_model, "default", lora(r=4, use_dora=True), tensors)
    with pytest.raises(ValueError, match=r"has shape \(1,\), expected \(4, 8\)"):
        hotswap(model.base_model, "default", lora(r=4), tensors)
    with pytest.raises(ValueError, match=r"has no lora_B\.weight for one"):
        hotswap(model.base_model, "default", lora(r=4), {"one.lora_A.weight": torch.ones(4, 8)})
    with pytest.raises(ValueError, match="too large for rank 2"):
        prepare_model_for_compiled_hotswap(get_peft_model(base(), lora(r=4)), target_rank=2)
    assert torch.equal(model(x), before)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    with pytest.raises(ValueError, match="prepare the model with a larger target_rank"):
        hotswap_adapter(model, path, "default")
    torch.testing.assert_close(model(x), before)
    model.merge_adapter()
    with pytest.raises(MergedError, match="unmerge it before swapping"):
        hotswap_adapter(model, path, "default")


@IMPORTS
def test_preparing_is_for_models_with_adapters_that_are_not_compiled():
    with pytest.raises(ValueError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(base(), target_rank=4)
    model = get_peft_model(base(), lora())
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8)
    with pytest.warns(UserWarning, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=8, check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiled should be one of"):
        prepare_model_for_compiled_hotswap(model, check_compiled="maybe")  # type: ignore[arg-type]
