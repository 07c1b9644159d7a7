"""A log larger than a part: every event once an epoch, from memory or from files alike."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import columns, sequences, shown
from model.catalogue import Catalogue
from model.loader import Loader, sample_of
from model.network import NetworkSettings
from model.sequences import Histories
from model.train_settings import Softmax, TrainSettings
from model.training import fit
from model.trends import ResolvedTrend
from tests import synthetic


def _loader(log, part_events, shuffle_ties=False):
    return Loader(
        log, lambda part, user_U: (part, user_U), part_events=part_events, shuffle_ties=shuffle_ties
    )


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    part_events=st.integers(1, 40),
    shuffle_ties=st.booleans(),
)
def test_every_event_comes_once_an_epoch(lengths, part_events, shuffle_ties):
    items = np.arange(sum(lengths))  # all distinct
    cuts = np.split(items, np.cumsum(lengths)[:-1])
    log = synthetic.histories([c.tolist() for c in cuts], [(c // 2).tolist() for c in cuts])
    loader = _loader(log, part_events, shuffle_ties)
    rng = np.random.default_rng(0)
    epochs = []
    for _ in range(2):
        parts = [(number, *part.read) for number, part in loader.parts(rng)]
        assert [number for number, *_ in parts] == list(range(len(parts)))
        for _, part, user_U in parts:
            assert part.user_ids == tuple(log.user_ids[u] for u in user_U)
            assert (part.item_E // 2 == part.timestamp_E).all()
            assert len(part) == 1 or part.num_events < part_events + max(lengths)
        epochs.append(np.concatenate([part.item_E for _, part, _ in parts]))
        assert sorted(epochs[-1]) == items.tolist()


def test_parts_are_the_same_from_any_of_them_on():
    log = synthetic.successor(40, 7, 10, seed=0)
    loader = _loader(log, 60, shuffle_ties=True)

    def parts(first):
        rng = np.random.default_rng(3)
        return [
            (n, p.log.item_E.tolist(), p.rng.random()) for n, p in loader.parts(rng, first)
        ], rng.random()

    (everything, state), (rest, same_state) = parts(0), parts(2)
    assert len(everything) > 3 and everything[2:] == rest and state == same_state


def test_the_next_part_is_read_while_the_present_one_is_used():
    log, reading = synthetic.successor(40, 7, 10, seed=0), []
    second = threading.Event()

    def read(part, user_U):
        reading.append(threading.current_thread().name)
        if len(reading) == 2:
            second.set()

    parts = Loader(log, read, part_events=60, shuffle_ties=False).parts(np.random.default_rng(0))
    next(parts)
    assert second.wait(60)  # nobody has asked for it
    assert reading[1].startswith("loader")
    parts.close()


def test_an_error_of_the_reader_is_the_caller_s():
    def read(part, user_U):
        if 0 not in user_U:
            raise ValueError("unreadable")

    log = synthetic.successor(40, 7, 10, seed=0)
    loader = Loader(log, read, part_events=60, shuffle_ties=False)
    with pytest.raises(ValueError, match="unreadable"):
        list(loader.parts(np.random.default_rng(0)))


def test_a_sample_has_whole_users():
    log = synthetic.successor(40, 7, 10, seed=0)
    sample = sample_of(log, 70, np.random.default_rng(0))
    assert 70 <= sample.num_events <= 84 and set(np.diff(sample.offset_U1)) == {7}
    assert sample_of(log, 1000, np.random.default_rng(0)) is log


def _same(a: Histories, b: Histories) -> None:
    np.testing.assert_array_equal(a.shown.offset_E1, b.shown.offset_E1)
    np.testing.assert_array_equal(a.shown.item_S, b.shown.item_S)
    assert a.user_ids == b.user_ids and a.user_fields == b.user_fields
    for name in ("item_E", "timestamp_E", "offset_U1", "event_type_E", "value_E"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_columns_in_files_are_those_in_memory(tmp_path, monkeypatch):
    """Read, cut and filtered piece by piece; the files are gone with the arrays."""
    log = synthetic.feedback_decides(30, 12, 8, seed=0)
    clean = synthetic.clean_tables(tmp_path / "clean", log, genres=False)
    path = clean / "interactions.parquet"
    table = pq.read_table(path)
    catalogue = Catalogue(tuple(sorted(set(table["item_id"].to_pylist()))))
    lists = [[f"i00{(k * j) % 9}" for j in range(k % 5)] for k in range(len(table))]
    pq.write_table(table.append_column("impression", pa.array(lists)), path)

    def read():
        whole = Histories.from_table(path, catalogue, shown=3)
        users = np.array([5, 3, 17])
        return whole, whole.subset(users), whole.where(whole.item_E % 2 == 0)

    in_memory = read()
    folder = tmp_path / "columns"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(columns, "FILE_EVENTS", 1)
    for module in (sequences, shown):
        monkeypatch.setattr(module, "READ_EVENTS", 7)
    in_files = read()
    for a, b in zip(in_memory, in_files, strict=True):
        assert not isinstance(a.item_E, np.memmap) and isinstance(b.item_E, np.memmap)
        _same(a, b)
    assert not list(folder.iterdir())  # nameless from the start


def test_training_in_parts_learns_what_training_on_the_whole_learns():
    log = synthetic.feedback_decides(300, 12, 8, seed=0)
    split = log.subset(np.arange(250)), log.subset(np.arange(250, 300))
    found = {}
    for part_events in (10_000, 700):
        chosen = TrainSettings(
            network=NetworkSettings(embedding=16, hidden=32, control=4, dropout=0.0),
            softmax=Softmax.DENSE,
            batch_events=128,
            part_events=part_events,
            learning_rate=0.01,
            max_epochs=8,
        )
        model = fit(*split, synthetic.catalogue(8), chosen, ResolvedTrend(3600, 0, 1.0))
        found[part_events] = min(entry["valid_ppl"] for entry in model.curve)
        assert all(0.0 <= entry["waiting_share"] < 1.0 for entry in model.curve[1:])
    assert found[700] < 1.1 * found[10_000]
