"""Runs that are killed, run twice at once, or meet a broken world: finished later, never half."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from feature_repo.store import FeatureReader, FeatureStoreSettings
from model import manifest as manifests
from model.store import ModelStore
from pipelines.cli import app
from pipelines.local_runner import STEPS
from tests import synthetic
from tests.planted import HRNN_RUN, ITEMS, hrnn_run, interruptible, write_log

SMALL = {
    "train.max_epochs": 3,
    "train.batch_events": 256,
    "train.learning_rate": 0.02,
    "train.network": "{embedding: 8, hidden: 8, control: 2, dropout: 0.0}",
    "evaluate.samples": 20,
    "gate.rules": "[{name: some, metric: hrnn.every.cases, at_least: 1}]",
    "ingest.columns": "{user_id: customer, item_id: product_id, timestamp: when}",
}
DEADLINE = 240.0


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    return write_log(path, synthetic.successor(60, 8, ITEMS, seed=0))


def _command(workspace, log, *command, settings=SMALL):
    assignments = [p for k, v in settings.items() for p in ("--set", f"{k}={v}")]
    told = ("--json", "--workspace", workspace, "--interactions", log, *assignments)
    return [*HRNN_RUN[:-1], *(command or ("run",)), *map(str, told)]


def _start(workspace, log, *command, settings=SMALL, **environment):
    return subprocess.Popen(
        _command(workspace, log, *command, settings=settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HRNN_TEST_MARK": str(workspace), **environment},
        preexec_fn=interruptible,
    )


def _marked(mark) -> list[int]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HRNN_TEST_MARK={mark}".encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


def _wait_until(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# Where each step is stopped: about to write this file, so that something is done and not all.
KILLED_AT = {
    "ingest": "ingest/tables/source.json",
    "validate": "validate/clean/report.json",
    "features": "features/registry.db",
    "warm-start": "warm-start/executor_output.json",
    "train": "manifest.json",
    "evaluate": "evaluate/evaluation",
    "gate": "gate/verdict",
    "deploy": "deploy/deployment",  # the pointer has moved, and the step does not know it yet
}
# Python imports this module by itself. The process that is about to write the file stands still
# until it is killed, so that a slow machine makes no difference.
STANDS_STILL = """
import os, signal, sys
def stand(event, arguments):
    if event == "open":
        path, writes = str(arguments[0]), (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    elif event == "os.rename":
        path, writes = str(arguments[1]), True
    else:
        return
    if writes and path.endswith(os.environ["HRNN_TEST_STAND"]):
        os.mkdir(os.environ["HRNN_TEST_STANDS"])
        while True:
            signal.pause()
sys.addaudithook(stand)
"""


def _status(workspace):
    """`hrnn status` of the newest run."""
    listed = CliRunner().invoke(app, ["status", "--workspace", str(workspace), "--json"])
    newest = json.loads(listed.stdout)[0]["run_id"]
    return CliRunner().invoke(app, ["status", newest, "--workspace", str(workspace)])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A workspace in which runs are killed, one after the other."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(STANDS_STILL)
    return folder


def _kill(killed, stand, log, *command, settings=SMALL):
    """Start a command and kill it when it is about to write the file `stand`."""
    workspace = killed / "workspace"
    stands = killed / f"stands-at-{stand.replace('/', '-')}"
    process = _start(
        workspace,
        log,
        *command,
        settings=settings,
        PYTHONPATH=str(killed / "site"),
        HRNN_TEST_STAND=stand,
        HRNN_TEST_STANDS=str(stands),
    )
    seen = []
    reading = threading.Thread(target=lambda: seen.extend(process.stderr), daemon=True)
    reading.start()
    _wait_until(lambda: stands.exists() or process.poll() is not None, f"{stand} was not reached")
    assert stands.exists(), "".join(seen)
    process.kill()
    process.wait()
    reading.join(DEADLINE)
    process.stdout.close()
    process.stderr.close()
    # Nobody is left who could go on writing while the next run begins.
    _wait_until(lambda: not _marked(workspace), f"processes outlived the run killed at {stand}")
    # The kernel frees the run's lock a moment after its processes have lost their environment.
    _wait_until(lambda: _status(workspace).exit_code == 130, "a run that is gone still runs")


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_in_the_middle_of_a_step_leaves_nothing_half_deployed(killed, log, step):
    workspace = killed / "workspace"
    _kill(killed, KILLED_AT[step], log)
    assert f": cancelled at {step}" in _status(workspace).stderr
    champion = ModelStore(str(workspace / "models")).champion()
    if step == "deploy":
        assert manifests.verify(workspace / "models" / champion.path)
    else:
        assert champion is None


@pytest.fixture(scope="module")
def nobody_answers():
    with socket.socket() as unused, pytest.MonkeyPatch.context() as patch:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        patch.setenv("HRNN_NOTIFY_URL", f"http://127.0.0.1:{port}/TOKEN")
        yield "warning: HRNN_NOTIFY_URL was not told of this outcome: no connection"


@pytest.fixture(scope="module")
def finished(killed, log, nobody_answers):
    """The workspace of the killed runs after one that was not, and what that said."""
    workspace = killed / "workspace"
    done = hrnn_run(workspace, "--interactions", log, settings=SMALL)
    assert done.returncode == 0, done.stderr
    return workspace, done


def test_run_again_it_finishes_and_has_deployed_once(finished):
    workspace, done = finished
    assert json.loads(done.stdout)["verdict"] == "deployed"
    store = ModelStore(str(workspace / "models"))
    champion = store.champion()
    assert champion.version == json.loads(done.stdout)["model_version"]
    assert champion.previous is None
    assert [v.version for v in store.versions()] == [champion.version]
    told = _status(workspace)
    assert (told.exit_code, told.stderr.rpartition(": ")[2]) == (0, "deployed\n")
    assert [line.split()[0] for line in told.stdout.splitlines()[1:9]] == list(STEPS)
    assert told.stdout.count("done before") == 3
    # What the killed runs had finished was not done again.
    assert done.stderr.count("done before, not again") == 3, done.stderr  # ingest, validate, train


def test_a_batch_that_was_killed_is_gone_on_with(finished, killed, log):
    output = killed / "lists"
    columns = {n: v for n, v in SMALL.items() if n.startswith("ingest.")}
    command = ("batch-recommend", "--output", str(output))
    _kill(killed, "/_summary.json", log, *command, settings=columns)
    (batch,) = output.iterdir()  # begun, and nobody is led to it
    parts = [p.stat().st_mtime_ns for p in batch.glob("part-*")]
    assert parts
    done = subprocess.run(
        _command(finished[0], log, *command, settings=columns),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "latest.json").read_text())["batch"] == batch.name
    assert json.loads(done.stdout)["batch"] == batch.name
    assert [p.stat().st_mtime_ns for p in batch.glob("part-*")] == parts


def test_a_refresh_that_was_killed_is_done_again(finished, killed):
    """Before it puts the new trend in force: the old one is, whole."""
    workspace, done = finished
    clean = Path(json.loads(done.stdout)["clean"])
    store = FeatureStoreSettings(root=str(workspace / "features"))
    before = FeatureReader(store).trend()
    later = before.as_of + 1
    settings = {"refresh_trends.as_of": str(later)}
    _kill(killed, f"refresh-{later}.parquet", clean, "refresh-trends", settings=settings)
    assert FeatureReader(store).trend().version == before.version
    again = subprocess.run(
        _command(workspace, clean, "refresh-trends", settings=settings),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert FeatureReader(store).trend().as_of == later
    assert json.loads(again.stdout)["in_force"]


def _error(done):
    """The one message of a failed run."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def _log_of(message):
    path = Path(message.rpartition("full log: ")[2].rstrip(")"))
    assert path.is_file(), message
    return path.read_text()


def test_two_runs_at_once_one_works_and_the_other_is_told(finished, log):
    finished, _ = finished
    process = _start(finished, log)
    first = process.stderr.readline()
    try:
        assert _status(finished).exit_code == 4
        done = hrnn_run(finished, "--interactions", log, settings=SMALL)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)
    assert done.returncode == 1
    run = first.split()[1].rstrip(",")
    assert f"run {run} is under way in this workspace" in _error(done)


def test_a_web_hook_that_fails_does_not_change_the_outcome(finished, nobody_answers):
    _, done = finished
    assert json.loads(done.stdout)["verdict"] == "deployed"
    assert nobody_answers in done.stderr
    assert done.stderr.index(": succeeded") < done.stderr.index(nobody_answers)
    assert "TOKEN" not in done.stderr


def test_a_web_hook_that_fails_does_not_hide_the_error(tmp_path, nobody_answers):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n")
    done = hrnn_run(tmp_path / "ws", "--interactions", tmp_path / "log.csv", settings={})
    assert done.returncode == 2
    assert nobody_answers in done.stderr
    message = _error(done)
    assert "ingest: " in message
    assert "no rows" in message


def test_a_champion_that_was_deleted_is_said_and_left(finished, log):
    finished, _ = finished
    store = ModelStore(str(finished / "models"))
    champion = store.champion()
    place = finished / "models" / champion.path
    place.rename(finished / "away")
    try:
        done = hrnn_run(finished, "--interactions", log, settings=SMALL)
        assert done.returncode == 2
        message = _error(done)
        assert f"evaluate: the champion {champion.version} cannot be compared with" in message
        assert "hrnn models promote" in message
        assert "InputError" in _log_of(message)
        told = _status(finished)
        assert told.exit_code == 1
        assert message.removeprefix("error: ") in told.stderr
        assert store.champion() == champion
    finally:
        (finished / "away").rename(place)


def test_a_store_that_cannot_be_used_is_said(finished, log):
    finished, _ = finished
    (finished / "models").rename(finished / "kept")
    (finished / "models").write_text("")
    try:
        done = hrnn_run(finished, "--interactions", log, settings=SMALL)
        assert done.returncode == 1
        assert "the model store" in _error(done)
        assert "Not a directory" in _error(done)
    finally:
        (finished / "models").unlink()
        (finished / "kept").rename(finished / "models")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[1:] = sys.argv[2:]
from pipelines.cli import main
main()
"""


def test_a_full_disk_is_said_with_the_step_it_hit(tmp_path, log):
    """No file may grow beyond a limit: the kernel refuses the write, as on a full disk."""
    assignments = [p for k, v in SMALL.items() for p in ("--set", f"{k}={v}")]
    done = subprocess.run(
        [
            *(sys.executable, "-c", LIMITED, "30000", "run", "--interactions", str(log)),
            *("--workspace", str(tmp_path / "ws"), *assignments),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode in (1, 2)
    message = _error(done)
    assert "too large" in message.lower() or "cannot write" in message
    assert ModelStore(str(tmp_path / "ws" / "models")).champion() is None
