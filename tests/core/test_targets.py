"""Which layers are adapted: PEFT's rules, and errors that help."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from veneer.core import AdaptedModel, LoHaConfig, LoraConfig, NoMatchingPeftModuleError
from veneer.core.config import lookup
from veneer.core.targets import condense, layer_filter, matcher, select, walk

PARTS = st.sampled_from(["q", "k", "to_q", "to_k", "attn", "attn1", "layers", "h", "0", "1", "12", "experts"])
PATHS = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
SUFFIXES = st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.ff = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


class Net(nn.Module):
    def __init__(self, blocks: int = 3):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.conv = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 6)

    def get_output_embeddings(self):
        return self.head


def adapted(config, net=None) -> list[str]:
    model = AdaptedModel(net or Net())
    model.add("a", config)
    return sorted(model.layers)


@given(
    PATHS, SUFFIXES, st.none() | st.lists(st.integers(0, 12), max_size=3), st.none() | st.sampled_from(["h", "layers"])
)
def test_list_rules_equal_pefts(path, suffixes, layers, pattern):
    pattern = pattern if layers else None
    theirs = peft.LoraConfig(target_modules=suffixes, layers_to_transform=layers, layers_pattern=pattern)
    ours = LoraConfig(target_modules=suffixes, layers_to_transform=layers, layers_pattern=pattern)
    in_layer = path in suffixes or layer_filter(ours)(path)
    assert (matcher(ours.target_modules)(path) and in_layer) == bool(check_target_module_exists(theirs, path))


@given(PATHS, st.sampled_from([r".*\.to_q", r"layers\.\d+\..*", "to_q|to_k", r".*attn1?\.(q|k)$", "q"]))
def test_a_regex_must_match_the_whole_path(path, regex):
    theirs = peft.LoraConfig(target_modules=regex)
    assert matcher(regex)(path) == bool(check_target_module_exists(theirs, path))


@given(st.lists(PATHS, min_size=1, max_size=12, unique=True), st.data())
def test_condensed_suffixes_select_the_same_modules(paths, data):
    chosen = data.draw(st.sets(st.sampled_from(paths), min_size=1))
    found = matcher(condense(chosen, paths))
    assert {p for p in paths if found(p)} >= chosen
    ambiguous = {p for p in paths if p not in chosen and any(p.endswith(f".{c}") for c in chosen)}
    assert {p for p in paths if found(p)} - chosen <= ambiguous


@given(st.dictionaries(st.sampled_from(["foo", "^foo", "barfoo", "a.foo"]), st.integers(1, 9)))
def test_pattern_keys_match_whole_suffixes(pattern):
    assert lookup(pattern, "x.xfoo", 0) == 0
    without_top = {k: v for k, v in pattern.items() if k != "^foo"}
    assert lookup(pattern, "x.foo", 0) == lookup(without_top, "x.foo", 0)


def test_all_linear_leaves_the_output_head():
    names = adapted(LoraConfig(target_modules="all-linear"))
    assert "head" not in names
    assert len(names) == 3 * 4
    assert not {"embed", "conv"} & set(names)


def test_a_long_list_is_condensed_in_the_config():
    net = Net(blocks=12)
    config = LoraConfig(target_modules=[f"layers.{i}.{n}" for i in range(12) for n in ("to_q", "to_k")])
    assert len(adapted(config, net)) == 24
    assert config.target_modules == {"to_q", "to_k"}


def test_exclusion_by_suffix_regex_and_modules_to_save():
    assert adapted(LoraConfig(target_modules=["to_q"], exclude_modules=["1.to_q"])) == [
        "layers.0.to_q",
        "layers.2.to_q",
    ]
    assert adapted(LoraConfig(target_modules=["to_q"], exclude_modules=r"layers\.[01]\..*")) == ["layers.2.to_q"]
    config = LoraConfig(target_modules=r"layers\.0\.(ff\..*|to_q)", exclude_modules=["ff.1"], modules_to_save=["ff"])
    assert adapted(config) == ["layers.0.ff", "layers.0.to_q", "layers.1.ff", "layers.2.ff"]
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapted(LoraConfig(target_modules=["to_q"], exclude_modules=["nothing"]))


def test_layers_by_index():
    net = nn.ModuleDict({"decoder": Net()})
    config = LoraConfig(target_modules=["to_q"], layers_to_transform=[0, 2])
    assert adapted(config, net) == ["decoder.layers.0.to_q", "decoder.layers.2.to_q"]
    config = LoraConfig(target_modules=["to_q"], layers_to_transform=1, layers_pattern="layers")
    assert adapted(config) == ["layers.1.to_q"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["to_qq"]), r"\['to_qq'\] matches no layer of Net; near: to_q \(3 layers\)"),
        (LoraConfig(target_modules="layers.9.to_q"), "matches no layer of Net"),
        (
            LoraConfig(target_modules=["to_q"], exclude_modules=["to_q"]),
            "matches 3 modules of Net, but all .* excluded",
        ),
        (LoraConfig(target_modules=["to_q"], layers_to_transform=[9], layers_pattern="layers"), "layers_to_transform"),
    ],
)
def test_nothing_matched_is_an_error_that_names_near_misses(config, message):
    net = Net()
    before = list(net.state_dict())
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        AdaptedModel(net).add("a", config)
    assert list(net.state_dict()) == before


def test_other_bad_targets():
    with pytest.raises(ValueError, match=r"layers.0.norm: a LayerNorm cannot be adapted: supported kinds are .*Linear"):
        AdaptedModel(Net()).add("a", LoraConfig(target_modules=["norm"]))
    with pytest.raises(ValueError, match="Please specify `target_modules` in `LoraConfig`"):
        AdaptedModel(Net()).add("a", LoraConfig())
    with pytest.raises(ValueError, match="without calling it"):
        AdaptedModel(nn.ModuleDict({"m": nn.MultiheadAttention(4, 2)})).add(
            "a", LoraConfig(target_modules=["out_proj"])
        )
    with pytest.raises(ValueError, match=r"modules_to_save=\['haed'\] matches no module of Net; near: head"):
        AdaptedModel(Net()).add("a", LoraConfig(target_modules=["to_q"], modules_to_save=["haed"]))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_unused_pattern_keys_warn_and_are_errors_when_strict(name):
    config = LoraConfig(target_modules=["to_q"], **{name: {"to_qx": 4, "1.to_q": 2}})
    message = rf"The following {name} keys did not match any targeted module and were ignored: \['to_qx'\]."
    with pytest.warns(RuntimeWarning, match=message):
        AdaptedModel(Net()).add("a", config)
    with pytest.raises(ValueError, match=r"\['to_qx'\].*near: to_q"):
        AdaptedModel(Net()).add("a", config, strict=True)


def test_patterns_set_rank_and_alpha_by_layer():
    model = AdaptedModel(Net())
    model.add(
        "a",
        LoraConfig(
            target_modules=["to_q"], r=2, lora_alpha=4, rank_pattern={"1.to_q": 3}, alpha_pattern={"^layers.2.to_q": 8}
        ),
    )
    adapters = model.adapters("a")
    assert [a.r for a in adapters.values()] == [2, 3, 2]
    assert [a.scaling for a in adapters.values()] == [2.0, 4 / 3, 4.0]


def test_a_module_used_twice_is_adapted_at_both_places():
    net = Net()
    net.layers[1].to_q = net.layers[0].to_q
    model = AdaptedModel(net)
    model.add("a", LoraConfig(target_modules=["to_q"]))
    assert net.layers[1].to_q is net.layers[0].to_q
    assert sorted(model.layers) == ["layers.0.to_q", "layers.2.to_q"]
    model.detach()
    assert type(net.layers[1].to_q) is nn.Linear


def test_walk_names_modules_as_named_modules_does():
    net = Net()
    names = [name for name, _ in net.named_modules() if name]
    assert list(walk(net)) == names
    AdaptedModel(net).add("a", LoHaConfig(target_modules="all-linear"))
    assert list(walk(net)) == names


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.sampled_from(["LORA", "LOHA", "LOKR"]))
def test_any_shape_and_rank_attaches_and_folds(rows, cols, rank, method):
    from veneer.core.config import config_classes

    init = {"init_lora_weights" if method == "LORA" else "init_weights": False}
    model = AdaptedModel(nn.ModuleDict({"layer": nn.Linear(cols, rows)}))
    model.add("a", config_classes()[method](r=rank, target_modules=["layer"], **init))
    layer, x = model.model["layer"], torch.randn(3, cols)
    weight, bias = layer.adapters["a"].fold(*layer.site.read())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def test_selecting_resolves_defaults_by_model_type():
    net = Net()
    net.config = type("Config", (), {"model_type": "llama"})
    with warnings.catch_warnings(), pytest.raises(NoMatchingPeftModuleError, match=r"\['q_proj', 'v_proj'\]"):
        select(net, LoraConfig(), walk(net))
