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


@app.command()
def canary(
    service: Annotated[str, typer.Argument(help="The InferenceService.")] = "hrnn-meta",
    namespace: Annotated[str, typer.Option(help="Its namespace.")] = "hrnn",
    end: Annotated[bool, typer.Option("--end", help="Take it away, whosever it is.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for that.", min=1)] = 900.0,
) -> None:
    """Show the canary that a release is trying on the cluster; with --end, end it in order.

    For a canary whose run is dead and that nobody ends. The champion is not touched.
    """
    from components.deploy.kserve import InferenceServices, StableService, canary_of
    from components.deploy.release import take_away

    services = InferenceServices(namespace)
    found = canary_of(services, StableService(services, service), percent=0)
    mark = found.mark()
    if mark is None and not end:
        print(f"no canary on {namespace}/{service}")
        return
    if mark is not None:
        print(f"canary of {mark.version} on {namespace}/{service}, begun by run {mark.run_id}")
    if end:
        take_away(found, timeout)
        print(f"no canary on {namespace}/{service} any more")


@app.command()
def settle(
    run_id: Annotated[
        str,
        typer.Argument(
            help="The run that is over; default: the one that was checking the champion, if its "
            "time is up.",
            metavar="[RUN_ID]",
        ),
    ] = "",
    store: Store = "",
    workspace: Workspace = Path("workspace"),
    service: Annotated[
        str, typer.Option(help="Its InferenceService, where releases are tried as canaries.")
    ] = "",
    namespace: Annotated[str, typer.Option(help="Of that.")] = "hrnn",
    timeout: Annotated[
        float, typer.Option(help="Seconds within which it has to be done.", min=1)
    ] = 900.0,
) -> None:
    """Take back what a run that is over left half done; nothing is promoted.

    As the run's own exit handler does: a champion that it had not finished checking is rolled
    back, its canary is ended, what it was trying is given up.
    """
    from datetime import UTC, datetime

    from components.deploy.settle import overdue, run
    from model.errors import InputError, UnavailableError

    opened = _open(store, workspace)
    champion = opened.champion()
    if not run_id and champion is not None and champion.checking is not None:
        if not overdue(champion, datetime.now(UTC)):
            raise InputError(
                f"run {champion.checking} is checking {champion.version} since "
                f"{champion.changed_at} and may be alive; if it is over: `hrnn models settle "
                f"{champion.checking}`"
            )
        run_id = champion.checking
    settled = run(opened.uri, {"service": service, "namespace": namespace}, run_id, seconds=timeout)
    for line in settled.done or ["nothing was left half done"][bool(settled.problems) :]:
        print(line)
    if settled.problems:
        raise UnavailableError("; ".join(settled.problems))


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
