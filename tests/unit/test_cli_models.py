"""`hrnn models`: what the store holds, promoted and rolled back from the command line."""

import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.deploy.kserve import InferenceServices, Mark, StableService, canary_of
from components.deploy.watch import RELEASE_SECONDS
from model.errors import InputError, UnavailableError
from model.store import Lineage, ModelStore
from pipelines.cli import app
from tests.kserve_cluster import Cluster
from tests.unit.test_store import make_bundle


@pytest.fixture
def store(tmp_path):
    store = ModelStore(str(tmp_path / "models"))
    for n in (1, 2, 3):
        bundle = make_bundle(tmp_path / f"b{n}", f"v{n}", created=f"2026-01-0{n}T10:00:00+00:00")
        metrics = {"hrnn": {"every": {"ppl": 100.0 * n, "ndcg@10": 0.1}}}
        store.publish(bundle, Lineage(metrics=metrics, verdict={"passed": True}))
    store.promote("v1")
    store.promote("v3")
    return store


def hrnn(*arguments):
    return CliRunner().invoke(app, ["models", *map(str, arguments)], catch_exceptions=False)


def test_list_shows_roles_and_figures(store, tmp_path):
    shown = hrnn("list", "--workspace", tmp_path).stdout
    lines = {
        name: line for line in shown.splitlines() for name in ("v1", "v2", "v3") if name in line
    }
    assert "champion" in lines["v3"]
    assert "300.0" in lines["v3"]
    assert "previous" in lines["v1"]
    assert "passed" in lines["v2"]
    listed = json.loads(hrnn("list", "--store", store.uri, "--json").stdout)
    assert [v["version"] for v in listed] == ["v3", "v2", "v1"]
    assert "holds no model" in hrnn("list", "--workspace", tmp_path / "none").stdout


def test_show_promote_and_roll_back(store, tmp_path):
    assert json.loads(hrnn("show", "--workspace", tmp_path).stdout)["version"] == "v3"
    shown = json.loads(hrnn("show", "previous", "--workspace", tmp_path).stdout)
    assert shown["lineage"]["metrics"]["hrnn"]["every"]["ppl"] == 100.0
    assert "champion is v2, before it v3" in hrnn("promote", "v2", "--workspace", tmp_path).stdout
    rollback = ("rollback", "--workspace", tmp_path, "--why", "people see one film only")
    assert "champion is v3, before it v1" in hrnn(*rollback).stdout
    shown = json.loads(hrnn("show", "v2", "--workspace", tmp_path).stdout)
    (last,) = shown["releases"]
    assert (shown["state"], last["reason"]) == ("rolled_back", "people see one film only")
    assert "rolled back" in hrnn("list", "--workspace", tmp_path).stdout
    # A second time it goes further back, not to what was rolled back.
    assert "champion is v1, before it none" in hrnn("rollback", "--workspace", tmp_path).stdout
    with pytest.raises(InputError, match="no previous model"):
        hrnn("rollback", "--workspace", tmp_path)
    assert "champion is v2, before it v1" in hrnn("promote", "v2", "--workspace", tmp_path).stdout
    assert store.version("v2").state == "released"


def test_a_champion_under_check_is_shown_and_settled_by_hand(store, tmp_path):
    store.promote("v2", checking="run-7")
    shown = json.loads(hrnn("show", "--workspace", tmp_path).stdout)
    assert (shown["role"], shown["state"], shown["checking"]) == ("champion", "checking", "run-7")
    assert "checking" in hrnn("list", "--workspace", tmp_path).stdout
    hrnn("promote", "champion", "--workspace", tmp_path)
    assert store.champion().checking is None
    other = ModelStore(str(tmp_path / "other"))
    other.publish(tmp_path / "b1", Lineage())
    other.promote("v1", checking="run-1")
    assert "there is no champion now" in hrnn("rollback", "--store", other.uri).stdout


def test_a_run_that_is_over_is_settled(store, tmp_path):
    assert "nothing was left half done" in hrnn("settle", "--workspace", tmp_path).stdout
    store.record("v2", "run-7", "trying")
    store.promote("v2", checking="run-7")
    with pytest.raises(InputError, match=r"run-7 is checking v2 .*may be alive.*settle run-7"):
        hrnn("settle", "--workspace", tmp_path)
    assert "nothing" in hrnn("settle", "run-8", "--workspace", tmp_path).stdout
    assert store.champion().version == "v2"
    # Only a release with a canary is tried, and nobody said where that may be.
    with pytest.raises(UnavailableError, match=r"canary of v2 .*not looked at.*run-7 --service"):
        hrnn("settle", "run-7", "--workspace", tmp_path)
    assert (store.champion().version, store.version("v2").state) == ("v3", "trying")
    # Its time is up: nobody has to name it.
    long_ago = datetime.now(UTC) - timedelta(seconds=RELEASE_SECONDS + 60)
    ModelStore(store.uri, clock=lambda: long_ago).promote("v2", checking="run-9")
    assert "again v3" in hrnn("settle", "--workspace", tmp_path).stdout
    # Somebody edited it.
    store.promote("v2", checking="run-10")
    pointer = Path(store.uri) / "champion.json"
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"changed_at": None}))
    assert "again v3" in hrnn("settle", "--workspace", tmp_path).stdout


def test_the_store_is_the_option_else_the_environment_else_the_workspace(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("HRNN_MODEL_DIR", store.uri)
    assert json.loads(hrnn("show").stdout)["version"] == "v3"
    with pytest.raises(InputError, match="no champion yet"):
        hrnn("show", "--store", tmp_path / "other")


@pytest.mark.parametrize("mode", ["Knative", "Standard"])
def test_a_canary_that_a_dead_run_left_is_shown_and_ended(store, tmp_path, monkeypatch, mode):
    cluster = Cluster(store, mode)
    config = {
        "clusters": [{"name": "c", "cluster": {"server": cluster.address}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config")
    )
    try:
        assert "no canary on hrnn/hrnn-meta" in hrnn("canary").stdout
        services = InferenceServices("hrnn", cluster.api())
        before = copy.deepcopy(cluster.objects["hrnn-meta"]["spec"])
        begun = canary_of(services, StableService(services, "hrnn-meta"), 20)
        begun.begin("/stores/models/versions/v2", Mark("run-9", "v2", 2e9))
        assert "canary of v2 on hrnn/hrnn-meta, begun by run run-9" in hrnn("canary").stdout
        assert "any more" in hrnn("canary", "--end").stdout
        assert "no canary on" in hrnn("canary").stdout
        assert cluster.objects.keys() == {"hrnn-meta"}
        assert cluster.objects["hrnn-meta"]["spec"] == before
    finally:
        cluster.close()


def test_what_is_not_there_is_said(store, tmp_path):
    with pytest.raises(InputError, match="no version 'v9'"):
        hrnn("promote", "v9", "--workspace", tmp_path)
    assert store.champion().version == "v3"
