"""SECURITY.md: what it says is shown by tests that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
HEADS = ("", "---")
CLAIMS = [
    cells
    for line in (ROOT / "SECURITY.md").read_text().splitlines()
    if line.startswith("|") and (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] not in HEADS
]


@cache
def defined_in(file: str) -> set[str]:
    """The tests that are defined in a file."""
    found = ast.parse((ROOT / file).read_text()).body
    functions = [each for each in found if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {each.name for each in functions if each.name.startswith("test_")}


def test_there_are_claims() -> None:
    assert len(CLAIMS) > 30
    assert {claim[0] for claim in CLAIMS} == {"can", "cannot"}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim[0]} {claim[1][:40]}")
def test_each_claim_names_tests_that_exist(claim: list[str]) -> None:
    _, _, shown = claim
    named = TEST.findall(shown)
    assert named
    assert TEST.sub("", shown).strip(", ") == ""
    assert not [(file, name) for file, name in named if name not in defined_in(file)]
