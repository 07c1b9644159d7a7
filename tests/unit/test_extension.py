"""A trained model for another catalogue: what it knew stays, what is new needs no training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from components.train import steps
from model import bundle as bundles
from model.catalogue import Catalogue
from model.extension import with_catalogue, with_items
from model.query import Event, Query
from model.recommender import Recommender
from model.schema import Schema
from model.sequences import Histories
from model.splits import Cases
from model.training import TrainSettings, fit
from model.transitions import Transitions
from tests import synthetic

M = 20
SETTINGS = {
    "max_epochs": 30,
    "learning_rate": 0.01,
    "batch_events": 128,
    "network": {"embedding": 16, "hidden": 16, "control": 4, "dropout": 0.1},
}
SCHEMA = Schema.parse({"items": {"genre": "categorical"}})


def _faithful(num_users: int, length: int, seed: int) -> Histories:
    """Users who stay with one of two genres (the items' parity), popular items first."""
    rng = np.random.default_rng(seed)
    items = [
        (2 * np.minimum(rng.geometric(0.2, size=length) - 1, M // 2 - 1) + u % 2).tolist()
        for u in range(num_users)
    ]
    return synthetic.histories(items, [list(range(0, 60 * length, 60))] * num_users)


def _catalogue(names: list[str]) -> Catalogue:
    """Items named by number; odd and even ones differ in genre."""
    return Catalogue(tuple(names), {"genre": ["eo"[int(n[1:]) % 2] for n in names]})


OLD = _catalogue([f"i{j:03d}" for j in range(M)])


@pytest.fixture(scope="module", params=[{}, {"tied": False}, {"item_fields": False}])
def trained(request):
    log = _faithful(80, 15, seed=0)
    network = SETTINGS["network"] | request.param
    settings = TrainSettings.parse(SETTINGS | {"network": network})
    return fit(log, _faithful(20, 15, seed=1), OLD, settings, None, SCHEMA)


def _scores(model, histories):
    scores = np.empty((histories.num_events, model.network.num_items))
    for event_N, score_NM in model.iter_scores(histories, 64):
        scores[event_N] = score_NM.numpy()
    return scores


def test_known_items_keep_their_affinities(trained):
    names = [*reversed(OLD.item_ids), "i101", "i100"]
    new = _catalogue(names)
    extended = with_catalogue(trained, OLD, new)
    log = _faithful(5, 15, seed=2)
    before = _scores(trained, log)
    after = _scores(extended, log.with_items(new.encode(OLD.item_ids)))
    np.testing.assert_allclose(after[:, new.encode(OLD.item_ids)], before, atol=1e-5)
    assert extended.encodings.num_items == extended.network.num_items == len(names)


def test_new_items_are_liked_for_their_fields_and_stand_among_the_others(trained):
    new = _catalogue([*OLD.item_ids, "i100", "i101"])
    extended = with_catalogue(trained, OLD, new)
    log = _faithful(20, 15, seed=3)
    score = _scores(extended, log)[log.timestamp_E >= 300]
    even = log.user_E[log.timestamp_E >= 300] % 2 == 0
    difference = score[:, M] - score[:, M + 1]
    if trained.network.items.output_tower is None:
        np.testing.assert_allclose(difference, 0.0, atol=1e-5)
    else:
        assert np.where(even, difference, -difference).min() > 0.5
    # One of each genre: together they stand where the known items do.
    if trained.network.items.output_tower is not None:
        assert abs(score[:, M:].mean() - score[:, :M].mean()) < 1.0
    # Known items are mostly expected when counts call for them, which never call for new ones.
    p = np.exp(score - np.logaddexp.reduce(score, axis=1, keepdims=True))
    assert 1 / 5 < p[:, M:].mean() / p[:, :M].mean() < 1.0


def test_some_items_new_or_changed_are_as_in_a_whole_new_catalogue(trained):
    changed = {"i1005": {"genre": "o"}, "i004": {"genre": "o"}, "a": {}, "i007": {}}
    extended, new = with_items(trained, OLD, changed)
    names = sorted({*OLD.item_ids, *changed})
    assert list(new.item_ids) == names
    genre = dict(zip(OLD.item_ids, OLD.fields["genre"], strict=True))
    genre |= {item: fields.get("genre") for item, fields in changed.items()}
    assert new.fields == {"genre": [genre[name] for name in names]}
    whole = with_catalogue(trained, OLD, new)
    log = _faithful(5, 15, seed=2).with_items(new.encode(OLD.item_ids))
    np.testing.assert_allclose(_scores(extended, log), _scores(whole, log), atol=1e-6)


def test_a_history_may_hold_new_items(trained):
    new = _catalogue([*OLD.item_ids, "i100"])
    extended = with_catalogue(trained, OLD, new)
    log = synthetic.histories([[2, M, 4, M, 6]], [[0, 60, 120, 180, 240]])
    assert np.isfinite(_scores(extended, log)).all()


def test_items_that_are_gone_leave_nothing_behind(trained):
    new = _catalogue([i for i in OLD.item_ids if i not in ("i003", "i010")])
    left = with_catalogue(trained, OLD, new)
    log = _faithful(6, 15, seed=4)
    without = log.where(~np.isin(log.item_E, (3, 10)))
    before = _scores(trained, without)
    position = new.encode(OLD.item_ids)
    kept = np.flatnonzero(position >= 0)
    after = _scores(left, log.with_items(position))
    np.testing.assert_allclose(after[:, position[kept]], before[:, kept], atol=1e-5)


def test_transition_counts_are_the_same_between_the_items_left(trained):
    new = _catalogue(["i007", "i100", "i001", "i005"])
    counts = with_catalogue(trained, OLD, new).transitions
    assert counts is not None and trained.transitions is not None
    rows = torch.tensor([[7], [1], [5]])
    wanted = trained.transitions.scatter(rows, torch.ones(1))[:, [7, 1, 5]]
    got = counts.scatter(torch.tensor([[0], [2], [3]]), torch.ones(1))
    torch.testing.assert_close(got[:, [0, 2, 3]], wanted)
    assert not got[:, 1].any() and int(counts.offset_R1.diff()[1]) == 0
    again = Transitions.from_tensors(counts.tensors(), len(new))
    torch.testing.assert_close(again.scatter(torch.tensor([[0]]), torch.ones(1)), got[:1])


def test_cases_and_histories_lose_the_events_of_items_that_are_gone():
    log = synthetic.histories([[0, 1, 2], [1, 1], [2, 0]], [[0, 1, 2], [0, 1], [5, 6]])
    cases = Cases(log, np.array([1, 2, 4, 6]))
    moved = cases.with_items(np.array([1, -1, 0]))
    assert moved.histories.item_E.tolist() == [1, 0, 0, 1]
    assert moved.histories.offset_U1.tolist() == [0, 2, 2, 4]
    assert moved.histories.item_E[moved.event_N].tolist() == [0, 1]
    assert moved.histories.timestamp_E[moved.event_N].tolist() == [2, 6]


def test_trend_is_counted_for_the_new_catalogue(trained):
    new = _catalogue(["i100", *OLD.item_ids[:5]])
    log = _faithful(10, 15, seed=5)
    extended = with_catalogue(replace(trained, trend_log=log), OLD, new)
    assert extended.trend_log is not None
    counts = np.bincount(extended.trend_log.item_E, minlength=6)
    assert counts.tolist() == [0, *np.bincount(log.item_E, minlength=M)[:5]]


def test_bundle_round_trip(tmp_path):
    clean = synthetic.clean_tables(tmp_path / "clean", synthetic.successor(40, 8, M, seed=0))
    settings = {"max_epochs": 1, "network": {"embedding": 8, "hidden": 8}}
    steps.run(clean, tmp_path / "bundle", trend={}, settings=settings)
    bundle = bundles.load(tmp_path / "bundle")
    old = bundle.catalogue
    added = {"genres": [["even"]], "year": [1993.0], "title": ["New"]}
    new = Catalogue(
        ("i999", *old.item_ids[1:]),
        {name: [*added[name], *values[1:]] for name, values in old.fields.items()},
        old.title_field,
    )
    bundles.save(
        tmp_path / "extended",
        model=with_catalogue(bundle.model, old, new),
        catalogue=new,
        schema=bundle.schema,
        settings=bundle.settings,
        trend=bundle.trend,
        metrics=bundle.metrics,
    )
    before, after = Recommender.load(tmp_path / "bundle"), Recommender.load(tmp_path / "extended")
    queries = [
        Query(history=[Event("i004", 1_000_000_000.0)], timestamp=1_000_000_600.0),
        Query(history=[], timestamp=1_000_000_600.0),
    ]
    known = [i for i in old.item_ids if i in new.index]
    np.testing.assert_allclose(
        after.affinities(queries)[:, new.encode(known)],
        before.affinities(queries)[:, old.encode(known)],
        atol=1e-5,
    )
    assert "i999" in [r.item_id for r in after.recommend(queries[:1], k=M)[0]]
    query = Query(history=[Event("i999", 1_000_000_000.0)], timestamp=1_000_000_600.0)
    assert np.isfinite(after.affinities([query])).all()
