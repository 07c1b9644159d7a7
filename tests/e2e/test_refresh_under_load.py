"""Trends refreshed while both real servers answer: nothing fails, no answer mixes two versions."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.refresh_trends import steps as refresh
from feature_repo.event_log import EventLog, NewEvent
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import FeatureReader
from model.recommender import Recommender
from model.trends import TrendSnapshot
from serving.launcher import LocalServing
from serving.settings import ServeSettings
from tests.planted import ITEMS

DEADLINE = 60


@pytest.fixture(scope="module")
def workspace(deployed, tmp_path_factory):
    """A workspace of its own: the trend of the shared one stays as it is."""
    copy = tmp_path_factory.mktemp("refreshed") / "workspace"
    for room in ("features", "models"):
        shutil.copytree(deployed[0] / room, copy / room)
    return copy


@pytest.fixture(scope="module")
def log_end(deployed):
    stamps = pq.read_table(Path(deployed[1]["clean"]) / "interactions.parquet")["timestamp"]
    return max(stamps.to_pylist())


@pytest.fixture(scope="module")
def serving(workspace):
    settings = ServeSettings(
        trend_refresh_seconds=0.1,
        grace_seconds=3,
        # A slow machine is no fault.
        feature_deadline_seconds=30,
        predictor_deadline_seconds=30,
        trend_deadline_seconds=30,
    ).with_free_ports()
    store = FeatureStoreSettings(root=str(workspace / "features"))
    with LocalServing(workspace / "models", store, settings, workspace / "logs") as serving:
        yield serving


class Load:
    """Constant load from several threads; every answer is kept."""

    def __init__(self, url):
        self.url, self.answers, self.failures = url, [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def _ask(self):
        instances = [
            {"user_id": "u7", "timestamp": 1_000_000_000, "num_results": ITEMS},
            {"items": ["item 3", "item 4"], "task": "rank", "timestamp": 1_000_000_000},
        ]
        with httpx.Client(timeout=DEADLINE, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self.url, json={"instances": instances})
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                    continue
                if answer.status_code == 200:
                    self.answers.append(answer.json()["predictions"])
                else:
                    self.failures.append((answer.status_code, answer.text))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE)

    def wait_for(self, version):
        """Until the newest answers were made with a version of the trend."""
        deadline = time.monotonic() + DEADLINE
        while not self.answers or self.answers[-1][0]["trend_version"] != version:
            assert time.monotonic() < deadline, f"{version} is not in use"
            time.sleep(0.01)


def test_refreshes_under_load_fail_no_request_and_mix_no_versions(
    serving, workspace, log_end, tmp_path
):
    store = FeatureStoreSettings(root=str(workspace / "features"))
    snapshots = {(s := FeatureReader(store).trend()).version: s}
    rng = np.random.default_rng(0)
    with Load(serving.predict_url) as load:
        load.wait_for(next(iter(snapshots)))
        for k in range(1, 9):
            # Each time another item is the most popular one.
            items = [f"item {(3 * k) % ITEMS}"] * 50 + [
                f"item {j}" for j in rng.integers(ITEMS, size=30)
            ]
            stamps = pa.array([log_end + 100 * k] * len(items), pa.int64())
            events = tmp_path / "events.parquet"
            pq.write_table(pa.table({"item_id": items, "timestamp": stamps}), events)
            refresh.run(str(events), store.root, {}, tmp_path / "out")
            written = json.loads((tmp_path / "out" / "trend.json").read_text())
            snapshot = TrendSnapshot.from_json(written)
            snapshots[snapshot.version] = snapshot
            load.wait_for(snapshot.version)
    assert load.failures == []
    assert {p["trend_version"] for a in load.answers for p in a} == set(snapshots)
    (bundle,) = (workspace / "models" / "versions").iterdir()
    beta = Recommender.load(bundle).beta
    assert abs(beta) > 1e-3
    for answer in load.answers:
        assert len({p["trend_version"] for p in answer}) == 1
        for prediction in answer:
            assert prediction["degraded"] == []
            snapshot = snapshots[prediction["trend_version"]]
            names = [item["item_id"] for item in prediction["items"]]
            assert len(set(names)) == len(names) > 0
            trends = [item["trend"] for item in prediction["items"]]
            np.testing.assert_allclose(trends, beta * snapshot.dense(names), rtol=1e-6, atol=1e-9)


def test_the_command_refreshes_from_the_event_log_and_keeps_its_address_to_itself(
    serving, workspace, log_end
):
    url = f"sqlite:///{workspace}/secret-name.db"
    log = EventLog.open(url, create=True)
    with log.write() as transaction:
        transaction.append(
            [NewEvent(str(k), "u1", "item 5", log_end + 10_000 + k) for k in range(200)]
        )
    log.close()
    command = [sys.executable, "-m", "pipelines.cli", "refresh-trends", "--json"]
    done = subprocess.run(
        [*command, "--workspace", workspace, "--interactions", url],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["events"] == 200
    assert result["in_force"]
    assert f"trend {result['trend_version']} is in force" in done.stderr
    with Load(serving.predict_url) as load:
        load.wait_for(result["trend_version"])
    assert load.failures == []
    for path in (workspace / "runs" / result["run_id"]).rglob("*"):
        assert path.is_dir() or "secret-name" not in path.read_text(), path


def test_the_command_refreshes_the_store_that_the_environment_names(
    serving, workspace, log_end, tmp_path
):
    url = f"sqlite:///{tmp_path}/events.db"
    log = EventLog.open(url, create=True)
    with log.write() as transaction:
        transaction.append([NewEvent("later", "u1", "item 5", log_end + 20_000)])
    log.close()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "refresh-trends", "--workspace", tmp_path / "own"],
        env=os.environ | {"HRNN_FEATURE_ROOT": str(workspace / "features"), "HRNN_EVENT_LOG": url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [version] = re.findall(r"trend (\S+) is in force", done.stderr)
    with Load(serving.predict_url) as load:
        load.wait_for(version)
    assert load.failures == []
