"""Any adapter as a LoRA, against `peft` where it converts, and against folding where it does not."""

import warnings

import peft
import pytest
import torch
from torch import Tensor, nn
from veneer import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PeftWarning,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
)
from veneer.core import AdaptedModel, inject_adapter_in_model
from veneer.core.files import read_metadata

from .conftest import MATRIX_CASES, build, make_config, stir
from .conftest import Net as OneLayer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(24, 30), nn.Linear(30, 26)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapted(config: PeftConfig) -> PeftModel:
    model = get_peft_model(net(), config).eval()
    stir(model.base_model, "default")
    return model


RANDOM = {"target_modules": ["first", "head"], "init_weights": False}


@pytest.mark.parametrize("rank", [1, 5, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("config", [LoHaConfig(r=3, **RANDOM), LoKrConfig(r=8, **RANDOM)], ids=["loha", "lokr"])
def test_same_as_peft(config, rank, tmp_path):
    """The same ranks and products under the same names."""
    ours = adapted(config)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    _, their_tensors = peft.convert_to_lora(theirs, rank)
    config, tensors = convert_to_lora(ours, rank)
    assert tensors.keys() == their_tensors.keys()
    for key in (key for key in tensors if "lora_A" in key):
        found, expected = (t[key.replace("lora_A", "lora_B")] @ t[key] for t in (tensors, their_tensors))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert tensors[key].shape == their_tensors[key].shape
    assert isinstance(config, LoraConfig)
    assert config.lora_alpha == config.r


OTHERS = [case for case in MATRIX_CASES if case.values[:2] not in {("LORA", 0), ("LORA", 1)}]


@pytest.mark.parametrize(("method", "variant", "kind"), OTHERS)
def test_any_method_at_any_layer(method, variant, kind):
    """At the full rank of the layer it is the adapter."""
    model, x = build(method, variant, kind, "default")
    layer = model.layers["layer"]
    before, full = model(x), min(layer.site.out, layer.site.cols)
    config, tensors = convert_to_lora(model, full)
    plain = AdaptedModel(OneLayer(kind).eval())
    plain.model.load_state_dict(model.detach().state_dict())
    plain.load("lora", config, tensors)
    torch.testing.assert_close(plain(x), before, atol=1e-4, rtol=1e-3)


def test_the_error_is_stated(tmp_path):
    model = adapted(OFTConfig(oft_block_size=6, target_modules=["first", "head"], init_weights=False))
    exact = {path: layer.adapters["default"] for path, layer in model.base_model.layers.items()}
    report = save_as_lora(tmp_path, model, 4)
    assert report.ranks == {"first": 4, "head": 4}
    _, tensors = convert_to_lora(model, 4)
    lost = whole = 0.0
    for path, adapter in exact.items():
        weight = adapter.site.read()[0].detach()
        delta = adapter.fold(weight, None)[0].detach() - weight
        name = f"base_model.model.{path}.lora"
        error = (delta - tensors[f"{name}_B.weight"] @ tensors[f"{name}_A.weight"]).norm().item()
        assert report.errors[path] == pytest.approx(error / delta.norm().item(), rel=1e-3)
        lost, whole = lost + error**2, whole + delta.norm().item() ** 2
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    stated = read_metadata(tmp_path / "adapter_model.safetensors")["relative_error"]
    assert float(stated) == pytest.approx(report.error, rel=1e-2)


@pytest.mark.parametrize("rank", [4, 0.9])
def test_saved_as_lora_peft_reads_it(rank, tmp_path):
    """Heads trained whole included."""
    model = adapted(LoHaConfig(r=2, target_modules=["first"], modules_to_save=["head"], init_weights=False))
    x = torch.randn(3, 24)
    save_as_lora(tmp_path, model, rank)
    ours = PeftModel.from_pretrained(net(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x))
    assert type(ours.peft_config["default"]) is LoraConfig
    if rank == 4:
        torch.testing.assert_close(ours(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_change_of_biases_is_a_bias_that_peft_reads(tmp_path):
    model = adapted(IA3Config(target_modules=["first"], feedforward_modules=[], init_ia3_weights=False))
    save_as_lora(tmp_path, model, 24)
    x = torch.randn(3, 24)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(), tmp_path)(x), model(x), atol=1e-4, rtol=1e-4)


def test_the_model_stays_as_it_is():
    model = adapted(LoKrConfig(r=2, **RANDOM))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    convert_to_lora(model, 2)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_without_a_wrapper_names_have_no_prefix():
    model = inject_adapter_in_model(make_config("LOHA", 0), OneLayer("conv2d"))
    _, tensors = convert_to_lora(model, 2)
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "layer.lora_A.weight": (2, 4, 3, 3),
        "layer.lora_B.weight": (6, 2, 1, 1),
    }


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank=0 is no rank"),
        (-1, "rank=-1 is no rank"),
        (0.0, "rank=0.0: a float is the share"),
        (1.5, "rank=1.5: a float is the share"),
        (25, "rank 25 is larger than the weight of first allows, which is 24"),
    ],
)
def test_wrong_ranks(rank, message, tmp_path):
    model = adapted(LoHaConfig(r=2, **RANDOM))
    with pytest.raises(ValueError, match=message):
        save_as_lora(tmp_path / "out", model, rank)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted():
    with pytest.raises(TypeError, match="this Net has no adapters, so there is nothing to convert"):
        convert_to_lora(net(), 2)
    model = adapted(LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    with pytest.raises(ValueError, match="Adapter nope not found"):
        convert_to_lora(model, 2, "nope")
    with pytest.warns(PeftWarning, match="'default' is a LoRA already"):
        convert_to_lora(model, 1)
    with pytest.raises(ValueError, match="'default' trains biases"):
        convert_to_lora(adapted(OFTConfig(oft_block_size=6, target_modules=["first"], bias="all")), 2)
