"""Runs the pipeline on this machine: progress, logs, one readable error, no process left behind."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.errors import HrnnError, InputError, UnavailableError
from pipelines.settings import BATCH, REFRESH, Settings

STEPS = ("ingest", "validate", "features", "train", "evaluate", "gate", "deploy")
# As in components.ingest.event_log, which takes seconds to import.
CONFIGURED, EVENT_LOG = "event-log", "HRNN_EVENT_LOG"
SQL_SCHEMES = ("sqlite:", "postgresql:", "postgresql+psycopg:", "postgres:")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Executing task '([\w-]+)'")
_FINISHED = re.compile(r"Task '([\w-]+)' finished with status (\w+)")
_RAISED = re.compile(r"^model\.errors\.(\w+): (.*)$")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)(?::.*)?$")
DEADLINE_SECONDS = 24 * 3600.0


class StepError(HrnnError):
    """A step failed for a reason that is not the user's input."""


@dataclass(frozen=True)
class Source:
    """What to train on: a named dataset, or files."""

    dataset: str = ""
    interactions: str = ""
    users: str = ""
    items: str = ""


def run(
    source: Source,
    workspace: Path,
    settings: Settings,
    *,
    say: Callable[[str], None],
    override: str = "",
    fresh: bool = False,
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any]:
    """Run `train_and_deploy` and return the run's result (docs/architecture.md, "Steps").

    Steps that an earlier run in this workspace finished, with the same data, settings and code,
    are not done again: a run that was killed goes on where it was.

    Args:
        override: deploy even if the gate refuses, for this reason, which is recorded.
        fresh: do every step anew.
        say: receives progress lines.
        verbose: pass every line of the log to `say`.
        deadline: seconds after which the run is stopped.

    Raises:
        InputError: a step refused its input; the message is the step's own.
        UnavailableError: something a step needs cannot be reached, or the deadline passed.
        StepError: a step failed otherwise.
    """
    # An address may hold a password, and a pipeline's parameters are written to its log.
    in_database = source.interactions.startswith(SQL_SCHEMES)
    own_log = workspace.absolute() / "events.db"
    variables = {EVENT_LOG: os.environ[EVENT_LOG]} if os.environ.get(EVENT_LOG) else {}
    if in_database:
        variables = {EVENT_LOG: source.interactions}
    elif not variables and own_log.is_file():
        # Who was deleted from it is left out of what is trained.
        variables = {EVENT_LOG: f"sqlite:///{own_log}"}
    arguments = {
        "source_digest": _source_digest(source, variables.get(EVENT_LOG)),
        "override": override,
        "dataset": source.dataset,
        "interactions": CONFIGURED if in_database else _absolute(source.interactions),
        "users": _absolute(source.users),
        "items": _absolute(source.items),
        "cache": str(workspace.absolute() / "datasets"),
        "feature_store": str(workspace.absolute() / "features"),
        "model_store": str(workspace.absolute() / "models"),
        "checkpoints": str(workspace.absolute() / "checkpoints"),
        **settings.to_arguments(),
    }
    folder = _run(
        "train_and_deploy",
        arguments,
        workspace,
        settings,
        say,
        verbose,
        deadline,
        variables,
        fresh=fresh,
    )
    result = _result(folder.name, folder, workspace.absolute() / "models")
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


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
        say, verbose, deadline: as for `run`.

    Raises:
        InputError, UnavailableError, StepError: as for `run`.
    """
    # An address may hold a password, and a pipeline's parameters are written to its log.
    in_database = "://" in interactions
    arguments = {
        "interactions": "" if in_database else _absolute(interactions),
        "feature_store": str(workspace.absolute() / "features"),
        **settings.to_arguments(REFRESH),
    }
    variables = {EVENT_LOG: interactions} if in_database else {}
    folder = _run(
        "refresh_trends", arguments, workspace, settings, say, verbose, deadline, variables
    )
    (summary,) = folder.glob("refresh-trends-*/refresh-trends/trend/summary.json")
    result = {
        "run_id": folder.name,
        **json.loads(summary.read_text()),
        "log": str(folder / "run.log"),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def batch_recommend(
    source: Source,
    output: str,
    workspace: Path,
    settings: Settings,
    *,
    user_list: str = "",
    version: str = "",
    say: Callable[[str], None],
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> dict[str, Any]:
    """Run `batch_recommend` and return the step's summary, with `run_id` and `log`.

    Args:
        output, user_list, version: see `components.batch_recommend.steps.run`.
        say, verbose, deadline: as for `run`.

    Raises:
        InputError, UnavailableError, StepError: as for `run`.
    """
    # An address may hold a password, and a pipeline's parameters are written to its log.
    in_database = source.interactions.startswith(SQL_SCHEMES)
    variables = {EVENT_LOG: source.interactions} if in_database else {}
    arguments = {
        "output": _absolute(output),
        "dataset": source.dataset,
        "interactions": CONFIGURED if in_database else _absolute(source.interactions),
        "users": _absolute(source.users),
        "items": _absolute(source.items),
        "source_digest": _source_digest(source),
        "cache": str(workspace.absolute() / "datasets"),
        "model_store": str(workspace.absolute() / "models"),
        "version": version,
        "user_list": _absolute(user_list),
        **settings.to_arguments(BATCH),
    }
    folder = _run(
        "batch_recommend", arguments, workspace, settings, say, verbose, deadline, variables
    )
    (summary,) = folder.glob("batch-recommend-*/batch-recommend/summary")
    result = {
        "run_id": folder.name,
        **json.loads(summary.read_text()),
        "log": str(folder / "run.log"),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _run(
    pipeline: str,
    arguments: dict[str, Any],
    workspace: Path,
    settings: Settings,
    say: Callable[[str], None],
    verbose: bool,
    deadline: float,
    variables: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> Path:
    """Run a pipeline to its end; returns the run's folder, whose name is the run's id.

    Args:
        variables: further environment variables of its steps.
        fresh: take nothing from the cache.

    Raises:
        UnavailableError: another run is under way in this workspace, or its disk is full.
    """
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    folder = workspace.absolute() / "runs" / run_id
    if pipeline == "train_and_deploy":
        arguments = {**arguments, "run_id": run_id}
    cache = workspace.absolute() / "runs" / ".cache"
    document = {
        "pipeline": pipeline,
        "arguments": arguments,
        "root": str(folder),
        "cache": None if fresh else str(cache),
    }
    specification, log = folder / "run.json", folder / "run.log"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workspace {workspace}: {error.strerror}") from None
    with _only_run(folder.parent / f".{pipeline}.lock", run_id) as lock:
        reader = _LogReader(say, verbose)
        environment = {**_environment(folder), **(variables or {})}
        try:
            (folder / "tmp").mkdir(parents=True)
            settings_text = json.dumps(settings.to_json(), indent=1) + "\n"
            (folder / "settings.json").write_text(settings_text)
            specification.write_text(json.dumps(document))
            say(f"run {run_id}, log {log}")
            code = _run_child(specification, environment, log, reader, deadline, lock)
        except OSError as error:
            raise UnavailableError(f"cannot write to {folder}: {error.strerror}") from None
        if code != 0:
            raise reader.error(log)
    shutil.rmtree(folder / "tmp", ignore_errors=True)  # kfp leaves one folder per step
    return folder


def _absolute(path: str) -> str:
    local = path and "://" not in path and path != CONFIGURED
    return str(Path(path).absolute()) if local else path


def _run_child(
    specification: Path,
    environment: Mapping[str, str],
    log: Path,
    reader: "_LogReader",
    deadline: float,
    lock: int,
) -> int:
    """Run the child to its end; whatever happens here, its whole process group is gone after.

    The child sees the end of its input when this process dies, and ends too; it holds the
    workspace's lock until then.
    """
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "pipelines.local_child", str(specification)],
        stdin=subprocess.PIPE,
        pass_fds=(lock,),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert child.stdout is not None  # noqa: S101 - PIPE was asked for
    late = threading.Event()

    def stop_late() -> None:
        late.set()
        _kill(child)

    timer = threading.Timer(deadline, stop_late)
    timer.daemon = True
    timer.start()
    try:
        with _terminate_as_interrupt(), log.open("w") as f:
            for line in child.stdout:
                f.write(_ANSI.sub("", line))
                f.flush()
                reader.read(_ANSI.sub("", line).rstrip("\n"))
        code = child.wait()
    finally:
        timer.cancel()
        _kill(child)
    if late.is_set():
        raise UnavailableError(f"the run was stopped after {deadline:.0f} s; its log: {log}")
    return code


def _environment(folder: Path) -> dict[str, str]:
    return {
        # Waiting compute threads soon sleep instead of spinning on: next to another busy
        # process, endless spinning made a training epoch thirty times slower.
        "GOMP_SPINCOUNT": "20000",
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _kill(child: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C: through the clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _only_run(path: Path, run_id: str) -> Iterator[int]:
    """Hold the pipeline's lock; the kernel frees it when the last process of a run is gone.

    Raises:
        UnavailableError: another run holds it.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UnavailableError(
                f"run {lock.read() or 'another'} is under way in this workspace: wait for it, stop "
                "it, or use another --workspace"
            ) from None
        lock.truncate(0)  # opened to append: what is written next stands at the start
        lock.write(run_id)
        lock.flush()
        yield lock.fileno()


def _source_digest(source: Source, event_log: str | None) -> str:
    """Digest of the files a run reads; "" when their content is not known beforehand.

    A later deletion of a user from the event log counts as other content.
    """
    deletion = _last_deletion(event_log) if event_log else 0
    digest = _files_digest(source)
    return f"{digest}-{deletion}" if digest and deletion else digest


def _last_deletion(event_log: str) -> int:
    from feature_repo.event_log import EventLog

    try:
        log = EventLog.open(event_log)
    except InputError:
        return 0  # there is no log yet
    with contextlib.closing(log):
        return log.last_deletion()


def _files_digest(source: Source) -> str:
    if source.dataset:
        return source.dataset  # checked against its published digest when it is obtained
    digest = hashlib.sha256()
    for path in (source.interactions, source.users, source.items):
        if "://" in path or path == CONFIGURED:
            return ""
        if path:
            with Path(path).open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def _place(step: str) -> str:
    return f"{STEPS.index(step) + 1}/{len(STEPS)} " if step in STEPS else ""


class _LogReader:
    """Turns kfp's log into progress lines and finds the error of a failed step."""

    def __init__(self, say: Callable[[str], None], verbose: bool) -> None:
        self._say, self._verbose = say, verbose
        self._step, self._next = "", 0  # under way; place of the one after it
        self._started = time.monotonic()
        self._own_output = False  # inside the step's own lines, after kfp's preamble
        self._failed_step = ""
        self._error: tuple[str, str] | None = None
        self._last_exception = ""

    def read(self, line: str) -> None:
        if self._verbose:
            self._say(line)
        text = line.strip()
        if started := _STARTED.search(line):
            self._say_skipped(started[1])
            self._step, self._own_output = started[1], False
            self._started = time.monotonic()
            self._say(f"[{_place(self._step)}{self._step}]")
        elif finished := _FINISHED.search(line):
            seconds = time.monotonic() - self._started
            self._own_output = False
            if finished[2] != "SUCCESS":
                self._failed_step = self._failed_step or finished[1]
                self._say(f"  {finished[1]} failed after {seconds:.1f} s")
            else:
                self._say(f"  done in {seconds:.1f} s")
        elif line == "    }":
            self._own_output = True  # kfp prints the step's input as JSON before the step speaks
        elif "[KFP Executor" in line:
            self._own_output = self._own_output and "Looking for" not in line
        elif raised := _RAISED.match(text):
            self._error = raised[1], raised[2]
            self._own_output = False
        elif _EXCEPTION.match(text):
            self._last_exception = text
        elif text.startswith("Traceback"):
            self._own_output = False
        elif self._own_output and text and not self._verbose:
            self._say(f"  {text}")

    def _say_skipped(self, step: str) -> None:
        """kfp says nothing of the steps that it takes from the cache."""
        if step in STEPS:
            for skipped in STEPS[self._next : STEPS.index(step)]:
                self._say(f"[{_place(skipped)}{skipped}]\n  done before, not again")
            self._next = STEPS.index(step) + 1

    def error(self, log: Path) -> HrnnError:
        """What to tell the user of a failed run."""
        step = self._failed_step or self._step or "the pipeline"
        if self._error is not None:
            kind, message = self._error
            error = {"InputError": InputError, "UnavailableError": UnavailableError}.get(
                kind, StepError
            )
            return error(f"{step}: {message} (full log: {log})")
        reason = self._last_exception or "it ended without saying why"
        return StepError(f"{step} failed: {reason} (full log: {log})")


def _result(run_id: str, folder: Path, model_store: Path) -> dict[str, Any]:
    """Collect what the steps left behind; `bundle` is the deployed copy, if there is one."""

    def only(pattern: str) -> Path | None:
        found = sorted(folder.glob(f"train-and-deploy-*/{pattern}"))
        return found[0] if found else None

    evaluation, verdict = only("evaluate/evaluation"), only("gate/verdict")
    if evaluation is None or verdict is None:
        raise StepError(f"the run left no verdict in {folder}: see run.log there")
    measured, judged = json.loads(evaluation.read_text()), json.loads(verdict.read_text())
    deployment = only("deploy/deployment")
    clean, bundle = (Path(measured["inputs"][name]) for name in ("clean", "bundle"))
    if deployment is not None:
        bundle = model_store / json.loads(deployment.read_text())["path"]
    paths = {
        "bundle": bundle,
        "report": only("evaluate/report"),
        "data_report": clean.parent / "data_report",
        "clean": clean,
        "log": folder / "run.log",
    }
    return {
        "run_id": run_id,
        "verdict": "deployed" if deployment is not None else "refused",
        "model_version": measured["model_version"],
        "metrics": measured["models"],
        "champion": judged["champion"],
        "override": judged["override"],
        "reasons": [rule["reason"] for rule in judged["rules"] if not rule["passed"]],
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
