"""Offline sources in an object store (a real S3 server), shared by pods without a folder."""

import json
import shutil

import pytest
from moto.server import ThreadedMotoServer

from components.features import steps as features
from components.refresh_trends import steps as refresh
from feature_repo.historical import training_features
from feature_repo.settings import FeatureStoreSettings
from feature_repo.sources import pull, push
from feature_repo.store import FeatureReader
from model.errors import UnavailableError
from tests.clean_tables import PERIOD, make_log, naive_q, write_clean

WINDOW = 3 * PERIOD


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        fs.mkdir("features")
        yield fs
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def pod(s3, tmp_path, redis_server, monkeypatch):
    """Starts a pod: the cluster's stores, and an empty folder at the same place."""
    monkeypatch.setenv("HRNN_FEATURE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("HRNN_ONLINE_STORE", "redis")
    monkeypatch.setenv("HRNN_REDIS_URL", redis_server.database())
    monkeypatch.setenv("HRNN_REGISTRY_URL", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("HRNN_SOURCES_URI", f"s3://features/{tmp_path.name}/sources/")

    def start():
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        return FeatureStoreSettings.from_env()

    return start


def test_pipeline_refresh_and_training_meet_only_in_the_stores(pod, s3, tmp_path):
    rows = make_log()
    cut = sorted(r[2] for r in rows)[len(rows) // 2]
    clean = write_clean(tmp_path / "past", [r for r in rows if r[2] < cut])
    whole = write_clean(tmp_path / "whole", rows)
    trend = {"period_seconds": PERIOD, "window_seconds": WINDOW, "smoothing": 0.5}
    pod()
    features.run(clean, "", trend, {}, tmp_path / "out")
    pod()
    first = refresh.run(str(whole), "", {"as_of": cut + 100}, tmp_path / "out")
    pod()
    summary = refresh.run(str(whole), "", {}, tmp_path / "out")
    assert summary["previous_as_of"] == first["as_of"]
    settings = pod()
    reader = FeatureReader(settings)  # serving needs no sources
    assert reader.trend().version == summary["trend_version"]
    assert not settings.path.exists()
    for result in (first, summary):
        moment, size = result["as_of"], result["num_items"]
        found = training_features(settings, [("u1", f"i{j}", moment) for j in range(5)])
        expected = [naive_q(rows, f"i{j}", moment, WINDOW, 0.5, size)[1] for j in range(5)]
        assert found["item_trend__log_q"].tolist() == pytest.approx(expected, rel=1e-14)
    base = f"features/{tmp_path.name}/sources"
    assert len([p for p in s3.find(base) if "refresh-" in p]) == 4
    pod()
    features.run(whole, "", trend, {}, tmp_path / "out")
    names = {p.removeprefix(f"{base}/") for p in s3.find(base)}
    assert not [name for name in names if "refresh-" in name]
    assert "applied.json" in names


def test_only_what_has_changed_is_copied_and_what_is_damaged_is_fetched_again(pod, tmp_path):
    clean = write_clean(tmp_path / "clean", make_log())
    settings = pod()
    features.run(clean, "", {"period_seconds": PERIOD, "window_seconds": 0}, {}, tmp_path / "out")
    assert push(settings) == pull(settings) == 0
    settings.source("item_metadata").write_bytes(b"damaged")
    (settings.sources / "left_over.parquet").write_bytes(b"")
    assert pull(settings) == 1
    assert not (settings.sources / "left_over.parquet").exists()
    index = settings.path / ".sources.json"
    index.write_text("{")  # cut off by a crash: everything is compared anew
    assert pull(settings) == len(json.loads(index.read_text())) > 5
    assert pull(settings) == 0


def test_an_object_store_that_is_away_is_named_without_its_keys(pod, s3, tmp_path, monkeypatch):
    pod()
    clean = write_clean(tmp_path / "clean", make_log())
    monkeypatch.setenv("HRNN_SOURCES_URI", "s3://no-such-bucket/x")
    with pytest.raises(UnavailableError, match="cannot store the feature sources") as error:
        features.run(clean, "", {"period_seconds": PERIOD}, {}, tmp_path / "out")
    assert "secret-key" not in str(error.value)
