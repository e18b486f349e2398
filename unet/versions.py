"""With which versions of Python and of the large packages the project runs, and which are installed."""

import importlib.metadata
import platform
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from unet.errors import InputError

PROJECT = "unet-pets"
PACKAGES = ("ray", "tensorflow", "keras", "numpy", "pyarrow", "mlflow")
"""Those whose versions have to fit each other on all nodes."""
TRIED = {"ray": "Ray", "tensorflow": "TensorFlow", "mlflow": "MLflow"}
"""Those of which `make test-versions` tries the minor versions that the project takes, by their usual names."""
DISTRIBUTIONS = {"tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-rocm", "tf-nightly")}
"""Names under which a package is installed, where it has several."""


def requirements() -> dict[str, str]:
    """The versions of Python and of `PACKAGES` that the project takes; none where neither tells them.

    A checkout's own file comes first: what an editable installation wrote down may be older.
    """
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        python, lines = project["requires-python"], project["dependencies"]
    else:
        try:
            about = importlib.metadata.metadata(PROJECT)
        except importlib.metadata.PackageNotFoundError:
            return {}
        python, lines = about["Requires-Python"], about.get_all("Requires-Dist") or []
    wanted = {line.name: str(line.specifier) for line in map(Requirement, lines) if line.marker is None}
    return {"python": python} | {name: wanted[name] for name in PACKAGES if name in wanted}


def installed() -> dict[str, str]:
    """The versions of Python and of those of `PACKAGES` that are installed here. Nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for name in DISTRIBUTIONS.get(package, (package,)):
            try:
                found[package] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def minor_versions(takes: str) -> list[str]:
    """Those of a range within one major version: `>=2.57,<2.60` gives 2.57, 2.58 and 2.59."""
    ends = {end.operator: Version(end.version) for end in SpecifierSet(takes)}
    return [f"{ends['>='].major}.{minor}" for minor in range(ends[">="].minor, ends["<"].minor)]


def check() -> None:
    """Refuse versions that nobody tried: users' clusters have their own, and a job brings its code alone.

    Raises:
        InputError: with the versions that would do.
    """
    takes, here = requirements(), installed()
    for package in TRIED.keys() & takes.keys() & here.keys():
        if SpecifierSet(takes[package]).contains(here[package], prereleases=True):
            continue
        called, those = TRIED[package], minor_versions(takes[package])
        listed = ", ".join(those) if len(those) < 5 else f"{those[0]} to {those[-1]}"
        raise InputError(
            f"{called} {here[package]} is installed here, and this project runs with {called} {listed}: install one of "
            "these, or use an environment or image made of requirements.txt (make setup)."
        )
