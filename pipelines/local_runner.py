"""The pipelines on this machine: their parameters from a workspace, their results from a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines import feature_stores
from pipelines.local_checks import check_batch, check_source, check_training
from pipelines.local_process import DEADLINE_SECONDS, Job
from pipelines.local_process import run as run_job
from pipelines.run_log import StepError
from pipelines.settings import BATCH, REFRESH, Settings
from pipelines.sources import EVENT_LOG, Source, absolute

STEPS = (
    *("ingest", "validate", "features", "warm-start"),
    *("train", "evaluate", "gate", "deploy"),
)
BATCH_STEPS = ("ingest", "validate", "batch-recommend")


def run(
    source: Source,
    workspace: Path,
    settings: Settings,
    *,
    say: Callable[[str], None],
    override: str = "",
    fresh: bool = False,
    model_store: str = "",
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any]:
    """Run `train_and_deploy` and return the run's result (docs/architecture.md, "Steps").

    Steps that an earlier run in this workspace finished, with the same data, settings and code,
    are not done again: a run that was killed goes on where it was.

    Args:
        override: deploy even if the gate refuses, for this reason, which is recorded.
        fresh: do every step anew.
        model_store: folder or address of the model store; empty: the workspace's.
        say, verbose, deadline: as for `local_process.run`.

    Raises:
        InputError, UnavailableError, StepError: as `local_process.run` does.
    """
    place = workspace.absolute()
    store = store_of(workspace, model_store)
    check_source(source, model_store=store)
    settings = check_training(settings, store)
    variables = source.variables(place / "events.db")
    job = Job(
        "train_and_deploy",
        {
            **source.parameters(),
            "source_digest": source.digest(variables),
            "override": override,
            "cache": str(place / "datasets"),
            "feature_store": str(place / "features"),
            "model_store": store,
            "checkpoints": str(place / "checkpoints"),
            **settings.to_arguments(),
        },
        settings.to_json(),
        STEPS,
        variables,
        cached=not fresh,
    )
    folder = run_job(job, workspace, say=say, verbose=verbose, deadline=deadline)
    return _keep(folder, _training_result(folder, store))


def refresh_trends(
    interactions: str,
    workspace: Path,
    settings: Settings,
    *,
    say: Callable[[str], None],
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any]:
    """Run `refresh_trends` and return the step's summary, with `run_id` and `log`.

    Args:
        interactions: where the events are; see `components.refresh_trends.steps.run`.
        say, verbose, deadline: as for `local_process.run`.

    Raises:
        InputError, UnavailableError, StepError: as `local_process.run` does.
    """
    # An address may hold a password, and a pipeline's parameters are written to its log.
    in_database = "://" in interactions
    store = feature_stores.in_use(workspace)
    job = Job(
        "refresh_trends",
        {
            "interactions": "" if in_database else absolute(interactions),
            "feature_store": "",  # as the environment says: an address may hold a password too
            **settings.to_arguments(REFRESH),
        },
        settings.to_json(),
        variables=store.to_env() | ({EVENT_LOG: interactions} if in_database else {}),
    )
    folder = run_job(job, workspace, say=say, verbose=verbose, deadline=deadline)
    return _keep(folder, _summary(folder, "refresh-trends/trend/summary.json"))


def batch_recommend(
    source: Source,
    output: str,
    workspace: Path,
    settings: Settings,
    *,
    user_list: str = "",
    version: str = "",
    model_store: str = "",
    say: Callable[[str], None],
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any]:
    """Run `batch_recommend` and return the step's summary, with `run_id` and `log`.

    Args:
        output, user_list, version: see `components.batch_recommend.steps.run`.
        model_store: folder or address of the model store; empty: the workspace's.
        say, verbose, deadline: as for `local_process.run`.

    Raises:
        InputError, UnavailableError, StepError: as `local_process.run` does.
    """
    place = workspace.absolute()
    store = store_of(workspace, model_store)
    check_source(source, output=output, user_list=user_list, model_store=store)
    check_batch(store, version)
    variables = source.variables(place / "events.db")
    job = Job(
        "batch_recommend",
        {
            **source.parameters(),
            "source_digest": source.digest(variables),
            "output": absolute(output),
            "cache": str(place / "datasets"),
            "model_store": store,
            "version": version,
            "user_list": absolute(user_list),
            **settings.to_arguments(BATCH),
        },
        settings.to_json(),
        BATCH_STEPS,
        variables,
    )
    folder = run_job(job, workspace, say=say, verbose=verbose, deadline=deadline)
    return _keep(folder, _summary(folder, "batch-recommend/summary"))


def store_of(workspace: Path, model_store: str) -> str:
    """The model store of a run: the one given, else the workspace's. Steps run in other folders."""
    return absolute(model_store) or str(workspace.absolute() / "models")


def _keep(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _summary(folder: Path, artifact: str) -> dict[str, Any]:
    """What a pipeline's last step says of itself."""
    (path,) = folder.glob(f"*-*/{artifact}")
    return {
        "run_id": folder.name,
        **json.loads(path.read_text()),
        "log": str(folder / "run.log"),
    }


def _training_result(folder: Path, model_store: str) -> dict[str, Any]:
    """Collect what the steps left behind; `bundle` is the deployed copy, if there is one."""

    def only(pattern: str) -> Path | None:
        found = sorted(folder.glob(f"train-and-deploy-*/{pattern}"))
        return found[0] if found else None

    evaluation, verdict = only("evaluate/evaluation"), only("gate/verdict")
    if evaluation is None or verdict is None:
        raise StepError(f"the run left no verdict in {folder}: see run.log there")
    measured, judged = json.loads(evaluation.read_text()), json.loads(verdict.read_text())
    deployment = only("deploy/deployment")
    clean = Path(measured["inputs"]["clean"])
    bundle = str(measured["inputs"]["bundle"])
    if deployment is not None:
        bundle = f"{model_store.rstrip('/')}/{json.loads(deployment.read_text())['path']}"
    paths = {
        "report": only("evaluate/report"),
        "data_report": clean.parent / "data_report",
        "clean": clean,
        "log": folder / "run.log",
    }
    return {
        "run_id": folder.name,
        "verdict": "deployed" if deployment is not None else "refused",
        "model_version": measured["model_version"],
        "metrics": measured["models"],
        "champion": judged["champion"],
        "override": judged["override"],
        "reasons": [rule["reason"] for rule in judged["rules"] if not rule["passed"]],
        "model_store": model_store,
        "bundle": bundle,
        **{name: str(_with_suffix(path)) for name, path in paths.items() if path is not None},
    }


def _with_suffix(path: Path) -> Path:
    """HTML artifacts get a copy with a suffix: KFP names them without one.

    Not a link: a browser follows it and shows the source of what has no suffix.
    """
    if path.name not in ("report", "data_report"):
        return path
    page = path.parents[2] / f"{path.name}.html"
    page.unlink(missing_ok=True)
    shutil.copyfile(path, page)
    return page
