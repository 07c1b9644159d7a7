"""A user's deletion, through the real steps: nothing of them is in the next run, bundle included.

The same search finds them in what a run of before the deletion left.
"""

import csv
import json
from contextlib import closing

import pyarrow.parquet as pq
import pytest

from components.features import steps as features
from components.ingest import steps as ingest
from components.train import steps as train
from components.validate import steps as validate
from feature_repo.event_log import EventLog, NewEvent
from feature_repo.live import LiveFeatures
from feature_repo.online import protos
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import FeatureReader
from model import bundle as bundles
from tests import synthetic

USER, THEIR_ITEM, THEIR_FIELD = "gone-jane", "gone-diary", "gone-hamlet"
SHARED, OTHER = "item 3", "u1"
TRACES = (USER, THEIR_ITEM, THEIR_FIELD)
ITEMS, AT = 12, 1_000_000_000
TRAIN = {
    "max_epochs": 1,
    "batch_events": 128,
    "network": {"embedding": 4, "hidden": 4, "control": 2, "dropout": 0.0},
}


def rows():
    """(user, item, time) of everybody; the user's own last."""
    log = synthetic.successor(40, 8, ITEMS, seed=0)
    for u, user in enumerate(log.user_ids):
        for e in range(log.offset_U1[u], log.offset_U1[u + 1]):
            yield user, f"item {log.item_E[e]}", int(log.timestamp_E[e])
    for n in range(6):
        yield USER, THEIR_ITEM if n % 2 else SHARED, AT + 600 * n


@pytest.fixture(scope="module", params=["event log", "own tables"])
def runs(request, tmp_path_factory):
    """Two runs, the user deleted in between: (folder of the first, of the second, features)."""
    folder = tmp_path_factory.mktemp("deletion")
    address = f"sqlite:///{folder}/events.db"
    where = FeatureStoreSettings(root=str(folder / "features"))
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(EventLog.open(address, create=True)) as log,
    ):
        patch.setenv("HRNN_EVENT_LOG", address)
        with log.write() as transaction:
            transaction.append(
                [NewEvent(f"e{n}", u, i, t) for n, (u, i, t) in enumerate(rows())]
                # What validate puts into quarantine.
                + [NewEvent("odd", USER, THEIR_ITEM, 4_000_000_000)]
            )
            transaction.put_user(USER, {"town": THEIR_FIELD})
            transaction.put_user(OTHER, {"town": "York"})
        given = {"interactions": "event-log"}
        if request.param == "own tables":
            given = own_tables(folder)
        run(folder / "before", given, where)
        live = LiveFeatures(where, log)
        live.follow()
        assert FeatureReader(where).user(USER).known
        with log.write() as transaction:
            assert transaction.delete_user(USER) == 7
        live.follow()
        run(folder / "after", given, where)
        live.follow()
        yield folder / "before", folder / "after", where


def own_tables(folder):
    """The same as files that still hold the user after the deletion, malformed lines included."""
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user_id", "item_id", "timestamp"))
        writer.writerows(rows())
        writer.writerow((USER, THEIR_ITEM, "yesterday"))
        writer.writerow((USER, THEIR_ITEM, AT, "a", "column", "too many"))
        writer.writerow((OTHER, "item 1", AT, "a", "column", "too many"))
    with (folder / "users.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("user_id", "town"), (USER, THEIR_FIELD), (OTHER, "York"), ("u2", "Ely")]
        )
    return {"interactions": str(folder / "log.csv"), "users": str(folder / "users.csv")}


def run(folder, given, where):
    tables, clean = folder / "tables", folder / "clean"
    folder.mkdir()
    kinds = {"fields": {"users": {"town": "categorical"}}}
    ingest.run(tables, **given, settings=kinds)
    limits = {"max_bad_share": 1.0}
    validate.run(tables, clean, folder / "quarantine", folder / "report.html", settings=limits)
    features.run(clean, where.root, {}, {}, folder / "summary")
    train.run(clean, folder / "bundle", trend={}, settings=TRAIN)


def texts(folder):
    """Everything that files say: (file, its text)."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix == ".parquet":
            yield path, "\n".join(map(str, pq.read_table(path).to_pylist()))
        else:
            yield path, path.read_bytes().decode("utf-8", "replace")


def traces(folder):
    return {(p.name, t) for p, text in texts(folder) for t in TRACES if t in text}


def test_the_search_finds_them_in_what_was_before(runs):
    before, _, _ = runs
    assert {trace for _, trace in traces(before / "bundle")} == {THEIR_ITEM, THEIR_FIELD}
    for part in ("tables", "clean", "quarantine"):
        assert USER in {trace for _, trace in traces(before / part)}, part


def test_nothing_of_them_is_in_the_next_run(runs):
    _, after, _ = runs
    assert traces(after) == set()


def test_what_they_chose_counts_no_more(runs):
    before, after, _ = runs
    first, second = (bundles.load(folder / "bundle") for folder in (before, after))
    assert second.metrics["training"]["events"] < first.metrics["training"]["events"]
    assert set(first.catalogue.item_ids) - set(second.catalogue.item_ids) == {THEIR_ITEM}
    for folder, own in ((before, 3), (after, 0)):
        clean = pq.read_table(folder / "clean" / "interactions.parquet").to_pylist()
        chosen = [row["item_id"] for row in clean]
        others = sum(item == SHARED for _, item, _ in list(rows())[:-6])
        assert chosen.count(SHARED) == others + own


def test_nor_in_the_feature_store(runs):
    _, after, where = runs
    assert {(name, t) for name, t in traces(where.sources)} == set()
    reader = FeatureReader(where)
    user, snapshot = reader.user(USER), reader.trend()
    assert (user.known, user.profile, list(user.history)) == (False, {}, [])
    assert THEIR_ITEM not in snapshot.item_ids
    assert reader.user(OTHER).known
    assert (
        snapshot.version
        == json.loads((after / "summary" / "summary.json").read_text())["trend_version"]
    )


def test_nor_their_bytes_in_its_files(runs):
    """Keys stay, without values."""
    _, _, where = runs
    together = b"".join(b"\n%c%s" % (len(i), i.encode()) for i in (SHARED, THEIR_ITEM))
    assert together in protos({"item_ids": [SHARED, THEIR_ITEM]})["item_ids"].SerializeToString()
    for path in where.path.glob("online_store.db*"):
        assert THEIR_FIELD.encode() not in path.read_bytes(), path.name
        assert together not in path.read_bytes(), path.name
    assert {"online_store.db"} <= {path.name for path in where.path.iterdir()}
