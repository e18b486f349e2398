"""What the documents say of tests, files and each other is so; the pinned packages carry hashes."""

import ast
import re

import pytest
from conftest import ROOT

MARKS = {"make test": None, "make test-slow": "slow", "make test-cluster": "cluster", "make kill-test": "kills"}


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
            assert any(wanted in mark if wanted else not mark & {"slow", "cluster", "kills"} for mark in marks), (
                target,
                file,
                name,
            )


def headings(page) -> list[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_decisions_that_code_points_to_are_there():
    pointers = [
        (file.name, heading)
        for file in (ROOT / "unet").rglob("*.py")
        for heading in re.findall(r"docs/decisions\.md#([\w-]+)", file.read_text())
    ]
    known = headings(ROOT / "docs" / "decisions.md")
    assert len(pointers) > 15 and not [pointer for pointer in pointers if pointer[1] not in known]


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Links within the documents, with their headings."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        path, _, heading = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def test_the_files_that_documents_name_are_there():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`((?:unet|tests|benchmarks|docs|jobs)/[\w/.]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), (page.name, name)


def test_every_pinned_package_carries_hashes_and_no_address():
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text().split("\n", 2)[2])
    assert len(entries) > 150
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+( ; .+)? \\\n", entry) and "--hash=sha256:" in entry, entry.splitlines()[0]
        assert "://" not in entry
