"""Deployment is atomic, repeatable, and never of a refused or damaged model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from components.deploy import steps
from components.train import steps as train
from model import manifest as manifests
from model import store as stores
from model.errors import BundleError, ConflictError, InputError, UnavailableError
from model.store import ModelStore
from tests import synthetic
from tests.servers import S3Server

TRAIN = {"max_epochs": 1, "network": {"embedding": 4, "hidden": 4, "control": 2}}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    clean = synthetic.clean_tables(folder / "clean", synthetic.successor(30, 8, 10, seed=0))
    for seed in (1, 2):
        train.run(clean, folder / f"b{seed}", trend={}, settings={**TRAIN, "seed": seed})
    return [folder / "b1", folder / "b2"]


def _deploy(bundle, tmp_path, champion=None, store="", run_id="run-1", **verdict):
    """Deploy as a run does that compared the bundle with `champion`."""
    version = json.loads((bundle / "manifest.json").read_text())["model_version"]
    judged = {
        "passed": True,
        "deploy": True,
        "override": None,
        "champion": champion,
        "model_version": version,
        "rules": [],
    } | verdict
    measured = {
        "data_digest": "d",
        "code_digest": "c",
        "models": {"hrnn": {"every": {"ppl": 3.0}, "slices": {}}},
    }
    for name, value in (("verdict", judged), ("evaluation", measured)):
        (tmp_path / f"{name}-{version}").write_text(json.dumps(value))
    return steps.run(
        bundle,
        tmp_path / f"evaluation-{version}",
        tmp_path / f"verdict-{version}",
        store or str(tmp_path / "store"),
        tmp_path / "out" / version,
        settings={"keep": 3},
        run_id=run_id,
    )


def _champion(tmp_path):
    return ModelStore(str(tmp_path / "store")).champion()


def test_the_champion_is_the_bundle_and_remembers_the_one_before(candidates, tmp_path):
    assert _champion(tmp_path) is None
    first = _deploy(candidates[0], tmp_path)
    second = _deploy(candidates[1], tmp_path, champion=first["version"])
    store = tmp_path / "store"
    assert _champion(tmp_path).version == second["version"]
    assert second["previous"] == first["version"]
    for record in (first, second):
        assert manifests.verify(store / record["path"]).model_version == record["version"]


def test_deploying_twice_changes_nothing(candidates, tmp_path):
    first = _deploy(candidates[0], tmp_path)
    assert _deploy(candidates[0], tmp_path) == first
    assert len(list((tmp_path / "store" / "versions").iterdir())) == 1


def test_a_refused_model_is_not_deployed(candidates, tmp_path):
    with pytest.raises(InputError, match="refused"):
        _deploy(candidates[0], tmp_path, passed=False, deploy=False)
    with pytest.raises(InputError, match="about other"):
        _deploy(candidates[0], tmp_path, model_version="other")
    assert not (tmp_path / "store").exists()


def test_lineage_says_where_the_model_comes_from_and_why_it_is_here(candidates, tmp_path):
    record = _deploy(candidates[0], tmp_path, passed=False, override="needed at once")
    lineage = ModelStore(str(tmp_path / "store")).version(record["version"]).lineage
    assert (lineage.data_digest, lineage.code_digest, lineage.run_id) == ("d", "c", "run-1")
    assert lineage.parent is None
    assert lineage.parameters["train"]["seed"] == 1
    assert lineage.metrics == {"hrnn": {"every": {"ppl": 3.0}}}
    assert lineage.override == "needed at once"
    assert lineage.verdict["passed"] is False


def test_an_override_is_recorded_for_a_version_that_had_passed_before(candidates, tmp_path):
    version = _deploy(candidates[0], tmp_path)["version"]
    other = _deploy(candidates[1], tmp_path, champion=version)["version"]
    refused = {"passed": False, "override": "the other one is worse than it looks"}
    _deploy(candidates[0], tmp_path, champion=other, run_id="run-2", **refused)
    store = ModelStore(str(tmp_path / "store"))
    assert store.champion().version == version
    told = {release.run_id: release.reason for release in store.releases(version)}
    assert told["run-1"] == ""
    assert "the other one is worse than it looks" in told["run-2"]


def test_a_model_compared_with_another_champion_is_not_deployed(candidates, tmp_path):
    first = _deploy(candidates[0], tmp_path)
    with pytest.raises(ConflictError, match="run again"):
        _deploy(candidates[1], tmp_path, champion=None)
    assert _champion(tmp_path).version == first["version"]


def test_a_damaged_bundle_leaves_the_champion(candidates, tmp_path):
    first = _deploy(candidates[0], tmp_path)
    damaged = shutil.copytree(candidates[1], tmp_path / "damaged")
    (damaged / "items.parquet").write_bytes(b"x")
    with pytest.raises(BundleError, match="digest"):
        _deploy(damaged, tmp_path)
    assert _champion(tmp_path).version == first["version"]


def test_a_store_that_cannot_be_written_says_so(candidates, tmp_path):
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(UnavailableError, match="Not a directory"):
        _deploy(candidates[0], tmp_path)


def test_of_two_runs_at_once_one_deploys_and_the_other_is_told(candidates, tmp_path):
    def attempt(bundle):
        try:
            return _deploy(bundle, tmp_path)["version"]
        except ConflictError:
            return None

    with ThreadPoolExecutor(2) as pool:
        deployed = [v for v in pool.map(attempt, candidates) if v]
    champion = _champion(tmp_path)
    assert deployed == [champion.version]
    manifests.verify(tmp_path / "store" / champion.path)


@pytest.fixture
def s3(monkeypatch):
    """A store on an S3 server that can be frozen and killed."""
    import s3fs

    server = S3Server("models")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    # The deadlines in force, a twentieth of them.
    monkeypatch.setattr(stores, "WRITE_SECONDS", 4.0)
    times = stores.S3_OPTIONS["config_kwargs"] | {"read_timeout": 1}
    monkeypatch.setitem(stores.S3_OPTIONS, "config_kwargs", times)
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.close()


def test_a_store_that_freezes_or_dies_under_a_deployment_is_said_in_time(
    candidates, tmp_path, s3, monkeypatch
):
    uri = "s3://models/store"
    first = _deploy(candidates[0], tmp_path, store=uri)
    s3.pause()
    with pytest.raises(UnavailableError, match=r"s3://models/store cannot be"):
        _deploy(candidates[1], tmp_path, champion=first["version"], store=uri)
    s3.resume()
    assert ModelStore(uri).champion().version == first["version"]

    # Frozen at the very moment at which the pointer is written: nobody can know what became of it.
    write = stores._Objects.write_if

    def frozen(*arguments):
        s3.pause()
        return write(*arguments)

    monkeypatch.setattr(stores._Objects, "write_if", frozen)
    with pytest.raises(UnavailableError, match=r"being changed to .*`hrnn models show` tells"):
        _deploy(candidates[1], tmp_path, champion=first["version"], store=uri)
    monkeypatch.setattr(stores._Objects, "write_if", write)
    s3.resume()
    second = _deploy(candidates[1], tmp_path, champion=first["version"], store=uri)
    champion = ModelStore(uri).champion()
    assert (champion.version, champion.history) == (second["version"], (first["version"],))
    s3.kill()
    with pytest.raises(UnavailableError, match=r"s3://models/store cannot be"):
        _deploy(candidates[0], tmp_path, champion=second["version"], store=uri)
