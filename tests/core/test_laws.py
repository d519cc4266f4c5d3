"""Every method obeys the same laws at every kind of layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from veneer.core import AdaptedLayer, AdaptedModel, MergedError
from veneer.core.adapter import Branch

from .conftest import KINDS, METHODS, NORMS, UNFIT, Net, build, each_case, make_config, stir

HALF = [torch.bfloat16, torch.float16]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@each_case
def test_starts_as_the_identity(method, variant, kind):
    model, x = build(method, variant, kind, "a", random=False)
    torch.testing.assert_close(model(x), model.model.layer.base_layer(x))


@each_case
def test_random_start_changes_the_output(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    assert not torch.allclose(model(x), model.model.layer.base_layer(x), atol=1e-4)


@each_case
def test_forward_is_fold(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    layer = model.model.layer
    weight, bias = layer.adapters["a"].fold(*(t if t is None else t.detach() for t in layer.site.read()))
    torch.testing.assert_close(model(x), layer.site.apply(x, weight, bias), atol=1e-5, rtol=1e-4)


@each_case
@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_merge_is_forward_and_unmerge_is_exact(method, variant, kind, keep):
    model, x = build(method, variant, kind, "a", "b")
    model.activate("a", "b")
    before, y = state(model), model(x)
    model.merge(keep_original=keep)
    assert not torch.equal(model.state_dict()["model.layer.base_layer.weight"], before["model.layer.base_layer.weight"])
    torch.testing.assert_close(model(x), y, atol=2e-5, rtol=1e-4)
    with pytest.raises(MergedError, match="unmerge_adapter"):
        model.activate("b")
    model.unmerge()
    assert_same_bits(model, before)
    assert torch.equal(model(x), y)


@each_case
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_merge_in_half_precision_rounds_once_and_unmerges_exactly(method, variant, kind, dtype):
    model, _ = build(method, variant, kind, "a", "b")
    layer = model.model.layer
    layer.base_layer.to(dtype)
    model.activate("a", "b")
    weight, bias = layer.site.read()
    wide = weight.detach().float(), None if bias is None else bias.detach().float()
    for name in ("a", "b"):
        wide = layer.adapters[name].fold(*wide)
    before = state(model)
    model.merge(["a"])
    model.merge(["b"])  # one by one equals at once: from the original weight, rounded once
    slack = 1e-6 * (1 + wide[0].abs())
    assert (layer.site.read()[0] >= (wide[0] - slack).to(dtype)).all()
    assert (layer.site.read()[0] <= (wide[0] + slack).to(dtype)).all()
    model.unmerge()
    assert_same_bits(model, before)


@each_case
def test_merging_for_good_leaves_a_plain_model(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    y, names = model(x), Net(kind).state_dict().keys()
    plain = model.merge_and_detach()
    assert type(plain.layer) is type((KINDS | NORMS)[kind].make())
    assert plain.state_dict().keys() == names
    torch.testing.assert_close(plain(x), y, atol=2e-5, rtol=1e-4)
    assert all(t.is_contiguous() for t in plain.state_dict().values())


@each_case
def test_detaching_leaves_no_residue(method, variant, kind):
    torch.manual_seed(0)
    net = Net(kind)
    base, before, flags = net.layer, state(net), [p.requires_grad for p in net.parameters()]
    attributes = set(vars(net)) | set(vars(base))
    model = AdaptedModel(net)
    model.add("a", make_config(method, variant))
    net((KINDS | NORMS)[kind].sample())
    assert model.detach() is net
    assert net.layer is base
    assert_same_bits(net, before)
    assert set(vars(net)) | set(vars(base)) == attributes
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert len([p.requires_grad for p in net.parameters()]) == len(flags)


@each_case
def test_adapters_do_not_disturb_each_other(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    alone = {}
    for name in ("a", "b"):
        model.activate(name)
        alone[name] = model(x)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-5)
    model.activate()
    assert torch.equal(model(x), model.model.layer.base_layer(x))
    model.delete("a")
    model.activate("b")
    assert torch.equal(model(x), alone["b"])


@each_case
def test_several_run_in_the_stated_order(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    layer = model.model.layer
    model.activate("a", "b")
    weights = layer.site.read()
    for name in ("a", "b"):
        weights = layer.adapters[name].fold(*weights)
    torch.testing.assert_close(model(x), layer.site.apply(x, *weights), atol=2e-5, rtol=1e-4)


@each_case
def test_gradients_only_where_asked(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    model.set_trainable("b", False)
    model.activate("b", "a")
    model(x).square().mean().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, _ in model.named_parameters() if ".adapters.a." in name}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters_of("a"))


@each_case
def test_gradients_equal_those_of_the_folded_weight(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    x = x.clamp(min=1) if kind == "embedding" else x  # a padding token gives no gradient to the row of a matrix
    layer, parameters = model.model.layer, model.parameters_of("a")
    forward = torch.autograd.grad(model(x).square().mean(), parameters)
    weight, bias = layer.adapters["a"].fold(*(t if t is None else t.detach() for t in layer.site.read()))
    folded = torch.autograd.grad(layer.site.apply(x, weight, bias).square().mean(), parameters)
    for one, two in zip(forward, folded, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


@each_case
def test_saving_and_loading_gives_the_same_function(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    model.set_trainable("a", False)  # torch.matmul rounds otherwise where a factor requires grad
    y, tensors = model(x), model.tensors("a")
    other = AdaptedModel(copy.deepcopy(model).detach())
    given = dict(tensors)
    other.load("b", make_config(method, variant), tensors)
    assert tensors == given
    assert torch.equal(other(x), y)
    assert other.tensors("b").keys() == tensors.keys()
    assert not any(p.requires_grad for p in other.parameters())
    assert not any(t.is_meta for t in other.state_dict().values())


@each_case
def test_strength_goes_from_the_base_to_the_adapter(method, variant, kind):
    model, x = build(method, variant, kind, "a")
    full, base = model(x), model.model.layer.base_layer(x)
    model.set_weight("a", 0.0)
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=1e-5)
    model.set_weight("a", 0.4)
    part = model(x)
    torch.testing.assert_close(part, torch.lerp(base, full, 0.4), atol=1e-5, rtol=1e-4)
    model.merge()
    torch.testing.assert_close(model(x), part, atol=2e-5, rtol=1e-4)


@each_case
def test_half_precision_base_with_float32_adapter(method, variant, kind):
    torch.manual_seed(0)
    model, x = AdaptedModel(Net(kind).to(torch.bfloat16)), (KINDS | NORMS)[kind].sample()
    model.add("a", make_config(method, variant))
    assert {p.dtype for p in model.parameters_of("a")} == {torch.float32}
    x = x.bfloat16() if x.is_floating_point() else x
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters_of("a"))
    wide = AdaptedModel(copy.deepcopy(model).detach().float())
    wide.load("a", make_config(method, variant), model.tensors("a"))
    torch.testing.assert_close(y.float(), wide(x.float() if x.is_floating_point() else x), atol=0.15, rtol=0.1)


@each_case
def test_copies_are_independent(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        stir(twin, "a")
        twin.activate("b")
        assert torch.equal(model(x), y)
        assert model.state.active == ("a",)


@pytest.mark.parametrize(
    ("method", "variant", "kind"),
    [
        pytest.param(*m.values, kind, id=f"{m.id}-{kind}")
        for m in METHODS
        for kind in ("linear", "conv2d", "embedding")
        if not {(m.id, kind), (m.id, "embedding")} & UNFIT
    ],
)
def test_compiles_as_one_graph(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    model.activate("a", "b")
    torch.testing.assert_close(compiled(x), model(x))


@each_case
def test_a_second_handle_finds_everything(method, variant, kind):
    model, x = build(method, variant, kind, "a", "b")
    model.activate("b")
    again = AdaptedModel(model.model)
    assert again.configs == model.configs
    assert again.state is model.state
    again.activate("a")
    assert [p.requires_grad for p in model.parameters_of("a")] == [True] * len(model.parameters_of("a"))
    assert torch.equal(again(x), model(x))


@each_case
def test_layer_answers_for_its_base(method, variant, kind):
    model, _ = build(method, variant, kind, "a")
    layer = model.model.layer
    assert isinstance(layer, AdaptedLayer)
    assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = layer.nothing_like_this
    adapter = layer.adapters["a"]
    assert all(layer.__getattr__(view)["a"] is not None for view in adapter.views if hasattr(adapter, view))


@each_case
def test_dropouts_act_in_training_only(method, variant, kind):
    options = {
        "LORA": {"lora_dropout": 0.5},
        "LOHA": {"rank_dropout": 0.5, "module_dropout": 0.3},
        "LOKR": {"rank_dropout": 0.5, "module_dropout": 0.3, "rank_dropout_scale": True},
        "OFT": {"module_dropout": 0.6},
    }.get(method)
    if options is None or (method == "LORA" and kind == "embedding") or (method == "OFT" and variant == 1):
        pytest.skip("no dropout here")
    torch.manual_seed(0)
    model, x = AdaptedModel(Net(kind).eval()), (KINDS | NORMS)[kind].sample()
    model.add("a", make_config(method, variant, **options))
    stir(model, "a")
    y = model(x)
    assert torch.equal(model(x), y)
    model.train()
    assert any(not torch.allclose(model(x), y, atol=1e-6) for _ in range(20))
    model.eval()
    assert torch.equal(model(x), y)


def test_every_registered_method_is_tried():
    tried = {m.values[0] for m in METHODS}
    model, _ = build("LORA", 0, "linear", "a")
    assert {"LORA", "LOHA", "LOKR", "IA3", "OFT"} <= tried
    assert isinstance(model.model.layer.adapters["a"], Branch)
