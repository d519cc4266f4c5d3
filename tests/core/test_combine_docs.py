"""docs/combinations.md: its code runs as it stands, and it leaves no kind and no option out."""

import re
from pathlib import Path

import pytest
import veneer
from veneer.core import combination_types
from veneer.core.combinations.registry import COMBINATIONS

TEXT = (Path(veneer.__file__).parent / "docs" / "combinations.md").read_text(encoding="utf-8")


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = set(combination_types())
    try:
        found: dict = {}
        for block in re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL):
            exec(block, found)
        assert set(COMBINATIONS) - known == {"median", "median_svd"}
        found["model"].base_model.combine(["subject", "style"], [1, 1], "middle", "median_svd", svd_rank=4, strength=2)
    finally:
        for name in set(COMBINATIONS) - known:
            del COMBINATIONS[name]


@pytest.mark.parametrize("kind", sorted(combination_types()))
def test_every_kind_and_option_is_told(kind):
    assert f"`{kind}`" in TEXT
    for option in combination_types()[kind].options:
        assert f"| `{option}` |" in TEXT
