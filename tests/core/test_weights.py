"""Weights by layer: one rule for merging and combining."""

import doctest

import pytest
from veneer.core import weights
from veneer.core.weights import resolve

PATHS = ["down_blocks.0.attn1.to_q", "down_blocks.0.attn2.to_k", "up_blocks.1.attn2.to_q", "up_blocks.10.attn2.to_q"]


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        (-2, [-2, -2, -2, -2]),
        ({}, [1, 1, 1, 1]),
        ({"up_blocks": 0.5}, [1, 1, 0.5, 0.5]),
        ({"up_blocks.1": 0.5, ".*": 0}, [0, 0, 0.5, 0]),
        ({"attn2": 0.5, "to_q": 2}, [2, 0.5, 0.5, 0.5]),
        ({r"up_blocks\.\d+": 3}, [1, 1, 3, 3]),
        ({"to_[qv]": 3}, [3, 1, 3, 3]),
        ({".*": 0, PATHS[1]: 7}, [0, 7, 0, 0]),
    ],
    ids=str,
)
def test_the_first_key_that_matches_decides(weight, expected):
    assert resolve(weight, PATHS) == dict(zip(PATHS, map(float, expected), strict=True))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (float("nan"), "the weight is nan: expected a finite number"),
        ("heavy", "the weight is 'heavy'"),
        (True, "the weight is True"),
        ({"up_blocks": float("inf")}, "the weight of 'up_blocks' is inf"),
        ({"up_block": 1}, r"'up_block' matches none of the 4 layers; near: up_blocks \(2 layers\)"),
        ({"o_q": 1}, r"'o_q' matches none of the 4 layers; near: to_q \(3 layers\)"),
        ({".*": 0, "up_blocks": 1}, r"'up_blocks' decides nothing: \['\.\*'\] before it"),
        ({"up_(blocks": 1}, r"'up_\(blocks' is neither the path of a layer nor a regex"),
    ],
    ids=str,
)
def test_wrong_weights_say_what_is_wrong(weight, message):
    with pytest.raises(ValueError, match=message):
        resolve(weight, PATHS)


def test_the_example_is_true():
    assert doctest.testmod(weights).failed == 0
