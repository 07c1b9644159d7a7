"""One pipeline run as a child process: log, one readable error, deadline, nothing left behind."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from components.deploy import release
from model.errors import HrnnError, InputError, UnavailableError
from pipelines.run_log import ANSI, LogReader

DEADLINE_SECONDS = 24 * 3600.0
STOP_SECONDS = release.STOP_SECONDS + 5.0  # for a step to take back what it has begun


@dataclass(frozen=True)
class Job:
    """What is to be run: a pipeline of this package, and how it is told.

    Args:
        pipeline: name of a module here and of the pipeline in it.
        arguments: its parameters, without `run_id`.
        steps: in the order in which they are told; [] where there is but one.
        settings: all settings in force, kept with the run.
        variables: further environment variables of the steps.
        cached: steps may be taken from earlier runs with the same inputs and code.
    """

    pipeline: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]
    steps: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    cached: bool = True


def run(
    job: Job,
    workspace: Path,
    *,
    say: Callable[[str], None],
    verbose: bool = False,
    deadline: float = DEADLINE_SECONDS,
) -> Path:
    """Run a pipeline to its end; returns the run's folder, whose name is the run's id.

    Args:
        say: receives progress lines.
        verbose: pass every line of the log to `say`.
        deadline: seconds after which the run is stopped.

    Raises:
        InputError: a step refused its input; the message is the step's own.
        UnavailableError: something a step needs cannot be reached, another run of the pipeline is
            under way in this workspace, its disk is full, or the deadline passed.
        StepError: a step failed otherwise.
    """
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    runs = workspace.absolute() / "runs"
    folder = runs / run_id
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workspace {workspace}: {error.strerror}") from None
    document = {
        "pipeline": job.pipeline,
        "arguments": dict(job.arguments),
        "run_id": run_id,
        "root": str(folder),
        "cache": str(runs / ".cache") if job.cached else None,
    }
    log = folder / "run.log"
    with _only_run(runs / f".{job.pipeline}.lock", run_id) as lock:
        reader = LogReader(say, job.steps, verbose=verbose)
        try:
            (folder / "tmp").mkdir(parents=True)
            (folder / "settings.json").write_text(json.dumps(job.settings, indent=1) + "\n")
            (folder / "run.json").write_text(json.dumps(document))
            say(f"run {run_id}, log {log}")
            environment = {**_environment(folder), **job.variables}
            code = _run_child(folder / "run.json", environment, log, reader, deadline, lock)
        except OSError as error:
            raise UnavailableError(f"cannot write to {folder}: {error.strerror}") from None
        except HrnnError as error:
            _keep_error(folder, error)
            raise
        if code != 0:
            failure = reader.error(log)
            _keep_error(folder, failure)
            raise failure
    shutil.rmtree(folder / "tmp", ignore_errors=True)  # kfp leaves one folder per step
    return folder


def is_under_way(workspace: Path, pipeline: str, run_id: str) -> bool:
    """Whether this run holds its pipeline's lock now."""
    path = workspace / "runs" / f".{pipeline}.lock"
    try:
        with path.open("r+") as lock:
            if lock.read() != run_id:
                return False
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False  # closing the file frees the lock
    except OSError:
        return False


def _keep_error(folder: Path, error: HrnnError) -> None:
    """For `hrnn status`. On a full disk the error itself is worth more than this copy of it."""
    with contextlib.suppress(OSError):
        (folder / "error.txt").write_text(f"{error}\n")


def _run_child(
    specification: Path,
    environment: Mapping[str, str],
    log: Path,
    reader: LogReader,
    deadline: float,
    lock: int,
) -> int:
    """Run the child to its end; whatever happens here, its whole process group is gone after.

    Before it is killed it is told (SIGTERM) and has `STOP_SECONDS`, in which a deploy step ends its
    canary. A second signal to this process cuts them short.

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
        _tell(child)

    timers = [threading.Timer(deadline, stop_late)]
    timers.append(threading.Timer(deadline + STOP_SECONDS, _kill, [child]))
    for timer in timers:
        timer.daemon = True
        timer.start()
    with _terminate_as_interrupt():
        try:
            with log.open("w") as f:
                for line in child.stdout:
                    f.write(ANSI.sub("", line))
                    f.flush()
                    reader.read(line)
            code = child.wait()
        finally:
            for timer in timers:
                timer.cancel()
            _end(child, child.stdout, log)
    if late.is_set():
        raise UnavailableError(f"the run was stopped after {deadline:.0f} s (full log: {log})")
    return code


def _environment(folder: Path) -> dict[str, str]:
    return {
        # Waiting compute threads soon sleep instead of spinning on: next to other busy processes,
        # a thread that spins keeps the one it waits for off the processor, and a training step
        # took thirty times as long (docs/results.md, "Stalls"). The images set the same.
        "GOMP_SPINCOUNT": "2000",
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _end(child: "subprocess.Popen[str]", output: IO[str], log: Path) -> None:
    """Tell the child to end, and kill what has not."""
    timer = threading.Timer(STOP_SECONDS, _kill, [child])
    timer.daemon = True
    try:
        if child.poll() is None:
            timer.start()
            _tell(child)
            with contextlib.ExitStack() as stack:
                f = None
                with contextlib.suppress(OSError):
                    f = stack.enter_context(log.open("a"))
                for line in output:  # to its end: who waits for a reader takes nothing back
                    with contextlib.suppress(OSError):  # a full disk, say
                        if f is not None:
                            f.write(ANSI.sub("", line))
                            f.flush()
    finally:
        timer.cancel()
        _kill(child)


def _tell(child: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)


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
