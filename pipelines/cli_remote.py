"""`hrnn submit`, `hrnn schedule`, `hrnn status`: runs on a Kubeflow Pipelines endpoint."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from model.errors import InputError

if TYPE_CHECKING:
    from pipelines.endpoint import Endpoint, Run

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
    _end(connected, connected.wait(run_id, _say, timeout, poll), as_json)


def status(
    run_id: Annotated[str, typer.Argument(help="A run; without it, the newest runs.")] = "",
    endpoint: Address = "",
    namespace: Namespace = "",
    limit: Annotated[int, typer.Option(help="Runs to list.", min=1, max=200)] = 20,
    as_json: AsJson = False,
) -> None:
    """What became of a run, step by step; or the newest runs.

    Exit code, for one run: 0 deployed or succeeded; 1 failed; 3 refused by the gate; 4 still
    running; 130 cancelled.
    """
    from pipelines.endpoint import Endpoint
    from pipelines.tables import runs_table, steps_table

    connected = Endpoint(endpoint, namespace)
    if not run_id:
        runs = connected.runs(limit)
        if as_json:
            print(json.dumps([asdict(r) for r in runs]))
        else:
            runs_table(runs, sys.stdout)
        return
    run = connected.run(run_id)
    if not as_json:
        steps_table(run, sys.stdout)
    _end(connected, run, as_json)


def _end(connected: "Endpoint", run: "Run", as_json: bool) -> None:
    if as_json:
        print(json.dumps({**asdict(run), "outcome": run.outcome}))
    text = f"run {run.run_id}: {run.outcome}"
    if failed := run.failed_step:
        text += f" at {failed.name}" + (f": {failed.error}" if failed.error else "")
        text += f" (full log: {connected.log_of(run.run_id, failed.name)})"
    elif run.error and run.outcome == "failed":
        text += f": {run.error}"
    _say(text)
    raise typer.Exit(EXIT[run.outcome])


@schedules.command("create")
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
