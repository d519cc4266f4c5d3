"""Any adapter as a LoRA: the best of its rank, with the error that it states."""

import math

import pytest
import torch
from veneer.diffusion.dialects.canonical import Canonical, Layer
from veneer.diffusion.dialects.names import Names
from veneer.diffusion.to_lora import Limits, built, to_lora

OUT, CHANNELS, R = 24, 16, 3
SHAPES = {"linear": (OUT, CHANNELS), "conv1x1": (OUT, CHANNELS, 1, 1), "conv3x3": (OUT, CHANNELS, 3, 3)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def factors(method: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    kernel, cols = shape[2:], math.prod(shape[1:])
    ones = [1] * len(kernel)
    return {
        "lora": lambda: {"lora_A.weight": random(R, *shape[1:]), "lora_B.weight": random(OUT, R, *ones)},
        "loha": lambda: {
            f"hada_w{i}_{x}": random(*size) for i in "12" for x, size in (("a", (OUT, R)), ("b", (R, cols)))
        },
        "lokr": lambda: {"lokr_w1": random(4, 4), "lokr_w2_a": random(6, 1), "lokr_w2_b": random(1, cols // 4)},
        "lokr, full": lambda: {"lokr_w1": random(4, 4), "lokr_w2": random(6, 4, *kernel)},
        "full": lambda: {"diff": random(*shape)},
        "glora": lambda: {
            "a1.weight": random(CHANNELS, R, *ones), "a2.weight": random(R, CHANNELS, *ones),
            "b1.weight": random(OUT, R, *ones), "b2.weight": random(R, *shape[1:]),
        },
        "ia3": lambda: {"ia3_out": random(OUT)},
        "oft": lambda: {"oft_blocks": random(4, 6, 6) / 9},
        "dora": lambda: {**factors("lora", shape), "lora_magnitude_vector": 1 + random(OUT).abs()},
    }[method]()  # fmt: skip


METHODS = ("lora", "loha", "lokr", "lokr, full", "full", "glora", "ia3", "oft", "dora")


def of(method: str, shape: tuple[int, ...], scale: float = 0.5) -> Layer:
    torch.manual_seed(0)
    name = {"dora": "lora"}.get(method, method.partition(",")[0])
    return Layer(name, factors(method, shape), 1.0 if name in ("full", "ia3", "oft") else scale)


def delta(layer: Layer, shape: tuple[int, ...]) -> torch.Tensor:
    """What the layer adds to `weight`, in float64."""
    weight = base(shape)[0].double().flatten(1)
    return built(layer, "x", shape).double().fold(weight, None)[0] - weight


def base(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator), torch.zeros(OUT)


def converted(layer: Layer, shape: tuple[int, ...], **options):
    adapter = Canonical({"unet": {"x": layer}})
    names = Names("test", {"unet": {"x": shape}})
    made = to_lora(adapter, names, Limits(**options), base=lambda *place: base(shape))
    return made, made.adapter.components["unet"]["x"]


each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@each_shape
@pytest.mark.parametrize("method", METHODS)
def test_a_lora_of_full_rank_is_exact(method, shape):
    layer = of(method, shape)
    made, lora = converted(layer, shape, rank=OUT)
    assert lora.method == "lora"
    torch.testing.assert_close(delta(lora, shape), delta(layer, shape), rtol=1e-4, atol=1e-4)
    assert made.error < 1e-5


@each_shape
@pytest.mark.parametrize("method", METHODS)
def test_a_lower_rank_is_the_best_and_states_its_error(method, shape):
    layer = of(method, shape)
    made, lora = converted(layer, shape, rank=2)
    assert lora.factors["lora_A.weight"].shape == (2, *shape[1:])
    wanted = delta(layer, shape)
    best = (torch.linalg.svdvals(wanted)[2:].norm() / wanted.norm()).item()
    found = ((delta(lora, shape) - wanted).norm() / wanted.norm()).item()
    assert found == pytest.approx(best, abs=1e-4)
    assert made.error == pytest.approx(best, abs=1e-4) == made.errors["unet", "x"]


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.2, 0.9])
@pytest.mark.parametrize("method", ["loha", "full"])
def test_a_tolerance_chooses_the_lowest_rank_that_keeps_it(method, tolerance):
    shape = SHAPES["linear"]
    layer = of(method, shape)
    made, lora = converted(layer, shape, tolerance=tolerance)
    rank, s = len(lora.factors["lora_A.weight"]), torch.linalg.svdvals(delta(layer, shape))
    assert made.error <= tolerance + 1e-5
    assert s[rank - 1 :].norm() / s.norm() > tolerance - 1e-5
    assert len(converted(layer, shape, tolerance=tolerance, rank=2)[1].factors["lora_A.weight"]) == min(rank, 2)


def test_a_lora_of_a_low_rank_stays_what_it_is():
    layer = of("lora", SHAPES["linear"])
    made, lora = converted(layer, SHAPES["linear"], rank=R)
    assert lora is layer
    assert made.error == 0


def test_changes_of_a_bias_come_along():
    shape = SHAPES["linear"]
    layer = Layer("full", {"diff": random(*shape), "diff_b": random(OUT)}, 0.5)
    _, lora = converted(layer, shape, rank=OUT)
    torch.testing.assert_close(lora.factors["lora_B.bias"] * lora.scale, layer.factors["diff_b"] * 0.5)
    layer = Layer("lora", {**factors("lora", shape), "lora_B.bias": random(OUT)}, 0.5)
    _, lora = converted(layer, shape, rank=1)
    torch.testing.assert_close(lora.factors["lora_B.bias"] * lora.scale, layer.factors["lora_B.bias"] * 0.5)


def test_what_no_lora_can_express_is_refused_or_left_out():
    adapter = Canonical({"unet": {"norm": Layer("norm", {"w_norm": random(8)}), "x": of("loha", SHAPES["linear"])}})
    names = Names("test", {"unet": {"norm": (8,), "x": SHAPES["linear"]}})
    with pytest.raises(ValueError, match=r"unet\.norm: a norm has no matrix .* --no-strict leaves such layers out"):
        to_lora(adapter, names, Limits(2))
    made = to_lora(adapter, names, Limits(2), strict=False)
    assert list(made.left_out) == [("unet", "norm")]
    assert list(made.adapter.components["unet"]) == ["x"]


@pytest.mark.parametrize("method", ["glora", "ia3", "oft", "dora"])
def test_methods_that_build_on_the_weight_ask_for_it(method):
    adapter = Canonical({"unet": {"x": of(method, SHAPES["linear"])}})
    with pytest.raises(ValueError, match=r"unet\.x: what \w+ changes depends on the base model's weights: give --base"):
        to_lora(adapter, Names("test", {"unet": {"x": SHAPES["linear"]}}), Limits(2))


@pytest.mark.parametrize(("options", "word"), [({"rank": 0}, "rank=0"), ({"tolerance": 1.5}, "tolerance=1.5")])
def test_limits_that_are_none(options, word):
    with pytest.raises(ValueError, match=word):
        Limits(**options)
