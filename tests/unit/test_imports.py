"""Imports between rooms point one way (docs/architecture.md)."""

import ast
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


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
