"""Inference equals training's own scores, reads every input, and holds at the edges."""

from dataclasses import replace

import numpy as np
import pytest

from model import bundle as bundles
from model.catalogue import Catalogue
from model.errors import InputError
from model.network import NetworkSettings
from model.query import Event, ItemFilter, Query
from model.recommender import Recommender
from model.schema import Schema
from model.splits import SplitSettings, split_users
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend, snapshot_from_counts
from tests import synthetic

M = 20
SCHEMA = Schema.parse(
    {
        "users": {"group": "categorical", "age": "numeric"},
        "items": {"genre": "multi_categorical", "year": "numeric", "about": "text"},
        "context": {"device": "categorical"},
    }
)


def _log():
    log = synthetic.successor(80, 10, M, seed=0)
    rng = np.random.default_rng(0)
    users = {
        "group": [("a", "b", None)[u % 3] for u in range(len(log))],
        "age": [float(20 + u % 40) for u in range(len(log))],
    }
    return replace(
        log,
        value_E=np.where(rng.random(log.num_events) < 0.2, np.nan, rng.normal(size=log.num_events)),
        event_type_E=np.array([("buy", "view")[j % 2] for j in log.item_E], dtype=object),
        context_fields={
            "device": np.array([("tv", "phone", None)[j % 3] for j in log.item_E], dtype=object)
        },
        user_fields=users,
    )


LOG = _log()
SPLIT = split_users(LOG, SplitSettings())
CATALOGUE = Catalogue(
    tuple(f"i{j:03d}" for j in range(M)),
    {
        "genre": [["even" if j % 2 == 0 else "odd", "any"] for j in range(M)],
        "year": [1990.0 + j % 5 for j in range(M)],
        "about": [f"item number {j}" for j in range(M)],
    },
)
# An embedding started wide makes a model of few epochs read everything it is given.
NETWORK = NetworkSettings(embedding=16, hidden=16, control=4, dropout=0.0, user_dropout=0.0)


def _bundle(folder, log=SPLIT.train, schema=SCHEMA):
    settings = TrainSettings(network=NETWORK, max_epochs=3, batch_events=128, learning_rate=0.02)
    model = fit(log, SPLIT.valid, CATALOGUE, settings, ResolvedTrend(86_400, 0, 1.0), schema)
    snapshot = snapshot_from_counts(
        list(CATALOGUE.item_ids),
        np.bincount(log.item_E, minlength=M),
        num_items=M,
        smoothing=1.0,
        as_of=2_000_000_000,
        window_seconds=0,
    )
    bundles.save(
        folder,
        model=model,
        catalogue=CATALOGUE,
        schema=schema,
        settings=settings,
        trend=snapshot,
        metrics={},
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return _bundle(tmp_path_factory.mktemp("recommender") / "bundle")


@pytest.fixture(scope="module")
def recommender(folder):
    return Recommender.load(folder)


def _query(log, user, k, **more):
    """The request that led to event k of a user."""
    start = int(log.offset_U1[user])
    events = [
        Event(
            item_id=CATALOGUE.item_ids[log.item_E[e]],
            timestamp=float(log.timestamp_E[e]),
            event_type=log.event_type_E[e],
            value=None if np.isnan(log.value_E[e]) else float(log.value_E[e]),
        )
        for e in range(start, start + k)
    ]
    fields = {n: values[user] for n, values in log.user_fields.items()}
    context = {n: values[start + k] for n, values in log.context_fields.items()}
    return Query(
        events, float(log.timestamp_E[start + k]), **{"user": fields, "context": context} | more
    )


def test_serving_scores_are_those_of_training(folder, recommender):
    model = bundles.load(folder).model  # without a trend log: affinities alone
    ((event_N, score_NM),) = model.iter_scores(SPLIT.test, 10_000)
    score_EM = np.empty((SPLIT.test.num_events, M), np.float32)
    score_EM[event_N] = score_NM
    value_E = model.predict_values(SPLIT.test)
    asked = [(u, k) for u in range(4) for k in (0, 1, 5, 9)]
    queries = [_query(SPLIT.test, u, k) for u, k in asked]
    rows = [int(SPLIT.test.offset_U1[u]) + k for u, k in asked]
    np.testing.assert_allclose(recommender.affinities(queries), score_EM[rows], atol=1e-4)
    items = [[CATALOGUE.item_ids[SPLIT.test.item_E[row]]] for row in rows]
    rated = recommender.rate(queries, items)
    assert [r[0][0] for r in rated] == [i[0] for i in items]
    np.testing.assert_allclose([r[0][1] for r in rated], value_E[rows], atol=1e-4)


def test_batch_equals_single(recommender):
    queries = [_query(SPLIT.test, u, k) for u, k in ((0, 0), (1, 7), (2, 3), (3, 9))]
    ids = list(CATALOGUE.item_ids)
    for one, many in (
        (lambda q: recommender.recommend([q], 5)[0], recommender.recommend(queries, 5)),
        (lambda q: recommender.rank([q], [ids[:7]])[0], recommender.rank(queries, [ids[:7]] * 4)),
    ):
        for query, answer in zip(queries, many, strict=True):
            assert [r.item_id for r in one(query)] == [r.item_id for r in answer]
            np.testing.assert_allclose(
                [r.score for r in one(query)], [r.score for r in answer], atol=1e-4
            )
    together = recommender.rate(queries, [ids[:n] for n in (3, 0, 5, 1)])
    for query, answer, n in zip(queries, together, (3, 0, 5, 1), strict=True):
        ((*alone,),) = recommender.rate([query], [ids[:n]])
        assert [i for i, _ in alone] == [i for i, _ in answer]
        np.testing.assert_allclose([v for _, v in alone], [v for _, v in answer], atol=1e-5)
    assert recommender.rate([], []) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda q: replace(q, timestamp=q.timestamp + 86_400),
        lambda q: replace(q, user={**q.user, "group": "b" if q.user["group"] != "b" else "a"}),
        lambda q: replace(q, context={"device": "phone" if q.context != "phone" else "tv"}),
        lambda q: replace(q, history=[*q.history[:-1], replace(q.history[-1], event_type=None)]),
        lambda q: replace(q, history=[*q.history[:-1], replace(q.history[-1], value=5.0)]),
        lambda q: replace(q, history=q.history[:-1]),
    ],
    ids=["time", "user", "context", "type", "value", "history"],
)
def test_every_input_is_read(recommender, change):
    query = replace(_query(SPLIT.test, 0, 5), context={"device": "tv"})
    before, after = recommender.affinities([query, change(query)])
    assert np.abs(before - after).max() > 1e-4


def test_users_without_history_are_served_from_fields_and_context(recommender):
    at = 1_000_500_000.0
    nobody = Query([], at)
    known = Query([], at, user={"group": "a", "age": 30.0}, context={"device": "tv"})
    answers = recommender.recommend([nobody, known], 5)
    assert all(len(a) == 5 for a in answers)
    scores = recommender.affinities([nobody, known])
    assert np.isfinite(scores).all() and np.abs(scores[0] - scores[1]).max() > 1e-4


def test_values_that_do_not_fit_a_field_are_refused_by_name(recommender):
    with pytest.raises(InputError, match=r"user\.age: expected numeric"):
        recommender.check(Query([], 0.0, user={"age": "old"}))
    recommender.check(Query([], 0.0, user={"shoe_size": "unknown fields are not read"}))


def test_filters_on_every_kind_of_field(recommender):
    def ids(**kwargs):
        query = _query(SPLIT.test, 0, 5, filter=ItemFilter(**kwargs))
        return {r.item_id for r in recommender.recommend([query], 100)[0]}

    everything = set(CATALOGUE.item_ids)
    assert ids() == everything
    assert ids(include=frozenset({"i003", "nowhere"})) == {"i003"}
    assert ids(exclude=frozenset({"i003", "nowhere"})) == everything - {"i003"}
    assert ids(where={"genre": frozenset({"odd"})}) == {f"i{j:03d}" for j in range(1, M, 2)}
    assert ids(where={"year": frozenset({"1991"})}) == {f"i{j:03d}" for j in range(1, M, 5)}
    assert ids(where={"about": frozenset({"item number 7"})}) == {"i007"}
    assert ids(where={"genre": frozenset({"odd"}), "year": frozenset({"1990", "1991"})}) == {
        f"i{j:03d}" for j in range(M) if j % 2 and j % 5 < 2
    }
    with pytest.raises(InputError, match="colour"):
        ids(where={"colour": frozenset({"red"})})


def test_seen_items_unknown_items_and_more_than_there_are(recommender):
    query = _query(SPLIT.test, 0, 5, exclude_seen=True)
    seen = {event.item_id for event in query.history}
    answer = recommender.recommend([query], 1000)[0]
    assert {r.item_id for r in answer} == set(CATALOGUE.item_ids) - seen
    strange = [Event("never-heard-of", query.timestamp - 1), *query.history]
    np.testing.assert_array_equal(
        recommender.affinities([replace(query, history=strange)]), recommender.affinities([query])
    )
    assert [r.item_id for r in recommender.rank([query], [["i001", "never-heard-of"]])[0]] == [
        "i001"
    ]
    assert [i for i, _ in recommender.rate([query], [["never-heard-of", "i001"]])[0]] == ["i001"]


def test_rating_needs_a_log_with_values(tmp_path):
    plain = Recommender.load(_bundle(tmp_path / "b", replace(SPLIT.train, value_E=None)))
    assert not plain.rates
    with pytest.raises(InputError, match="predicts no values"):
        plain.rate([_query(SPLIT.test, 0, 5)], [["i001"]])


def test_bundles_with_foreign_transition_counts_are_refused(folder, tmp_path, recommender):
    import hashlib
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    counts = load_file(copy / bundles.TRANSITIONS)
    save_file(counts | {"item": counts["item"] + M}, copy / bundles.TRANSITIONS)
    manifest = json.loads((copy / "manifest.json").read_text())
    data = (copy / bundles.TRANSITIONS).read_bytes()
    manifest["files"][bundles.TRANSITIONS] = hashlib.sha256(data).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(bundles.BundleError, match="do not fit"):
        bundles.load(copy)
    (copy / bundles.TRANSITIONS).unlink()
    with pytest.raises(bundles.BundleError, match="missing"):
        bundles.load(copy)
