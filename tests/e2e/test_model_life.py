"""A model store under a running service: swaps under load, and champions that must be refused."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path

import pytest

from model.query import Event, Query
from model.recommender import Recommender
from model.store import Lineage, ModelStore
from serving.client import Client
from tests.e2e.processes import HISTORY, NOW, metric, random_bundle, started, until


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return [random_bundle(folder / name, seed) for seed, name in enumerate(("first", "second"))]


class Store:
    """A model store, written as the deploy step does."""

    def __init__(self, folder):
        self.path = folder / "models"
        self._store = ModelStore(str(self.path))

    def deploy(self, bundle):
        version = self._store.publish(bundle, Lineage())
        return self._store.promote(version).version

    def point_at(self, folder):
        """As a deploy gone wrong would."""
        champion = {"version": folder.name, "path": f"versions/{folder.name}", "previous": None}
        work = self.path / "champion.new"
        work.write_text(json.dumps(champion))
        work.replace(self.path / "champion.json")

    def copy(self, bundle, name):
        target = self.path / "versions" / name
        shutil.copytree(bundle, target)
        return target


@pytest.fixture(scope="module")
def store(bundles, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    store.deploy(bundles[0])
    return store


@pytest.fixture(scope="module")
def serving(store, bundles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    # Patient, so that a busy machine makes no degraded answers.
    settings = {"model_refresh_seconds": 0.2, "predictor_deadline_seconds": 10.0}
    settings |= {"feature_deadline_seconds": 10.0}
    with started(store.path, bundles[0], folder, **settings) as serving:
        yield serving


class Load(threading.Thread):
    """Asks without pause, in searches of one and of several rounds; keeps every answer."""

    def __init__(self, url, num_results):
        super().__init__()
        self._url, self._num_results = url, num_results
        self.answers, self.errors = [], []
        self.stopped = threading.Event()

    def run(self):
        with Client(self._url, timeout=30.0) as client:
            while not self.stopped.is_set():
                try:
                    self.answers.append(
                        client.recommend("u1", timestamp=NOW, num_results=self._num_results)
                    )
                except Exception as error:
                    self.errors.append(error)

    def versions(self):
        return {answer.model_version for answer in list(self.answers)}


def test_a_new_champion_is_swapped_in_under_load_without_one_failed_request(
    serving, store, bundles
):
    recommenders = {r.version: r for r in map(Recommender.load, bundles)}
    old, new = recommenders
    loads = [Load(serving.url, n) for n in (5, 5, 25, 300)]
    for load in loads:
        load.start()
    try:
        until(lambda: all(load.versions() for load in loads))
        assert store.deploy(bundles[1]) == new
        until(lambda: all(new in load.versions() for load in loads), 60)
        store.deploy(bundles[0])  # and back
        until(lambda: all(load.answers[-1].model_version == old for load in loads), 60)
    finally:
        for load in loads:
            load.stopped.set()
        for load in loads:
            load.join()
    query = Query([Event(item, float(t)) for item, t in HISTORY], NOW)
    for load in loads:
        assert load.errors == []
        assert load.versions() == {old, new}
        expected = {
            version: {i.item_id: i.score for i in recommender.recommend([query], 300)[0]}
            for version, recommender in recommenders.items()
        }
        for answer in load.answers:
            assert answer.degraded == ()
            scores = {i.item_id: i.score for i in answer.items}
            assert scores == pytest.approx(
                {i: expected[answer.model_version][i] for i in scores}, abs=1e-4
            ), "scores of another version than the answer names"
    assert metric(serving, "predictor", "hrnn_model_info", version=old) == 1
    assert metric(serving, "predictor", "hrnn_model_info", version=new) == 0
    assert metric(serving, "predictor", "hrnn_model_is_champion") == 1
    assert metric(serving, "predictor", "hrnn_model_refreshes_total", outcome="swapped") == 2


def flip_a_byte(folder):
    with (folder / "weights.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x55")
    return "does not match its digest"


def truncate(folder):
    os.truncate(folder / "weights.safetensors", 1000)
    return "does not match its digest"


def lose_a_file(folder):
    (folder / "items.parquet").unlink()
    return "items.parquet is missing"


def be_foreign(folder):
    (folder / "manifest.json").write_text(json.dumps(
        {"format": "onnx", "format_version": 2, "model_version": "x", "created": "", "files": {}}
    ))  # fmt: skip
    return "holds a 'onnx', not a hrnn-meta-bundle"


def be_no_bundle(folder):
    (folder / "manifest.json").write_text('{"weights": ')
    return "is not a bundle manifest"


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def be_pickled(folder):
    """Digests that fit, and weights that would run code."""
    weights = folder / "weights.safetensors"
    weights.write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model_version"] = folder.name
    manifest["files"][weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "cannot be loaded"


def be_under_a_wrong_name(folder):
    return "says that it is"


FAULTS = [flip_a_byte, truncate, lose_a_file, be_foreign, be_no_bundle, be_pickled]
FAULTS += [be_under_a_wrong_name]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_champion_that_cannot_be_used_is_refused_and_the_old_one_stays(
    serving, store, bundles, fault, tmp_path, monkeypatch
):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    name = fault.__name__
    with Client(serving.url) as client:
        before = client.recommend("u1", timestamp=NOW).model_version
        refused = metric(serving, "predictor", "hrnn_model_refreshes_total", outcome="refused")
        other = next(b for b in bundles if Recommender.load(b).version != before)
        folder = store.copy(other, name)
        reason = fault(folder)
        store.point_at(folder)
        log = serving.log_file("predictor")
        until(lambda: f"champion {name} is refused" in log.read_text(), 60)
        (line,) = [li for li in log.read_text().splitlines() if f"{name} is refused" in li]
        message = json.loads(line)["message"]
        assert f"{before} stays in use" in message
        assert reason in message
        now = metric(serving, "predictor", "hrnn_model_refreshes_total", outcome="refused")
        assert now == refused + 1
        assert metric(serving, "predictor", "hrnn_model_is_champion") == 0
        answer = client.recommend("u1", timestamp=NOW)
        assert (answer.model_version, answer.degraded) == (before, ())
        assert not (tmp_path / "bomb").exists()
        assert store.deploy(other) != before  # what was refused does not stand in the way
        until(lambda: client.recommend("u1").model_version != before, 60)


def test_a_store_that_cannot_be_read_changes_nothing(serving, store, bundles):
    champion = store.path / "champion.json"
    with Client(serving.url) as client:
        before = client.recommend("u1").model_version
        record = champion.read_text()
        for text in ("{", '{"path": "../../elsewhere"}', "[]"):
            count = metric(serving, "predictor", "hrnn_model_refreshes_total", outcome="unreadable")
            champion.write_text(text)
            until(
                lambda count=count: (
                    metric(serving, "predictor", "hrnn_model_refreshes_total", outcome="unreadable")
                    > count
                )
            )
            assert client.recommend("u1").model_version == before
        champion.write_text(record)
        other = next(b for b in bundles if Recommender.load(b).version != before)
        store.deploy(other)
        until(lambda: client.recommend("u1").model_version != before, 60)


def test_sigterm_in_the_middle_of_requests_finishes_them(serving, bundles):
    """Last, as it stops the processes: what was accepted is answered, and the exit code is 0."""
    started_ = threading.Barrier(5)
    outcomes = []

    def ask():
        with Client(serving.url, timeout=30.0) as client:
            client.recommend("u1")  # connected
            started_.wait(30)
            outcomes.append(client.recommend("u1", timestamp=NOW).degraded)

    serving.store.write(delay=1.0)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    started_.wait(30)
    transformer = serving.processes["transformer"]
    until(lambda: metric(serving, "transformer", "hrnn_requests_in_flight") == 4)
    transformer.send_signal(signal.SIGTERM)
    assert transformer.wait(20) == 0
    for thread in threads:
        thread.join(30)
    assert outcomes == [()] * 4
