"""A run killed at any moment goes on to the same weights; bad checkpoints are refused, kept."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import FILE, Checkpoint, CheckpointFile
from model.errors import InputError, UnavailableError
from model.network import NetworkSettings
from model.train_settings import Softmax, TrainSettings
from model.training import fit
from model.trends import ResolvedTrend
from tests import synthetic

NETWORK = NetworkSettings(embedding=8, hidden=8, control=4)
SETTINGS = TrainSettings(
    network=NETWORK,
    batch_events=64,
    bptt=6,
    max_epochs=3,
    threads=1,
    softmax=Softmax.DENSE,
    negatives=5,
    checkpoint_minutes=0.0,  # after every step
)


def _train(folder: Path | None, softmax: Softmax = Softmax.DENSE, **changed):
    """The run that the processes of this test share: ties to shuffle, a trend, values, λ."""
    log = synthetic.feedback_decides(30, 12, 8, seed=0)
    settings = SETTINGS.model_copy(update={"softmax": softmax, **changed})
    return fit(
        log.subset(np.arange(24)),
        log.subset(np.arange(24, 30)),
        synthetic.catalogue(8),
        settings,
        ResolvedTrend(3600, 0, 1.0),
        checkpoints=folder,
    )


def main() -> None:
    """What killed processes run: `-m tests.unit.test_checkpoint FOLDER SOFTMAX PART_EVENTS OUT`."""
    folder, softmax, part_events, out = sys.argv[1:]
    model = _train(Path(folder), Softmax(softmax), part_events=int(part_events))
    save_file(model.network.state_dict(), out)


@pytest.mark.parametrize(
    ("softmax", "part_events"), [(Softmax.DENSE, 1000), (Softmax.SAMPLED, 100)]
)
def test_killed_again_and_again_the_weights_are_those_of_one_run(tmp_path, softmax, part_events):
    """Also of a log of which a part at a time is in memory."""
    wanted = _train(None, softmax, part_events=part_events).network.state_dict()
    folder, out = tmp_path / "checkpoints", tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "tests.unit.test_checkpoint", folder, softmax.value]
    command += [str(part_events), out]
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(20):
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        last = attempt == 19
        deadline = time.monotonic() + 200
        before = _stamp(folder / FILE)
        # Let it write one checkpoint at least, then some moments more.
        while not last and process.poll() is None and _stamp(folder / FILE) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        try:
            process.wait(200 if last or kills == 3 else rng.random() * 0.1)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills >= 2
    got = load_file(out)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0.0, atol=0.0, msg=name)
    assert not (folder / FILE).exists()


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


class _StopError(Exception):
    pass


def _interrupted(folder: Path) -> bytes:
    """A run that ends in its second epoch; what it left behind."""

    def stop(line: str) -> None:
        if line.startswith("epoch   1"):
            raise _StopError

    log = synthetic.feedback_decides(30, 12, 8, seed=0)
    with pytest.raises(_StopError):
        fit(
            log.subset(np.arange(24)),
            log.subset(np.arange(24, 30)),
            synthetic.catalogue(8),
            SETTINGS,
            ResolvedTrend(3600, 0, 1.0),
            progress=stop,
            checkpoints=folder,
        )
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.5}])
def test_a_checkpoint_of_other_settings_is_refused_and_kept(tmp_path, change):
    left = _interrupted(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        _train(tmp_path, **change)
    assert (tmp_path / FILE).read_bytes() == left


def test_a_checkpoint_of_other_data_is_refused_and_kept(tmp_path):
    left = _interrupted(tmp_path)
    log = synthetic.feedback_decides(30, 12, 8, seed=1)
    with pytest.raises(InputError, match="other training events, validation events"):
        fit(
            log.subset(np.arange(24)),
            log.subset(np.arange(24, 30)),
            synthetic.catalogue(8),
            SETTINGS,
            ResolvedTrend(3600, 0, 1.0),
            checkpoints=tmp_path,
        )
    assert (tmp_path / FILE).read_bytes() == left


def test_more_epochs_may_be_asked_of_an_interrupted_run(tmp_path):
    _interrupted(tmp_path)
    assert _train(tmp_path, max_epochs=4).curve[-1]["epoch"] == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "cannot be read"),
        (lambda b: b"", "cannot be read"),
        (lambda b: b"x" * 100, "cannot be read"),
        (lambda b: b[:-20] + bytes(x ^ 255 for x in b[-20:]), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, damage, message):
    left = damage(_interrupted(tmp_path))
    (tmp_path / FILE).write_bytes(left)
    with pytest.raises(InputError, match=message):
        _train(tmp_path)
    assert (tmp_path / FILE).read_bytes() == left


def test_foreign_files_are_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(InputError, match="no training checkpoint"):
        CheckpointFile(tmp_path, {}).read()
    save_file(
        {"w": torch.ones(2)},
        tmp_path / FILE,
        {"format": "hrnn-meta-checkpoint", "format_version": "99", "state": json.dumps({})},
    )
    with pytest.raises(InputError, match="checkpoint format 99"):
        CheckpointFile(tmp_path, {}).read()


def _limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_out_of_disk_is_an_error_and_the_checkpoint_before_stays(tmp_path):
    left = _interrupted(tmp_path / "checkpoints")
    command = [sys.executable, "-m", "tests.unit.test_checkpoint"]
    result = subprocess.run(
        [*command, tmp_path / "checkpoints", "dense", str(SETTINGS.part_events), tmp_path / "out"],
        preexec_fn=_limit_file_size,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode != 0
    assert "the training checkpoint cannot be written" in result.stderr
    assert (tmp_path / "checkpoints" / FILE).read_bytes() == left
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [FILE]


def test_a_device_that_is_full_from_the_start(tmp_path):
    target = tmp_path / "file"
    target.write_text("in the way")
    with pytest.raises(UnavailableError, match="cannot be written"):
        CheckpointFile(target, {}).write(Checkpoint({"w": torch.ones(1)}, {}))
    assert target.read_text() == "in the way"


if __name__ == "__main__":
    main()
