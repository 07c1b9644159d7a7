"""Releases to servers that run: swapped in, refused, or taken back while users are answered.

The model store is on S3, for the runs as for the servers that follow it.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import s3fs

from components.deploy.kserve import RunningService
from components.deploy.release import Releaser
from components.deploy.watch import ReleaseSettings
from model.errors import RolledBackError
from model.store import Lineage, ModelStore
from pipelines.serving import local_serving
from serving.client import Client
from tests.e2e.test_pipeline import COLUMNS, WORSE
from tests.planted import FAST, hrnn_run
from tests.servers import S3Server

# Patient: on a busy machine answers may be late, or without the model now and then.
RELEASE = {"ready_seconds": 120, "watch_seconds": 1, "poll_seconds": 0.2}
RELEASE |= {"max_error_rate": 0.9, "max_p99_seconds": 10}
LENIENT = {"gate.rules": "[{name: some, metric: hrnn.every.cases, at_least: 1}]"}


@pytest.fixture(scope="module")
def running(deployed, tmp_path_factory):
    """A workspace of its own, as the first run left it, and what `hrnn serve` starts for it."""
    workspace = tmp_path_factory.mktemp("live")
    for part in ("features", "runs/.cache"):
        shutil.copytree(deployed[0] / part, workspace / part)
    s3 = S3Server("models")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = ModelStore("s3://models/live")
        store.promote(store.publish(Path(deployed[1]["bundle"]), Lineage()))
        with (
            local_serving(workspace, model_store=store.uri) as serving,
            Client(serving.url, timeout=30.0) as client,
        ):
            yield workspace, store, deployed[3], serving, client
        s3fs.S3FileSystem.clear_instance_cache()
    s3.close()


@pytest.mark.timeout(900)  # two runs, perhaps on a loaded machine
def test_a_second_run_is_swapped_in_at_a_running_server_and_a_worse_one_refused(running):
    workspace, store, log, serving, client = running
    first = store.champion()
    assert client.recommend("u7").model_version == first.version
    released = {
        "train.seed": 7,
        "train.max_epochs": 3,
        "deploy.service_url": serving.url,
        "deploy.release": json.dumps(RELEASE),
    }
    own = ("--interactions", log, "--model-store", store.uri)
    done = hrnn_run(workspace, *own, settings=FAST | COLUMNS | LENIENT | released)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["model_store"] == store.uri
    assert result["bundle"] == f"{store.uri}/versions/{result['model_version']}"
    assert not (workspace / "models").exists()
    second = store.champion()
    assert second.version == result["model_version"] != first.version
    assert (second.previous, second.checking) == (first.version, None)
    assert [(r.run_id, r.state) for r in store.releases(second.version)] == [
        (result["run_id"], "released")
    ]
    assert f"answered by {second.version}" in done.stderr
    assert client.recommend("u7").model_version == second.version  # it was waited for

    done = hrnn_run(workspace, *own, settings=FAST | COLUMNS | WORSE | released)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["champion"] == second.version
    assert store.champion() == second
    assert client.recommend("u7").model_version == second.version


def test_a_server_that_does_not_answer_with_the_new_model_gets_the_old_one_back(running):
    _, store, _, serving, client = running
    now = store.champion()
    other = next(v.version for v in store.versions() if v.version != now.version)
    predictor = serving.processes["predictor"].pid
    settings = ReleaseSettings.parse(RELEASE | {"ready_seconds": 2})
    os.kill(predictor, signal.SIGSTOP)
    try:
        with pytest.raises(RolledBackError, match=rf"did not take it.*again {now.version}"):
            Releaser(store, other, "run", RunningService(serving.url), None, settings).release(
                "", replaces=now.version
            )
    finally:
        os.kill(predictor, signal.SIGCONT)
    assert store.champion().version == now.version
    assert store.release(other, "run").state == "rolled_back"
    answers = (client.recommend("u7").model_version for _ in range(100))
    assert next(version for version in answers if version) == now.version
