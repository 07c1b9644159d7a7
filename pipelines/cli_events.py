"""`hrnn events`: tell a running collector what happened; rebuild from what it has stored."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model.errors import InputError

if TYPE_CHECKING:
    from feature_repo.event_log import EventLog

app = typer.Typer(
    help="Events: send them to the collector of a running service, delete a user's data, rebuild "
    "the online features from the event log.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Url = Annotated[str, typer.Option(help="The collector.")]
COLLECTOR = "http://127.0.0.1:8100"
Workspace = Annotated[Path, typer.Option(help="Folder for data, runs, features and models.")]
Log = Annotated[
    str,
    typer.Option(
        "--log",
        help="The event log (sqlite:///PATH, postgresql://…); default: HRNN_EVENT_LOG, else the "
        "workspace's.",
    ),
]
FieldsOption = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="NAME=VALUE", help="A field, its value as YAML; repeatable."),
]


@app.command()
def send(
    user: Annotated[str, typer.Option(help="Who.")],
    item: Annotated[str, typer.Option(help="What.")],
    at: Annotated[str, typer.Option(help="When: Unix seconds or ISO 8601; default: now.")] = "",
    event_type: Annotated[str, typer.Option("--type", help="view, buy, rating…")] = "",
    value: Annotated[float | None, typer.Option(help="A rating, price, dwell time…")] = None,
    url: Url = COLLECTOR,
) -> None:
    """Store one event; the user's next recommendation sees it."""
    import time

    from pipelines.cli import parse_time
    from serving.event_client import EventClient

    event: dict[str, Any] = {"user_id": user, "item_id": item}
    if at:
        event["timestamp"] = parse_time(at, time.time())
    if event_type:
        event["event_type"] = event_type
    if value is not None:
        event["event_value"] = value
    with EventClient(url) as client:
        sent = client.send([event])
    print("stored, and seen by the next recommendation" if sent.visible else "stored")


@app.command("put-item")
def put_item(
    item: Annotated[str, typer.Argument(help="Its id; may be new.")],
    fields: FieldsOption = None,
    url: Url = COLLECTOR,
) -> None:
    """Set all fields of an item."""
    from serving.event_client import EventClient

    with EventClient(url) as client:
        client.put_item(item, parse_fields(fields or []))


@app.command("put-user")
def put_user(
    user: Annotated[str, typer.Argument(help="The user's id; may be new.")],
    fields: FieldsOption = None,
    url: Url = COLLECTOR,
) -> None:
    """Set all fields of a user."""
    from serving.event_client import EventClient

    with EventClient(url) as client:
        client.put_user(user, parse_fields(fields or []))


@app.command("delete-user")
def delete_user(
    user: Annotated[str, typer.Argument(help="Whose data to delete.")], url: Url = COLLECTOR
) -> None:
    """Delete a user's data from log and features; the next model is trained without it."""
    from serving.event_client import EventClient

    with EventClient(url) as client:
        print(f"deleted {client.delete_user(user):,} events")


@app.command("import")
def import_tables(
    tables: Annotated[Path, typer.Argument(help="Clean tables: the `clean` folder of a run.")],
    log: Log = "",
    workspace: Workspace = Path("workspace"),
) -> None:
    """Put the tables of a run into the event log, which then holds everything to train on.

    Safe to repeat: rows that are there already stay as they are.
    """
    from components.ingest.event_log import import_clean

    with _open(log, workspace, create=True) as events:
        for name, (added, rows) in import_clean(events, tables).items():
            print(f"{name}: {added:,} of {rows:,} rows added")


@app.command()
def rebuild(log: Log = "", workspace: Workspace = Path("workspace")) -> None:
    """Write the online features of all users of the event log anew. Servers may go on meanwhile."""
    from feature_repo.live import LiveFeatures
    from pipelines import feature_stores

    with _open(log, workspace) as events:
        live = LiveFeatures(feature_stores.in_use(workspace), events)
        live.rebuild()
        print(f"online features are up to change {live.follow():,} of the event log")


@contextmanager
def _open(url: str, workspace: Path, create: bool = False) -> Iterator["EventLog"]:
    from feature_repo.event_log import EventLog
    from pipelines.serving import event_log

    with closing(EventLog.open(url or event_log(workspace), create=create)) as events:
        yield events


def parse_fields(texts: list[str]) -> dict[str, Any]:
    """`name=value` texts as fields; values are YAML: 5, text, [a, b].

    Raises:
        InputError: not of this form.
    """
    import yaml

    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--field {text!r}: expected NAME=VALUE")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--field {name}: {value!r} is not a value (YAML)") from None
    return fields
