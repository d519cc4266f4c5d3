"""What code written for PEFT relies on, behaviour by behaviour, and where ours is deliberately mended."""

import json
import re
from copy import deepcopy

import peft
import pytest
import torch
import transformers
import veneer
from safetensors.torch import load_file, save_file
from torch import nn
from veneer import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MergedError,
    NoMatchingPeftModuleError,
    OFTConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
)
from veneer.core import BaseTunerLayer, LoraLayer, ModulesToSaveWrapper, get_layer_status, get_model_status


class Net(nn.Module):
    """A small model with the names that careless key matching trips over."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.weight_bias = nn.Linear(8, 8)
        self.lora_head = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lora_head(self.weight_bias(self.norm(self.lin0(x)).relu())))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


X = torch.arange(30.0).reshape(5, 6) / 30
CONFIGS = {
    "lora": lambda **o: LoraConfig(target_modules=["lin0"], init_lora_weights=False, **o),
    "modules_to_save": lambda **o: LoraConfig(
        target_modules=["lin0"], init_lora_weights=False, **{"modules_to_save": ["head"]} | o
    ),
    "lora bias": lambda **o: LoraConfig(target_modules=["lin0"], init_lora_weights=False, lora_bias=True, **o),
    "dora": lambda **o: LoraConfig(target_modules=["lin0"], init_lora_weights=False, use_dora=True, **o),
    "loha": lambda **o: LoHaConfig(target_modules=["lin0"], init_weights=False, **o),
    "lokr": lambda **o: LoKrConfig(target_modules=["lin0"], init_weights=False, **o),
    "ia3": lambda **o: IA3Config(target_modules=["lin0"], feedforward_modules=[], init_ia3_weights=False, **o),
    "oft": lambda **o: OFTConfig(target_modules=["lin0"], oft_block_size=2, init_weights=False, **o),
}
every_method = pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS.keys())
lora, with_head = CONFIGS["lora"], CONFIGS["modules_to_save"]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def owned(model: PeftModel, *adapters: str) -> set[str]:
    """Names of the parameters of these adapters."""
    ids = {id(p) for adapter in adapters for p in model.base_model.parameters_of(adapter)}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def saved(request, tmp_path):
    """A directory with two adapters, "default" at its root and "other" below."""
    model = get_peft_model(net(), request.param())
    model.add_adapter("other", request.param())
    model.save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- 1. who is trainable


def test_loading_for_inference_makes_nothing_trainable(saved):
    """With `modules_to_save` too: the copy of the head stays frozen."""
    model = PeftModel.from_pretrained(net().train(), saved)
    assert not trained(model)
    assert not model.training


def test_loading_for_training_makes_the_adapter_trainable(saved):
    model = PeftModel.from_pretrained(net().train(), saved, is_trainable=True)
    assert trained(model) == owned(model, "default")
    assert model.training


def test_a_second_load_for_inference_leaves_the_first_frozen(saved):
    """`load_adapter` must not unfreeze the adapter that it keeps active."""
    model = PeftModel.from_pretrained(net(), saved)
    model.load_adapter(saved / "other", "other")
    assert not trained(model)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("first", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("second", [True, False], ids=["train", "infer"])
def test_each_adapter_keeps_the_mode_it_was_loaded_in(saved, first, second):
    """The case that PEFT's own test-suite expects to fail: the second adapter's mode does not leak into the first.

    Mended: an inactive trainable adapter requires grad once it is active, and not before.
    """
    model = PeftModel.from_pretrained(net(), saved, is_trainable=first)
    model.load_adapter(saved / "other", "other", is_trainable=second)
    assert trained(model) == (owned(model, "default") if first else set())
    model.set_adapter("other")
    assert trained(model) == (owned(model, "other") if second else set())
    model.set_adapter("default")
    assert trained(model) == (owned(model, "default") if first else set())


def test_two_active_adapters_train_if_each_was_loaded_for_training(saved):
    if json.loads((saved / "adapter_config.json").read_text()).get("modules_to_save"):
        pytest.skip("two copies of one module cannot both be active")
    model = PeftModel.from_pretrained(net(), saved, is_trainable=True)
    model.load_adapter(saved / "other", "other")
    model.load_adapter(saved / "other", "third", is_trainable=True)
    model.set_adapter(["default", "other", "third"])
    assert trained(model) == owned(model, "default", "third")


@every_method
def test_switching_never_makes_a_frozen_adapter_trainable(make):
    model = get_peft_model(net(), make())
    model.add_adapter("frozen", make(inference_mode=True))
    model.set_adapter("frozen")
    assert not trained(model)
    model.set_requires_grad("frozen")
    assert trained(model) == owned(model, "frozen")


@every_method
def test_a_new_adapter_waits_frozen_until_it_is_active(make):
    model = get_peft_model(net(), make())
    model.add_adapter("other", make())
    assert trained(model) == owned(model, "default")
    model.set_adapter("other")
    assert trained(model) == owned(model, "other")


@every_method
def test_set_adapter_can_activate_without_grad(make):
    model = get_peft_model(net(), make())
    model.add_adapter("other", make())
    model.set_adapter("other", inference_mode=True)
    assert not trained(model)
    assert model.active_adapters == ["other"]


def test_flags_set_by_hand_elsewhere_stay(saved):
    model = PeftModel.from_pretrained(net(), saved)
    model.get_base_model().norm.weight.requires_grad = True
    by_hand = trained(model)
    model.load_adapter(saved / "other", "other", is_trainable=True)
    model.add_adapter("third", lora())
    model.set_adapter("third")
    model.delete_adapter("third")
    with model.disable_adapter():
        pass
    assert by_hand <= trained(model) <= by_hand | owned(model, "other", "default")


def test_biases_are_trained_with_their_adapter():
    model = get_peft_model(net(), lora(bias="all"))
    assert trained(model) == owned(model, "default")
    assert sum(name.endswith("bias") for name in trained(model)) == 5
    model.add_adapter("other", lora())
    model.set_adapter("other")
    assert trained(model) == owned(model, "other")


# ---------------------------------------------------------------- 2. modules_to_save belongs to an adapter


def test_only_adapters_that_asked_get_a_copy():
    model = get_peft_model(net(), lora())
    model.add_adapter("with_head", with_head())
    head, linear = model.get_base_model().head, model.get_base_model().lin0
    assert head.active_adapters == []
    assert linear.active_adapters == ["default"]
    model.set_adapter("with_head")
    assert head.active_adapters == linear.active_adapters == ["with_head"]
    assert trained(model) == owned(model, "with_head")


def test_a_tuner_layer_lists_an_active_adapter_that_it_does_not_have():
    model = get_peft_model(net(), lora())
    model.add_adapter("other", LoraConfig(target_modules=["weight_bias"]))
    model.set_adapter("other")
    assert model.get_base_model().lin0.active_adapters == ["other"]


def test_two_active_copies_of_one_module_are_refused():
    model = get_peft_model(net(), with_head())
    model.add_adapter("other", with_head())
    with pytest.raises(ValueError, match="Only one active adapter may replace head"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]
    assert trained(model) == owned(model, "default")


def test_each_copy_trains_apart():
    model = get_peft_model(net(), with_head())
    model.add_adapter("other", with_head())
    original = model.get_base_model().head.base_layer.weight.clone()
    for name, value in (("default", 1.0), ("other", 2.0)):
        model.set_adapter(name)
        with torch.no_grad():
            model.get_base_model().head.weight.fill_(value)
    model.set_adapter("default")
    assert model.get_base_model().head.weight.eq(1).all()
    assert torch.equal(model.get_base_model().head.base_layer.weight, original)


# ---------------------------------------------------------------- 3. the wrapper is transparent


def test_wrapper_of_a_saved_module_shows_the_running_copy():
    model = get_peft_model(net(), with_head())
    head = model.get_base_model().head
    copy = dict(model.named_parameters())[next(n for n in trained(model) if n.endswith("weight") and "head" in n)]
    assert head.weight is copy
    with model.disable_adapter():
        assert head.weight is head.base_layer.weight
    assert head.weight is copy


@every_method
def test_wrapper_of_a_layer_answers_for_its_base(make):
    layer = get_peft_model(net(), make()).get_base_model().lin0
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.weight is layer.get_base_layer().weight


@every_method
def test_unknown_attributes_are_attribute_errors(make):
    model = get_peft_model(net(), make())
    model.delete_adapter("default")
    for owner in (model, model.base_model, *model.base_model.layers.values()):
        with pytest.raises(AttributeError, match="no_such_thing"):
            owner.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        veneer.AdaptedLayer.__new__(veneer.AdaptedLayer).anything  # noqa: B018


@every_method
def test_forward_takes_keyword_arguments_only(make):
    base = get_peft_model(net(), make()).get_base_model()
    h = torch.randn(2, 8)
    torch.testing.assert_close(base.lin0(input=X), base.lin0(X))
    torch.testing.assert_close(base.head(input=h), base.head(h))


# ---------------------------------------------------------------- 4. deleting


def names_found(owner: object, name: str) -> list[str]:
    """Public dict-like attributes of `owner` that have the key `name`."""
    found = []
    for attribute in dir(owner):
        if not attribute.startswith("_"):
            try:
                if name in getattr(owner, attribute).keys():  # noqa: SIM118
                    found.append(attribute)
            except (AttributeError, TypeError):
                pass
    return found


@every_method
def test_deleting_leaves_no_trace_of_the_name(make):
    model = get_peft_model(net(), make())
    model.add_adapter("gone", make())
    model.set_adapter("gone")
    owners = [model, model.base_model, *model.modules()]
    assert any(names_found(owner, "gone") for owner in owners)
    model.delete_adapter("gone")
    for owner in owners:
        assert not names_found(owner, "gone")
    assert not any("gone" in key for key in model.state_dict())


@every_method
def test_deleting_the_active_adapter_activates_the_next(make):
    model = get_peft_model(net(), make())
    model.add_adapter("other", make())
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert list(model.peft_config) == ["other"]
    assert trained(model) == owned(model, "other")


@every_method
def test_after_the_last_adapter_the_base_model_runs(make):
    model = get_peft_model(net(), make()).eval()
    model.delete_adapter("default")
    assert model.active_adapters == []
    torch.testing.assert_close(model(X), net()(X))


@pytest.mark.parametrize("make", [CONFIGS["lora"], CONFIGS["oft"]], ids=["lora", "oft"])
def test_a_merged_adapter_cannot_be_deleted(make):
    model = get_peft_model(net(), make())
    model.merge_adapter()
    before = bits(model)
    with pytest.raises(MergedError, match="unmerge it before deleting it"):
        model.delete_adapter("default")
    assert_same_bits(model, before)
    assert list(model.peft_config) == model.active_adapters == ["default"]


def test_deleting_an_unknown_adapter_is_an_error():
    with pytest.raises(ValueError, match="Adapter nope not found"):
        get_peft_model(net(), lora()).delete_adapter("nope")


# ---------------------------------------------------------------- 5. errors are atomic


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("default", lambda: lora(), ValueError, "already exists"),
        ("other", lambda: lora(bias="all"), ValueError, "only one adapter of a model may train its biases"),
        ("other", lambda: LoraConfig(target_modules=["lin9"]), NoMatchingPeftModuleError, r"near: lin0 \(1 layer\)"),
        ("other", lambda: LoraConfig(target_modules=["lin0", "norm"]), ValueError, "norm: a BatchNorm1d cannot be"),
        ("other", lambda: lora(modules_to_save=["tail"]), ValueError, "modules_to_save"),
        ("dotted.name", lambda: lora(), ValueError, "without dots"),
        ("half", lambda: lora(), ValueError, "ModuleDict keeps for itself"),
        ("other", lambda: LoHaConfig(), ValueError, "Please specify `target_modules`"),
    ],
    ids=["duplicate", "second bias", "no target", "kind", "modules_to_save", "dots", "reserved", "no default"],
)
def test_a_refused_adapter_changes_nothing(name, config, error, message):
    model = get_peft_model(net(), lora(bias="all"))
    before, flags, modules = bits(model), trained(model), [n for n, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        model.add_adapter(name, config())
    assert_same_bits(model, before)
    assert trained(model) == flags
    assert [n for n, _ in model.named_modules()] == modules
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["default"]


def test_a_refused_first_adapter_leaves_the_model_as_it_was():
    base = net()
    with pytest.raises(NoMatchingPeftModuleError):
        get_peft_model(base, LoraConfig(target_modules=["nope"]))
    assert trained(base) == {name for name, _ in net().named_parameters()}
    assert [type(m) for m in base.modules()] == [type(m) for m in net().modules()]


# ---------------------------------------------------------------- 6. merging


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.bias"])
def test_safe_merge_refuses_broken_weights_and_biases(key, value):
    model = get_peft_model(net(), CONFIGS["lora bias"]())
    model.base_model.tensors("default")[f"lin0.{key}"].view(-1)[0] = value
    layer = model.get_base_model().lin0
    before = bits(layer.base_layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights of lin0"):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(layer.base_layer, before)
    assert layer.merged_adapters == []
    assert not layer.merged


@every_method
def test_merging_twice_warns_and_does_nothing(make):
    model = get_peft_model(net(), make())
    model.merge_adapter()
    before = bits(model)
    with pytest.warns(PeftWarning, match="Already merged"):
        model.merge_adapter()
    assert_same_bits(model, before)
    model.unmerge_adapter()
    with pytest.warns(PeftWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_in_training_mode_ignores_dropout(use_dora):
    model = get_peft_model(net(), lora(lora_dropout=0.5, use_dora=use_dora)).eval()
    y = model(X)
    merged = model.train().merge_and_unload().eval()
    torch.testing.assert_close(merged(X), y)


def test_merged_tensors_are_contiguous(tmp_path):
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn", "wte"], init_lora_weights=False))
    merged = model.merge_and_unload()
    assert all(p.is_contiguous() for p in merged.parameters())


@every_method
def test_merging_one_by_one_is_merging_a_list(make):
    model = get_peft_model(net(), make())
    model.add_adapter("other", CONFIGS["lora"]())
    before = bits(model)
    model.merge_adapter(["default", "other"])
    together = bits(model)
    model.unmerge_adapter()
    assert_same_bits(model, before)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert model.get_base_model().lin0.merged_adapters == ["default", "other"]
    assert_same_bits(model, together)
    model.unmerge_adapter()
    assert_same_bits(model, before)


@every_method
def test_forward_never_unmerges(make):
    model = get_peft_model(net(), make()).eval()
    y = model(X)
    model.merge_adapter()
    before = bits(model)
    torch.testing.assert_close(model(X), y, atol=1e-5, rtol=1e-5)
    assert_same_bits(model, before)
    assert model.get_base_model().lin0.merged


@every_method
def test_merging_for_good_while_disabled_gives_the_adapted_model(make):
    """As in PEFT; whole modules with the rest."""
    model = get_peft_model(net(), make()).eval()
    with torch.no_grad():
        for parameter in model.base_model.parameters_of("default"):
            parameter.add_(0.1)
    y = model(X)
    model.disable_adapter_layers()
    torch.testing.assert_close(model.merge_and_unload()(X), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_adapter("other"),
        lambda m: m.set_adapter(["default", "other"]),
        lambda m: m.disable_adapter().__enter__(),
        lambda m: m.disable_adapter_layers(),
    ],
    ids=["set_adapter", "two", "disable_adapter", "disable_adapter_layers"],
)
def test_changing_what_is_active_while_merged_is_an_error(change):
    model = get_peft_model(net(), lora())
    model.add_adapter("other", lora())
    model.merge_adapter()
    before, flags = bits(model), trained(model)
    with pytest.raises(MergedError, match=r"call unmerge_adapter\(\) before"):
        change(model)
    assert_same_bits(model, before)
    assert trained(model) == flags
    assert model.active_adapters == ["default"]


def test_unmerge_without_the_original_is_an_error():
    model = get_peft_model(net(), lora())
    model.merge_adapter(keep_original="none")
    with pytest.raises(MergedError, match="keep_original='cpu'"):
        model.unmerge_adapter()


# ---------------------------------------------------------------- 7. state dict keys are found by structure


def test_a_base_module_called_lora_is_neither_saved_nor_trained():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0", "weight_bias"]))
    keys = veneer.get_peft_model_state_dict(model)
    assert set(keys) == {f"base_model.model.{layer}.lora_{x}.weight" for layer in ("lin0", "weight_bias") for x in "AB"}
    assert not any("lora_head" in name for name in trained(model))


@pytest.mark.parametrize("name", ["efaul", "foodefault_bar", "lin0", "weight", "lora_A", "adapters", "base_layer", "0"])
def test_adapter_names_may_be_parts_of_other_names(name, tmp_path):
    model = get_peft_model(net(), lora()).eval()
    model.add_adapter(name, with_head(r=2))
    model.set_adapter(name)
    assert not any(torch.equal(p, torch.zeros_like(p)) for p in model.base_model.parameters_of(name))
    keys = veneer.get_peft_model_state_dict(model, adapter_name=name)
    plain = {"lin0.lora_A.weight", "lin0.lora_B.weight", "head.weight", "head.bias"}
    assert set(keys) == {f"base_model.model.{key}" for key in plain}
    assert keys["base_model.model.lin0.lora_A.weight"].shape == (2, 6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(again(X), model(X))
    model.delete_adapter(name)
    assert set(veneer.get_peft_model_state_dict(model)) == {
        "base_model.model.lin0.lora_A.weight",
        "base_model.model.lin0.lora_B.weight",
    }


def test_saved_modules_keep_plain_names_and_scalar_buffers():
    model = get_peft_model(net(), lora(modules_to_save=["norm"]))
    model.train()(X)
    tensors = veneer.get_peft_model_state_dict(model)
    names = {key.removeprefix("base_model.model.norm.") for key in tensors if ".norm." in key}
    assert names == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert tensors["base_model.model.norm.num_batches_tracked"] == 1
    assert model.get_base_model().norm.base_layer.num_batches_tracked == 0
    other = get_peft_model(net(), lora(modules_to_save=["norm"]))
    veneer.set_peft_model_state_dict(other, tensors)
    assert other.get_base_model().norm.num_batches_tracked == 1


@every_method
def test_setting_tensors_leaves_the_given_dict_alone(make):
    tensors = veneer.get_peft_model_state_dict(get_peft_model(net(), make()))
    tensors["base_model.model.unknown"] = torch.zeros(1)
    before = dict(tensors)
    target = get_peft_model(net(), make())
    missing, unexpected = veneer.set_peft_model_state_dict(target, tensors)
    assert tensors.keys() == before.keys()
    assert all(tensors[key] is before[key] for key in before)
    assert (missing, unexpected) == ([], ["unknown"])
    after = veneer.get_peft_model_state_dict(target)
    assert all(torch.equal(after[key], tensors[key]) for key in after)


def test_state_dict_of_the_model_may_give_the_values():
    model = get_peft_model(net(), with_head())
    doubled = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    plain = veneer.get_peft_model_state_dict(model)
    for key, tensor in veneer.get_peft_model_state_dict(model, state_dict=doubled).items():
        torch.testing.assert_close(tensor, 2 * plain[key])


def test_injection_keeps_plain_names():
    base = net()
    model = veneer.inject_adapter_in_model(lora(), base)
    assert model is base
    assert set(veneer.get_peft_model_state_dict(model)) == {"lin0.lora_A.weight", "lin0.lora_B.weight"}
    veneer.inject_adapter_in_model(lora(), base, adapter_name="other")
    veneer.set_adapter(base, "other")
    assert base.lin0.active_adapters == ["other"]
    veneer.delete_adapter(base, "other")
    assert base.lin0.active_adapters == ["default"]


# ---------------------------------------------------------------- 8. disable_adapter()


@every_method
def test_disabling_nests_and_restores(make):
    model = get_peft_model(net(), make()).eval()
    y, base, flags = model(X), net()(X), trained(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base)
        assert not trained(model)
        with model.disable_adapter():
            torch.testing.assert_close(model(X), base)
        torch.testing.assert_close(model(X), base)
        assert not trained(model)
    torch.testing.assert_close(model(X), y)
    assert trained(model) == flags


def test_disabling_restores_after_an_error_and_keeps_a_disabled_state():
    model = get_peft_model(net(), lora())
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert trained(model) == owned(model, "default")
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert model.get_base_model().lin0.disable_adapters
    model.enable_adapter_layers()
    assert not model.get_base_model().lin0.disable_adapters


def test_switching_inside_disable_adapter_counts_afterwards():
    model = get_peft_model(net(), lora())
    model.add_adapter("other", lora())
    with model.disable_adapter():
        model.set_adapter("other")
        torch.testing.assert_close(model(X), net()(X))
    assert model.active_adapters == ["other"]
    assert trained(model) == owned(model, "other")


def test_disabling_cannot_undo_trained_biases_and_warns():
    model = get_peft_model(net(), lora(bias="all"))
    with pytest.warns(PeftWarning, match="trained are the base model's own") as caught, model.disable_adapter():
        model.disable_adapter_layers()
    assert len(caught) == 1


# ---------------------------------------------------------------- 9. dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_base(dtype, autocast, tmp_path):
    """Adapters are kept in float32, added and loaded later too, unless `autocast_adapter_dtype=False`."""
    model = get_peft_model(net().to(dtype), lora(), autocast_adapter_dtype=autocast)
    model.add_adapter("added", lora())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded")
    expected = torch.float32 if autocast else dtype
    for name in ("default", "added", "loaded"):
        assert {p.dtype for p in model.base_model.parameters_of(name)} == {expected}
    again = PeftModel.from_pretrained(net().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in again.base_model.parameters_of("default")} == {expected}
    assert again(X.to(dtype)).dtype == dtype


def test_one_call_may_choose_another_dtype(tmp_path):
    model = get_peft_model(net().bfloat16(), lora())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "small", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.base_model.parameters_of("small")} == {torch.bfloat16}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_nothing_stays_on_meta(saved, low_cpu_mem_usage):
    model = PeftModel.from_pretrained(net(), saved, low_cpu_mem_usage=low_cpu_mem_usage)
    model.load_adapter(saved / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


# ---------------------------------------------------------------- 10. patterns


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.foo, self.barfoo = nn.Linear(4, 4), nn.Linear(4, 4)
        self.deep = nn.ModuleDict({"foo": nn.Linear(4, 4), "barfoo": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("key", "matched"),
    [
        ("foo", {"foo", "deep.foo"}),
        ("^foo", {"foo"}),
        ("deep.foo", {"deep.foo"}),
        (r".*barfoo", {"barfoo", "deep.barfoo"}),
        ("foo|barfoo", {"foo", "deep.foo", "barfoo", "deep.barfoo"}),
    ],
)
@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig, LoKrConfig])
def test_pattern_keys_match_whole_dotted_suffixes(kind, key, matched):
    """Rank and alpha are looked up apart."""
    layers = get_peft_model(
        Tree(), kind(r=2, target_modules=["foo", "barfoo"], rank_pattern={key: 1})
    ).base_model.layers
    assert {path for path, layer in layers.items() if layer.r["default"] == 1} == matched
    config = kind(r=2, target_modules=["foo", "barfoo"], alpha_pattern={key: 6})
    layers = get_peft_model(Tree(), config).base_model.layers
    assert {path for path, layer in layers.items() if layer.scaling["default"] == 3} == matched


@pytest.mark.parametrize("pattern", [{"foo": 1, "^foo": 3}, {"^foo": 3, "foo": 1}], ids=["general", "special"])
def test_order_of_disjoint_pattern_keys_does_not_matter(pattern):
    reordered = dict(reversed(pattern.items()))
    ranks = [
        {p: layer.r["default"] for p, layer in get_peft_model(
            Tree(), LoraConfig(target_modules=["foo"], rank_pattern=order)).base_model.layers.items()}
        for order in (pattern, reordered)
    ]  # fmt: skip
    assert ranks[0]["deep.foo"] == ranks[1]["deep.foo"] == 1


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_unused_pattern_keys_warn(field):
    config = LoraConfig(target_modules=["foo"], **{field: {"nope": 1, "foo": 2}})
    with pytest.warns(RuntimeWarning, match=rf"The following {field} keys did not match.*\['nope'\]"):
        get_peft_model(Tree(), config)


def test_target_modules_become_a_set():
    assert LoraConfig(target_modules=["a", "b", "a"]).target_modules == {"a", "b"}
    assert LoraConfig(target_modules="a.*").target_modules == "a.*"


def test_long_lists_of_targets_are_condensed(tmp_path):
    """To the shortest suffixes that match exactly the same modules, in the config and in the file."""
    blocks = [nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2), "rest": nn.Linear(2, 2)}) for _ in range(12)]
    targets = [f"{i}.{n}" for i in range(12) for n in "qk"]
    model = get_peft_model(nn.Sequential(*blocks), LoraConfig(r=1, target_modules=targets))
    assert model.peft_config["default"].target_modules == {"q", "k"}
    assert set(model.base_model.layers) == set(targets)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["k", "q"]


# ---------------------------------------------------------------- 11. scaling

SCALINGS = {
    "set_scale": lambda layer: layer.set_scale("default", 0.5),
    "set_scale of another": lambda layer: layer.set_scale("nope", 0.5),
    "scale_layer": lambda layer: layer.scale_layer(3.0),
    "scale_layer twice": lambda layer: (layer.scale_layer(3.0), layer.scale_layer(2.0)),
    "unscale_layer": lambda layer: (layer.scale_layer(3.0), layer.unscale_layer(2.0)),
    "unscale_layer wholly": lambda layer: (
        layer.scale_layer(3.0),
        layer.set_scale("other", 2.0),
        layer.unscale_layer(),
    ),
    "set after scaling": lambda layer: (layer.scale_layer(3.0), layer.set_scale("default", 2.0)),
}


@pytest.mark.parametrize("change", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_relative_to_the_start_and_for_active_adapters(change, active, use_rslora):
    """The same numbers as in PEFT."""
    scalings = []
    for library in (peft, veneer):
        options = {"target_modules": ["lin0"], "use_rslora": use_rslora}
        model = library.get_peft_model(net(), library.LoraConfig(r=4, lora_alpha=6, **options))
        model.add_adapter("other", library.LoraConfig(r=2, lora_alpha=8, **options))
        model.set_adapter(active)
        layer = model.base_model.model.lin0
        change(layer)
        scalings.append(dict(layer.scaling))
    assert scalings[0] == pytest.approx(scalings[1])


def test_scale_acts_on_the_output():
    model = get_peft_model(net(), LoraConfig(target_modules=["lin0"], init_lora_weights=False)).eval()
    layer, x = model.get_base_model().lin0, torch.randn(3, 6)
    base, full = layer.base_layer(x), layer(x)
    layer.set_scale("default", 0.25)
    torch.testing.assert_close(layer(x), base + 0.25 * (full - base))
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), full)


# ---------------------------------------------------------------- 13. tied weights


def tied_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_merging_into_a_tied_embedding_unties(tmp_path):
    """The output layer keeps its weight, and the saved model says so: `tie_word_embeddings` is off."""
    model = get_peft_model(tied_llama(), LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    y = model(tokens).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, y)
    torch.testing.assert_close(merged.lm_head.weight, tied_llama().lm_head.weight)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, y)


def test_unmerging_a_tied_embedding_ties_it_again():
    base = tied_llama()
    model = get_peft_model(base, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.unload().model.embed_tokens.weight is base.lm_head.weight


# ---------------------------------------------------------------- 14. configs and folders


@every_method
def test_config_comes_back_as_the_class_of_its_method(make, tmp_path):
    config = make()
    config.save_pretrained(tmp_path)
    again = veneer.PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict() | {"peft_version": again.peft_version}


def test_the_config_that_is_passed_is_the_one_that_is_used(saved):
    config = veneer.PeftConfig.from_pretrained(saved)
    config.inference_mode = False
    model = PeftModel.from_pretrained(net(), saved, config=config)
    assert model.peft_config["default"] is config
    assert config.inference_mode


def test_version_is_stored_and_kept(tmp_path):
    model = get_peft_model(net(), lora())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", values["peft_version"])
    assert "runtime_config" not in values
    path.write_text(json.dumps(values | {"peft_version": "0.9.0", "runtime_config": {"x": 1}}))
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert again.peft_config["default"].peft_version == "0.9.0"


def test_the_folder_holds_the_adapter_only(tmp_path):
    model = get_peft_model(net(), lora())
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    pair = "adapter_config.json", "adapter_model.safetensors"
    assert files == {"README.md", *pair, *(f"other/{name}" for name in pair)}


# ---------------------------------------------------------------- 15. saving and loading


def test_saving_changes_nothing(saved, tmp_path):
    model = PeftModel.from_pretrained(net(), saved, is_trainable=True)
    before, config, flags = bits(model), deepcopy(model.peft_config["default"]), trained(model)
    model.save_pretrained(tmp_path / "again")
    assert_same_bits(model, before)
    assert model.peft_config["default"] == config
    assert trained(model) == flags
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["inference_mode"] is True


def test_missing_keys_warn_with_the_adapter_and_the_full_key(tmp_path):
    get_peft_model(net(), lora()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lin0.lora_A.weight"]
    save_file(tensors, path)
    with pytest.warns(PeftWarning, match=r"missing adapter keys.*base_model\.model\.lin0\.lora_A\.first\.weight"):
        PeftModel.from_pretrained(net(), tmp_path, adapter_name="first")


def test_encoder_decoder_generate(tmp_path):
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    base = transformers.T5ForConditionalGeneration(config)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM"))
    tokens = torch.tensor([[1, 2, 3]])
    out = model.generate(input_ids=tokens, max_new_tokens=2, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 3)


# ---------------------------------------------------------------- also relied upon


def test_views_per_layer():
    model = get_peft_model(net(), lora(r=2, lora_alpha=6))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["weight_bias"]))
    layer = model.base_model.model.lin0
    assert layer.lora_A["default"].weight.shape == (2, 6)
    assert layer.lora_B["default"].weight.shape == (8, 2)
    assert layer.scaling == {"default": 3}
    assert (list(layer.lora_A), "other" in layer.lora_A) == (["default"], False)
    assert layer.merged_adapters == []
    assert layer.get_base_layer() is layer.base_layer
    assert type(layer.base_layer) is nn.Linear


def test_handles():
    base = net()
    model = get_peft_model(base, lora())
    assert model.base_model.model is model.get_base_model() is base
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert model.active_peft_config is model.peft_config["default"]
    assert model.peft_type == "LORA"
    assert issubclass(NoMatchingPeftModuleError, (ValueError, veneer.PeftError))


def test_trainable_parameters_are_counted(capsys):
    model = get_peft_model(net(), lora(r=2))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 28 || all params: 280 || trainable%: 10.0000\n"
    assert model.get_nb_trainable_parameters() == (28, 280)


@every_method
def test_base_model_comes_back_whole(make):
    base = net()
    originals = dict(base.named_modules())
    keys = list(base.state_dict())
    unloaded = get_peft_model(base, make()).unload()
    assert unloaded is base
    assert dict(base.named_modules()) == originals
    assert list(base.state_dict()) == keys


@every_method
def test_isinstance_checks(make):
    base = get_peft_model(net(), make()).get_base_model()
    has_lora = isinstance(make(), LoraConfig)
    assert isinstance(base.lin0, BaseTunerLayer)
    assert isinstance(base.lin0, LoraLayer) is has_lora
    assert not isinstance(base.lin0, ModulesToSaveWrapper)
    assert isinstance(base.head, ModulesToSaveWrapper) is bool(make().modules_to_save)
    assert not isinstance(base.norm, (BaseTunerLayer, LoraLayer, ModulesToSaveWrapper))


def test_status_follows_the_model():
    model = get_peft_model(net(), lora(r=2))
    model.add_adapter("other", lora())
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.num_adapter_layers) == ("Net", "PeftModel", 1)
    assert (status.trainable_params, status.available_adapters) == (28, ["default", "other"])
    assert status.requires_grad == {"default": True, "other": False}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    (layer,) = get_layer_status(model)
    assert (layer.name, layer.module_type, layer.merged_adapters) == ("lin0", "Linear", ["default"])
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not get_layer_status(model)[0].enabled
    with pytest.raises(ValueError, match="has no adapters"):
        get_model_status(net())
