"""A Kubeflow Pipelines endpoint: start runs, schedule them, ask what became of them."""

import contextlib
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from model.errors import HrnnError, InputError, UnavailableError
from pipelines.compile import compile_one

CONNECT_SECONDS, READ_SECONDS = 5.0, 60.0
FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# A poll that fails is asked again so often before the wait is given up.
PATIENCE = 5
_EVERY = re.compile(r"(\d+)\s*([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_CRON_FIELD = re.compile(r"[\d*/,\-?LW#A-Za-z]+")


# Nodes of Argo that are no steps of ours: drivers, brackets, attempts of pods, the workflow itself.
_NO_STEP = re.compile(
    r"root|executor.*|(exit-handler|condition).*|.*-driver|.*\.onExit"
    r"|.*-[bcdfghjklmnpqrstvwxz2456789]{5}"  # Kubernetes' random names have no vowels
)


@dataclass(frozen=True)
class Step:
    """One step of a run; `error` is "" unless it failed and the endpoint says why (2.17: never)."""

    name: str
    state: str
    error: str


@dataclass(frozen=True)
class Run:
    """What the endpoint knows of a run; `state` is one of Kubeflow's, e.g. RUNNING, SUCCEEDED."""

    run_id: str
    name: str
    state: str
    created_at: str
    finished_at: str
    error: str
    steps: tuple[Step, ...]
    pipeline: str

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    @property
    def outcome(self) -> str:
        """running, deployed, refused, succeeded, failed or cancelled.

        A run with a gate that succeeded without its deploy step was refused by it.
        """
        if not self.finished:
            return "running"
        if self.state == "CANCELED":
            return "cancelled"
        if self.state != "SUCCEEDED":
            return "failed"
        if not any(s.name == "gate" for s in self.steps) and self.pipeline != "train-and-deploy":
            return "succeeded"
        done = any(s.name == "deploy" and s.state == "SUCCEEDED" for s in self.steps)
        return "deployed" if done else "refused"

    @property
    def failed_step(self) -> Step | None:
        """The step that failed, the first if there are several."""
        return next((s for s in self.steps if s.state == "FAILED"), None)


@dataclass(frozen=True)
class Schedule:
    """A recurring run; `trigger` is a cron expression or `every N s`."""

    schedule_id: str
    name: str
    trigger: str
    enabled: bool
    created_at: str


def interval_seconds(text: str) -> int:
    """Seconds of `30m`, `1h`, `1d`."""
    found = _EVERY.fullmatch(text.strip())
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if seconds < 60:
        raise InputError(f"--every {text!r}: expected a time such as 30m, 1h, 1d, at least 1m")
    return seconds


def cron_expression(text: str) -> str:
    """Kubeflow's cron has seconds first; the usual five fields get a 0 there."""
    fields = text.split()
    if len(fields) not in (5, 6) or not all(_CRON_FIELD.fullmatch(f) for f in fields):
        raise InputError(
            f"--cron {text!r}: expected five fields (minute hour day month weekday), or six with "
            "seconds first"
        )
    return " ".join(["0", *fields] if len(fields) == 5 else fields)


class Endpoint:
    """Calls of `kfp.Client`, each with a deadline and one readable error.

    All methods raise `UnavailableError` when the endpoint cannot be reached or fails, and
    `InputError` when it refuses what was asked.
    """

    def __init__(self, address: str, namespace: str = "", experiment: str = "hrnn-meta") -> None:
        """Connect.

        Args:
            address: of the endpoint; empty: KF_PIPELINES_ENDPOINT. A token is read from
                HRNN_KFP_TOKEN.
            namespace: the profile's, in multi-user installations.
        """
        self.address = address or os.environ.get("KF_PIPELINES_ENDPOINT", "")
        if not self.address:
            raise InputError(
                "--endpoint: give the address of Kubeflow Pipelines, or set KF_PIPELINES_ENDPOINT"
            )
        self.namespace, self.experiment = namespace or None, experiment
        warnings.simplefilter("ignore")
        import kfp
        import urllib3

        token = os.environ.get("HRNN_KFP_TOKEN") or None
        limit = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
        with self._errors("reached"):
            # The client asks the endpoint while it is made, without a deadline: this finds out.
            urllib3.PoolManager().request("GET", self.address, timeout=limit, retries=1)
            self._client = kfp.Client(
                host=self.address, namespace=namespace or "kubeflow", existing_token=token
            )
        # The client hands on no deadline, and without one a silent endpoint would hang it.
        pool = self._client._run_api.api_client.rest_client.pool_manager
        request = pool.request

        def within(*arguments: Any, **keywords: Any) -> Any:
            answer = request(*arguments, **{**keywords, "timeout": limit, "retries": 2})
            # The client reads a login page as an empty answer.
            if answer.status < 300 and not answer.data.lstrip().startswith(b"{"):
                raise ValueError("this is no JSON; is a login page in between?")
            return answer

        pool.request = within

    def submit(self, pipeline: str, arguments: Mapping[str, Any], name: str) -> str:
        """Start a run and return its id."""
        with tempfile.TemporaryDirectory() as folder, self._errors("asked for a run"):
            run = self._client.run_pipeline(
                self._experiment_id(),
                name,
                pipeline_package_path=str(compile_one(pipeline, Path(folder))),
                params=dict(arguments),
            )
        return str(run.run_id)

    def run(self, run_id: str) -> Run:
        """One run with its steps."""
        with self._errors(f"asked for run {run_id}"):
            return _run(self._client.get_run(run_id))

    def log_of(self, run_id: str, step: str) -> str:
        """Where a person finds the log of a step, in words."""
        labels = f"pipeline/runid={run_id},app.kubernetes.io/component={step}"
        namespace = self.namespace or "NAMESPACE"
        return (
            f"{self.address.rstrip('/')}/#/runs/details/{run_id}, or `kubectl -n {namespace} logs "
            f"-l {labels} -c main --tail 50`"
        )

    def runs(self, limit: int = 20) -> list[Run]:
        """The newest runs, without their steps."""
        with self._errors("asked for its runs"):
            found = self._client.list_runs(
                page_size=limit, sort_by="created_at desc", namespace=self.namespace
            )
        return [_run(run) for run in found.runs or []]

    def wait(
        self, run_id: str, say: Callable[[str], None], seconds: float, every: float = 10.0
    ) -> Run:
        """Follow a run to its end, telling each change of a step.

        Raises:
            UnavailableError: it has not ended in time (it goes on), or nothing answers any more.
        """
        told: dict[str, str] = {}
        deadline, failures = time.monotonic() + seconds, 0
        while True:
            try:
                run = self.run(run_id)
                failures = 0
            except UnavailableError:
                failures += 1
                if failures >= PATIENCE:
                    raise
            else:
                for step in run.steps:
                    if told.get(step.name) != step.state:
                        told[step.name] = step.state
                        say(
                            f"[{step.name}] {step.state.lower()}"
                            + (f": {step.error}" if step.error else "")
                        )
                if run.finished:
                    return run
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"run {run_id} has not ended within {seconds:.0f} s; it goes on: "
                    f"`hrnn status {run_id}`"
                )
            time.sleep(every)

    def schedule(
        self,
        pipeline: str,
        arguments: Mapping[str, Any],
        name: str,
        *,
        cron: str = "",
        every_seconds: int = 0,
        replace: bool = False,
    ) -> str:
        """Run again and again; returns the schedule's id.

        One run at a time; what was missed is not made up for.

        Raises:
            InputError: a schedule of this name exists, and `replace` is not set.
        """
        same = [s for s in self.schedules() if s.name == name]
        if same and not replace:
            raise InputError(
                f"there is a schedule {name} ({same[0].trigger}) already: --replace it, or give "
                "this one another --name"
            )
        with tempfile.TemporaryDirectory() as folder, self._errors("asked for a schedule"):
            made = self._client.create_recurring_run(
                self._experiment_id(),
                name,
                cron_expression=cron or None,
                interval_second=every_seconds or None,
                max_concurrency=1,
                no_catchup=True,
                params=dict(arguments),
                pipeline_package_path=str(compile_one(pipeline, Path(folder))),
            )
        for old in same:  # only when its successor is there
            self.unschedule(old.schedule_id)
        return str(made.recurring_run_id)

    def schedules(self) -> list[Schedule]:
        """All schedules of the experiment's namespace."""
        found: list[Any] = []
        token = ""
        with self._errors("asked for its schedules"):
            while True:
                page = self._client.list_recurring_runs(
                    page_token=token, page_size=100, namespace=self.namespace
                )
                found += page.recurring_runs or []
                token = page.next_page_token or ""
                if not token:
                    break
        return [_schedule(s) for s in found]

    def unschedule(self, name_or_id: str) -> list[str]:
        """Delete the schedules of this name or id; returns their ids.

        Raises:
            InputError: there is none.
        """
        ids = [s.schedule_id for s in self.schedules() if name_or_id in (s.schedule_id, s.name)]
        if not ids:
            raise InputError(f"there is no schedule {name_or_id!r}; `hrnn schedule list` shows all")
        for schedule_id in ids:
            with self._errors(f"asked to delete schedule {schedule_id}"):
                self._client.delete_recurring_run(schedule_id)
        return ids

    def _experiment_id(self) -> str:
        made = self._client.create_experiment(self.experiment, namespace=self.namespace)
        return str(made.experiment_id)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        import kfp_server_api
        import urllib3

        try:
            # The client prints links; results alone belong on stdout.
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except kfp_server_api.ApiException as error:
            reason = _reason(error)
            message = f"{self.address} was {what} and answered {error.status}: {reason}"
            if error.status is not None and 400 <= error.status < 500:
                raise InputError(message) from None
            raise UnavailableError(message) from None
        except (urllib3.exceptions.HTTPError, OSError, TimeoutError) as error:
            raise UnavailableError(
                f"{self.address} cannot be reached ({type(error).__name__}); is this the address "
                "of Kubeflow Pipelines?"
            ) from None
        except (ValueError, TypeError) as error:
            if isinstance(error, HrnnError):
                raise
            raise UnavailableError(
                f"{self.address} was {what} and gave no answer of Kubeflow Pipelines: {error}"
            ) from None


def _reason(error: Any) -> str:
    import json

    try:
        body = json.loads(error.body)
        return str(body.get("message") or body.get("error") or error.reason).splitlines()[0]
    except (TypeError, ValueError, AttributeError, IndexError):
        return str(error.reason)


def _run(run: Any) -> Run:
    details = run.run_details.task_details if run.run_details else None
    spec = run.pipeline_spec if isinstance(run.pipeline_spec, dict) else {}
    spec = spec.get("pipeline_spec", spec)
    known = _step_names(spec)

    def is_step(name: str) -> bool:
        return name in known if known else bool(name) and not _NO_STEP.fullmatch(name)

    return Run(
        run_id=str(run.run_id),
        name=run.display_name or "",
        state=str(run.state or "PENDING"),
        created_at=_moment(run.created_at),
        finished_at=_moment(run.finished_at),
        error=_message(run.error),
        steps=tuple(
            Step(t.display_name, str(t.state or ""), _message(t.error))
            for t in sorted(details or [], key=lambda t: str(t.start_time or "~"))
            if is_step(t.display_name or "")
        ),
        pipeline=str(spec.get("pipelineInfo", {}).get("name", "")),
    )


def _step_names(spec: Mapping[str, Any]) -> set[str]:
    """Tasks of a pipeline that run in a container; none if the specification is not there."""
    components = spec.get("components", {})
    dags = [spec.get("root", {}).get("dag", {}), *(c.get("dag", {}) for c in components.values())]
    return {
        name
        for dag in dags
        for name, task in dag.get("tasks", {}).items()
        if "executorLabel" in components.get(task.get("componentRef", {}).get("name"), {})
    }


def _schedule(recurring: Any) -> Schedule:
    trigger = recurring.trigger
    if trigger is not None and trigger.cron_schedule is not None:
        text = str(trigger.cron_schedule.cron)
    elif trigger is not None and trigger.periodic_schedule is not None:
        text = f"every {int(trigger.periodic_schedule.interval_second):,} s"
    else:
        text = ""
    return Schedule(
        schedule_id=str(recurring.recurring_run_id),
        name=recurring.display_name or "",
        trigger=text,
        enabled=str(recurring.status or recurring.mode or "") in ("ENABLED", "ENABLE"),
        created_at=_moment(recurring.created_at),
    )


def _message(status: Any) -> str:
    return (status.message or "") if status is not None else ""


def _moment(moment: datetime | None) -> str:
    # Runs that have not ended carry the year 1970.
    return "" if moment is None or moment.year <= 1970 else moment.isoformat(timespec="seconds")
