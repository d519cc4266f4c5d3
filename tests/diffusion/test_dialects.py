"""Files of LyCORIS read with the deltas that LyCORIS has; every dialect written and read again to the same deltas."""

from __future__ import annotations

import copy
import itertools

import lycoris.modules as lycoris_modules
import pytest
import torch
from lycoris.modules import boft, diag_oft, full, glora, ia3, locon, loha, lokr, norms
from safetensors.torch import load_file, save_file
from veneer.diffusion.dialects.canonical import Header
from veneer.diffusion.dialects.plan import plan
from veneer.diffusion.dialects.reading import read
from veneer.diffusion.dialects.writing import write
from veneer.diffusion.pipeline import adapted_models, detach, load_adapter, set_weights

from .tiny_models import KOHYA_NAMES, LAYERS, PLACES, denoiser_of, names_of, pipe_of, randomise

DORA = {"weight_decompose": True}
METHODS = {
    "lora": (locon.LoConModule, {}),
    "lora-tucker": (locon.LoConModule, {"use_tucker": True}),
    "lora-rs": (locon.LoConModule, {"rs_lora": True}),
    "lora-scalar": (locon.LoConModule, {"use_scalar": True}),
    "dora": (locon.LoConModule, DORA | {"wd_on_out": True}),
    "dora-in": (locon.LoConModule, DORA | {"wd_on_out": False}),
    "dora-tucker": (locon.LoConModule, DORA | {"use_tucker": True}),
    "loha": (loha.LohaModule, {}),
    "loha-tucker": (loha.LohaModule, {"use_tucker": True}),
    "loha-dora": (loha.LohaModule, DORA | {"wd_on_out": True}),
    "loha-dora-in": (loha.LohaModule, DORA | {"wd_on_out": False}),
    "lokr": (lokr.LokrModule, {"lora_dim": 1}),
    "lokr-both": (lokr.LokrModule, {"lora_dim": 1, "decompose_both": True, "factor": 4}),
    "lokr-full": (lokr.LokrModule, {"lora_dim": 99, "alpha": 7}),
    "lokr-full-matrix": (lokr.LokrModule, {"lora_dim": 1, "full_matrix": True}),
    "lokr-factor": (lokr.LokrModule, {"lora_dim": 1, "factor": 2}),
    "lokr-tucker": (lokr.LokrModule, {"lora_dim": 1, "use_tucker": True}),
    "lokr-dora": (lokr.LokrModule, {"lora_dim": 1} | DORA | {"wd_on_out": True}),
    "lokr-dora-in": (lokr.LokrModule, {"lora_dim": 1} | DORA | {"wd_on_out": False}),
    "full": (full.FullModule, {}),
    "norm": (norms.NormModule, {}),
    "oft": (diag_oft.DiagOFTModule, {"lora_dim": 2}),
    "oft-rescaled": (diag_oft.DiagOFTModule, {"lora_dim": 2, "rescaled": True, "constraint": 0.05}),
    "boft": (boft.ButterflyOFTModule, {"lora_dim": 2, "rescaled": True}),
    "glora": (glora.GLoRAModule, {}),
    "ia3": (ia3.IA3Module, {}),
    "ia3-in": (ia3.IA3Module, {"train_on_input": True}),
}
CASES = [
    pytest.param(method, family, kind, id=f"{method}-{family}-{kind}")
    for method, (family, kind) in itertools.product(METHODS, PLACES)
    if ("norm" in kind) == (method == "norm")
]


@pytest.fixture(autouse=True)
def _clean():
    yield
    for family in LAYERS:
        detach(pipe_of(family))


def sample(base: torch.nn.Module) -> torch.Tensor:
    """A batch for a layer."""
    random = torch.Generator().manual_seed(1)
    shape = base.weight.shape
    if isinstance(base, torch.nn.GroupNorm):
        return torch.randn(2, shape[0], 4, 4, generator=random)
    if base.weight.ndim == 4:
        return torch.randn(2, shape[1], 6, 6, generator=random)
    return torch.randn(2, 3, shape[-1], generator=random)


def lycoris_file(method: str, family: str, kind: str, path) -> torch.Tensor:
    """A file with LyCORIS' adapter of one layer; that layer's output with it."""
    make, options = METHODS[method]
    base = copy.deepcopy(denoiser_of(family).get_submodule(LAYERS[family][kind]))
    module = make("name", base, **({"lora_dim": 2, "alpha": 3} | options))
    randomise(module)
    if options.get("use_scalar"):
        module.scalar.data.fill_(1.7)
    x = sample(base)
    module.apply_to()  # a full difference becomes the whole weight here
    with torch.no_grad():
        y = base(x)
        saved = module.custom_state_dict() or module.state_dict()
    name = KOHYA_NAMES[family][kind]
    save_file({f"{name}.{key}": t.detach().clone().contiguous() for key, t in saved.items()}, path)
    return y


@pytest.mark.parametrize(("method", "family", "kind"), CASES)
def test_lycoris_files_mean_what_lycoris_means(method, family, kind, tmp_path):
    theirs = lycoris_file(method, family, kind, tmp_path / "file.safetensors")
    base = denoiser_of(family).get_submodule(LAYERS[family][kind])
    load_adapter(pipe_of(family), tmp_path / "file.safetensors")
    ours = denoiser_of(family).get_submodule(LAYERS[family][kind])
    with torch.no_grad():
        torch.testing.assert_close(ours(sample(base)), theirs, atol=5e-5, rtol=1e-4)
        assert not torch.allclose(base(sample(base)), theirs, atol=1e-2)


REFUSED = {
    "diffusers": {
        *("dora-in", "full", "norm", "glora", "oft", "ia3-in"),
        *(m for m in METHODS if m.startswith(("loha", "lokr"))),
    },
    "peft": {"dora-in", "full", "norm", "glora", "oft", "ia3-in", "loha-dora", "lokr-dora"},
}
"""Dialect -> methods that it cannot express."""
ROUND = {"lora", "lora-tucker", "dora", "dora-in", "loha", "loha-tucker", "loha-dora", "lokr", "lokr-full", "lokr-tucker",
         "lokr-dora", "full", "norm", "glora", "oft", "ia3-in"}  # fmt: skip


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft"])
@pytest.mark.parametrize(("method", "family", "kind"), [c for c in CASES if c.values[0] in ROUND])
def test_round_trips_keep_the_delta(method, family, kind, dialect, tmp_path):
    theirs = lycoris_file(method, family, kind, tmp_path / "file.safetensors")
    adapter = read(tmp_path / "file.safetensors", names_of(family))
    out = tmp_path / ("folder" if dialect == "peft" else "other.safetensors")
    if method in REFUSED.get(dialect, ()):
        with pytest.raises(ValueError, match=r"--method lora --rank N"):
            write(out, adapter, dialect, names_of(family))
        assert not out.exists()
        return
    write(out, adapter, dialect, names_of(family))
    base = denoiser_of(family).get_submodule(LAYERS[family][kind])
    assert load_adapter(pipe_of(family), out) == ({}, ())
    with torch.no_grad():
        ours = denoiser_of(family).get_submodule(LAYERS[family][kind])(sample(base))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)
    if dialect != "peft":
        assert plan(Header.of_file(out), names_of(family)).dialect.name == dialect


@pytest.mark.parametrize("method", ["lora", "lora-tucker", "dora", "loha", "loha-tucker", "lokr", "lokr-full", "oft"])
def test_lycoris_reads_our_kohya_files(method, tmp_path):
    """The same file from us, read by LyCORIS' own loader."""
    family, kind = "sd1", "conv3x3"
    theirs = lycoris_file(method, family, kind, tmp_path / "file.safetensors")
    write(
        tmp_path / "ours.safetensors", read(tmp_path / "file.safetensors", names_of(family)), "kohya", names_of(family)
    )
    name, tensors = KOHYA_NAMES[family][kind], load_file(tmp_path / "ours.safetensors")
    base = copy.deepcopy(denoiser_of(family).get_submodule(LAYERS[family][kind]))
    with torch.no_grad():
        module = lycoris_modules.make_module(*lycoris_modules.get_module(tensors, name), name, base)
        module.apply_to()
        torch.testing.assert_close(base(sample(base)), theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize(
    "method", ["lora", "lora-tucker", "dora", "loha", "loha-tucker", "lokr", "lokr-full", "lokr-both"]
)
def test_peft_reads_our_directories(method, kind, tmp_path):
    from peft import PeftModel

    theirs = lycoris_file(method, "sd1", kind, tmp_path / "file.safetensors")
    write(tmp_path / "peft", read(tmp_path / "file.safetensors", names_of("sd1")), "peft", names_of("sd1"))
    model = PeftModel.from_pretrained(copy.deepcopy(denoiser_of("sd1")), tmp_path / "peft" / "unet")
    layer = model.base_model.model.get_submodule(LAYERS["sd1"][kind])
    with torch.no_grad():
        torch.testing.assert_close(layer(sample(layer.base_layer)), theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_diffusers_reads_our_files(method, family, tmp_path):
    theirs = lycoris_file(method, family, "linear", tmp_path / "file.safetensors")
    out = tmp_path / "pytorch_lora_weights.safetensors"
    write(out, read(tmp_path / "file.safetensors", names_of(family)), "diffusers", names_of(family))
    model = copy.deepcopy(denoiser_of(family))
    model.load_lora_adapter(str(out), prefix="transformer" if family == "flux" else "unet")
    layer = model.get_submodule(LAYERS[family]["linear"])
    with torch.no_grad():
        torch.testing.assert_close(layer(sample(layer.base_layer)), theirs, atol=5e-5, rtol=1e-4)


def test_one_file_may_mix_methods(tmp_path):
    """LyCORIS' presets do: it runs, weighs, merges and comes off as one adapter."""
    tensors, expected = {}, {}
    for method, kind in [
        ("lora", "linear"),
        ("lokr", "bias"),
        ("loha-tucker", "conv3x3"),
        ("norm", "norm"),
        ("full", "conv1x1"),
    ]:
        expected[kind] = lycoris_file(method, "sd1", kind, tmp_path / "part.safetensors")
        tensors |= load_file(tmp_path / "part.safetensors")
    save_file(tensors, tmp_path / "mixed.safetensors")
    pipe, unet = pipe_of("sd1"), denoiser_of("sd1")
    bases = {kind: unet.get_submodule(LAYERS["sd1"][kind]) for kind in expected}

    def outputs() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {kind: unet.get_submodule(LAYERS["sd1"][kind])(sample(base)) for kind, base in bases.items()}

    plain = outputs()
    load_adapter(pipe, tmp_path / "mixed.safetensors", "mixed")
    for kind, y in outputs().items():
        torch.testing.assert_close(y, expected[kind], atol=5e-5, rtol=1e-4)
    set_weights(pipe, {"mixed": 0.5})
    half = outputs()
    for kind, y in half.items():
        torch.testing.assert_close(y, torch.lerp(plain[kind], expected[kind], 0.5), atol=5e-5, rtol=1e-4)
    model = adapted_models(pipe)["unet"]
    model.merge()
    for kind, y in outputs().items():
        torch.testing.assert_close(y, half[kind], atol=5e-5, rtol=1e-4)
    model.unmerge()
    detach(pipe)
    for kind, base in bases.items():
        assert unet.get_submodule(LAYERS["sd1"][kind]) is base
    for kind, y in outputs().items():
        assert torch.equal(y, plain[kind])
