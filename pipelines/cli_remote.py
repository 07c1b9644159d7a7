"""`hrnn submit`, `hrnn schedule`, `hrnn status`: runs on a Kubeflow Pipelines endpoint."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.errors import InputError
from pipelines.cli_help import WithSettings

if TYPE_CHECKING:
    from pipelines.endpoint import Run

# Exit codes by outcome; those of `hrnn run`, and one for what has not ended.
EXIT = {
    "deployed": 0,
    "succeeded": 0,
    "failed": 1,
    "refused": 3,
    "running": 4,
    "cancelled": 130,
}

Address = Annotated[
    str,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Kubeflow Pipelines; default: KF_PIPELINES_ENDPOINT. HRNN_KFP_TOKEN holds a token.",
    ),
]
Namespace = Annotated[str, typer.Option(help="Profile, in a multi-user installation.")]
Pipeline = Annotated[
    str, typer.Argument(help="train_and_deploy, refresh_trends or batch_recommend.")
]
Dataset = Annotated[str, typer.Option(help="Named dataset.")]
Table = typer.Option(
    metavar="ADDRESS", help="What the pods can read: s3://…, https://…, /stores/…."
)
Interactions = Annotated[str, Table]
UserList = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="batch_recommend: ids, one a line, or Parquet."),
]
ModelStoreAddress = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="Of the model store: s3://…; default: /stores/models."),
]
Version = Annotated[str, typer.Option(help="batch_recommend: of the model; default: the champion.")]
Output = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="batch_recommend: every batch gets a folder there; latest.json names the newest.",
    ),
]
Override = Annotated[
    str, typer.Option(help="Deploy even if the gate refuses; say why.", metavar="WHY")
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; repeatable."),
]
SettingsFile = Annotated[
    Path | None, typer.Option("--settings", help="YAML or JSON file of settings.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]

schedules = typer.Typer(
    help="Recurring runs: create, list, delete.", no_args_is_help=True, rich_markup_mode=None
)


def submit(
    pipeline: Pipeline = "train_and_deploy",
    endpoint: Address = "",
    namespace: Namespace = "",
    dataset: Dataset = "",
    interactions: Interactions = "",
    users: Annotated[str, Table] = "",
    items: Annotated[str, Table] = "",
    user_list: UserList = "",
    model_store: ModelStoreAddress = "",
    version: Version = "",
    output: Output = "",
    override: Override = "",
    name: Annotated[str, typer.Option(help="Of the run; default: pipeline and time.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.", min=1)] = 86_400.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 10.0,
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
    as_json: AsJson = False,
) -> None:
    """Start a pipeline run on Kubeflow Pipelines.

    Exit code 0: submitted, or with --wait: deployed (other pipelines: succeeded); 3: refused by
    the gate; 1: failed, or the endpoint did; 2: bad input; 130: cancelled.
    """
    from datetime import UTC, datetime

    from pipelines.endpoint import Endpoint
    from pipelines.submission import Options, parameters

    options = Options(
        dataset=dataset,
        interactions=interactions,
        users=users,
        items=items,
        user_list=user_list,
        model_store=model_store,
        version=version,
        output=output,
        override=override,
    )
    given = parameters(pipeline, options, assignments, settings_file)
    connected = Endpoint(endpoint, namespace)
    title = name or f"{pipeline.replace('_', '-')} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    run_id = connected.submit(pipeline, given, title)
    _say(f"run {run_id} submitted")
    if not wait:
        print(json.dumps({"run_id": run_id}) if as_json else run_id)
        return
    run = connected.wait(run_id, _say, timeout, poll)
    log = connected.log_of(run_id, run.failed_step.name) if run.failed_step else ""
    _end(run, log, as_json)


def status(
    run_id: Annotated[str, typer.Argument(help="A run; without it, the newest runs.")] = "",
    endpoint: Address = "",
    namespace: Namespace = "",
    workspace: Annotated[
        Path | None,
        typer.Option(help="Runs of this machine instead; the default without an endpoint."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Runs to list.", min=1, max=200)] = 20,
    as_json: AsJson = False,
) -> None:
    """What became of a run, step by step; or the newest runs, on a cluster or of a workspace.

    Exit code, for one run: 0 deployed or succeeded; 1 failed; 3 refused by the gate; 4 still
    running; 130 cancelled.
    """
    from pipelines.tables import runs_table, steps_table

    if workspace or not (endpoint or os.environ.get("KF_PIPELINES_ENDPOINT")):
        from pipelines import local_runs

        place = workspace or Path("workspace")
        runs = [] if run_id else local_runs.newest(place, limit)
        run = local_runs.find(place, run_id) if run_id else None
        log = f"{local_runs.log_of(place, run_id)}" if run_id else ""
        empty = f"no runs in {place}: start one with `hrnn run`, or give --endpoint for a cluster's"
    else:
        from pipelines.endpoint import Endpoint

        connected = Endpoint(endpoint, namespace)
        runs = [] if run_id else connected.runs(limit)
        run = connected.run(run_id) if run_id else None
        failed = run.failed_step if run else None
        log = connected.log_of(run_id, failed.name) if failed else ""
        empty = f"no runs at {connected.address}"
    if run is not None:
        if not as_json:
            steps_table(run, sys.stdout)
        _end(run, log, as_json)
    elif as_json:
        print(json.dumps([asdict(r) for r in runs]))
    elif runs:
        runs_table(runs, sys.stdout)
    else:
        _say(empty)


def _end(run: "Run", log: str, as_json: bool) -> None:
    """Say how a run ended, with the place of the log where that helps, and end like it."""
    if as_json:
        print(json.dumps({**asdict(run), "outcome": run.outcome}))
    text = f"run {run.run_id}: {run.outcome}"
    failed = run.failed_step or next((s for s in run.steps if s.state == "CANCELED"), None)
    if failed and not run.error.startswith(f"{failed.name}"):
        text += f" at {failed.name}"
    if reason := (failed.error if failed and failed.error else run.error):
        text += f": {reason}"
    if failed and log and log not in text:
        text += f" (full log: {log})"
    _say(text)
    raise typer.Exit(EXIT[run.outcome])


@schedules.command("create", cls=WithSettings)
def create_schedule(
    pipeline: Pipeline,
    cron: Annotated[
        str, typer.Option(help="Five fields, e.g. '0 3 * * *', or six with seconds first (UTC).")
    ] = "",
    every: Annotated[str, typer.Option(help="Interval such as 30m, 1h, 1d.")] = "",
    name: Annotated[str, typer.Option(help="Of the schedule; default: the pipeline's.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in place of the one of this name.")
    ] = False,
    endpoint: Address = "",
    namespace: Namespace = "",
    dataset: Dataset = "",
    interactions: Interactions = "",
    users: Annotated[str, Table] = "",
    items: Annotated[str, Table] = "",
    user_list: UserList = "",
    model_store: ModelStoreAddress = "",
    version: Version = "",
    output: Output = "",
    assignments: Assignments = None,
    settings_file: SettingsFile = None,
) -> None:
    """Run a pipeline again and again, one run at a time; prints the schedule's id."""
    from pipelines.endpoint import Endpoint, cron_expression, interval_seconds
    from pipelines.submission import Options, parameters

    if bool(cron) == bool(every):
        raise InputError("give either --cron or --every")
    expression = cron_expression(cron) if cron else ""
    seconds = interval_seconds(every) if every else 0
    options = Options(
        dataset=dataset,
        interactions=interactions,
        users=users,
        items=items,
        user_list=user_list,
        model_store=model_store,
        version=version,
        output=output,
    )
    given = parameters(pipeline, options, assignments, settings_file)
    print(
        Endpoint(endpoint, namespace).schedule(
            pipeline,
            given,
            name or pipeline.replace("_", "-"),
            cron=expression,
            every_seconds=seconds,
            replace=replace,
        )
    )


@schedules.command("list")
def list_schedules(
    endpoint: Address = "", namespace: Namespace = "", as_json: AsJson = False
) -> None:
    """All schedules."""
    from pipelines.endpoint import Endpoint
    from pipelines.tables import schedules_table

    found = Endpoint(endpoint, namespace).schedules()
    if as_json:
        print(json.dumps([asdict(s) for s in found]))
    else:
        schedules_table(found, sys.stdout)


@schedules.command("delete")
def delete_schedule(
    schedule: Annotated[str, typer.Argument(help="Name or id.")],
    endpoint: Address = "",
    namespace: Namespace = "",
) -> None:
    """Delete a schedule; runs that have begun go on."""
    from pipelines.endpoint import Endpoint

    for schedule_id in Endpoint(endpoint, namespace).unschedule(schedule):
        print(f"deleted {schedule_id}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
