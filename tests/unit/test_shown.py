"""Items that were shown and not chosen: from a log, as it is sent, to the arrays training reads."""

import csv
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.ingest import steps as ingest
from components.validate import steps as validate
from feature_repo.event_log import EventLog, NewEvent
from model import shown
from model.catalogue import Catalogue
from model.sequences import Histories
from model.shown import Shown
from model.tables import Log

ITEMS = Catalogue(tuple(f"i{j}" for j in range(5)))
ITEM = st.sampled_from([*ITEMS.item_ids, "unknown"])
EVENT = st.tuples(
    st.integers(0, 3),  # user
    ITEM,
    st.none() | st.lists(ITEM | st.none(), max_size=6) | st.just(["i0", "i1", "i2"]),
)


def not_chosen(events, most):
    """By the definition: item ids by event."""
    found = []
    for n, (user, _, listed) in enumerate(events):
        first = last = n
        same = (user, (listed or [])[:most])
        while first > 0 and (events[first - 1][0], (events[first - 1][2] or [])[:most]) == same:
            first -= 1
        while last + 1 < len(events) and (
            (events[last + 1][0], (events[last + 1][2] or [])[:most]) == same
        ):
            last += 1
        chosen = {item for _, item, _ in events[first : last + 1]}
        kept = [i for i in same[1] if i in ITEMS.index and i not in chosen]
        found.append(list(dict.fromkeys(kept)))
    return found


def names(histories):
    return [
        [ITEMS.item_ids[j] for j in histories.shown.of(np.array([e]))[0]]
        for e in range(histories.num_events)
    ]


@settings(max_examples=60, deadline=None)
@given(events=st.lists(EVENT, min_size=1, max_size=30), most=st.integers(1, 5))
@pytest.mark.parametrize("portion", [3, 2**20])
def test_lists_are_read_by_the_definition(events, most, portion, tmp_path_factory):
    events = sorted(events, key=lambda event: event[0])
    path = tmp_path_factory.mktemp("shown") / "interactions.parquet"
    columns = {
        "user_id": pa.array([f"u{user}" for user, _, _ in events]),
        "item_id": pa.array([item for _, item, _ in events]),
        "timestamp": pa.array(range(len(events)), pa.int64()),
        "impression": pa.array([listed for *_, listed in events], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), path, row_group_size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shown, "READ_EVENTS", portion)
        histories = Histories.from_table(path, ITEMS, shown=most)
        assert names(histories) == not_chosen(events, most)
        assert histories.shown.item_S.dtype == np.int32
        everything, place = histories.shown.of(np.arange(histories.num_events))
        assert everything.tolist() == histories.shown.item_S.tolist()
        lengths = np.diff(histories.shown.offset_E1)
        assert place.tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()
        last = histories.subset(np.arange(len(histories))[::-1])
        assert names(last) == [
            listed
            for user in reversed(histories.user_ids)
            for listed, (owner, *_) in zip(names(histories), events, strict=True)
            if f"u{owner}" == user
        ]
        known = histories.where(histories.item_E >= 0)
        assert names(known.with_items(np.array([0, 1, 2, -1, 3]))) == [
            [ITEMS.item_ids[min(ITEMS.index[i], 3)] for i in listed if i != "i3"]
            for listed, (_, item, _) in zip(names(histories), events, strict=True)
            if item not in ("i3", "unknown")
        ]


def test_without_impressions_there_are_none(tmp_path):
    path = tmp_path / "interactions.parquet"
    columns = {"user_id": ["u"], "item_id": ["i0"], "timestamp": [1]}
    pq.write_table(pa.table(columns), path)
    assert Histories.from_table(path, ITEMS, shown=3).shown is None
    pq.write_table(pa.table({**columns, "impression": [["i1"]]}), path)
    assert Histories.from_table(path, ITEMS).shown is None  # not asked for
    assert names(Histories.from_table(path, ITEMS, shown=3)) == [["i1"]]


def test_none_of_no_events():
    empty = Shown(np.empty(0, np.int32), np.zeros(1, np.int64))
    assert empty.of(np.empty(0, np.int64))[0].tolist() == []
    assert empty.taken(lambda start, stop: np.arange(start, stop), 0).offset_E1.tolist() == [0]


LISTS = {  # user, item → list
    ("u1", "song"): ["song", "it's", "a\nb", "never seen"],
    ("u1", "it's"): ["song", "it's", "a\nb", "never seen"],
    ("u2", "a\nb"): None,
    ("u2", "song"): ["☃ two words", "song"],
    ("u3", "☃ two words"): ["☃ two words"],
}
LEFT = [["a\nb"], ["a\nb"], [], ["☃ two words"], []]


def from_event_log(folder, log_url):
    with closing(EventLog.open(log_url, create=True)) as log, log.write() as transaction:
        transaction.append(
            [
                NewEvent(f"e{n}", user, item, 100 + n, None, None, listed and tuple(listed), None)
                for n, ((user, item), listed) in enumerate(LISTS.items())
            ]
        )
    return log_url


def from_csv(folder):
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "ts", "impressions"])
        for n, ((user, item), listed) in enumerate(LISTS.items()):
            # Of one item the delimiter at its end tells that its blanks are not delimiters.
            writer.writerow(
                [user, item, 100 + n, "" if listed is None else "|".join([*listed, ""])]
            )
    return str(folder / "log.csv")


def from_parquet(folder):
    (users, items), lists = zip(*LISTS, strict=True), [*LISTS.values()]
    times = [*range(100, 100 + len(users))]
    table = {"user": users, "item": items, "ts": times, "slate": lists}
    pq.write_table(pa.table({n: pa.array(v) for n, v in table.items()}), folder / "log.parquet")
    return str(folder / "log.parquet")


def check_comes_to_training(folder, interactions):
    ingest.run(folder / "tables", interactions=interactions)
    few = {"min_users": 1, "min_items": 1, "min_events": 1}
    outputs = [folder / name for name in ("tables", "clean", "q", "r.html")]
    validate.run(*outputs, settings=few)
    log = Log.read(folder / "clean", shown=20)
    ids, lists = log.catalogue.item_ids, log.histories.shown
    assert [
        [ids[j] for j in lists.of(np.array([e]))[0]] for e in range(log.histories.num_events)
    ] == LEFT


def test_what_was_not_clicked_comes_to_training_from_an_event_log(tmp_path, log_url):
    check_comes_to_training(tmp_path, from_event_log(tmp_path, log_url))


@pytest.mark.parametrize("source", [from_csv, from_parquet])
def test_what_was_not_clicked_comes_to_training_from_files(tmp_path, source):
    check_comes_to_training(tmp_path, source(tmp_path))
