"""Deployment is atomic, repeatable, and never of a refused or damaged model."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from components.deploy import steps
from components.train import steps as train
from model import bundle as bundles
from model.errors import BundleError, InputError, UnavailableError
from model.store import ModelStore
from tests import synthetic

TRAIN = {"max_epochs": 1, "network": {"embedding": 4, "hidden": 4, "control": 2}}


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    clean = synthetic.clean_tables(folder / "clean", synthetic.successor(30, 8, 10, seed=0))
    for seed in (1, 2):
        train.run(clean, folder / f"b{seed}", trend={}, settings={**TRAIN, "seed": seed})
    return [folder / "b1", folder / "b2"]


@pytest.fixture
def verdict(tmp_path):
    path = tmp_path / "verdict"
    path.write_text(json.dumps({"passed": True, "rules": []}))
    return path


def _deploy(bundle, verdict, tmp_path):
    return steps.run(bundle, verdict, str(tmp_path / "store"), tmp_path / "out", settings={})


def _champion(tmp_path):
    return ModelStore(str(tmp_path / "store")).champion()


def test_the_champion_is_the_bundle_and_remembers_the_one_before(candidates, verdict, tmp_path):
    assert _champion(tmp_path) is None
    first = _deploy(candidates[0], verdict, tmp_path)
    second = _deploy(candidates[1], verdict, tmp_path)
    store = tmp_path / "store"
    assert _champion(tmp_path).version == second["version"]
    assert second["previous"] == first["version"]
    for record in (first, second):
        assert bundles.verify(store / record["path"]).model_version == record["version"]


def test_deploying_twice_changes_nothing(candidates, verdict, tmp_path):
    first = _deploy(candidates[0], verdict, tmp_path)
    assert _deploy(candidates[0], verdict, tmp_path) == first
    assert len(list((tmp_path / "store" / "versions").iterdir())) == 1


def test_a_refused_model_is_not_deployed(candidates, tmp_path):
    refused = tmp_path / "refused"
    refused.write_text(json.dumps({"passed": False, "rules": []}))
    with pytest.raises(InputError, match="refused"):
        _deploy(candidates[0], refused, tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_damaged_bundle_leaves_the_champion(candidates, verdict, tmp_path):
    first = _deploy(candidates[0], verdict, tmp_path)
    damaged = shutil.copytree(candidates[1], tmp_path / "damaged")
    (damaged / "items.parquet").write_bytes(b"x")
    with pytest.raises(BundleError, match="digest"):
        _deploy(damaged, verdict, tmp_path)
    assert _champion(tmp_path).version == first["version"]


def test_a_store_that_cannot_be_written_says_so(candidates, verdict, tmp_path):
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(UnavailableError, match="Not a directory"):
        _deploy(candidates[0], verdict, tmp_path)


def test_concurrent_deployments_leave_one_whole_champion(candidates, verdict, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_deploy, candidates[i % 2], verdict, tmp_path) for i in range(16)]
        for job in jobs:
            job.result()
    store = tmp_path / "store"
    champion = _champion(tmp_path)
    assert bundles.verify(store / champion.path).model_version == champion.version
    assert len(list((store / "versions").iterdir())) == 2
