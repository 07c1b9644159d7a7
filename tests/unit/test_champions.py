"""Following a model store: what is loaded, refused, tried again, and never held for long."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest

from model.errors import BundleError, InputError
from model.store import Lineage, ModelStore
from serving import champions, metrics
from serving.champions import Champions
from tests.e2e.processes import random_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return [random_bundle(folder / str(seed), seed) for seed in range(2)]


def load(path):
    return SimpleNamespace(
        version=json.loads((path / "manifest.json").read_text())["model_version"]
    )


@pytest.mark.parametrize("scheme", ["folder", "memory"])
def test_every_new_champion_is_handed_over_once(bundles, tmp_path, scheme):
    where = str(tmp_path) if scheme == "folder" else f"memory://champions-{tmp_path.name}"
    store = ModelStore(where)
    first, second = (store.publish(bundle, Lineage()) for bundle in bundles)
    following = Champions(where, load)
    with pytest.raises(BundleError, match="holds no model"):
        following.first()
    store.promote(first)
    assert following.first().version == first
    assert following.next(first) is None
    store.promote(second)
    assert following.next(first).version == second
    assert following.next(second) is None
    store.rollback()
    assert following.next(second).version == first
    following.close()


def test_a_bundle_is_served_as_it_is(bundles):
    following = Champions(str(bundles[0]), load)
    version = following.first().version
    assert following.next(version) is None
    with pytest.raises(InputError, match="nonsense"):
        Champions("nonsense://x", load)


def test_a_refused_champion_is_tried_again_later_and_the_one_after_it_at_once(
    bundles, tmp_path, caplog
):
    store = ModelStore(str(tmp_path))
    first, second = (store.publish(bundle, Lineage()) for bundle in bundles)
    store.promote(first)
    now, tried = [0.0], []

    def refusing(path):
        tried.append(path.name)
        if path.name == second and now[0] < 100:
            raise MemoryError("secret")
        return load(path)

    following = Champions(str(tmp_path), refusing, clock=lambda: now[0])
    following.first()
    store.promote(second)
    for now[0] in (1.0, 2.0, champions.RETRY_SECONDS - 1):
        assert following.next(first) is None
    assert tried == [first, second]
    assert f"champion {second} is refused, {first} stays in use: MemoryError" in caplog.text
    assert "secret" not in caplog.text
    now[0] = 101.0
    assert following.next(first).version == second


def test_a_champion_that_cannot_be_made_ready_is_refused(bundles, tmp_path, caplog):
    store = ModelStore(str(tmp_path))
    first, second = (store.publish(bundle, Lineage()) for bundle in bundles)
    store.promote(first)
    following = Champions(str(tmp_path), load)
    following.first()
    store.promote(second)

    def fails(model):
        assert model.version == second
        raise RuntimeError("it reads no history")

    assert following.next(first, fails) is None
    assert f"champion {second} is refused, {first} stays in use: RuntimeError" in caplog.text
    following = Champions(str(tmp_path), load)
    assert following.next(first, lambda model: SimpleNamespace(of=model)).of.version == second


def test_an_unreadable_store_is_reported_once(bundles, tmp_path, caplog):
    store = ModelStore(str(tmp_path))
    first = store.publish(bundles[0], Lineage())
    store.promote(first)
    following = Champions(str(tmp_path), load)
    caplog.set_level("INFO")
    text = (tmp_path / "champion.json").read_text()
    (tmp_path / "champion.json").write_text("{")
    assert [following.next(first) for _ in range(3)] == [None] * 3
    assert caplog.text.count("stays in use") == 1
    (tmp_path / "champion.json").write_text(text)
    assert following.next(first) is None
    assert "readable again" in caplog.text


def test_a_champion_that_was_not_checked_yet_is_shown_since_when(bundles, tmp_path):
    store = ModelStore(str(tmp_path))
    version = store.publish(bundles[0], Lineage())
    champion = store.promote(version, checking="run-1")
    following = Champions(str(tmp_path), load)
    since = metrics.CHAMPION_UNCHECKED.collect
    following.first()
    promoted = datetime.fromisoformat(champion.changed_at).timestamp()
    assert since()[0].samples[0].value == promoted
    pointer = tmp_path / "champion.json"
    pointer.write_text(pointer.read_text().replace(champion.changed_at, "yesterday"))
    assert following.next(version) is None
    assert since()[0].samples[0].value == 1.0
    naive = champion.changed_at.removesuffix("+00:00")
    for edited, seen in ((json.dumps(naive), promoted), ("null", 1.0)):
        record = json.loads(pointer.read_text()) | {"changed_at": json.loads(edited)}
        pointer.write_text(json.dumps(record))
        assert following.next(version) is None
        assert since()[0].samples[0].value == seen
    store.confirm(version)
    assert following.next(version) is None
    assert since()[0].samples[0].value == 0.0


def test_a_first_champion_that_is_rolled_back_is_no_longer_unchecked(bundles, tmp_path):
    store = ModelStore(str(tmp_path))
    version = store.publish(bundles[0], Lineage())
    store.promote(version, checking="run-1")
    following = Champions(str(tmp_path), load)
    following.first()
    assert metrics.CHAMPION_UNCHECKED.collect()[0].samples[0].value > 0
    assert store.rollback(replaces=version) is None
    assert following.next(version) is None
    assert metrics.CHAMPION_UNCHECKED.collect()[0].samples[0].value == 0.0


@pytest.mark.parametrize(
    ("mark", "until"),
    [("", 0.0), ('{"run_id": "r", "version": "v", "until": 17.5}', 17.5), ("edited", 1.0)],
)
def test_a_canary_shows_until_when_it_is_one(mark, until):
    metrics.set_canary(mark)
    assert metrics.CANARY_UNTIL.collect()[0].samples[0].value == until
