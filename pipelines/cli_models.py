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
Why = Annotated[str, typer.Option(help="Kept with the version, for whoever looks next.")]
BY_HAND = "by-hand"  # in place of a run's id


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
        print(json.dumps([{**asdict(v), "state": v.state} for v in versions]))
        return
    from pipelines.tables import versions_table

    versions_table(versions, sys.stdout)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A version, or: champion, previous.")] = "champion",
    store: Store = "",
    workspace: Workspace = Path("workspace"),
) -> None:
    """Everything that is recorded of a version, and what its releases came to, as JSON."""
    opened = _open(store, workspace)
    found = opened.version(_named(opened, version))
    print(json.dumps({**asdict(found), "state": found.state}, indent=1))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version that `hrnn models list` shows.")],
    why: Why = "",
    store: Store = "",
    workspace: Workspace = Path("workspace"),
) -> None:
    """Make a version the champion; servers that follow the store take it within seconds.

    Also one that was rolled back, or is still being checked: you say that it is good.
    """
    opened = _open(store, workspace)
    named = _named(opened, version)
    champion = opened.promote(named)
    opened.record(named, BY_HAND, "released", why)
    _tell(champion)


@app.command()
def rollback(why: Why = "", store: Store = "", workspace: Workspace = Path("workspace")) -> None:
    """Make the version before the champion again; once more: the one before that.

    To go forward again: `hrnn models promote VERSION`.
    """
    opened = _open(store, workspace)
    bad = _named(opened, "champion")
    champion = opened.rollback(replaces=bad)
    opened.record(bad, BY_HAND, "rolled_back", why)
    _tell(champion)


def _named(store: "ModelStore", version: str) -> str:
    from model.errors import InputError

    if version not in ("champion", "previous"):
        return version
    champion = store.champion()
    found = champion and (champion.version if version == "champion" else champion.previous)
    if not found:
        raise InputError(f"the model store {store.uri} has no {version} yet: start with `hrnn run`")
    return str(found)


def _tell(champion: "Champion | None") -> None:
    if champion is None:
        print("there is no champion now, as before the first deployment")
    else:
        print(f"champion is {champion.version}, before it {champion.previous or 'none'}")
