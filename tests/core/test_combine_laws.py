"""Every combination obeys the same laws with every method at every kind of layer.

A new combination is tried by being registered, with one line in `NEUTRAL` if it needs options.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from veneer.core import (
    AdaptedModel,
    IA3Config,
    LoraConfig,
    OFTConfig,
    combination,
    combination_types,
    on_deltas,
    on_factors,
)
from veneer.core.combinations.registry import COMBINATIONS, REQUIRED, Part
from veneer.core.lowrank import LowRank
from veneer.core.stack import fold

from .conftest import KINDS, build, each_case, each_matrix_case, make_config, stir

NEUTRAL = {
    **{name: {"density": 1.0} for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
}
"""Options with which nothing is pruned."""
PRUNING = {name: {"density": 0.4} for name in NEUTRAL}
each_kind = pytest.mark.parametrize("kind", sorted(combination_types()))


def neutral(name: str, of: dict[str, dict] = NEUTRAL) -> dict:
    return of.get(name.removesuffix("_svd"), {})


def full_rank(model: AdaptedModel, name: str) -> dict:
    """An option that truncates nothing, for kinds that have it."""
    most = max(min(layer.site.out, layer.site.cols) for layer in model.layers.values())
    return {"svd_rank": most} if "svd_rank" in combination_types()[name].options else {}


def change(model: AdaptedModel, name: str, path: str = "layer") -> tuple[Tensor, Tensor]:
    """What an adapter adds to weight and bias of its layer, by the law that folding is."""
    layer = model.layers[path]
    (weight, bias), adapter = layer.site.read(), layer.adapters[name]
    with torch.no_grad():
        folded, moved = fold(adapter, weight, bias)
    zero = torch.zeros(layer.site.out)
    return (folded - weight).double(), ((zero if moved is None else moved) - (zero if bias is None else bias)).double()


def assert_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], message: str = "") -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= 2e-5 * (1 + two.norm()), message


@each_case
def test_one_adapter_at_weight_one_is_itself(method, variant, kind):
    """With every combination that takes it; strengths count."""
    model, x = build(method, variant, kind, "a")
    model.set_weight("a", 0.7)
    expected, y = change(model, "a"), model(x)
    for name in combination_types():
        if model.reason_against(["a"], name) is None:
            report = model.combine(["a"], [1.0], name, name, **neutral(name), **full_rank(model, name))
            assert_near(change(model, name), expected, name)
            assert report.error < 1e-5 or report.error != report.error  # none to state where factors are merged
            model.activate(name)
            torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-3)
            model.activate("a")
            model.delete(name)


@each_matrix_case
def test_any_method_blends_with_a_lora(method, variant, kind):
    """Exactly the weighted sum of what they do, biases included."""
    model, x = build(method, variant, kind, "a")
    model.add("b", make_config("LORA", 0))
    (dw, db), (dw2, db2) = change(model, "a"), change(model, "b")
    if kind == "embedding" and db.any():
        pytest.skip("an embedding has no bias")
    for name in ("cat", "svd"):
        report = model.combine(["a", "b"], [0.6, -1.5], name, name, **full_rank(model, name))
        assert_near(change(model, name), (0.6 * dw - 1.5 * dw2, 0.6 * db - 1.5 * db2), name)
        assert report.error < 1e-5
        model.activate(name)
        weight, bias = model.layers["layer"].adapters[name].fold(*model.layers["layer"].site.read())
        torch.testing.assert_close(model(x), model.layers["layer"].site.apply(x, weight, bias), atol=1e-4, rtol=1e-3)


@each_case
def test_the_order_of_adapters_does_not_matter(method, variant, kind):
    model, _ = build(method, variant, kind, "a", "b")
    for name in combination_types():
        if model.reason_against(["a", "b"], name) is None:
            drawn = "seed" in combination_types()[name].options
            options = full_rank(model, name) | neutral(name, NEUTRAL if drawn else PRUNING)
            model.combine(["a", "b"], [0.5, 0.8], "one", name, **options)
            model.combine(["b", "a"], [0.8, 0.5], "two", name, **options)
            assert_near(change(model, "one"), change(model, "two"), name)
            model.delete("one")
            model.delete("two")


@pytest.mark.parametrize("method", ["LORA", "LOHA", "LOKR", "OFT", "IA3"])
@pytest.mark.parametrize("max_error", [0.5, 0.1, 1e-3])
def test_the_rank_is_the_smallest_within_an_error(method, max_error):
    model, _ = build(method, 0, "conv2d", "a")
    model.add("b", make_config("LORA", 0))
    target = change(model, "a")[0] + change(model, "b")[0]
    report = model.combine(["a", "b"], [1.0, 1.0], "new", "svd", max_error=max_error)
    error = ((change(model, "new")[0] - target).norm() / target.norm()).item()
    assert report.errors["layer"] == pytest.approx(error, abs=1e-6)
    assert error <= max_error
    s = torch.linalg.svdvals(target)
    rank = report.ranks["layer"]
    assert rank == 1 or s[rank - 1 :].norm() > max_error * s.norm()
    capped = model.combine(["a", "b"], [1.0, 1.0], "capped", "svd", max_error=max_error, svd_rank=2)
    assert capped.ranks["layer"] == min(rank, 2)


# ---------------------------------------------------------------- several layers


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def deep(*targets: list[str]) -> AdaptedModel:
    """Adapters "a", "b", ... of rank 2 on these layers (default: two on both)."""
    torch.manual_seed(0)
    model = AdaptedModel(Deep())
    for name, target in zip("abc", targets or [["first", "last"]] * 2, strict=False):
        model.add(name, LoraConfig(r=2, lora_alpha=3, target_modules=target, init_lora_weights=False))
    return model


@each_kind
def test_weights_by_block(kind):
    """Each layer is what it is with its weights alone."""
    model, options = deep(), neutral(kind, PRUNING) | full_rank(deep(), kind)
    if "seed" in combination_types()[kind].options:
        options["seed"] = 3
    model.combine(["a", "b"], [{"first": 0.3, "last": 0.8}, 0.6], "mixed", kind, **options)
    model.combine(["a", "b"], [0.3, 0.6], "one", kind, **options)
    model.combine(["a", "b"], [0.8, 0.6], "two", kind, **options)
    assert_near(change(model, "mixed", "first"), change(model, "one", "first"))
    assert_near(change(model, "mixed", "last"), change(model, "two", "last"))
    assert (change(model, "one", "last")[0] - change(model, "two", "last")[0]).norm() > 1e-3


@each_kind
def test_layers_that_one_adapter_targets_take_that_one(kind):
    model = deep(["first"], ["first", "last"])
    model.combine(["a", "b"], [0.5, 2.0], "new", kind, **neutral(kind), **full_rank(model, kind))
    assert_near(change(model, "new", "last"), tuple(2 * d for d in change(model, "b", "last")))
    assert model.configs["new"].target_modules == {"first", "last"}


@pytest.mark.parametrize("kind", [k for k in sorted(combination_types()) if "seed" in combination_types()[k].options])
def test_a_seed_fixes_the_draws_of_each_layer(kind):
    both = deep()
    options = neutral(kind, PRUNING) | full_rank(both, kind)
    found = []
    for seed in (5, 5, 6):
        both.combine(["a", "b"], [1.0, 1.0], "new", kind, seed=seed, **options)
        found.append(change(both, "new", "last")[0])
        both.delete("new")
        torch.rand(9)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    both.layers["first"].adapters["a"].strength = 9.0
    both.combine(["a", "b"], [{"first": 3.0}, 1.0], "new", kind, seed=5, **options)
    assert torch.equal(change(both, "new", "last")[0], found[0])
    state = torch.get_rng_state()
    both.combine(["a", "b"], [1.0, 1.0], "again", kind, seed=5, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_layers_deltas_at_a_time(monkeypatch):
    model, alive, most = deep(), weakref.WeakSet(), [0]
    plain = Part.delta

    def counted(part: Part) -> Tensor:
        found = plain(part)
        alive.add(found)
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(Part, "delta", counted)
    model.combine(["a", "b"], [1.0, 1.0], "new", "ties_svd", density=0.5)
    assert most[0] == 2


def test_an_adapter_merged_already_counts_from_the_original_weights():
    model, _ = build("OFT", 0, "linear", "a", "b")
    model.combine(["a", "b"], [0.5, 0.5], "before", svd_rank=8)
    model.activate("a")
    model.merge()
    model.combine(["a", "b"], [0.5, 0.5], "after", svd_rank=8)
    assert model.tensors("before").keys() == model.tensors("after").keys()
    for key, tensor in model.tensors("before").items():
        assert torch.equal(tensor, model.tensors("after")[key])


# ---------------------------------------------------------------- what each kind is


def deltas(model: AdaptedModel, *names: str) -> list[Tensor]:
    return [change(model, name)[0] for name in names]


def combined(model: AdaptedModel, weights: list[float], kind: str, **options) -> Tensor:
    model.combine(["a", "b"], weights, "new", kind, **full_rank(model, kind), **options)
    found = change(model, "new")[0]
    model.delete("new")
    return found


def test_slerp_keeps_the_length_and_halves_the_angle():
    model, _ = build("LORA", 0, "linear", "a", "b")
    one, two = deltas(model, "a", "b")
    model.set_weight("b", (one.norm() / two.norm()).item())
    two = deltas(model, "b")[0]

    def angle(x: Tensor, y: Tensor) -> float:
        return ((x * y).sum() / x.norm() / y.norm()).arccos().item()

    for t in (0.0, 0.25, 0.5, 1.0):
        found = combined(model, [1 - t, t], "slerp")
        assert found.norm().item() == pytest.approx(one.norm().item(), rel=1e-4)
        assert angle(one, found) == pytest.approx(t * angle(one, two), abs=2e-3)
        assert_near((combined(model, [2 - 2 * t, 2 * t], "slerp"),), (2 * found,))


def test_slerp_takes_two_adapters():
    model = deep(*[["first"]] * 3)
    assert model.reason_against(["a", "b"], "slerp") is None
    assert model.reason_against(["a", "b", "c"], "slerp") == "'slerp' takes 2 adapters, not 3"
    with pytest.raises(ValueError, match="'slerp' takes 2 adapters, not 3"):
        model.combine(["a", "b", "c"], [1, 1, 1], "new", "slerp")


def test_breadcrumbs_keep_what_is_neither_large_nor_small():
    model, _ = build("LORA", 0, "linear", "a", "b")
    expected = torch.zeros(12, 8, dtype=torch.float64)
    for delta, weight in zip(deltas(model, "a", "b"), (0.5, -2.0), strict=True):
        order = delta.abs().flatten().argsort(descending=True)
        middle = order[int(0.1 * 96) : int(0.4 * 96)]
        expected.view(-1)[middle] += weight * delta.flatten()[middle]
    assert_near((combined(model, [0.5, -2.0], "breadcrumbs", density=0.3, gamma=0.1),), (expected,))


@pytest.mark.parametrize("kind", ["della", "dare_linear_svd"])
def test_random_pruning_keeps_the_share_and_the_expectation(kind):
    model, _ = build("LORA", 0, "linear", "a")
    expected, total, kept = change(model, "a")[0], 0.0, 0.0
    rounds = 400
    for seed in range(rounds):
        model.combine(["a"], [1.0], "new", kind, density=0.5, seed=seed, **full_rank(model, kind))
        found = change(model, "new")[0]
        model.delete("new")
        total, kept = total + found / rounds, kept + (found.abs() > 1e-6).double() / rounds
    assert kept.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (total - expected).norm() < 0.15 * expected.norm()
    if kind == "della":  # the larger of a row are likelier to stay, from 0.45 to 0.55
        by_size = kept.gather(1, expected.abs().argsort(1)).mean(0)
        assert by_size[0].item() == pytest.approx(0.45, abs=0.04)
        assert by_size[-1].item() == pytest.approx(0.55, abs=0.04)


# ---------------------------------------------------------------- modules trained whole, biases


def with_heads() -> AdaptedModel:
    torch.manual_seed(0)
    model = AdaptedModel(Deep())
    for name in "ab":
        config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"], init_lora_weights=False)
        model.add(name, config)
        stir(model, name)
    return model


@each_kind
def test_modules_trained_whole_become_their_weighted_average(kind):
    model = with_heads()
    base, one, two = (
        m.weight.double()
        for m in (model.layers["last"].base_layer, *(model.layers["last"].adapters[n].whole for n in "ab"))
    )
    model.combine(["a", "b"], [0.3, 0.9], "new", kind, **neutral(kind))
    found = model.layers["last"].adapters["new"].whole.weight
    torch.testing.assert_close(found.double(), base + 0.3 * (one - base) + 0.9 * (two - base))
    assert model.configs["new"].modules_to_save == ["last"]
    model.combine(["a", "b"], [{"last": 0.25}, {"last": 0.75}], "mean", kind, **neutral(kind))
    found = model.layers["last"].adapters["mean"].whole.weight
    torch.testing.assert_close(found.double(), 0.25 * one + 0.75 * two)


def test_what_is_not_defined_is_refused_by_name():
    model = with_heads()
    model.add("both", LoraConfig(r=2, target_modules=["first", "last"]))
    with pytest.raises(ValueError, match=r"last is trained whole .* adapted by others"):
        model.combine(["a", "both"], [1.0, 1.0], "new")
    assert "trained whole" in (model.reason_against(["a", "both"], "svd") or "")
    biased = AdaptedModel(Deep())
    biased.add("biased", LoraConfig(r=2, target_modules=["first"], bias="all"))
    with pytest.raises(ValueError, match="'biased' trains biases of the base model"):
        biased.combine(["biased"], [1.0], "new")
    mixed = AdaptedModel(nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4)}))
    mixed.add("lora", LoraConfig(r=2, target_modules=["embed"]))
    mixed.add("ia3", IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False))
    with pytest.raises(ValueError, match="embed: the blend changes the bias of linear"):
        mixed.combine(["lora", "ia3"], [1.0, 1.0], "new", svd_rank=2)
    assert set(mixed.configs) == {"lora", "ia3"}


def test_a_changed_bias_gives_other_layers_none():
    model = AdaptedModel(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4, bias=False)))
    model.add("ia3", IA3Config(target_modules=["0", "1"], feedforward_modules=[], init_ia3_weights=False))
    x = torch.randn(3, 4)
    y = model(x)
    model.combine(["ia3"], [1.0], "new", max_error=0)
    assert model.configs["new"].lora_bias
    model.activate("new")
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)
    plain = model.merge_and_detach()
    torch.testing.assert_close(plain(x), y, atol=1e-5, rtol=1e-4)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "1.weight"}


def test_counters_of_a_module_trained_whole_have_no_average():
    model = AdaptedModel(nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)}))
    for name in "ab":
        model.add(name, LoraConfig(r=2, target_modules=["linear"], modules_to_save=["norm"]))
    model.combine(["a", "b"], [0.5, 0.5], "same")
    model.layers["norm"].adapters["a"].whole.num_batches_tracked += 3
    with pytest.raises(ValueError, match="norm is trained whole, and its num_batches_tracked are whole numbers"):
        model.combine(["a", "b"], [0.5, 0.5], "new")


@each_kind
def test_a_broken_adapter_is_named_by_its_layer(kind):
    model = deep()
    next(iter(model.layers["last"].adapters["b"].parameters())).data[0] = float("nan")
    with pytest.raises(ValueError, match="last: the combined adapter is NaN or infinite"):
        model.combine(["a", "b"], [1.0, 1.0], "new", kind, **neutral(kind), **full_rank(model, kind))
    assert "new" not in model.configs


@each_kind
def test_an_adapter_at_strength_zero_adds_nothing(kind):
    model, _ = build("LOKR", 1, "linear", "a")
    model.add("b", make_config("LORA", 0))
    model.set_weight("a", 0.0)
    if model.reason_against(["a", "b"], kind) is None:
        model.combine(["a", "b"], [1.0, 1.0], "new", kind, **neutral(kind), **full_rank(model, kind))
        assert_near(change(model, "new"), change(model, "b"))


# ---------------------------------------------------------------- reasons, ranks, and one's own


def test_every_kind_says_why_it_is_not_possible():
    model = AdaptedModel(KINDS["linear"].make())
    model = AdaptedModel(Deep())
    model.add("lora", LoraConfig(r=2, target_modules=["first"]))
    model.add("large", LoraConfig(r=4, target_modules=["first"]))
    model.add("oft", OFTConfig(oft_block_size=7, target_modules=["first"]))
    on_factors = {"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"}
    for kind in combination_types():
        unequal, dense = (model.reason_against(["lora", other], kind) for other in ("large", "oft"))
        assert (unequal is not None) == (dense is not None) == (kind in on_factors)
        if unequal and dense:
            assert "first: ranks [2, 4] differ" in unequal
            assert "first: OFT has no factors" in dense
    with pytest.raises(ValueError, match="Adapter nope not found"):
        model.reason_against(["nope"], "svd")
    with pytest.raises(ValueError, match="'soup' is unknown"):
        model.reason_against(["lora"], "soup")
    with pytest.raises(ValueError, match="first: OFT has no rank to go by: give svd_rank, or max_error"):
        model.combine(["lora", "oft"], [1.0, 1.0], "new")


def test_every_kind_declares_what_it_reads():
    for name, kind in combination_types().items():
        assert kind.about.endswith((".", "it.")), name
        assert all(isinstance(option, str) for option in kind.options)
    assert combination_types()["ties"].options == {"density": REQUIRED, "majority_sign_method": "total"}
    assert set(combination_types()["dare_linear_svd"].options) == {
        "density", "seed", "svd_rank", "max_error", "svd_clamp", "svd_driver"
    }  # fmt: skip


def test_a_combination_is_one_registered_function():
    @combination("first")
    def first(parts) -> LowRank:
        return LowRank(*parts[0].factors)

    @on_factors("halved")
    @on_deltas("quartered", adapters=2)
    def halved(tensors: list[Tensor], weights: list[float], *, by: float = 2.0) -> Tensor:
        return sum(t * w for t, w in zip(tensors, weights, strict=True)) / by

    try:
        model = deep()
        model.combine(["a", "b"], [5.0, 1.0], "one", "first")
        assert_near((1.5 * change(model, "one", "first")[0],), (change(model, "a", "first")[0],))
        model.combine(["a"], [1.0], "two", "halved")
        assert_near((4 * change(model, "two", "first")[0],), (change(model, "a", "first")[0],))
        report = model.combine(["a", "b"], [1.0, 0.0], "four", "quartered", by=4.0)
        assert_near((4 * change(model, "four", "first")[0],), (change(model, "a", "first")[0],))
        assert report.ranks == {"first": 2, "last": 2}
        assert "takes 2 adapters, not 1" in (model.reason_against(["a"], "quartered") or "")
        with pytest.raises(ValueError, match=r"'halved' has no option per; it reads \['by'\]"):
            model.combine(["a"], [1.0], "three", "halved", per=2)
    finally:
        for name in ("first", "halved", "quartered"):
            del COMBINATIONS[name]
