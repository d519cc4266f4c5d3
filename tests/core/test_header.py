"""Headers of safetensors files: everything they say is held against the file before memory is taken for it."""

import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from veneer import AdapterFileError
from veneer.core.files import read_tensors
from veneer.core.header import MAX_HEADER, PICKLED, read_header

TENSORS = {
    "a.lora_A.weight": torch.arange(8.0).view(2, 4),
    "a.lora_B.weight": torch.ones(3, 2, dtype=torch.bfloat16),
    "a.alpha": torch.tensor(1.5, dtype=torch.float16),
    "none": torch.empty(0, 4),
}
WHOLE = save(TENSORS, {"format": "pt", "trigger": "sks ♥"})


def written(path: Path, header: dict | bytes | str, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_a_whole_file_says(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE)
    header = read_header(path)
    assert {name: (info.shape, info.numel) for name, info in header.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.numel()) for name, tensor in TENSORS.items()
    }
    assert header.metadata == {"format": "pt", "trigger": "sks ♥"}
    assert (header.size, header.tensors["a.lora_B.weight"].dtype) == (len(WHOLE), "BF16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "uint8"])
def test_scalars_are_read_alone(tmp_path, dtype):
    value = torch.tensor(6.5).to(getattr(torch, dtype))
    (tmp_path / "x").write_bytes(save({"a.alpha": value, "b": torch.zeros(3), "c": value[None].clone()}))
    assert read_header(tmp_path / "x").scalars == {"a.alpha": value.item(), "c": value.item()}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    """640 is 0x0280, and bytes 80 02 begin a pickle."""
    text = json.dumps({"x": entry()})
    header = read_header(written(tmp_path / "x", text.ljust(length), bytes(8)))
    assert list(header.tensors) == ["x"]


def test_looking_into_a_file_imports_neither_torch_nor_numpy(tmp_path):
    code = (
        "import sys, veneer.core.files, veneer.core.header; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.sep, check=True)
    assert child.stdout == "[]\n"


# ---------------------------------------------------------------- contradictions

DEEP = "[" * 100_000 + "]" * 100_000
HEADERS = {
    "not JSON": ("{nonsense", b"", "header is not JSON"),
    "two values": ('{}{"x": 1}', b"", "header is not JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "header is not UTF-8"),
    "half a character": ('{"\\ud800": 1}', b"", "lone surrogates"),
    "nested deeply": (f'{{"x": {DEEP}}}', b"", "nested too deeply"),
    "a number of 5000 digits": (f'{{"x": {"9" * 5000}}}', b"", "header is not JSON"),
    "NaN": ('{"x": NaN}', b"", "holds NaN"),
    "the same name twice": ('{"x": 1, "y": 2, "x": 3}', b"", "names 'x' twice"),
    "the same field twice": ('{"x": {"shape": [1], "shape": [2]}}', b"", "names 'shape' twice"),
    "metadata of numbers": ({"__metadata__": {"rank": 4}}, b"", "__metadata__ is not an object of strings"),
    "metadata as a list": ({"__metadata__": []}, b"", "__metadata__ is not an object of strings"),
    "a tensor as a number": ({"x": 4}, b"", "'x' is not described by dtype, shape and data_offsets"),
    "no shape": ({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "'x' is not described by"),
    "a field too many": ({"x": {**entry(), "code": "1"}}, bytes(8), "'x' is not described by"),
    "an unknown dtype": ({"x": entry(dtype="F31")}, bytes(8), "'x' has dtype \"F31\"; known are BOOL"),
    "a dtype as a list": ({"x": entry(dtype=["F32"])}, bytes(8), r"'x' has dtype \['F32'\]"),
    "a negative size": ({"x": entry(shape=(-2,))}, bytes(8), r"'x' has shape \[-2\], expected"),
    "a fractional size": ({"x": entry(shape=(2.0,))}, bytes(8), r"'x' has shape \[2\.0\], expected"),
    "true as a size": ({"x": entry(shape=(True, 2))}, bytes(8), r"'x' has shape \[True, 2\], expected"),
    "an astronomic size": ({"x": entry(shape=(2**70,))}, bytes(8), "'x' has shape"),
    "an overflowing product": ({"x": entry(shape=(2**62, 4), end=0)}, b"", "takes .* bytes, has 0"),
    "a petabyte": ({"x": entry(shape=(2**48,), end=2**50)}, bytes(8), "take 1125899906842624 bytes, and 8 are there"),
    "too many axes": ({"x": entry(shape=(1,) * 9, end=4)}, bytes(4), "has 9 dimensions"),
    "offsets backwards": ({"x": entry(begin=8, end=0)}, bytes(8), "takes 8 bytes, has -8"),
    "negative offsets": ({"x": entry(begin=-8, end=0)}, bytes(8), r"data_offsets \[-8, 0\], expected \[begin, end\]"),
    "one offset": ({"x": {**entry(), "data_offsets": [8]}}, bytes(8), r"data_offsets \[8\], expected"),
    "offsets against the shape": ({"x": entry(end=12)}, bytes(12), "takes 8 bytes, has 12"),
    "offsets against the dtype": ({"x": entry(dtype="F16")}, bytes(8), "takes 4 bytes, has 8"),
    "overlapping tensors": ({"x": entry(), "y": entry(begin=4, end=12)}, bytes(12), "'y' overlaps 'x'"),
    "two tensors in one place": ({"x": entry(), "y": entry()}, bytes(8), "'y' overlaps 'x'"),
    "a hole": ({"x": entry(), "y": entry(begin=12, end=20)}, bytes(20), "4 bytes before 'y' belong to no tensor"),
    "data cut short": ({"x": entry()}, bytes(7), "cut short: its tensors take 8 bytes, and 7 are there"),
    "data left over": ({"x": entry()}, bytes(9), "1 bytes after its last tensor belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_contradicts_itself_or_its_file(tmp_path, header, data, message):
    path = written(tmp_path / "x.safetensors", header, data)
    for read in (read_header, read_tensors):
        with pytest.raises(AdapterFileError, match=rf"x\.safetensors is not a whole safetensors file: .*{message}"):
            read(path)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, MAX_HEADER + 1])
def test_a_stated_length_is_not_believed(tmp_path, length):
    path = written(tmp_path / "x", {"x": entry()}, bytes(8), length)
    with path.open("r+b") as file:
        file.truncate(MAX_HEADER + 4096)  # sparse: no bytes are behind it
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="is not a whole safetensors file"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


# ---------------------------------------------------------------- other files

FOREIGN = {
    "empty": (b"", "it is empty"),
    "three bytes": (b"abc", "has 3 bytes, too few"),
    "zip": (b"PK\x03\x04" + bytes(60), "is a zip archive, as torch.save writes"),
    "pickle": (pickle.dumps({"a": list(range(50))}), "is a pickle, which could run any code"),
    "old pickle": (pickle.dumps([1] * 50, protocol=2), "is a pickle"),
    "gguf": (b"GGUF\x03" + bytes(60), "is a GGUF file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>sign in</html>", "is a web page"),
    "json": (b'{"error": "Entry not found"}', "is a JSON file"),
    "text": (b"Entry not found in the repository", "no header follows"),
}


@pytest.mark.parametrize(("data", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_other_files_are_told_by_their_beginning(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    for read in (read_header, read_tensors):
        with pytest.raises(AdapterFileError, match=rf"x\.safetensors .*{message}"):
            read(path)


@pytest.mark.parametrize("ending", sorted({*PICKLED, ".CKPT"}))
def test_pickles_are_refused_by_name_without_being_opened(tmp_path, ending, monkeypatch):
    path = tmp_path / f"x{ending}"
    path.write_bytes(WHOLE)
    monkeypatch.setattr(Path, "open", None)
    with pytest.raises(AdapterFileError, match=r"is a pickle, .* not read; convert it to safetensors"):
        read_header(path)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "nowhere": "does not exist",
        "link": "is a link to nothing",
        "round": "cannot be read: .*symbolic links",
        "folder.safetensors": "is a folder, not a file of tensors",
        "pipe": "is a device, not a file",
        "nul\0": "cannot be read",
        "n" * 300: "cannot be read: File name too long",
    }.items():
        with pytest.raises(AdapterFileError, match=message):
            read_header(tmp_path / name)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "x").write_bytes(WHOLE)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert len(read_header(tmp_path / "link").tensors) == 4


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    good = torch.ones(3, 4)
    bad = good.clone()
    bad[1, 2] = value
    (tmp_path / "x").write_bytes(save({"good": good, "bad": bad.to(getattr(torch, dtype))}))
    with pytest.raises(AdapterFileError, match="x holds NaN or infinity in bad: its training diverged"):
        read_tensors(tmp_path / "x")


def test_large_finite_numbers_and_infinite_alphas_are_read(tmp_path):
    tensors = {"a": torch.full((9,), 3e38), "b.alpha": torch.tensor(torch.inf), "c": torch.ones(2, dtype=torch.int64)}
    (tmp_path / "x").write_bytes(save(tensors))
    assert read_tensors(tmp_path / "x").keys() == tensors.keys()


# ---------------------------------------------------------------- any damage at all


def damage(data: bytes, seed: int) -> bytes:
    """A few random wounds: flipped bits, bytes cut out, copied or made up, most of them in the header."""
    draw, wounded = random.Random(seed), bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(wounded)) if draw.random() < 0.3 else draw.randrange(min(len(wounded), 420))
        length = draw.choice([1, 1, 2, 8, 40])
        match draw.randrange(5):
            case 0:
                wounded[at] ^= 1 << draw.randrange(8)
            case 1:
                del wounded[at : at + length]
            case 2:
                wounded[at:at] = wounded[at : at + length]
            case 3:
                wounded[at : at + length] = draw.randbytes(length)
            case 4:
                wounded[at : at + 1] = draw.choice([b"9", b"-", b"[", b'"', b"{", b"1e9", b"null", b"00"])
        if not wounded:
            break
    return bytes(wounded)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_damage_is_one_clear_error_or_none(tmp_path, seed):
    """What is accepted is what the library reads too; what is refused is refused in one line, by one type."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(damage(WHOLE, seed))
    try:
        tensors, error = read_tensors(path), ""
    except AdapterFileError as refused:
        tensors, error = None, str(refused)
    if tensors is None:
        assert error.startswith(str(path))
        assert "\n" not in error
    else:
        expected = load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(same(tensor, expected[key]) for key, tensor in tensors.items())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, len(WHOLE) - 1))
def test_a_cut_file_is_never_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(AdapterFileError, match="is not a whole safetensors file"):
        read_tensors(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_any_bytes_at_all(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(AdapterFileError):
        read_tensors(tmp_path / "x")
