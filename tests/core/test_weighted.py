"""Adapters as people write them."""

import pytest
from veneer.core.weighted import Weighted, parse_weighted


@pytest.mark.parametrize(
    ("texts", "parsed"),
    [
        ([], []),
        (["runs/bear"], [Weighted("bear", "runs/bear", 1.0)]),
        (
            ["runs/bear=0.5", "a.b/ink.safetensors=-1"],
            [Weighted("bear", "runs/bear", 0.5), ("ink", "a.b/ink.safetensors", -1)],
        ),
        (["a/x=1", "b/x=2", "c/x"], [("x", "a/x", 1.0), ("x-2", "b/x", 2.0), ("x-3", "c/x", 1.0)]),
        (["odd=name/x"], [("x", "odd=name/x", 1.0)]),
        (["owner/v1.5=1e-1"], [("v1_5", "owner/v1.5", 0.1)]),
    ],
)
def test_path_and_weight(texts, parsed):
    assert parse_weighted(texts) == parsed
