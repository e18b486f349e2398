"""Imports run one way: a folder knows those below it, and none above."""

import ast
import functools
import importlib.util
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "unet"
LAYERS = (
    ("errors", "secrets", "paths", "streams", "progress", "classes", "metrics", "metric_names"),
    ("environment", "remote", "borders", "versions"),
    ("storage",),
    ("locks", "disk", "settings"),
    ("recipe",),
    ("config",),
    ("pages",),
    ("terminal",),
    ("data",),
    ("cluster",),
    ("runs",),
    ("tracking",),
    ("models",),
    ("prediction",),
    ("packaging", "evaluation"),
    ("training",),
    ("supervise",),
    ("tuning",),
    ("comparison", "doctor"),
    ("commands",),
)
"""From the ground up: what stands on one floor knows nothing of its neighbours."""
FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}
# `unet/__init__.py`, the public face, may import all, and nothing in the package imports it.


@functools.cache
def imports(file: Path) -> set[str]:
    """The folders and top modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: imports name what they mean in full"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("unet.")}
    return found


def home(file: Path) -> str:
    """The folder or top module that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def test_every_folder_has_its_floor():
    assert {home(file) for file in FILES} == set(FLOOR)


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_no_import_points_up(name):
    up = {
        f"{file.relative_to(PACKAGE)} -> {other}"
        for file in FILES
        for other in imports(file)
        if home(file) == name and other != name and FLOOR[other] >= FLOOR[name]
    }
    assert not up


def test_what_a_researcher_edits_knows_neither_ray_nor_mlflow_nor_files():
    """`recipe/` computes: whatever stores, sends, schedules or shows stands above it. What it imports, too."""
    forbidden = {"ray", "mlflow", "h5py", "pathlib", "os", "io", "rich", "pyarrow", "yaml"}
    below = {"recipe"}
    while grown := {other for file in FILES if home(file) in below for other in imports(file)} - below:
        below |= grown
    for file in (file for file in FILES if home(file) in below):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not forbidden & {name.split(".")[0] for name in names}, file.name


SCRIPTS = sorted((PACKAGE.parent / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_what_a_benchmark_imports_is_there(file):
    """In functions too, which nothing but a long measurement would call."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unet"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                named = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(named), named
