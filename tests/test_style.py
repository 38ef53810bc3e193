"""Rules of this repository that no linter knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.live import REPOSITORY

FILES = sorted([*(REPOSITORY / "service").rglob("*.py"), *(REPOSITORY / "workers").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPOSITORY)) for path in FILES])
def test_no_assert_outside_of_tests_and_a_docstring_in_every_module(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "says nothing of what it is for"
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"python -O would skip the check in lines {asserts}"
