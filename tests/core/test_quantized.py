"""Adapters on bitsandbytes' layers, with the real library: every method, and the numbers of `peft`."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import veneer
from torch import nn
from veneer.core import AdaptedModel, MergedError, PeftWarning
from veneer.core.quantized import dequantize_4bit

from .conftest import METHODS, make_config, stir
from .quantized import IN, OUT, QUANTIZED, QuantNet, bnb, net

TARGETS = ["first", "second"]
KINDS = pytest.mark.parametrize("kind", QUANTIZED)
BRIEF = pytest.mark.parametrize("kind", ["nf4-double", "int8"])
METHOD = pytest.mark.parametrize(("method", "variant"), METHODS)
# In evaluation on a CPU the 8-bit layer quantises x as well; in training it runs W x.


def adapted(kind: str, method: str = "LORA", variant: int = 0, *names: str, **changes) -> tuple[AdaptedModel, ...]:
    model = AdaptedModel(net(kind).train())
    options = {"target_modules": TARGETS} | changes
    if method == "IA3" and variant:
        options["feedforward_modules"] = TARGETS
    for name in names or ("a",):
        model.add(name, make_config(method, variant, **options))
    stir(model, *names or ("a",))
    return model, torch.randn(5, IN)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def dequantized(model: nn.Module) -> nn.Module:
    """A plain twin of a net with the very weights that its layers stand for."""
    twin = copy.deepcopy(model)
    for path in TARGETS:
        layer, linear = getattr(model, path), nn.Linear(1, 1)
        weight, bias = veneer.core.sites.find(type(layer))(layer).read()
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        setattr(twin, path, linear)
    return twin


@KINDS
def test_a_site_reads_what_the_layer_runs(kind):
    model, x = net(kind).train(), torch.randn(5, IN)
    torch.testing.assert_close(dequantized(model)(x), model(x))
    model.eval()
    torch.testing.assert_close(dequantized(model)(x), model(x), rtol=0.05, atol=0.05)


@METHOD
@BRIEF
def test_every_method_runs_as_over_the_dequantized_weights(method, variant, kind):
    model, x = adapted(kind, method, variant)
    plain = AdaptedModel(dequantized(net(kind)).train())
    plain.load("a", model.configs["a"], model.tensors("a"), trainable=True)
    x.requires_grad_()
    y, expected = model(x), plain(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    learned = [p for p in model.parameters_of("a") if p.requires_grad]
    wanted = [p for p in plain.parameters_of("a") if p.requires_grad]
    assert learned
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), [x, *learned]),
        torch.autograd.grad(expected.square().sum(), [x, *wanted]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-3)


@METHOD
@BRIEF
def test_a_merge_rounds_as_it_says_and_unmerges_exactly(method, variant, kind):
    model, x = adapted(kind, method, variant, "a", "b")
    model.activate("a", "b")
    before, y = bits(model), model(x)
    layers = {p: model.layers[p] for p in TARGETS}
    wanted = {p: layer._folded(*layer._to_fold(("a", "b")))[0] for p, layer in layers.items()}
    with pytest.warns(PeftWarning, match="rounded the weights of 2 quantized layers"):
        model.merge(["a"])
    with pytest.warns(PeftWarning):
        model.merge(["b"], safe_merge=True)
    for path, layer in layers.items():
        error = (layer.site.read()[0] - wanted[path]).norm() / wanted[path].norm()
        torch.testing.assert_close(model.rounding[path].weight, error.item(), rtol=1e-3, atol=1e-5)
        assert error < (0.15 if "4" in kind else 0.02)
        torch.testing.assert_close(layer.original()[0], dequantized(net(kind)).get_submodule(path).weight.detach())
    merged = model(x)
    assert not torch.equal(merged, y)
    at_once = AdaptedModel(copy.deepcopy(model.model))
    at_once.unmerge()
    with pytest.warns(PeftWarning):
        at_once.merge()
    assert torch.equal(at_once(x), merged)
    model.unmerge()
    assert model.rounding == {}
    assert_same_bits(model, before)
    assert torch.equal(model(x), y)


@KINDS
def test_merging_for_good_leaves_a_plain_quantized_model(kind):
    model, x = adapted(kind)
    model(x)
    with pytest.warns(PeftWarning):
        model.merge()
    y = model(x)
    plain = model.merge_and_detach()
    assert type(plain.first) is type(net(kind).first)
    assert torch.equal(plain(x), y)
    assert plain.state_dict().keys() == net(kind).train().state_dict().keys()


def test_merging_nothing_changes_no_weight():
    model = AdaptedModel(net("int8").train())
    model.add("a", veneer.LoraConfig(r=2, target_modules=TARGETS))
    before = bits(model)
    model.merge()
    assert_same_bits(model, before)


@BRIEF
def test_originals_that_were_not_kept_are_gone(kind):
    model, _ = adapted(kind)
    with pytest.warns(PeftWarning):
        model.merge(keep_original="none")
    with pytest.raises(MergedError, match="not kept"):
        model.unmerge()


@BRIEF
def test_safe_merge_refuses_infinities(kind):
    model, _ = adapted(kind)
    next(iter(model.parameters_of("a"))).data.fill_(float("inf"))
    before = bits(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge(safe_merge=True)
    assert_same_bits(model, before)


PEFT_CASES = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": False}),
    "rslora": ("LoraConfig", {"r": 3, "use_rslora": True, "init_lora_weights": False}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True, "init_lora_weights": False}),
    "lora head": ("LoraConfig", {"r": 3, "init_lora_weights": False, "modules_to_save": ["head"]}),
    "ia3": ("IA3Config", {"feedforward_modules": ["second"], "init_ia3_weights": False}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "init_weights": False}),
}


def net_for_peft(kind: str) -> nn.Module:
    """As `peft` wants it, and without bitsandbytes' repacking at evaluations (see below)."""
    model = net(kind)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = "int8" in kind, "4" in kind
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4-bf16", "int8", "int8-outliers"])
def test_numbers_and_files_are_those_of_peft(case, kind, tmp_path):
    if case == "dora" and "int8" in kind:
        pytest.skip("peft loses the scales of 8-bit layers on a CPU when it reads them for DoRA, and then fails")
    close = {"atol": 1e-3, "rtol": 1e-2} if kind == "fp4-bf16" else {"atol": 2e-5, "rtol": 1e-4}  # peft reads bfloat16
    name, options = PEFT_CASES[case]
    reference = peft.get_peft_model(net_for_peft(kind), getattr(peft, name)(target_modules=TARGETS, **options))
    x = torch.randn(7, IN)
    reference.save_pretrained(str(tmp_path / "theirs"))
    ours = veneer.PeftModel.from_pretrained(net(kind), tmp_path / "theirs", is_trainable=True)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), reference.train(training)(x), **close)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(net_for_peft(kind), str(tmp_path / "ours"))
    torch.testing.assert_close(back(x), ours(x), **close)


@KINDS
def test_copies_and_pickles_run_alike_and_merge(kind):
    model, x = adapted(kind)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        with pytest.warns(PeftWarning):
            twin.merge()
        twin.unmerge()
        assert torch.equal(twin(x), y)
    assert torch.equal(model(x), y)


@BRIEF
def test_a_quantized_module_saved_whole_is_trained_in_full_precision(kind, tmp_path):
    config = veneer.LoraConfig(r=2, target_modules=["second"], modules_to_save=["first"])
    model, x = veneer.get_peft_model(net(kind).train(), config), torch.randn(5, IN)
    whole = model.base_model.layers["first"].replacement()
    assert type(whole) is nn.Linear
    torch.testing.assert_close(model(x), net(kind).train()(x))
    model(x).square().sum().backward()
    assert whole.weight.grad.abs().sum() > 0
    whole.weight.data += 0.1
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(net(kind).train(), tmp_path)
    torch.testing.assert_close(again.train()(x), model(x))
    model.unload()
    torch.testing.assert_close(model.get_base_model()(x), net(kind).train()(x))


@BRIEF
def test_half_precision_adapters_are_possible(kind):
    model = veneer.get_peft_model(
        net(kind).bfloat16().train(), veneer.LoraConfig(r=2, target_modules=["first"]), autocast_adapter_dtype=False
    )
    expected = torch.bfloat16 if kind == "fp4-bf16" else torch.float32
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert model(torch.randn(5, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_four_bit_layer_keeps_its_dtype_through_merges():
    model, _ = adapted("fp4-bf16")
    state = model.model.first.base_layer.weight.quant_state
    with pytest.warns(PeftWarning):
        model.merge()
    weight = model.model.first.base_layer.weight
    assert (weight.quant_state.dtype, weight.quant_type) == (state.dtype, "fp4") == (torch.bfloat16, "fp4")
    assert weight.quant_state is model.model.first.base_layer.quant_state is not state


def test_layers_that_are_not_quantized_yet():
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(bnb.nn.Linear4bit(IN, OUT), bnb.nn.Linear8bitLt(OUT, IN, has_fp16_weights=False))

    model = AdaptedModel(fresh())
    model.add("a", veneer.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.to("cpu")  # quantises
    x = torch.randn(3, IN)
    assert model.model[0].base_layer.weight.dtype == torch.uint8
    torch.testing.assert_close(model.train()(x).shape, torch.Size([3, IN]))
    with torch.device("meta"):
        empty = fresh()
    handle = AdaptedModel(empty)
    handle.add("a", veneer.LoraConfig(r=2, target_modules=["0", "1"]))
    assert {p.device.type for p in handle.parameters_of("a")} == {"meta"}


# ---------------------------------------------------------------- repacking by bitsandbytes on CPUs with AVX512-BF16


def packed_for_cpu(kind: str) -> QuantNet:
    """A net as an evaluation leaves it on such a CPU."""
    model = net(kind)
    for layer in (model.first, model.second):
        converted = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
        layer.weight.data, layer.weight.quant_state = converted
    return model


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4-bf16"])
def test_repacked_weights_are_put_back(kind):
    model, expected = packed_for_cpu(kind), net(kind)
    with pytest.warns(PeftWarning, match="repacked 4-bit weights"):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["first"]))
    for path in TARGETS:
        got, want = model.get_submodule(path), expected.get_submodule(path)
        got = getattr(got, "base_layer", got)
        assert torch.equal(got.weight.data, want.weight.data)
        torch.testing.assert_close(
            dequantize_4bit(got.weight.data, got.weight.quant_state),
            dequantize_4bit(want.weight.data, want.weight.quant_state),
            rtol=2**-8,
            atol=1e-6,
        )


def test_an_evaluation_before_and_between_training_steps_leaves_gradients_right():
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    model, x = adapted("nf4"), torch.randn(5, IN)
    model, x = model[0], x.requires_grad_()
    fresh = model(x)
    expected = torch.autograd.grad(fresh.square().sum(), x)[0]
    with torch.no_grad():
        model.eval()(x.detach())
    assert all(not m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    again = model.train()(x)
    assert torch.equal(again, fresh)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], expected)


def test_rows_that_are_no_whole_blocks_are_reported_on_a_cpu():
    model = nn.Sequential(bnb.nn.Linear4bit(48, 64).to("cpu"))
    with pytest.warns(PeftWarning, match="48 input features are no multiple of the 64"):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("kind", ["Embedding4bit", "Embedding8bit"])
def test_quantized_embeddings_are_refused_with_the_reason(kind):
    model = nn.Sequential(getattr(bnb.nn.modules, kind)(64, 64))
    with pytest.raises(ValueError, match="neither trained nor saved"):
        veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["0"]))
