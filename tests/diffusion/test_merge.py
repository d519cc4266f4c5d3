"""Adapters folded into a pipeline for good: a plain pipeline, which saves and loads without Veneer."""

import json
from copy import deepcopy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from veneer import IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from veneer.core import AdaptedModel, MergedError
from veneer.diffusion import adapted_models, detach, load_adapter, load_pipeline, merge, set_weights
from veneer.diffusion.families import EMBEDDED_PATH
from veneer.diffusion.pipeline import save_adapter

UNET = ["to_q", "to_v", "conv1", "conv_in"]
ADAPTERS = {
    "subject": {
        "unet": LoraConfig(r=3, lora_alpha=6, target_modules=UNET, init_lora_weights=False),
        "text_encoder": LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False),
    },
    "style": {"unet": LoKrConfig(r=2, target_modules=["to_q", "ff.net.2"], init_weights=False)},
    "light": {
        "unet": LoHaConfig(r=2, target_modules=["conv1", "to_k"], use_dora=True, init_weights=False),
        "text_encoder": IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
    },
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each adapter, with random weights."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipeline("embedded")
    torch.manual_seed(0)
    for name, components in ADAPTERS.items():
        made = {}
        for component, config in components.items():
            model = AdaptedModel(getattr(pipe, component))
            model.add(name, deepcopy(config))
            made[component] = model.configs[name], model.tensors(name)
            model.detach()
        save_adapter(folder / name, made, {})
    return folder


@pytest.fixture
def make(folders):
    def make(dtype=torch.float32, names=tuple(ADAPTERS)):
        pipe = load_pipeline("embedded").to(dtype=dtype)
        for name in names:
            load_adapter(pipe, folders / name, name, weight=0.6)
        return pipe

    return make


@torch.no_grad()
def outputs(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    """What text encoder and UNet make of the same input."""
    tokens = pipe.tokenizer("a photo of a face", padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(tokens).last_hidden_state
    size = pipe.unet.config.sample_size
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)).to(text.dtype)
    return text, pipe.unet(noise, 500, text).sample


def states(pipe) -> dict[str, torch.Tensor]:
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{part}.{key}": t.clone() for part, module in parts.items() for key, t in module.state_dict().items()}


def assert_same_bits(pipe, before) -> None:
    after = states(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_pipeline_saves_and_loads_without_a_trace(make, dtype, tmp_path):
    pipe = make(dtype)
    before = outputs(pipe)
    parameters = {id(p) for p in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]}
    assert merge(pipe, safe_merge=True) is pipe
    assert {id(p) for p in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]} <= parameters  # in place
    after = outputs(pipe)
    tolerance = 2e-4 if dtype == torch.float32 else 0.1
    for one, two in zip(after, before, strict=True):
        torch.testing.assert_close(one, two, atol=tolerance * two.abs().max().item(), rtol=tolerance)
    pipe.save_pretrained(tmp_path)

    for component in ("unet", "text_encoder", "vae"):
        plain = getattr(load_pipeline("embedded"), component)
        module = getattr(pipe, component)
        assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]
        assert [set(vars(m)) for m in module.modules()] == [set(vars(m)) for m in plain.modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
        files = [next((root / component).glob("*.safetensors")) for root in (tmp_path, EMBEDDED_PATH)]
        assert load_file(files[0]).keys() == load_file(files[1]).keys()
    for path in tmp_path.rglob("*config.json"):
        text = "".join(line for line in path.read_text().lower().splitlines() if "_name_or_path" not in line)
        assert not any(word in text for word in ("veneer", "lora", "adapter", "base_layer")), path
    index = json.loads((tmp_path / "model_index.json").read_text())
    original = json.loads((EMBEDDED_PATH / "model_index.json").read_text())
    assert {k: v for k, v in index.items() if k[0] != "_"} == {k: v for k, v in original.items() if k[0] != "_"}

    again = StableDiffusionPipeline.from_pretrained(tmp_path).to(dtype=dtype)
    assert_same_bits(again, states(pipe))
    for p in [*again.unet.parameters(), *again.text_encoder.parameters()]:
        p.data = p.data.clone()  # mapped from a file it need not be aligned, and would be summed in another order
    for one, two in zip(outputs(again), after, strict=True):
        assert torch.equal(one, two)


def test_weights_by_adapter_component_and_block(make):
    weights = {
        "subject": {"text_encoder": 0.3, "up_blocks": 1.0, "unet": 0.5},
        "style": 0.8,
    }
    pipe = make()
    set_weights(pipe, weights | {"light": 0.0})
    found = {
        f"{component}.{path}": adapter.strength
        for component, model in adapted_models(pipe).items()
        for path, adapter in model.adapters("subject").items()
    }
    expected = {"text_encoder": 0.3, "up_blocks": 1.0, "unet": 0.5}
    assert found == {p: next(w for part, w in expected.items() if part in p) for p in found}
    assert set(found.values()) == set(expected.values())
    before = outputs(pipe)
    after = outputs(merge(make(), weights))
    for one, two in zip(after, before, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4 * two.abs().max().item(), rtol=1e-4)


def test_only_what_is_named_is_merged(make):
    one, other = make(names=["style"]), make()
    set_weights(one, {"style": 1.0})
    assert_same_bits(merge(other, {"style": 1.0}), states(merge(one)))
    assert adapted_models(other) == {}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"stile": 1.0}, "no adapter stile; it has light, style, subject"),
        ({"style": 1.0, "subject": {"mid_blocks": 0.5}}, "'mid_blocks' matches none of the"),
        ({"subject": {"vae": 0.5}}, "'vae' matches none of the"),
        ({"subject": float("inf")}, "expected a finite number"),
    ],
)
@pytest.mark.parametrize("change", [merge, set_weights])
def test_a_refusal_changes_nothing(make, change, weights, message):
    pipe = make()
    before, y = states(pipe), outputs(pipe)
    with pytest.raises(ValueError, match=message):
        change(pipe, weights)
    assert_same_bits(pipe, before)
    assert all(torch.equal(one, two) for one, two in zip(outputs(pipe), y, strict=True))


def test_one_broken_component_keeps_the_others_from_merging(make):
    pipe = make(names=["subject"])
    list(adapted_models(pipe).values())[-1].parameters_of("subject")[0].data[0] = float("nan")
    before = states(pipe)
    with pytest.raises(ValueError, match="NaNs detected"):
        merge(pipe, safe_merge=True)
    after = states(pipe)
    assert all(torch.equal(after[k], t) or t.isnan().any() for k, t in before.items())
    detach(pipe)
    assert_same_bits(pipe, states(load_pipeline("embedded")))


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(load_pipeline("embedded"))


def test_progress_bars_on_request(make, capsys):
    merge(make(names=["subject"]), progressbar=True)
    assert capsys.readouterr().err.count("merging: 100%") >= 2


def test_merging_and_unmerging_a_component_keeps_its_bits(make):
    pipe = make()
    before = states(pipe)
    for model in adapted_models(pipe).values():
        model.merge()
    with pytest.raises(MergedError):
        set_weights(pipe, {"subject": 0.1})
    for model in adapted_models(pipe).values():
        model.unmerge()
    assert_same_bits(pipe, before)


def test_an_adapter_loaded_with_a_wrong_weight_is_not_loaded(folders):
    pipe = load_pipeline("embedded")
    with pytest.raises(ValueError, match="expected a finite number"):
        load_adapter(pipe, folders / "style", "style", weight=float("nan"))
    assert not any(model.configs for model in adapted_models(pipe).values())
