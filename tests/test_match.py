"""Patterns of layer names."""

import subprocess
import sys

import pytest

from tracequant import BudgetError, ModelError
from tracequant.core.match import match_names, matching


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["layer1.conv", "layer10.conv", "Layer1.conv"]),
        ("layer1.*", ["layer1.conv"]),
        ("Layer*", ["Layer1.conv"]),
        ("layer?.conv", ["layer1.conv"]),
        ("[!l]*", ["Layer1.conv"]),
        ("layer1", []),
    ],
)
def test_patterns_match_whole_names_in_their_case(pattern: str, expected: list[str]) -> None:
    assert matching(pattern, ["layer1.conv", "layer10.conv", "Layer1.conv"]) == expected


def test_names_come_once_and_in_their_own_order() -> None:
    assert match_names(["a*", "b", "*1"], ["b", "a1", "a2", "c"], "include") == ["b", "a1", "a2"]
    assert match_names([], ["b"], "include") == []


def test_a_pattern_without_a_match_names_what_there_is() -> None:
    names = [f"layer{i}" for i in range(8)]
    message = r"exclude pattern 'Layer\*' matches no layer; there are layer0, .*, layer5, ... \(8 in all\)"
    with pytest.raises(ModelError, match=message):
        match_names(["*", "Layer*"], names, "exclude")
    with pytest.raises(BudgetError, match="min_bits pattern 'x' matches no activation; there are none"):
        match_names(["x"], [], "min_bits", "activation", BudgetError)


def test_matching_takes_no_torch() -> None:
    script = "import sys, tracequant.core.match; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
