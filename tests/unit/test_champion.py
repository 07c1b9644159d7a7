"""The champion is measured on the candidate's events, and only on those it was not trained on."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.digests import code_digest, tables_digest
from components.evaluate import steps
from components.evaluate.champion import load_champion
from components.train import steps as train
from model import bundle as bundles
from model.errors import InputError
from model.store import Lineage, ModelStore
from tests import synthetic

TRAIN = {"max_epochs": 2, "network": {"embedding": 4, "hidden": 4, "control": 2}}
HASH = {"split": {"assign": "hash"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A log, the same log a while later (more users, one more item), and a bundle of each."""
    folder = tmp_path_factory.mktemp("world")
    log = synthetic.successor(80, 8, 10, seed=0)
    synthetic.clean_tables(folder / "before", log.subset(np.arange(60)))
    later = synthetic.clean_tables(folder / "later", log)
    table = pq.read_table(later / "interactions.parquet")
    end = int(table["timestamp"].to_numpy().max())
    events = table.to_pylist()
    users = sorted({e["user_id"] for e in events})
    for n, user in enumerate(users):
        item = "new item" if n % 10 == 0 else "i001"
        events.append({"user_id": user, "item_id": item, "timestamp": end + 60 + n})
    events.sort(key=lambda e: (e["user_id"], e["timestamp"]))
    pq.write_table(pa.Table.from_pylist(events, table.schema), later / "interactions.parquet")
    for name, data, more in (
        ("old", "before", {}),
        ("again", "before", {"seed": 1}),
        ("new", "later", {}),
        ("old-hash", "before", HASH),
        ("new-hash", "later", HASH),
    ):
        train.run(folder / data, folder / name, trend={}, settings={**TRAIN, **more})
    return folder


def _store(tmp_path, world, bundle, data):
    store = ModelStore(str(tmp_path / "store"))
    lineage = Lineage(data_digest=tables_digest(world / data))
    store.promote(store.publish(world / bundle, lineage))
    return store


def _load(store, world, data, candidate, tmp_path):
    loaded = bundles.load(world / candidate)
    clean = world / data
    return load_champion(store.uri, clean, loaded, tables_digest(clean), tmp_path / "work")


def test_no_store_or_an_empty_one_has_no_champion(world, tmp_path):
    candidate = bundles.load(world / "old")
    assert load_champion("", world / "before", candidate, "", tmp_path) is None
    empty = str(tmp_path / "empty")
    assert load_champion(empty, world / "before", candidate, "", tmp_path) is None


def test_of_the_same_data_and_split_all_events_are_compared(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    champion = _load(store, world, "before", "again", tmp_path)
    assert champion.comparable_E.all()
    assert champion.version == store.champion().version


def test_of_a_log_that_grew_only_what_is_new_is_compared(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    champion = _load(store, world, "later", "new", tmp_path)
    end = bundles.load(world / "old").trend.as_of
    assert np.array_equal(champion.comparable_E, champion.test.timestamp_E >= end)
    assert 0 < champion.comparable_E.sum() < len(champion.comparable_E)
    # One of the two was split otherwise: the champion may know the answers.
    assert not _load(store, world, "before", "old-hash", tmp_path).comparable_E.any()


def test_with_a_split_by_hash_users_stay_where_they_are(world, tmp_path):
    store = _store(tmp_path, world, "old-hash", "before")
    champion = _load(store, world, "later", "new-hash", tmp_path)
    assert champion.comparable_E.all()


def test_the_champion_gets_the_new_catalogue(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    champion = _load(store, world, "later", "new", tmp_path)
    assert champion.model.encodings.num_items == 11
    for _, score_NM in champion.model.iter_scores(champion.test, 1000):
        assert score_NM.shape[1] == 11
        assert bool(score_NM.isfinite().all())


def test_a_champion_that_is_gone_or_of_other_fields(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    other = shutil.copytree(world / "before", tmp_path / "other")
    items = pq.read_table(other / "items.parquet").drop_columns(["genres", "year"])
    pq.write_table(items, other / "items.parquet")
    schema = json.loads((other / "schema.json").read_text())
    (other / "schema.json").write_text(json.dumps(schema | {"items": {}}))
    train.run(other, tmp_path / "bundle", trend={}, settings=TRAIN)
    loaded = bundles.load(tmp_path / "bundle")
    champion = load_champion(store.uri, other, loaded, "", tmp_path / "work")
    assert "fields are not those of this data" in champion.problem
    assert champion.model is None
    shutil.rmtree(tmp_path / "store" / store.champion().path)
    with pytest.raises(InputError, match=r"cannot be compared with.*hrnn models promote"):
        _load(store, world, "before", "again", tmp_path)


def test_the_evaluation_holds_everybody_on_the_same_events(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    document = steps.run(
        world / "later",
        world / "new",
        tmp_path / "evaluation",
        tmp_path / "report",
        settings={"samples": 50, "frames": 3},
        model_store=store.uri,
        inputs={"clean": "c"},
    )
    assert json.loads((tmp_path / "evaluation").read_text()) == document
    models = document["models"]
    assert set(models) == {"hrnn", "champion", "popularity", "transition-counts"}
    assert len({m["every"]["cases"] for m in models.values()}) == 1
    comparable = models["hrnn"]["comparable"]["cases"]
    assert 0 < comparable < models["hrnn"]["every"]["cases"]
    assert models["hrnn"]["against_champion"]["comparable"]["cases"] == comparable
    assert set(models["champion"]["against_popularity"]) >= {"every", "comparable"}
    frames = document["frames"]
    assert len(frames) == 3
    assert all(a["end"] <= b["start"] for a, b in pairwise(frames))
    cases = [models["hrnn"]["frames"][f["name"]]["cases"] for f in frames]
    assert sum(cases) == models["hrnn"]["every"]["cases"]
    assert document["champion"] == {"version": store.champion().version, "problem": ""}
    assert document["code_digest"] == code_digest()
    assert document["request_time"]["delays"][0]["overlap"] == 1.0
    page = (tmp_path / "report").read_text()
    for outside in ('src="', 'href="http', "url(http", "@import"):  # nothing from the network
        assert outside not in page
    for heading in ("Over time", "Cold start", "Calibration", "Effect of the request's time"):
        assert heading in page
    assert "Champion, serving now" in page


def test_the_same_model_against_itself_is_no_change(world, tmp_path):
    store = _store(tmp_path, world, "old", "before")
    document = steps.run(
        world / "before",
        world / "old",
        tmp_path / "evaluation",
        tmp_path / "report",
        settings={"samples": 20},
        model_store=store.uri,
    )
    against = document["models"]["hrnn"]["against_champion"]["comparable"]
    assert against["ppl"]["value"] == pytest.approx(1.0)
    assert against["ndcg@10"]["value"] == pytest.approx(0.0)


def test_digests_change_with_content_alone(tmp_path, world):
    before = tables_digest(world / "before")
    copy = shutil.copytree(world / "before", tmp_path / "copy")
    (copy / "source.json").write_text("{}")
    assert tables_digest(copy) == before
    pq.write_table(pq.read_table(copy / "items.parquet").slice(1), copy / "items.parquet")
    assert tables_digest(copy) != before
