"""Two real processes under torchrun train as one does: same losses, same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient
from safetensors.torch import load_file, save_file

from model import bundle
from model.distributed import Processes
from model.feedback import FeedbackSettings
from model.network import NetworkSettings
from model.sequences import bptt_batches
from model.shown import Shown
from model.train_settings import Softmax, TrainSettings
from model.training import fit
from model.trends import ResolvedTrend
from tests import synthetic

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Dropout draws other numbers in every process; without it the arithmetic is the same.
NETWORK = NetworkSettings(
    embedding=8, hidden=8, control=4, dropout=0.0, fields_dropout=0.0, user_dropout=0.0
)


def _train(softmax: Softmax, checkpoints: Path | None = None):
    """Some values are missing, rewards differ, and some events have lists: parts of a batch weigh
    differently."""
    log = synthetic.feedback_decides(25, 12, 8, seed=0)
    log.value_E[::7] = np.nan
    listed_E = np.arange(log.num_events) % 3 > 0
    lists = Shown(
        ((log.item_E + 1) % 8)[listed_E].astype(np.int32), np.concatenate([[0], listed_E.cumsum()])
    )
    kind = np.where(log.user_E % 2 == 0, "view", "buy").astype(object)
    log = synthetic.replace(log, shown=lists, event_type_E=kind)
    settings = TrainSettings(
        network=NETWORK,
        softmax=softmax,
        negatives=5,
        batch_events=64,
        bptt=5,
        max_epochs=2,
        checkpoint_minutes=0.0,
        feedback=FeedbackSettings(rewards={"view": 0.2}, shown_weight=1.0),
    )
    return fit(
        log.subset(np.arange(19)),
        log.subset(np.arange(19, 25)),
        synthetic.catalogue(8),
        settings,
        ResolvedTrend(3600, 0, 1.0),
        checkpoints=checkpoints,
    )


def main() -> None:
    """What torchrun starts: `-m tests.unit.test_distributed SOFTMAX OUT`."""
    softmax, out = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    model = _train(Softmax(softmax), Path(out) / "checkpoints")
    processes = Processes.current()
    save_file(model.network.state_dict(), Path(out) / f"{processes.rank}.safetensors")
    if processes.rank == 0:
        (Path(out) / "curve.json").write_text(json.dumps(model.curve))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("softmax", [Softmax.DENSE, Softmax.SAMPLED])
def test_two_processes_do_what_one_does_with_the_whole_batch(tmp_path, softmax):
    command = [*TORCHRUN, "-m", "tests.unit.test_distributed", softmax.value, str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = _train(softmax)
    curve = json.loads((tmp_path / "curve.json").read_text())
    for together, one in zip(curve, alone.curve, strict=True):
        assert together["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert together["valid_loss"] == pytest.approx(one["valid_loss"], rel=1e-4)
    weights = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for name, value in alone.network.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name]), name
        torch.testing.assert_close(weights[0][name], value, atol=2e-3, rtol=1e-2, msg=name)


def test_shares_of_a_batch_make_the_batch():
    log = synthetic.successor(23, 9, 20, seed=0)
    arguments = {"bptt": 4, "batch_events": 30}

    def batches(share):
        rng = np.random.default_rng(0)
        return list(bptt_batches(log, **arguments, rng=rng, share=share))

    whole, parts = batches((0, 1)), [batches((rank, 3)) for rank in range(3)]
    owner = {}
    for k, batch in enumerate(whole):
        events = [part[k].event_N for part in parts]
        assert sorted(np.concatenate(events)) == sorted(batch.event_N)
        for rank, event_N in enumerate(events):
            for user in np.unique(log.user_E[event_N]):
                assert owner.setdefault(user, rank) == rank  # its state is there
    for part in parts:
        before = np.empty(0, dtype=np.int64)
        for batch in part:
            first = batch.event_N[: len(batch.previous_S)]
            for start, previous in zip(first, batch.previous_S, strict=True):
                if previous >= 0:
                    assert before[previous] + 1 == start
            before = batch.event_N[batch.last_S]


def _launch(arguments):
    """The function of a TrainJob: two processes on this node."""
    import subprocess
    import sys

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = ["--nproc-per-node", "2", "-m", "components.train.job"]
    sys.exit(subprocess.call([*torchrun, *job, *arguments]))


def test_a_train_job_of_kubeflow_writes_a_bundle(tmp_path):
    """Through the SDK's local processes; its venv is empty, so the path leads to ours."""
    clean = synthetic.clean_tables(tmp_path / "clean", synthetic.successor(30, 12, 10, seed=0))
    settings = TrainSettings(network=NETWORK, max_epochs=2, batch_events=64)
    client = TrainerClient(LocalProcessBackendConfig())
    runtime = client.get_runtime("torch-distributed")
    runtime.trainer.framework = "python"  # `_launch` calls torchrun
    arguments = ["--clean", str(clean), "--bundle", str(tmp_path / "bundle")]
    arguments += ["--settings", settings.model_dump_json()]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    name = client.train(
        runtime,
        trainer=CustomTrainer(
            func=_launch, func_args=arguments, env=ENVIRONMENT | {"PYTHONPATH": path}
        ),
    )
    job = client.wait_for_job_status(name, {"Complete", "Failed"}, timeout=250, polling_interval=1)
    log = "\n".join(client.get_job_logs(name))
    assert job.status == "Complete", log
    assert "2 processes" in log and log.count("epoch   1") == 1
    loaded = bundle.load(tmp_path / "bundle")
    assert len(loaded.catalogue) == 10
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))


def test_a_bad_setting_is_one_error_and_exit_code_2(tmp_path):
    clean = synthetic.clean_tables(tmp_path / "clean", synthetic.successor(30, 12, 10, seed=0))
    command = [sys.executable, "-m", "components.train.job", "--clean", clean]
    done = subprocess.run(
        [*command, "--bundle", tmp_path / "bundle", "--settings", '{"epochs": 3}'],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2
    assert "train.epochs: no such setting" in done.stderr
    assert not (tmp_path / "bundle").exists()


if __name__ == "__main__":
    main()
