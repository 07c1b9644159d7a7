"""`hrnn models`: what the model store holds, and which of it serves."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from model.store import Champion, ModelStore

app = typer.Typer(
    help="The model store: list, show, promote, roll back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[
    str,
    typer.Option(
        help="Folder or address (s3://bucket/prefix); default: HRNN_MODEL_DIR, else the "
        "workspace's.",
    ),
]
Workspace = Annotated[Path, typer.Option(help="Folder for data, runs, features and models.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def store_address(store: str, workspace: Path) -> str:
    """The store that a command is about."""
    return store or os.environ.get("HRNN_MODEL_DIR", "") or str(workspace / "models")


def _open(store: str, workspace: Path) -> "ModelStore":
    from model.store import ModelStore

    return ModelStore(store_address(store, workspace))


@app.command("list")
def list_models(
    store: Store = "", workspace: Workspace = Path("workspace"), as_json: AsJson = False
) -> None:
    """Every version, newest first, with its place and its figures."""
    versions = _open(store, workspace).versions()
    if as_json:
        print(json.dumps([asdict(v) for v in versions]))
        return
    from pipelines.tables import versions_table

    versions_table(versions, sys.stdout)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A version, or: champion, previous.")] = "champion",
    store: Store = "",
    workspace: Workspace = Path("workspace"),
) -> None:
    """Everything that is recorded of a version, as JSON."""
    opened = _open(store, workspace)
    print(json.dumps(asdict(opened.version(_named(opened, version))), indent=1))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version that `hrnn models list` shows.")],
    store: Store = "",
    workspace: Workspace = Path("workspace"),
) -> None:
    """Make a version the champion; servers that follow the store take it within seconds."""
    opened = _open(store, workspace)
    _tell(opened.promote(_named(opened, version)))


@app.command()
def rollback(store: Store = "", workspace: Workspace = Path("workspace")) -> None:
    """Make the version before the champion again."""
    _tell(_open(store, workspace).rollback())


def _named(store: "ModelStore", version: str) -> str:
    from model.errors import InputError

    if version not in ("champion", "previous"):
        return version
    champion = store.champion()
    found = champion and (champion.version if version == "champion" else champion.previous)
    if not found:
        raise InputError(f"the model store {store.uri} has no {version} yet: start with `hrnn run`")
    return str(found)


def _tell(champion: "Champion") -> None:
    print(f"champion is {champion.version}, before it {champion.previous or 'none'}")
