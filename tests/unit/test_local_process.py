"""A run that is stopped: its step has time to take back what it had begun, and no more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.planted import interruptible

DEADLINE = 120.0
# A pipeline of two steps, found beside those of this package.
SITE = "import pipelines; pipelines.__path__.append({folder!r})"
PIPELINE = """
from kfp import dsl


@dsl.component(install_kfp_package=False)
def wait(place: str, deaf: bool):
    import signal
    from pathlib import Path

    class Stop(BaseException):
        pass

    def stop(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(place, "told").touch()
        if not deaf:
            raise Stop

    signal.signal(signal.SIGTERM, stop)
    Path(place, "begun").touch()
    try:
        while True:
            signal.pause()
    except Stop:
        for n in range(5000):  # more than a pipe holds
            print("taking back", n, "of what had been begun", flush=True)
        Path(place, "taken-back").touch()


@dsl.component(install_kfp_package=False)
def after(place: str):
    from pathlib import Path

    Path(place, "after").touch()


@dsl.pipeline
def waits(place: str, deaf: bool):
    after(place=place).after(wait(place=place, deaf=deaf))
"""
RUN = """
import sys
from pathlib import Path
from pipelines.local_process import Job, run
run(Job("waits", {"place": sys.argv[1], "deaf": sys.argv[2] == "deaf"}, {}, cached=False),
    Path(sys.argv[1]) / "ws", say=print)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE.format(folder=str(tmp_path)))
    (tmp_path / "waits.py").write_text(PIPELINE)
    started = []

    def begin(*how):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), *how],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=interruptible,
        )
        started.append(process)
        _appears(tmp_path / "begun", process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE)


def _appears(path, process):
    deadline = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def _log(folder: Path) -> str:
    (log,) = folder.glob("ws/runs/*/run.log")
    return log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_step_takes_back_what_it_had_begun_and_no_further_one_begins(start, tmp_path, number):
    process = start("hears")
    process.send_signal(number)
    out, _ = process.communicate(timeout=DEADLINE)
    assert "KeyboardInterrupt" in out
    assert (tmp_path / "taken-back").exists()
    assert "taking back 4999 of" in _log(tmp_path)
    assert not (tmp_path / "after").exists()


def test_who_stops_it_twice_does_not_wait(start, tmp_path):
    process = start("deaf")
    process.send_signal(signal.SIGINT)
    _appears(tmp_path / "told", process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)  # less than the step is given
    assert not (tmp_path / "taken-back").exists()
