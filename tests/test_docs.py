"""What the documents say of tests is so."""

import ast
import re

import pytest
from conftest import ROOT

MARKS = {"make test": None, "make test-slow": "slow", "make kill-test": "kills"}


def marks_of(path) -> dict[str, set[str]]:
    """The pytest marks of each test of a file, its own and the file's."""
    tree = ast.parse(path.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {
        function.name: {
            mark for node in function.decorator_list for mark in re.findall(r"mark\.(\w+)", ast.unparse(node))
        }
        for function in functions
    }


def rows() -> list[str]:
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| what happens")]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_fault_says_which_target_runs_its_test(row):
    shown = row.split("|")[3]
    parts = re.findall(r"`(make [a-z-]+)`: ((?:(?!`make ).)+)", shown)
    assert parts, f"{shown} names no target"
    for target, tests in parts:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", tests)
        assert named
        for file, name in named:
            found = marks_of(ROOT / "tests" / file)
            marks = [found[name]] if name else list(found.values())
            wanted = MARKS[target]
            assert any(wanted in mark if wanted else not mark & {"slow", "kills"} for mark in marks), (
                target,
                file,
                name,
            )
