"""The benchmarks run, at shapes too small to mean anything."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import veneer

KINDS = {"llama": ["ties", "dare_ties_svd", "slerp"], "sd15": ["convert LoKr"]}


@pytest.mark.parametrize("model", KINDS)
def test_blend(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(veneer.__file__).parent / "benchmarks"))
    blend, path = import_module("blend"), tmp_path / "out.json"
    kinds = ";".join(KINDS[model])
    blend.main(["--quick", "--rounds", "1", "--models", model, "--kinds", kinds, "--json", str(path)])
    table = json.loads(path.read_text())["tables"][model]
    assert list(table) == KINDS[model]
    for kind, row in table.items():
        libraries = ["peft", "veneer"] if blend.KINDS[kind].in_peft else ["veneer"]
        assert row.keys() == {f"{who}_{what}" for who in libraries for what in ("s", "gb", "error")} | {"by_shape"}
        assert all(row[f"{who}_error"] < 1e-4 for who in libraries)
