"""Imports between rooms point one way (docs/architecture.md)."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("pipelines", "components", "feature_repo", "model", "serving")
ALLOWED = {
    "model": {"model"},
    "feature_repo": {"feature_repo", "model"},
    "components": {"components", "feature_repo", "model"},
    "serving": {"serving", "feature_repo", "model"},
    "pipelines": {"pipelines", "components", "feature_repo", "model", "serving"},
}
# Only one room knows each of these.
OWNERS = {
    "feast": {"feature_repo"},
    "kserve": {"serving"},
    "kfp": {"components", "pipelines"},
    "torch": {"model", "serving"},  # serving sets the number of threads
}


def imported(path: Path, *, at_once: bool = False) -> set[str]:
    """Packages that a file imports; `at_once`: as soon as it is imported itself."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        names = imported(path)
        assert names & set(ROOMS) <= ALLOWED[room], path
        for package, owners in OWNERS.items():
            assert package not in names or room in owners, f"{path} imports {package}"


def test_model_can_be_lifted_out():
    """model/ needs no serving, pipeline or feature store package."""
    for path in (ROOT / "model").rglob("*.py"):
        assert not imported(path) & {"kfp", "feast", "kserve", "fastapi", "ibis", "duckdb"}, path


def normal(distribution: str) -> str:
    return re.sub("[-_.]+", "-", distribution).lower()


def test_what_is_imported_at_once_is_installed_with_the_product():
    """The tests have packages that the product has not: they do not notice by themselves."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {normal(re.split("[=<>@ ]", line)[0]) for line in lines if line[:1].isalnum()}
    providers = packages_distributions()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for package in imported(path, at_once=True) - set(ROOMS) - sys.stdlib_module_names:
                assert {normal(d) for d in providers[package]} & locked, f"{path}: {package}"
