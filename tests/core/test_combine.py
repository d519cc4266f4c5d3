"""Weighted combinations of adapters, against `peft` and against float64 mathematics."""

import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from veneer import AdaptedModel, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, PeftWarning, get_peft_model

from .conftest import KINDS
from .conftest import Net as OneLayer

SCALED = {"init_lora_weights": False, "r": 2}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.embed(tokens))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


EVERY = ["embed", "linear", "conv"]
ADAPTERS = {
    "a": {"r": 2, "lora_alpha": 3, "target_modules": EVERY},
    "b": {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": EVERY},
    "ranked": {
        "r": 2, "lora_alpha": 4, "rank_pattern": {"linear": 3}, "alpha_pattern": {"conv": 1}, "target_modules": EVERY
    },
    "large": {"r": 4, "lora_alpha": 2, "target_modules": EVERY},
    "partial": {"r": 2, "lora_alpha": 2, "target_modules": ["linear"]},
}  # fmt: skip


@pytest.fixture
def both(tmp_path):
    """The same adapters on a model of ours and on one of PEFT's."""
    configs = {n: LoraConfig(init_lora_weights=False, **o) for n, o in ADAPTERS.items()}
    names = iter(configs.items())
    name, config = next(names)
    ours = get_peft_model(net(), config, adapter_name=name)
    for name, config in names:
        ours.add_adapter(name, config)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "a", adapter_name="a")
    for name in [n for n in ADAPTERS if n != "a"]:
        theirs.load_adapter(tmp_path / name, name)
    return ours, theirs


def delta(model: PeftModel | AdaptedModel, name: str, path: str) -> Tensor:
    """What the adapter adds to the weight, (out, cols), in float64."""
    handle = model.base_model if isinstance(model, PeftModel) else model
    adapter = handle.layers[path].adapters[name]
    return adapter.gain * adapter.delta().detach().double()


def exact(model: PeftModel | AdaptedModel, weights: dict[str, float], path: str) -> Tensor:
    """The weighted sum of those adapters that the layer has."""
    handle = model.base_model if isinstance(model, PeftModel) else model
    here = handle.layers[path].adapters
    return sum(w * delta(model, n, path) for n, w in weights.items() if n in here)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank (Eckart-Young)."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


WEIGHTS = [[1.0, 1.0], [0.7, -0.4], [-1.5, -0.5], [2.0, 0.0]]
PRUNED = {
    "magnitude_prune": [{"density": 0.5}, {"density": 0.2}],
    "ties": [{"density": 0.5}, {"density": 0.3, "majority_sign_method": "frequency"}, {"density": 1.0}],
    "dare_linear": [{"density": 0.5}],
    "dare_ties": [{"density": 0.6}, {"density": 0.4, "majority_sign_method": "frequency"}],
}


def of_peft(kind: str, model: PeftModel, names: list[str], *arguments, **options) -> None:
    """PEFT's blend; random numbers start after those that it draws to initialise the new adapter."""
    tuner = model.base_model
    inject = tuner.inject_adapter

    def inject_and_seed(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(7)

    tuner.inject_adapter = inject_and_seed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, *arguments, combination_type=kind, **options)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("names", "kind", "options"),
    [
        (["a", "b"], "cat", {}),
        (["a", "ranked"], "cat", {}),
        (["a", "large"], "cat", {}),
        (["a", "partial"], "cat", {}),
        (["a", "b"], "linear", {}),
        (["a", "b"], "svd", {}),
        (["a", "b"], "svd", {"svd_rank": 3, "svd_full_matrices": False}),
        (["a", "large"], "svd", {}),
        (["a", "ranked"], "svd", {}),
        (["partial", "b"], "svd", {}),
        *((["a", "b"], kind, options) for kind, several in PRUNED.items() for options in several),
        *((["a", "b"], f"{kind}_svd", options) for kind, several in PRUNED.items() for options in several),
        *((["a", "ranked"], f"{kind}_svd", several[0]) for kind, several in PRUNED.items()),
        *((["large", "partial"], f"{kind}_svd", several[0] | {"svd_rank": 3}) for kind, several in PRUNED.items()),
    ],
    ids=str,
)
def test_same_as_peft(both, names, kind, options, weights):
    """Random draws included, from the same state of torch's generator; but PEFT lays out what an embedding's adapter
    adds the other way round. Not for a first adapter with `use_rslora`, which PEFT keeps and so scales once more."""
    ours, theirs = both
    torch.manual_seed(7)
    ours.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
    of_peft(kind, theirs, names, weights, "new", **options)
    for path in EVERY if not (kind.startswith("dare") and kind.endswith("svd")) else ["linear", "conv"]:
        layer = getattr(theirs.base_model.model, path)
        found = ours.base_model.layers[path].site.from_matrix(delta(ours, "new", path))
        torch.testing.assert_close(found.float(), layer.get_delta_weight("new").detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ranked", "large", "partial"])
def test_combined_adapters_are_files_that_peft_reads(both, name, tmp_path):
    """With a rank of their own for each layer."""
    ours, _ = both
    ours.add_weighted_adapter(["a", name], [1.0, -0.5], "new", combination_type="cat")
    ours.save_pretrained(tmp_path / "out", selected_adapters=["new"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "out" / "new")
    ours.set_adapter("new")
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(ours(tokens), theirs(tokens))


# ---------------------------------------------------------------- any layer, any dtype

PRECISIONS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def two_loras(kind: str, dtype: torch.dtype = torch.float32, autocast: bool = False) -> AdaptedModel:
    """A layer with adapters "a" and "b" of unequal ranks and scales."""
    torch.manual_seed(0)
    model = AdaptedModel(OneLayer(kind).to(dtype))
    for name, r, alpha in (("a", 2, 3), ("b", 3, 1)):
        config = LoraConfig(target_modules=["layer"], r=r, lora_alpha=alpha, init_lora_weights=False)
        model.add(name, config, autocast_adapter_dtype=autocast)
    return model


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, None, 5])
def test_svd_is_the_optimum(kind, dtype, rank):
    """Of all matrices of that rank, the nearest to the exact sum; without a rank, of the largest rank."""
    model = two_loras(kind, dtype)
    model.combine(["a", "b"], [0.8, -1.3], "new", "svd", svd_rank=rank)
    target = exact(model, {"a": 0.8, "b": -1.3}, "layer")
    expected, found = best(target, rank or 3), delta(model, "new", "layer")
    assert {p.dtype for p in model.parameters_of("new")} == {dtype}
    assert (found - expected).norm() <= PRECISIONS[dtype] * target.norm()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cat_is_the_exact_sum(kind, dtype):
    model = two_loras(kind, dtype)
    model.combine(["a", "b"], [0.8, -1.3], "new", "cat")
    target = exact(model, {"a": 0.8, "b": -1.3}, "layer")
    assert (delta(model, "new", "layer") - target).norm() <= PRECISIONS[dtype] * target.norm()
    assert model.configs["new"].r == 5


def test_a_half_precision_base_combines_in_float32():
    model = two_loras("linear", torch.bfloat16, autocast=True)
    model.combine(["a", "b"], [1.0, 1.0], "new", "svd")
    assert {p.dtype for p in model.parameters_of("new")} == {torch.float32}


def test_svd_of_a_wide_sum_is_the_optimum_too():
    """Ranks that together exceed the matrix take the dense way."""
    torch.manual_seed(0)
    model = AdaptedModel(nn.Sequential(nn.Linear(6, 5)))
    for name in "abc":
        model.add(name, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    model.combine(list("abc"), [1.0, 1.0, 1.0], "new", "svd", svd_rank=2)
    expected = best(exact(model, dict.fromkeys("abc", 1.0), "0"), 2)
    torch.testing.assert_close(delta(model, "new", "0"), expected, atol=1e-5, rtol=1e-5)


def test_svd_clamp_bounds_the_factors():
    model = two_loras("linear")
    model.combine(["a", "b"], [1.0, 1.0], "free", "svd")
    model.combine(["a", "b"], [1.0, 1.0], "clamped", "svd", svd_clamp=0.8)
    free, clamped = (torch.cat([p.flatten() for p in model.parameters_of(n)]).abs() for n in ("free", "clamped"))
    assert clamped.max() < free.max()
    assert clamped.eq(clamped.max()).sum() > 1


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d-1x1"])
@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("effective", [False, True])
def test_other_delta_methods_combine_with_loras(kind, how, effective):
    """LoHa and LoKr by their exact factors, or densely where they have none."""
    torch.manual_seed(0)
    model = AdaptedModel(OneLayer(kind))
    target, r = ["layer"], 1
    options = {"target_modules": target, "r": r, "init_weights": False, "use_effective_conv2d": effective}
    model.add("lora", LoraConfig(target_modules=target, r=2, init_lora_weights=False))
    model.add("loha", LoHaConfig(alpha=3, **options))
    model.add("lokr", LoKrConfig(alpha=2, **options))
    weights = {"lora": 0.5, "loha": 2.0, "lokr": -1.0}
    model.combine(list(weights), list(weights.values()), "new", how, **({"svd_rank": 4} if how == "svd" else {}))
    expected = exact(model, weights, "layer")
    expected = best(expected, 4) if how == "svd" else expected
    torch.testing.assert_close(delta(model, "new", "layer"), expected, atol=1e-5, rtol=1e-5)
    assert type(model.configs["new"]) is LoraConfig


# ---------------------------------------------------------------- the new adapter and its neighbours


def three() -> PeftModel:
    model = get_peft_model(net(), LoraConfig(target_modules=["linear"], **SCALED), adapter_name="a").eval()
    model.add_adapter("b", LoraConfig(target_modules=["linear", "embed"], **SCALED))
    model.add_adapter("c", LoraConfig(target_modules=["conv"], **SCALED))
    return model


def test_layers_that_one_adapter_targets_take_that_one():
    model = three()
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 2.0, 3.0], "new", combination_type="cat")
    torch.testing.assert_close(delta(model, "new", "embed"), 2 * delta(model, "b", "embed"))
    torch.testing.assert_close(delta(model, "new", "conv"), 3 * delta(model, "c", "conv"))
    expected = delta(model, "a", "linear") + 2 * delta(model, "b", "linear")
    torch.testing.assert_close(delta(model, "new", "linear"), expected)
    assert model.peft_config["new"].target_modules == {"linear", "embed", "conv"}


def test_the_new_adapter_waits_frozen_and_disturbs_nothing():
    model = three()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert model.active_adapters == ["a"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    model.set_adapter("new")
    assert not any(p.requires_grad for p in model.parameters())


def test_outputs_add_up():
    model, tokens = three(), torch.tensor([[1, 2, 3]])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type="cat")
    model.set_adapter(["a", "b"])
    y = model(tokens)
    model.set_adapter("new")
    torch.testing.assert_close(model(tokens), y)


def test_combining_does_not_depend_on_what_is_merged():
    model = three()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "before", combination_type="cat")
    model.merge_adapter()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "after", combination_type="cat")
    assert torch.equal(delta(model, "before", "linear"), delta(model, "after", "linear"))


def test_an_adapter_counts_at_its_weight():
    model = three()
    expected = 0.5 * delta(model, "a", "linear")
    model.base_model.set_weight("a", 0.5)
    model.add_weighted_adapter(["a"], [1.0], "new", combination_type="cat")
    torch.testing.assert_close(delta(model, "new", "linear"), expected)


def test_a_name_that_exists_is_left_as_it_is():
    """As in PEFT; `AdaptedModel.combine` says so."""
    model = three()
    before = delta(model, "b", "linear")
    model.add_weighted_adapter(["a"], [1.0], "b")
    assert torch.equal(delta(model, "b", "linear"), before)
    with pytest.raises(ValueError, match="Adapter with name b already exists"):
        model.base_model.combine(["a"], [1.0], "b")


# ---------------------------------------------------------------- the options of PEFT's method


def refuse(model: PeftModel, message: str, *arguments, **options) -> None:
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments, **options)
    assert "new" not in model.peft_config
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        (["a", "nope"], [1.0, 1.0], {}, "Adapter nope not found"),
        (["a", "b"], [1.0], {}, "2 adapters and 1 weights"),
        ([], [], {}, "0 adapters"),
        (["a", "b"], [1.0, 1.0], {"combination_type": "soup"}, r"'soup' is unknown; known: \['breadcrumbs', 'cat'"),
        (["a", "b"], [1.0, 1.0], {"combination_type": "ties"}, "'ties' needs density"),
        (["a", "b"], [1.0, 1.0], {"combination_type": "ties", "density": 1.5}, r"density=1.5 is no share"),
        (["a", "b"], [1.0, 1.0], {"combination_type": "dare_linear", "density": 0}, r"density=0 is no share"),
        (["a", "b"], [1.0, 1.0], {"svd_rank": -1}, "svd_rank=-1"),
        (["a", "b"], [1.0, 1.0], {"svd_clamp": 0.3}, "svd_clamp=0.3 is no upper quantile"),
        (["a", "b"], [1.0, 1.0], {"svd_driver": "fast"}, "svd_driver='fast' is unknown"),
        (["a", "b"], [1.0, 1.0], {"max_error": 1.0}, "max_error=1.0 is no relative error"),
        (["a", "b"], [1.0, 1.0], {"combination_type": "cat", "max_error": 0.1}, "'cat' has no option max_error"),
        (["a", "b"], [1.0, 1.0], {"densty": 0.5}, r"'svd' has no option densty; it reads \['max_error', 'svd_clamp'"),
        (["a", "b"], [1.0, float("nan")], {}, "the weight is nan"),
        (["a", "b"], [1.0, {"liner": 2}], {}, r"'liner' matches none of the 2 layers; near: linear"),
        (
            ["a", "b"],
            [1.0, 1.0],
            {"combination_type": "ties_svd", "density": 0.5, "majority_sign_method": "loudest"},
            "'loudest' is neither 'total' nor 'frequency'",
        ),
        (["a", "b"], [1.0, -1.0], {"combination_type": "slerp"}, "(embed|linear): 'slerp' goes .* no weight is -1.0"),
        (["a", "b"], [1, 1], {"combination_type": "della", "density": 0.9, "epsilon": 0.4}, "epsilon=0.4 takes"),
        (["a", "b"], [1, 1], {"combination_type": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "exceed 1 together"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments(names, weights, options, message):
    refuse(three(), message, names, weights, "new", **options)


def test_an_option_of_peft_that_a_kind_does_not_read_is_told():
    model = three()
    with pytest.warns(PeftWarning, match="'cat' does not read density, svd_rank"):
        model.add_weighted_adapter(["a"], [1.0], "new", combination_type="cat", density=0.5, svd_rank=3)
    torch.testing.assert_close(delta(model, "new", "linear"), delta(model, "a", "linear"))
