"""Adapter directories: written whole or not at all, read strictly, never unpickled."""

import dataclasses
import json
import os
import pickle
import stat
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import veneer
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from veneer import (
    AdaptedModel,
    AdapterFileError,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
)
from veneer.core import load_adapter, load_peft_weights, save_adapter
from veneer.core.files import read_metadata

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.0.lora_A.weight"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": False} | options)


def adapted(**options) -> PeftModel:
    return get_peft_model(net(), lora(**options)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path)
    return tmp_path


def change_config(directory: Path, **changes) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by the end of their name, or take them out."""
    tensors = load_file(directory / WEIGHTS)
    for end, value in changes.items():
        tensors.pop(f"base_model.model.0.{end}.weight", None)
        if value is not None:
            tensors[f"base_model.model.0.{end}.weight"] = value
    save_file(tensors, directory / WEIGHTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- atomic writes


class Crash(Exception):  # noqa: N818
    """What a full disk or a lost machine would be."""


def crash_in_tensors(tensors, path, metadata):
    Path(path).write_bytes(b"half a file")
    raise Crash


def crash(*_, **__):
    raise Crash


@pytest.mark.parametrize(
    ("owner", "name", "breaks"),
    [(safetensors.torch, "save_file", crash_in_tensors), (os, "replace", crash), (os, "fsync", crash)],
    ids=["while writing", "before renaming", "before flushing"],
)
def test_a_crash_while_saving_keeps_the_old_files(saved, monkeypatch, owner, name, breaks):
    before = contents(saved)
    config, tensors = load_adapter(saved)
    monkeypatch.setattr(owner, name, breaks)
    with pytest.raises(Crash):
        save_adapter(saved, config, {key: tensor + 1 for key, tensor in tensors.items()})
    assert contents(saved) == before


def test_a_crash_in_the_config_keeps_the_old_one(saved, monkeypatch):
    before = (saved / CONFIG).read_bytes()
    config = PeftConfig.from_pretrained(saved)
    monkeypatch.setattr(Path, "write_text", crash)
    with pytest.raises(Crash):
        config.save_pretrained(saved)
    assert (saved / CONFIG).read_bytes() == before
    assert not list(saved.glob(".*"))


def test_files_are_readable_as_the_umask_says(tmp_path):
    mask = os.umask(0o027)
    try:
        adapted().save_pretrained(tmp_path)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG, WEIGHTS)} == {0o640}


def test_a_loaded_adapter_does_not_depend_on_its_file(saved):
    model = PeftModel.from_pretrained(net(), saved)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size = (saved / WEIGHTS).stat().st_size
    with (saved / WEIGHTS).open("r+b") as file:
        file.write(b"\0" * size)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


# ---------------------------------------------------------------- damaged files


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.9, 0.999])
def test_a_truncated_weights_file_is_named(saved, share):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a whole safetensors file"):
        PeftModel.from_pretrained(net(), saved)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a whole safetensors file"):
        read_metadata(saved / WEIGHTS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a JSON file"),
        (b'{"peft_type": "LO', "is not a JSON file"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b"[1, 2]", "does not hold a JSON object"),
        (b"{}", "peft_type=None is no method"),
        (b'{"peft_type": "POLY"}', "peft_type='POLY' is no method of this release"),
        (b'{"peft_type": "LORA", "r": "four"}', "adapter_config.json: .*not supported between"),
        (b'{"peft_type": "LORA", "r": [4]}', "adapter_config.json: .*not supported between"),
        (b'{"peft_type": "LORA", "lora_alpha": "four"}', "`lora_alpha` should be a number but .* is 'four'"),
        (b'{"peft_type": "LORA", "alpha_pattern": {"x": null}}', "`lora_alpha` should be a number but .* is None"),
        (b'{"peft_type": "LORA", "rank_pattern": [4]}', "adapter_config.json: 'list' object has no attribute"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "is not a JSON file"),
        (b'{"peft_type": ' + b"[" * 100_000 + b"}", "is not a JSON file"),
    ],
)
def test_a_damaged_config_is_named(saved, data, message):
    (saved / CONFIG).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(net(), saved)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named_with_what_is_there(saved, missing):
    (saved / missing).unlink()
    with pytest.raises(ValueError, match=rf"Can't find '{missing}' at .*found \['README.md'"):
        PeftModel.from_pretrained(net(), saved)


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_pickles_are_refused_unread(saved, tmp_path, name):
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"is a pickle, which could run any code|is not a whole safetensors file"):
        PeftModel.from_pretrained(net(), saved)
    assert not (tmp_path / "exploded").exists()


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="would write a pickle"):
        adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert not contents(tmp_path)


# ---------------------------------------------------------------- configs

READERS = {
    "PeftConfig.from_pretrained": PeftConfig.from_pretrained,
    "LoraConfig.from_pretrained": LoraConfig.from_pretrained,
    "PeftModel.from_pretrained": lambda d: PeftModel.from_pretrained(net(), d),
    "load_adapter": lambda d: adapted().load_adapter(d, "other"),
}
METHODS = (
    lora(),
    LoHaConfig(r=2, target_modules=["0"]),
    LoKrConfig(r=2, target_modules=["0"]),
    OFTConfig(oft_block_size=2, target_modules=["0"]),
    IA3Config(target_modules=["0"], feedforward_modules=[]),
)
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())


@every_reader
def test_unknown_keys_warn_exactly_once(saved, read):
    change_config(saved, from_the_future=1, another={"a": 2})
    with pytest.warns(PeftWarning) as caught:
        read(saved)
    assert len(caught) == 1
    assert "['another', 'from_the_future']" in str(caught[0].message)


@every_reader
@pytest.mark.parametrize("name", sorted(LoraConfig.later))
def test_options_that_cannot_be_honoured_are_refused_by_name(saved, read, name):
    change_config(saved, **{name: {"x": 1}})
    with pytest.raises(ValueError, match=rf"LoraConfig: {name} cannot be honoured"):
        read(saved)


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(peft.LoraConfig)))
def test_every_option_of_pefts_lora_is_honoured_or_refused_by_name(name):
    default = getattr(peft.LoraConfig(), name)
    LoraConfig(**{name: default})
    if name in LoraConfig.later:
        with pytest.raises(ValueError, match=rf"LoraConfig: {name} cannot be honoured"):
            LoraConfig(**{name: {"x": 1}})


@every_reader
@pytest.mark.parametrize("empty", [None, False, {}, []])
def test_such_options_are_dropped_when_empty(saved, read, empty):
    change_config(saved, **dict.fromkeys(LoraConfig.later, empty))
    read(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "`r` should be a positive integer"),
        ({"rank_pattern": {"0": -1}}, "`r` should be a positive integer"),
        ({"bias": "some"}, "bias='some' is unknown"),
        ({"init_lora_weights": "magic"}, "init_lora_weights='magic' is unknown"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not a probability below 1"),
        ({"task_type": "DREAM"}, "task_type='DREAM' is unknown"),
        ({"layers_pattern": "layers"}, "layers_pattern has an effect only with layers_to_transform"),
        ({"target_modules": "x.*", "layers_to_transform": [1]}, "layers_to_transform needs target_modules as a list"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_values_are_refused_alike_in_code_and_in_files(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        lora(**changes)
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(saved)


ODD_VALUES = (
    None, "x", "", "(", -1, 0, 3, 0.5, 1e308, True, [], ["x"], [1], [None], [[1]], {}, {"a": "b"}, {"a": 1}, {"(": 1},
    {"a": None},
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", METHODS, ids=[type(c).__name__ for c in METHODS])
def test_values_of_any_type_load_or_are_refused_by_one_error(tmp_path, config):
    get_peft_model(net(), config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    for name in sorted(values):
        for odd in ODD_VALUES:
            (tmp_path / CONFIG).write_text(json.dumps(values | {name: odd}))
            with suppress(ValueError):
                PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0.5}, "r=0.5 is no int"),
        ({"r": True}, "r=True is no int"),
        ({"target_modules": 3}, r"target_modules=3 is no list\[str\] \| set\[str\] \| str \| None"),
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression: missing \)"),
        ({"modules_to_save": [1]}, r"modules_to_save=\[1\] is no list\[str\]"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no regular expression"),
        ({"use_rslora": "yes"}, "use_rslora='yes' is no bool"),
    ],
)
def test_values_of_a_wrong_type_are_named_with_the_file(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(AdapterFileError, match=rf"adapter_config\.json: {message}"):
        PeftConfig.from_pretrained(saved)


def test_a_config_survives_json(tmp_path):
    config = lora(
        target_modules=["b", "a"], exclude_modules=["c"], rank_pattern={"a": 3}, alpha_pattern={"b": 1.5},
        task_type="SEQ_CLS", modules_to_save=["head"], layers_to_transform=[0, 2], layers_pattern="layers",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["a", "b"]
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"peft_version": again.peft_version}
    assert veneer.get_peft_config(config.to_dict()) == config


# ---------------------------------------------------------------- tensors that do not fit

MISFITS = {
    "unexpected": ({"lora_C": torch.ones(2, 2)}, "no place for .*lora_C"),
    "wrong shape": ({"lora_A": torch.ones(2, 5)}, r"0\.lora_A\.weight has shape \(2, 5\), expected \(2, 4\)"),
    "wrong rank": ({"lora_A": torch.ones(3, 4), "lora_B": torch.ones(6, 3)}, "expected .* expected"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused_and_nothing_changes(saved, changes, message):
    change_tensors(saved, **changes)
    base = net()
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == flags
    assert [type(m) for m in base.modules()] == [type(m) for m in net().modules()]

    model = adapted()
    keys, trained = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "other")
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
    assert (list(model.state_dict()), [p.requires_grad for p in model.parameters()]) == (keys, trained)


def test_missing_tensors_warn_and_are_initialised(saved):
    """The layer of a missing tensor starts afresh; what the file has stays as it is."""
    expected = load_file(saved / WEIGHTS)["base_model.model.0.lora_B.weight"]
    change_tensors(saved, lora_A=None)
    with pytest.warns(PeftWarning, match=r"missing adapter keys.*0\.lora_A\.default\.weight"):
        model = PeftModel.from_pretrained(net(), saved)
    tensors = model.base_model.tensors("default")
    assert torch.equal(tensors["0.lora_B.weight"], expected)
    assert tensors["0.lora_A.weight"].isfinite().all()
    assert not any(t.is_meta for t in model.parameters())


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_our_own_loading_is_strict_about_missing_tensors(saved, name):
    change_tensors(saved, **{name: None})
    config, tensors = load_adapter(saved)
    model = AdaptedModel(net())
    with pytest.raises(ValueError, match=rf"adapter 'a': missing \['0\.{name}\.weight'\]"):
        model.load("a", config, tensors)
    assert not model.configs
    assert [type(m) for m in model.model.modules()] == [type(m) for m in net().modules()]


def test_a_file_for_another_model_is_refused(saved):
    with pytest.raises(veneer.NoMatchingPeftModuleError, match=r"target_modules=\['0'\] matches no layer"):
        PeftModel.from_pretrained(nn.ModuleDict({"other": nn.Linear(4, 6)}), saved)


# ---------------------------------------------------------------- where adapters are


def test_further_adapters_live_in_subfolders(tmp_path):
    model = adapted()
    model.add_adapter("other", lora(r=3))
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path, subfolder="other").r == 3
    for source in ({"model_id": tmp_path / "other"}, {"model_id": str(tmp_path), "subfolder": "other"}):
        again = PeftModel.from_pretrained(net(), **source)
        assert again.peft_config["default"].r == 3
    again = PeftModel.from_pretrained(net(), tmp_path)
    again.load_adapter(tmp_path, "second", subfolder="other")
    assert [config.r for config in again.peft_config.values()] == [2, 3]


def test_selected_adapters_are_saved_alone(tmp_path):
    model = adapted()
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert set(contents(tmp_path)) == {"README.md", f"other/{CONFIG}", f"other/{WEIGHTS}"}
    with pytest.raises(ValueError, match=r"selected_adapters \['nope'\] are not among \['default', 'other'\]"):
        model.save_pretrained(tmp_path, selected_adapters=["nope"])


def test_only_the_main_process_writes(tmp_path):
    adapted().save_pretrained(tmp_path, is_main_process=False)
    assert not contents(tmp_path)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        adapted().save_pretrained(tmp_path / "file")


@pytest.fixture
def hub(saved, monkeypatch):
    """A hub that has one repository, and the list of what it was asked for."""
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        if repo_id != "some/adapter":
            raise LocalEntryNotFoundError(f"no {repo_id} here")
        return str(saved / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_ids_are_downloaded(hub):
    options = {"revision": "v1", "token": "secret", "cache_dir": "/nowhere"}
    model = PeftModel.from_pretrained(net(), "some/adapter", subfolder="deep", **options)
    assert list(model.peft_config) == ["default"]
    assert [(repo, name) for repo, name, _ in hub] == [("some/adapter", CONFIG), ("some/adapter", WEIGHTS)]
    assert all(asked == {"subfolder": "deep"} | options for *_, asked in hub)


def test_an_id_that_is_nowhere_is_named(hub):
    with pytest.raises(ValueError, match=rf"Can't find '{CONFIG}' at 'no/adapter'.*it is not in the cache"):
        PeftModel.from_pretrained(net(), "no/adapter")


def test_a_local_directory_asks_no_hub(saved, hub):
    PeftModel.from_pretrained(net(), saved)
    assert hub == []


def test_weights_alone(saved):
    tensors = load_peft_weights(saved)
    assert set(tensors) == set(load_file(saved / WEIGHTS))
    assert KEY in tensors


# ---------------------------------------------------------------- the card


def test_a_new_card_says_what_the_hub_needs(tmp_path):
    model = get_peft_model(net(), lora(base_model_name_or_path="org/base"))
    model.save_pretrained(tmp_path)
    data = huggingface_hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model) == ("peft", "org/base")
    assert data.tags == ["lora", "base_model:adapter:org/base"]


@pytest.mark.parametrize("front", ["---\nlicense: mit\ntags:\n- mine\n---\n", ""], ids=["with data", "text only"])
def test_an_existing_card_is_kept(tmp_path, front):
    (tmp_path / "README.md").write_text(f"{front}# My adapter\n\nTrained with love.\n")
    for _ in range(2):
        adapted().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# My adapter\n\nTrained with love."
    assert card.data.library_name == "peft"
    assert card.data.tags == (["mine", "lora"] if front else ["lora"])
    assert card.data.get("license") == ("mit" if front else None)


# ---------------------------------------------------------------- tensors in memory


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    whole = torch.arange(48.0).reshape(6, 8)
    tensors = {"0.lora_A.weight": whole[:2, :4], "0.lora_B.weight": whole[:, :2], "same": whole, "again": whole}
    save_adapter(tmp_path, lora(), tensors)
    _, found = load_adapter(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_view_of_a_large_tensor_is_stored_small(tmp_path):
    large = torch.zeros(1000, 1000)
    save_adapter(tmp_path, lora(), {"0.lora_A.weight": large[:2]})
    assert (tmp_path / WEIGHTS).stat().st_size < 10_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_are_kept_in_the_file(tmp_path, dtype):
    save_adapter(tmp_path, lora(), {"x": torch.ones(3, dtype=dtype), "scalar": torch.tensor(2, dtype=dtype)})
    _, found = load_adapter(tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert found["scalar"].shape == ()


def test_metadata_travels_in_the_header(tmp_path):
    save_adapter(tmp_path, lora(), {"x": torch.ones(1)}, {"trigger": "a robot", "steps": "30"})
    assert read_metadata(tmp_path / WEIGHTS) == {"format": "pt", "trigger": "a robot", "steps": "30"}


def test_saving_is_deterministic(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(0)
        adapted(target_modules=["2", "0"]).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_options_that_would_be_ignored_are_refused(saved, tmp_path):
    with pytest.raises(TypeError, match="is_trainble"):
        PeftModel.from_pretrained(net(), saved, is_trainble=True)
    with pytest.raises(TypeError, match="key_mapping"):
        PeftModel.from_pretrained(net(), saved, key_mapping={"a": "b"})
    model = PeftModel.from_pretrained(net(), saved, low_cpu_mem_usage=True, key_mapping=None)
    with pytest.raises(ValueError, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "out", save_embedding_layers=True)
    assert not (tmp_path / "out").exists()


def test_a_given_state_dict_is_what_is_saved(saved, tmp_path):
    model = PeftModel.from_pretrained(net(), saved)
    model.save_pretrained(tmp_path / "out", state_dict={key: tensor + 1 for key, tensor in model.state_dict().items()})
    before, after = load_adapter(saved)[1], load_adapter(tmp_path / "out")[1]
    for key in before:
        torch.testing.assert_close(after[key], before[key] + 1)


@pytest.mark.parametrize("trainable", [True, False])
def test_what_a_file_lacks_starts_afresh(trainable):
    """Also over an adapter that is being trained: its leaves are written to in place."""
    model = adapted(target_modules=["0", "2"], init_lora_weights=True).base_model
    model.set_trainable("default", trainable)
    given = {key: tensor + 1 for key, tensor in model.tensors("default").items() if key.startswith("0.")}
    with torch.no_grad():
        for parameter in model.parameters_of("default"):
            parameter.fill_(3.0)
    held = model.parameters_of("default")
    result = model.assign("default", given, missing_ok=True)
    assert sorted(result.missing_keys) == ["2.lora_A.weight", "2.lora_B.weight"]
    found = model.tensors("default")
    for key, tensor in given.items():
        assert torch.equal(found[key], tensor)
    assert not found["2.lora_B.weight"].any()
    assert found["2.lora_A.weight"].std() > 0
    for old, new in zip(held, model.parameters_of("default"), strict=True):
        assert old is new
        assert new.requires_grad is trainable
