"""`hrnn`: run the pipeline, serve its model, ask it. Heavy imports happen inside the commands."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from model.errors import HrnnError, InputError
from pipelines import cli_events, cli_models, cli_remote
from pipelines.cli_help import WithSettings

DEFAULT_DATASET = "movielens-100k"
REFUSED, BAD_INPUT, FAILED, INTERRUPTED = 3, 2, 1, 130  # exit codes; 0 = done

app = typer.Typer(
    help="HRNN-meta: recommendations in real time. `hrnn run` trains on your log and deploys the "
    "model if it passes the gate; `hrnn serve` answers over HTTP; `hrnn recommend` asks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_models.app, name="models")
app.add_typer(cli_events.app, name="events")
app.command(cls=WithSettings)(cli_remote.submit)
app.command()(cli_remote.status)
app.add_typer(cli_remote.schedules, name="schedule")

Workspace = Annotated[Path, typer.Option(help="Folder for data, runs, features and models.")]
ModelStoreOption = Annotated[
    str,
    typer.Option(
        "--model-store",
        metavar="ADDRESS",
        help="Folder or address (s3://bucket/prefix) of the model store; default: the workspace's.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="YAML or JSON file of settings.")
]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command(cls=WithSettings)
def run(
    dataset: Annotated[
        str, typer.Option(help=f"Named dataset; default {DEFAULT_DATASET} when no file is given.")
    ] = "",
    interactions: Annotated[
        str,
        typer.Option(
            help="CSV or Parquet of who did what when, or the event log: sqlite:///PATH, "
            "postgresql://…, or `event-log` for the one in HRNN_EVENT_LOG.",
            metavar="SOURCE",
        ),
    ] = "",
    users: Annotated[str, typer.Option(help="User fields.", metavar="FILE")] = "",
    items: Annotated[str, typer.Option(help="Item fields.", metavar="FILE")] = "",
    workspace: Workspace = Path("workspace"),
    model_store: ModelStoreOption = "",
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
    override: Annotated[
        str,
        typer.Option(
            help="Deploy even if the gate refuses; say why, it is recorded.", metavar="WHY"
        ),
    ] = "",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do every step anew, also those done before.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on stdout.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the whole log.")] = False,
) -> None:
    """Run train_and_deploy on this machine.

    Run again after a stop, it goes on where it was.

    Exit code 0: deployed; 3: refused by the gate (the champion stays); 2: bad input; 1: failed.
    """
    from pipelines import local_runner
    from pipelines.settings import load

    source = _source(dataset, interactions, users, items)
    settings = load(settings_file, assignments or [], own_data=not source.dataset)
    result = local_runner.run(
        source,
        workspace,
        settings,
        say=_say,
        override=override,
        fresh=fresh,
        model_store=model_store,
        verbose=verbose,
    )
    if as_json:
        print(json.dumps(result))
    else:
        from pipelines.tables import evaluation_table, paths_table

        evaluation_table(result, sys.stderr)
        paths_table(result, sys.stderr)
    for reason in result["reasons"]:
        _say(f"{'overridden' if result['override'] else 'refused'}: {reason}")
    if result["verdict"] == "refused":
        raise typer.Exit(REFUSED)


def _source(dataset: str, interactions: str, users: str, items: str) -> Any:
    from pipelines.sources import Source, is_local

    if dataset and interactions:
        raise InputError("give either --dataset or --interactions, not both")
    if (users or items) and not interactions:
        raise InputError("--users and --items go with --interactions FILE")
    if interactions:
        # A missing file is better said now than after the pipeline has started.
        files = {"--interactions": interactions, "--users": users, "--items": items}
        for option, path in files.items():
            if is_local(path) and not Path(path).is_file():
                raise InputError(f"{option} {path}: no such file")
        return Source("", interactions, users, items)
    from components.ingest.datasets import find

    find(dataset or DEFAULT_DATASET)  # says which names exist
    return Source(dataset=dataset or DEFAULT_DATASET)


@app.command("refresh-trends", cls=WithSettings)
def refresh_trends(
    interactions: Annotated[
        str,
        typer.Option(
            help="The event log (sqlite:///PATH, postgresql://…), clean tables of a run, or a "
            "Parquet file of item_id and timestamp; default: HRNN_EVENT_LOG, or the workspace's.",
            metavar="SOURCE",
        ),
    ] = "",
    workspace: Workspace = Path("workspace"),
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on stdout.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the whole log.")] = False,
) -> None:
    """Count what is popular now and serve it: the pipeline refresh_trends, on this machine.

    Running servers take the new trend within seconds; models are not touched.
    """
    from pipelines import local_runner
    from pipelines.serving import event_log
    from pipelines.settings import load

    settings = load(settings_file, assignments or [])
    source = interactions or event_log(workspace)
    result = local_runner.refresh_trends(source, workspace, settings, say=_say, verbose=verbose)
    if as_json:
        print(json.dumps(result))


@app.command("batch-recommend", cls=WithSettings)
def batch_recommend(
    output: Annotated[str, typer.Option(help="Folder or address for the Parquet files.")],
    dataset: Annotated[str, typer.Option(help="Named dataset.")] = "",
    interactions: Annotated[
        str, typer.Option(help="CSV or Parquet of who did what when.", metavar="FILE")
    ] = "",
    users: Annotated[str, typer.Option(help="User fields.", metavar="FILE")] = "",
    items: Annotated[str, typer.Option(help="Item fields.", metavar="FILE")] = "",
    user_list: Annotated[
        str, typer.Option(help="Ids, one a line, or Parquet; default: everybody.", metavar="FILE")
    ] = "",
    version: Annotated[str, typer.Option(help="Of the model; default: the champion.")] = "",
    workspace: Workspace = Path("workspace"),
    model_store: ModelStoreOption = "",
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on stdout.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the whole log.")] = False,
) -> None:
    """Recommend to everybody at once, into Parquet files.

    Run again after a stop, it goes on with the parts that are missing.
    """
    from pipelines import local_runner
    from pipelines.settings import load
    from pipelines.sources import is_local

    source = _source(dataset, interactions, users, items)
    if user_list and is_local(user_list) and not Path(user_list).is_file():
        raise InputError(f"--user-list {user_list}: no such file")
    result = local_runner.batch_recommend(
        source,
        output,
        workspace,
        load(settings_file, assignments or []),
        user_list=user_list,
        version=version,
        model_store=model_store,
        say=_say,
        verbose=verbose,
    )
    if as_json:
        print(json.dumps(result))


@app.command("settings")
def show_settings(
    section: Annotated[
        list[str] | None, typer.Argument(help="Sections, e.g. train; default: all.")
    ] = None,
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, without comments.")] = False,
) -> None:
    """Print every setting with its meaning and the value in force: a file for --settings."""
    from pipelines.settings import load, sections
    from pipelines.settings_text import to_yaml

    settings = load(settings_file, assignments or [])
    names = sections(section or [])
    document = {name: values for name, values in settings.to_json().items() if name in names}
    print(json.dumps(document, indent=1) if as_json else to_yaml(settings, names))


@app.command("compile")
def compile_pipelines(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the YAML.")],
) -> None:
    """Compile the pipelines to KFP IR YAML for a cluster."""
    from pipelines.compile import compile_all

    for path in compile_all(output):
        print(path)


@app.command("code-digest")
def show_code_digest() -> None:
    """Print the digest of the steps' code: an image must hold the code that runs are for."""
    from components.digests import code_digest

    print(code_digest())


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="HTTP port of the service.", min=1, max=65535)] = 8080,
    workspace: Workspace = Path("workspace"),
    model_store: ModelStoreOption = "",
) -> None:
    """Serve the deployed model on this machine until Ctrl-C."""
    from pipelines.serving import local_serving

    with local_serving(workspace, port=port, model_store=model_store) as serving:
        _say(f"serving at {serving.predict_url}")
        _say(f"events to {serving.settings.collector_url}/events")
        for role, url in serving.metrics_urls.items():
            _say(f"{role} metrics: {url}")
        _say("Ctrl-C stops it")
        serving.wait()


@app.command()
def recommend(
    user: Annotated[
        str | None, typer.Option(help="User id; unknown ones get what new users get.")
    ] = None,
    at: Annotated[
        str,
        typer.Option(
            help="Request time: Unix seconds, ISO 8601, or +1d, +2h, +30m from now.",
        ),
    ] = "",
    k: Annotated[int | None, typer.Option("--num-results", "-k", min=1)] = None,
    task: Annotated[str, typer.Option(help="recommend; rank or rate with --items.")] = "recommend",
    items: Annotated[
        list[str] | None, typer.Option(help="What to rank or rate: ids with commas, or repeated.")
    ] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="Instead of the stored one: ITEM or ITEM@TIME, oldest first; repeated."),
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of the request, e.g. device=tv; repeated.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of the user, e.g. age=30; repeated.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only items with this NAME=VALUE; repeated.")
    ] = None,
    exclude_seen: Annotated[bool, typer.Option(help="Leave out items of the history.")] = False,
    trend_weight: Annotated[float, typer.Option(help="0: without the trend.")] = 1.0,
    explore: Annotated[float, typer.Option(help="Weight of the exploration bonus.")] = 0.0,
    url: Annotated[str, typer.Option(help="The running service.")] = "http://127.0.0.1:8080",
    workspace: Workspace = Path("workspace"),
    model_store: ModelStoreOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Ask a running service (`hrnn serve`) for recommendations, rankings or predicted ratings."""
    from dataclasses import asdict

    from pipelines import questions
    from serving.client import Client

    now = time.time()
    moment = parse_time(at, now) if at else None
    instance: dict[str, Any] = {
        "user_id": user,
        "task": task,
        "timestamp": moment,
        "num_results": k or (10 if task == "recommend" else None),
        "items": questions.items(items),
        "history": questions.history(history, moment or now),
        "context": questions.fields("--context", context),
        "user": questions.fields("--field", field),
        "filter": questions.item_filter(where),
        "exclude_seen": exclude_seen,
        "trend_weight": trend_weight,
        "exploration_weight": explore,
    }
    with Client(url) as client:
        (prediction,) = client.predict([{n: v for n, v in instance.items() if v is not None}])
    if as_json:
        print(json.dumps(asdict(prediction)))
        return
    from pipelines.tables import recommendation_table

    recommendation_table(prediction, _titles(workspace, model_store), sys.stdout)


_RELATIVE = re.compile(r"\+(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_time(text: str, now: float) -> float:
    """Unix seconds from `893286638`, `1998-04-22T10:00:00Z` or `+1d` (from `now`)."""
    from datetime import UTC, datetime

    if relative := _RELATIVE.fullmatch(text):
        return now + float(relative[1]) * _UNITS[relative[2]]
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"--at {text!r}: give Unix seconds, ISO 8601 (2026-01-31T12:00:00Z) or +1d, +2h"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _titles(workspace: Path, model_store: str) -> dict[str, str]:
    """Titles of the deployed model's items; none when the service's model is not here."""
    from pipelines.serving import champion_catalogue

    try:
        return champion_catalogue(workspace, model_store).titles
    except HrnnError:
        return {}


@app.command()
def demo(workspace: Workspace = Path("workspace")) -> None:
    """Run the pipeline on the default dataset, serve the model, ask it, stop."""
    from pipelines.demo import main as demo_main

    demo_main(workspace, _say)


def main() -> None:
    """Entry point: errors in one sentence, no traceback (HRNN_DEBUG=1 shows it)."""
    if os.environ.get("HRNN_DEBUG") == "1":
        app()
        return
    try:
        app()
    except InputError as error:
        _say(f"error: {error}")
        sys.exit(BAD_INPUT)
    except HrnnError as error:
        _say(f"error: {error}")
        sys.exit(FAILED)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # Typer turns Ctrl-C into this
            _say("stopped")
        raise
    except BrokenPipeError:
        sys.exit(FAILED)
    except Exception as error:
        # Not foreseen: still one line for the user; the traceback is a rerun away.
        _say(f"error: unexpected {type(error).__name__}: {error} (HRNN_DEBUG=1 shows where)")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
