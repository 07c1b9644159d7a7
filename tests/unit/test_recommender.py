"""The recommender on a log with everything: fields, feedback, values, request context."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.train import steps
from model import bundle as bundles
from model import retrieval
from model.encoders import EncoderKind
from model.errors import BundleError, InputError
from model.field_values import FieldValues
from model.manifest import MANIFEST, digest_of_file
from model.query import Event, ItemFilter, Query
from model.recommender import Recommender
from model.schema import Schema
from model.tables import Log
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend, snapshot_from_counts
from tests import synthetic

M = 24
IDS = [f"i{j:03d}" for j in range(M)]
START = 1_000_000_000
TRAIN = {
    "max_epochs": 2,
    "learning_rate": 0.01,
    "batch_events": 256,
    "network": {"embedding": 8, "hidden": 16, "control": 4},
}


def write_rich(path):
    """Clean tables whose events have types, values and a device; items of every field kind."""
    clean = synthetic.clean_tables(path, synthetic.successor(80, 12, M, seed=0))
    synthetic.add_users(clean)
    rng = np.random.default_rng(1)
    events = pq.read_table(clean / "interactions.parquet")
    n = len(events)
    number = np.array([int(i[1:]) for i in events.column("item_id").to_pylist()])
    value = np.where(rng.random(n) < 0.2, np.nan, 1.0 + number % 5)
    columns = {
        "event_type": rng.choice(["play", "skip", "buy"], n).tolist(),
        "event_value": pa.array(value, from_pandas=True),
        "device": [None if j % 11 == 0 else ["tv", "phone"][j % 2] for j in range(n)],
        "volume": rng.uniform(0, 10, n).tolist(),
    }
    for name, column in columns.items():
        events = events.append_column(name, pa.array(column))
    pq.write_table(events, clean / "interactions.parquet")
    items = pq.read_table(clean / "items.parquet")
    colours = [None if j == 0 else ["red", "green", "blue"][j % 3] for j in range(M)]
    items = items.append_column("colour", pa.array(colours))
    items = items.append_column("blurb", pa.array([f"The number {j % 4}" for j in range(M)]))
    pq.write_table(items, clean / "items.parquet")
    schema = Schema.load(clean / "schema.json").model_dump(mode="json")
    schema["items"] |= {"colour": "categorical", "blurb": "text"}
    schema["context"] = {"device": "categorical", "volume": "numeric"}
    Schema.parse(schema).save(clean / "schema.json")
    return clean


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return write_rich(tmp_path_factory.mktemp("rich") / "clean")


@pytest.fixture(scope="module")
def path(clean, tmp_path_factory):
    path = tmp_path_factory.mktemp("rich-model") / "bundle"
    steps.run(clean, path, trend={}, settings=TRAIN)
    return path


@pytest.fixture(scope="module")
def recommender(path):
    return Recommender.load(path)


def events(*items, kind="play", value=3.0):
    return [Event(i, START + 600.0 * n, kind, value) for n, i in enumerate(items)]


def query(*items, at=START + 86_400.0, **more):
    return Query(events(*items), at, **more)


def long_history(length):
    rng = np.random.default_rng(length)
    return [
        Event(
            IDS[rng.integers(M)],
            START + 600.0 * n,
            [None, "play", "skip", "unheard of"][rng.integers(4)],
            [None, 1.0, 4.5][rng.integers(3)],
        )
        for n in range(length)
    ]


QUERIES = [
    Query([], START),
    query("i003"),
    Query(long_history(7), START + 9000.0, {"group": "a", "age": 31.0}, {"device": "tv"}),
    Query(long_history(260), START + 10**6, {"group": "b"}, {"device": "phone", "volume": 3.0}),
    Query([], START, {"age": 60.0}, {"volume": 9.0}),
    Query([Event("never heard of", START)], START + 5.0),
]


def test_a_batch_equals_single_queries(recommender):
    single = np.concatenate([recommender.affinities([q]) for q in QUERIES])
    np.testing.assert_allclose(recommender.affinities(QUERIES), single, atol=1e-5)
    lists = [IDS[k : 3 * k] for k in range(1, len(QUERIES) + 1)]
    batches = (
        recommender.recommend(QUERIES, 5),
        recommender.rank(QUERIES, lists),
        recommender.rate(QUERIES, lists),
    )
    for k, (q, items) in enumerate(zip(QUERIES, lists, strict=True)):
        alone = recommender.recommend([q], 5), recommender.rank([q], [items])
        for batch, [one] in zip(batches[:2], alone, strict=True):
            assert [r.item_id for r in batch[k]] == [r.item_id for r in one]
            assert [r.score for r in batch[k]] == pytest.approx([r.score for r in one], abs=1e-5)
        [rated] = recommender.rate([q], [items])
        assert [i for i, _ in batches[2][k]] == [i for i, _ in rated] == items
        assert [v for _, v in batches[2][k]] == pytest.approx([v for _, v in rated], abs=1e-5)


def test_nothing_asked_is_nothing_answered(recommender):
    assert (
        recommender.recommend([], 3) == recommender.rank([], []) == recommender.rate([], []) == []
    )
    assert recommender.rate([QUERIES[1]], [[]]) == recommender.rank([QUERIES[1]], [[]]) == [[]]


ROUNDING = 1e-6  # of equal queries in different rows of one matrix product


def changed(recommender, one, other):
    phi = recommender.affinities([one, other])
    return np.abs(phi[0] - phi[1]).max()


def test_feedback_in_the_history_changes_the_answer(recommender):
    liked = Query(events("i003", "i008", value=5.0), START + 9000.0)
    disliked = Query(events("i003", "i008", value=1.0), START + 9000.0)
    skipped = Query(events("i003", "i008", kind="skip", value=5.0), START + 9000.0)
    untold = Query(events("i003", "i008", kind=None, value=None), START + 9000.0)
    for other in (disliked, skipped, untold):
        assert changed(recommender, liked, other) > 1e-4
    [[(_, high)], [(_, low)]] = recommender.rate([liked, disliked], [["i005"]] * 2)
    assert high > low
    # A type the log did not have is no type.
    unheard = Query(events("i003", kind="unheard of"), START + 9000.0)
    assert (
        changed(recommender, unheard, Query(events("i003", kind=None), START + 9000.0)) < ROUNDING
    )


def test_context_changes_the_answer(recommender):
    tv, phone = (query("i003", context={"device": d}) for d in ("tv", "phone"))
    loud = query("i003", context={"device": "tv", "volume": 9.5})
    assert changed(recommender, tv, phone) > 1e-4
    assert changed(recommender, tv, loud) > 1e-4
    unread = query("i003", context={"device": "tv", "moon": "full", "volume": None})
    assert changed(recommender, tv, unread) < ROUNDING
    unheard = query("i003", context={"device": "fridge"})
    assert changed(recommender, unheard, query("i003")) < ROUNDING


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("context", {"volume": "loud"}, r"context\.volume: expected numeric, got str"),
        ("context", {"volume": ("1", "2")}, r"context\.volume: expected numeric, got tuple"),
        ("context", {"device": ("tv", "phone")}, r"context\.device: expected categorical, got tup"),
        ("user", {"age": "old"}, r"user\.age: expected numeric, got str"),
        ("user", {"group": ("a", "b")}, r"user\.group: expected categorical, got tuple"),
    ],
)
def test_a_value_that_does_not_fit_its_kind_is_refused_by_name(
    recommender, section, values, message
):
    with pytest.raises(InputError, match=message):
        recommender.check(query(**{section: values}))


def test_values_that_fit_are_accepted(recommender):
    for q in QUERIES:
        recommender.check(q)
    recommender.check(query(context={"volume": 3, "device": "fridge", "else": ("x",)}))


def test_users_without_history_are_served_from_fields_and_context(recommender):
    plain = Query([], START)
    for more in (
        {"user": {"group": "a"}},
        {"user": {"age": 66.0}},
        {"context": {"device": "phone"}},
        {"context": {"volume": 0.5}},
    ):
        assert changed(recommender, plain, replace(plain, **more)) > 1e-4
    [items] = recommender.recommend([plain], M)
    assert len(items) == M
    assert np.isfinite([i.score for i in items]).all()


def test_filters_on_every_kind_of_field(recommender):
    def passing(item_filter, **more):
        [items] = recommender.recommend([query("i002", "i004", filter=item_filter, **more)], M)
        return sorted(int(i.item_id[1:]) for i in items)

    def where(**values):
        return ItemFilter(where={name: frozenset(v) for name, v in values.items()})

    assert passing(where(colour=["red"])) == list(range(3, M, 3))  # item 0 has no colour
    assert passing(where(colour=["red", "blue"])) == sorted([*range(3, M, 3), *range(2, M, 3)])
    assert passing(where(colour=["red"], genres=["even"])) == list(range(6, M, 6))
    assert passing(where(genres=["odd"])) == list(range(1, M, 2))
    assert passing(where(year=["1993", "1994.0"])) == [j for j in range(M) if j % 5 > 2]
    assert passing(where(blurb=["The number 2"])) == list(range(2, M, 4))
    assert passing(where(title=["Item 7"])) == [7]
    assert passing(where(colour=["mauve"])) == passing(where(colour=[])) == []
    some = ItemFilter(include=frozenset(["i001", "i002", "unknown"]), exclude=frozenset(["i001"]))
    assert passing(some) == [2]
    assert passing(ItemFilter(), exclude_seen=True) == [j for j in range(M) if j not in (2, 4)]
    assert passing(ItemFilter(include=frozenset())) == []
    assert set(recommender.fields) == {"genres", "year", "colour", "blurb", "title"}


def test_filters_see_new_and_changed_items_and_read_no_others_again(recommender, monkeypatch):
    recommender.prepare_filters()
    read = []
    begin = FieldValues.__init__

    def counted(self, column_M, kind):
        read.append(len(column_M))
        begin(self, column_M, kind)

    monkeypatch.setattr(FieldValues, "__init__", counted)
    # "a" comes before all others, "i003a" between them; i003 was red, i006 too, and is left alone.
    new = {
        "a": {"colour": "red", "genres": ["even", "new"], "year": 1994},
        "i003a": {"colour": "mauve", "year": 9007199254740993},
    }
    grown = recommender.with_items(new | {"i003": {"colour": "mauve"}})
    grown.prepare_filters()
    assert read == [3] * 4

    def passing(**values):
        item_filter = ItemFilter(where={name: frozenset(v) for name, v in values.items()})
        allowed_M = grown.allowed(query("i002", filter=item_filter))
        return [i for i, allowed in zip(grown.item_ids, allowed_M, strict=True) if allowed]

    red = [f"i{j:03d}" for j in range(6, M, 3)]
    assert passing(colour=["red"]) == ["a", *red]
    assert passing(colour=["mauve"]) == ["i003", "i003a"]
    assert passing(genres=["new"]) == ["a"]
    assert passing(year=["1994"]) == ["a", *(f"i{j:03d}" for j in range(M) if j % 5 == 4)]
    again = grown.with_items({"b": {"colour": "red"}})  # of the bundle, not of what was added
    assert again.allowed(query("i002", filter=ItemFilter(where={"colour": {"red"}}))).sum() == (
        len(red) + 2
    )


def test_k_beyond_the_catalogue_gives_all_allowed_items(recommender):
    q = query("i002", exclude_seen=True, filter=ItemFilter(exclude=frozenset(["i005"])))
    [all_items], [everything] = recommender.recommend([q], 10**6), recommender.recommend([q], M)
    assert all_items == everything
    assert {i.item_id for i in all_items} == set(IDS) - {"i002", "i005"}


FILTERS = [
    ItemFilter(),
    ItemFilter(exclude=frozenset(["i003", "i009", "nowhere"])),
    ItemFilter(include=frozenset(["i002", "i005", "i011", "nowhere"])),
    ItemFilter(where={"colour": frozenset(["red", "blue"])}),
    ItemFilter(include=frozenset(IDS[3:20]), where={"colour": frozenset(["green"])}),
    ItemFilter(include=frozenset()),
]


@pytest.mark.parametrize("method", ["float32", "int8"])
@pytest.mark.parametrize("seen", [False, True])
def test_what_is_retrieved_is_what_scoring_and_sorting_give(recommender, monkeypatch, seen, method):
    monkeypatch.setattr(retrieval, "SMALL", 0)
    w_MD, b_M = recommender._w_MD.numpy(), recommender._b_M.numpy()
    index = retrieval.Retrieval(w_MD, b_M, retrieval.Method(method))
    monkeypatch.setattr(recommender, "retrieval", index)
    queries = [replace(q, filter=f, exclude_seen=seen) for q in QUERIES for f in FILTERS]
    restrictions = [recommender.restriction(q) for q in queries]
    extras = [np.arange(M) * 0.25 if n % 5 == 4 else None for n in range(len(queries))]
    phi_BM = recommender.affinities(queries).astype(np.float64)
    for phi_M, extra_M in zip(phi_BM, extras, strict=True):
        phi_M += 0.0 if extra_M is None else extra_M
    for batch_from, top_n in ((1, 1), (100, 1), (1, 5), (100, 5), (1, M), (100, 10**9), (1, 0)):
        index.batch_from = batch_from
        asks = recommender.asks(queries, restrictions, [top_n] * len(queries), extras)
        more, trending = [*IDS[5:15], "nowhere"], ["lost", *IDS[::-3]]
        lists = [recommender.listed(trending) if n % 3 else None for n in range(len(queries))]
        answers = recommender.retrieve(asks, [more] * len(queries), lists)
        for query, phi_M, listed, answer in zip(queries, phi_BM, lists, answers, strict=True):
            allowed = {IDS[j] for j in np.flatnonzero(recommender.allowed(query))}
            phi = {i: float(v) for i, v in zip(IDS, phi_M, strict=True) if i in allowed}
            assert answer.exhausted == (top_n >= len(allowed))
            assert len(answer.item_ids) == len(set(answer.item_ids)) == min(top_n, len(allowed))
            expected = sorted(phi.values(), reverse=True)[:top_n]
            np.testing.assert_allclose(answer.affinity_C, expected, atol=ROUNDING)
            for items, affinities in (
                (answer.item_ids, answer.affinity_C),
                (more, answer.affinity_A),
                (trending if listed else [], answer.affinity_T),
            ):
                expected = [phi.get(i, np.nan) for i in items]
                np.testing.assert_allclose(affinities, expected, atol=ROUNDING)


def test_unknown_ids_are_skipped(recommender):
    known = events("i003", "i008")
    odd = [known[0], Event("gone", START + 300.0, "buy", 1.0), known[1]]
    odd += [Event("lost", START + 900.0, "skip", 5.0)]
    assert changed(recommender, Query(known, START + 9e3), Query(odd, START + 9e3)) < ROUNDING
    [ranked] = recommender.rank([query()], [["gone", "i004", "lost"]])
    assert [r.item_id for r in ranked] == ["i004"]
    [rated] = recommender.rate([query()], [["i009", "gone", "i004", "lost", "i009"]])
    assert [i for i, _ in rated] == ["i009", "i004", "i009"]
    assert recommender.rate([query()], [["gone"]]) == [[]]


def test_histories_are_read_in_order_of_time(recommender):
    history = long_history(20)
    shuffled = [history[n] for n in np.random.default_rng(0).permutation(20)]
    assert (
        changed(recommender, Query(history, START + 1e6), Query(shuffled, START + 1e6)) < ROUNDING
    )


def test_values_are_predicted_on_the_scale_of_the_log(recommender):
    assert recommender.rates
    [rated] = recommender.rate([query("i003")], [IDS])
    value = np.array([v for _, v in rated])
    # The log's values are 1 + j % 5, less than damped averages know of them.
    assert np.corrcoef(value, [1 + j % 5 for j in range(M)])[0, 1] > 0.9
    assert 0.5 < value.min() < value.max() < 5.5


def test_a_model_without_values_says_so(tmp_path):
    clean = synthetic.clean_tables(tmp_path / "clean", synthetic.successor(40, 6, M, seed=0))
    steps.run(clean, tmp_path / "bundle", trend={}, settings=TRAIN | {"max_epochs": 1})
    recommender = Recommender.load(tmp_path / "bundle")
    assert not recommender.rates
    with pytest.raises(InputError, match="predicts no values: its training log had none"):
        recommender.rate([query("i003")], [["i004"]])


# The model in memory and the one read back, for every encoder and the other switches.

VARIANTS = {
    **{kind.value: {"encoder": kind.value} for kind in EncoderKind},
    "untied": {"tied": False},
    "no transitions": {"transitions": False},
    "untied, no transitions": {"tied": False, "transitions": False},
    "no inputs but items": {
        "time_input": False,
        "feedback": False,
        "user_fields": False,
        "item_fields": False,
        "request_context": False,
    },
    "no ratings": {"ratings": False},
}


@pytest.fixture(scope="module")
def log(clean):
    return Log.read(clean)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, log, tmp_path_factory):
    """A trained model in memory, and the recommender of its bundle."""
    settings = TrainSettings.parse(
        TRAIN | {"max_epochs": 1, "network": TRAIN["network"] | VARIANTS[request.param]}
    )
    model = fit(
        log.histories.subset(np.arange(60)),
        log.histories.subset(np.arange(60, 80)),
        log.catalogue,
        settings,
        ResolvedTrend(period_seconds=86_400, window_seconds=0, smoothing=1.0),
        log.schema,
    )
    trend = snapshot_from_counts(
        IDS, np.arange(M), num_items=M, smoothing=1.0, as_of=START, window_seconds=0
    )
    path = tmp_path_factory.mktemp("variant") / "bundle"
    parts = {
        "model": model,
        "catalogue": log.catalogue,
        "schema": log.schema,
        "settings": settings,
        "trend": trend,
        "metrics": {},
    }
    manifest = bundles.save(path, **parts)
    assert (bundles.TRANSITIONS in manifest.files) == settings.network.transitions
    return bundles.Bundle(manifest, **parts), path


def test_what_is_read_back_is_equal_to_the_last_digit(pair):
    bundle, path = pair
    before, after = Recommender(bundle), Recommender.load(path)
    np.testing.assert_array_equal(before.affinities(QUERIES), after.affinities(QUERIES))
    lists = [IDS] * len(QUERIES)
    assert before.rank(QUERIES, lists) == after.rank(QUERIES, lists)
    assert before.rates == after.rates
    if before.rates:
        assert before.rate(QUERIES, lists) == after.rate(QUERIES, lists)


def test_serving_reads_what_training_read(pair, log):
    """At every position of some users, the recommender gives the scores of the evaluation."""
    bundle, path = pair
    recommender, model = Recommender.load(path), bundle.model
    users = log.histories.subset(np.arange(70, 76))
    queries = as_queries(users)
    evaluated = replace(model, trend_log=None)  # affinities: without trend
    phi = np.empty((users.num_events, M))
    for event_N, score_NM in evaluated.iter_scores(users, 64):
        phi[event_N] = score_NM.numpy()
    np.testing.assert_allclose(recommender.affinities(queries), phi, atol=1e-5)
    if recommender.rates:
        targets = [[IDS[j]] for j in users.item_E]
        rated = [v for [(_, v)] in recommender.rate(queries, targets)]
        np.testing.assert_allclose(rated, model.predict_values(users), atol=1e-5)


def asked(recommender, queries):
    """Query vectors and transition bonuses."""
    free = [recommender.restriction(q) for q in queries]
    nothing = [None] * len(queries)
    asks = recommender.asks(queries, free, [3] * len(queries), nothing)
    bonus = np.zeros((len(queries), M), dtype=np.float32)
    for b, ask in enumerate(asks):
        bonus[b, ask.bonus_item_S] = ask.bonus_S
    return np.stack([ask.x_D for ask in asks]), bonus


@pytest.mark.parametrize("lockstep", [1, 10**9])
def test_histories_are_read_as_in_a_batch(pair, log, monkeypatch, lockstep):
    """By the network, all at once and one by one; anew, and on from a kept state."""
    monkeypatch.setattr("model.lean.LOCKSTEP", lockstep)
    queries = [*QUERIES, *as_queries(log.histories.subset(np.arange(70, 73)))]
    network = Recommender.load(pair[1])
    network._lean = None
    expected = asked(network, queries)
    recommender = Recommender.load(pair[1])
    for _ in range(2):
        for found, one in zip(asked(recommender, queries), expected, strict=True):
            np.testing.assert_allclose(found, one, atol=1e-5)
    single = Recommender.load(pair[1])
    for b, query in enumerate(queries):
        for found, one in zip(asked(single, [query]), expected, strict=True):
            np.testing.assert_allclose(found[0], one[b], atol=1e-5)


@pytest.fixture
def kept(path):
    """A recommender that keeps states, and one that does not."""
    first, second = Recommender.load(path), Recommender.load(path)
    second._lean.states.limit = 0
    return first, second


def test_a_kept_state_is_advanced_by_what_is_new(kept):
    recommender, fresh = kept
    history = long_history(40)
    for length in (0, 1, 2, 3, 5, 5, 12, 13, 30, 40):
        for late in (0.0, 5000.0):  # the same state, at another request time
            query = Query(history[:length], history[max(length, 1) - 1].timestamp + late)
            before = recommender._lean.read(query, query.history)
            np.testing.assert_allclose(
                before.x_D, fresh._lean.read(query, query.history).x_D, atol=1e-5
            )
    grown = [*history, Event("i004", history[-1].timestamp + 60.0, "play", 2.0)]
    query = Query(grown, grown[-1].timestamp)
    assert recommender._lean.read(query, grown).steps == 2  # the event, and the request
    assert fresh._lean.read(query, grown).steps == len(grown) + 1


CHANGES = {
    "a late event": lambda h: sorted([*h, Event("i007", h[4].timestamp + 1.0)], key=_time),
    "the oldest one dropped": lambda h: h[1:],
    "another item": lambda h: [*h[:3], replace(h[3], item_id="i011"), *h[4:]],
    "another time": lambda h: [*h[:3], replace(h[3], timestamp=h[3].timestamp + 3.0), *h[4:]],
    "another value": lambda h: [*h[:3], replace(h[3], value=2.0), *h[4:]],
    "another type": lambda h: [*h[:3], replace(h[3], event_type="buy"), *h[4:]],
    "another last item": lambda h: [*h[:-1], replace(h[-1], item_id="i001")],
    "another last value": lambda h: [*h[:-1], replace(h[-1], value=5.0)],
}


def _time(event):
    return event.timestamp


@pytest.mark.parametrize("case", CHANGES)
def test_a_history_whose_past_changed_is_read_anew(kept, case):
    recommender, fresh = kept
    history = [replace(e, event_type="play", value=1.0) for e in long_history(20)]
    query = Query(history, START + 10**5, {"group": "a", "age": 31.0})
    recommender._lean.read(query, history)
    changed_history = CHANGES[case](history)
    for other in (query, replace(query, user={"group": "b"})):
        read = recommender._lean.read(other, changed_history)
        expected = fresh._lean.read(other, changed_history)
        np.testing.assert_allclose(read.x_D, expected.x_D, atol=1e-5)
        if not case.startswith("another last"):
            assert read.steps == len(changed_history) + 1


def test_only_so_many_states_are_kept(kept):
    lean = kept[0]._lean
    lean.states.limit = 3
    for user in range(10):
        history = [replace(e, item_id=IDS[user]) for e in long_history(4)]
        lean.read(Query(history, START + 10**5), history)
    assert len(lean.states._states) == 3
    lean.read(Query(history, START + 10**5), history)
    assert lean.read(Query(history, START + 10**5), history).steps == 1


def test_another_model_reads_ahead_what_was_read_last(kept, path):
    recommender, fresh = kept
    history = long_history(30)
    users = ({"group": "a", "age": 31.0, "hobby": "x"}, {"group": "b"}, {})
    queries = [Query(history[: 10 + b], START + 10**5, user) for b, user in enumerate(users)]
    for query in queries:
        recommender._lean.read(query, query.history)
    grown = replace(queries[0], history=history[:12])
    recommender._lean.read(grown, grown.history)
    recent = recommender.recent()
    assert [len(one.query.history) for one in recent] == [12, 12, 11], "the grown one once"
    assert recent[0].query.user == {"group": "a", "age": 31.0}, "what the model reads"
    unreadable = replace(recent[1], query=replace(queries[1], user={"age": "old"}))
    other, third = Recommender.load(path), Recommender.load(path)
    other.read_ahead([unreadable, *recent])
    assert other.recent() == recent, "in the same order, asked for when they were"
    third.read_ahead(other.recent())
    assert third.recent() == recent
    for query in (grown, *queries[1:]):
        for one in (other, third):
            read = one._lean.read(query, query.history)
            assert read.steps == 1, "the request alone"
            expected = fresh._lean.read(query, query.history)
            np.testing.assert_allclose(read.x_D, expected.x_D, atol=1e-5)
    assert fresh.recent() == [], "keeps none"


def test_a_history_that_slides_is_read_on_and_equals_the_whole_reading(kept, path):
    recommender, fresh = kept
    network = Recommender.load(path)
    network._lean = None  # reads by batches
    history = long_history(190)
    steps = []
    for end in range(90, 190):
        window = history[end - 90 : end]
        query = Query(window, window[-1].timestamp + 60.0, {"group": "a"})
        read = recommender._lean.read(query, window)
        assert len(read.item_L) == 90, "counts see the whole history"
        steps.append(read.steps)
        if end % 9 == 0:
            one = fresh._lean.read(query, window)
            np.testing.assert_allclose(read.x_D, one.x_D, atol=1e-5)
            for found, expected in zip(
                asked(recommender, [query]), asked(network, [query]), strict=True
            ):
                np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(steps) <= 91
    assert steps.count(2) > 75, "most add one event to a kept state"


def test_states_stay_valid_when_items_come_and_change(kept):
    recommender, fresh = kept
    history = long_history(20)
    query = Query(history, START + 10**5)
    recommender._lean.read(query, history)
    changed = next(i for i in IDS if i != history[-1].item_id and i in {e.item_id for e in history})
    for items, anew in (
        ({"a": {}, "zz": {}}, False),
        ({"a": {}, "ab": {}}, False),
        ({changed: {}, "a": {}}, True),  # its vector is another one
        ({changed: {}, "b": {}}, False),  # as just before
        ({}, False),
    ):
        extended = recommender.with_items(items)
        expected = fresh.with_items(items)._lean.read(query, history)
        read = extended._lean.read(query, history)
        np.testing.assert_allclose(read.x_D, expected.x_D, atol=1e-5)
        assert (read.steps > 1) == anew, items


@pytest.mark.parametrize("value", [1e30, 1.7e308])
def test_absurd_values_in_a_history_leave_numbers_finite(pair, value):
    recommender = Recommender.load(pair[1])
    history = [replace(e, value=value * (-1) ** (n // 3)) for n, e in enumerate(long_history(20))]
    for length in (1, 7, 20):
        odd = Query(history[:length], START + 9e4)
        assert np.isfinite(recommender.affinities([odd])).all()
        if recommender.rates:
            [rated] = recommender.rate([odd], [IDS])
            assert np.isfinite([v for _, v in rated]).all()


def as_queries(histories):
    """Every event of a log as the request that led to it."""
    queries = []
    for e in range(histories.num_events):
        user = int(histories.user_E[e])
        past = range(int(histories.offset_U1[user]), e)
        queries.append(
            Query(
                [
                    Event(
                        IDS[histories.item_E[p]],
                        float(histories.timestamp_E[p]),
                        histories.event_type_E[p],
                        None if np.isnan(histories.value_E[p]) else float(histories.value_E[p]),
                    )
                    for p in past
                ],
                float(histories.timestamp_E[e]),
                {name: column[user] for name, column in histories.user_fields.items()},
                {name: column[e] for name, column in histories.context_fields.items()},
            )
        )
    return queries


def test_scores_with_trend_equal_those_of_the_evaluation(recommender, clean):
    """φ̃ + β·log q at one position, with the log q(t) of the evaluation as the snapshot."""
    log = Log.read(clean)
    loaded = recommender._bundle.model
    model = replace(loaded, trend_log=log.histories)
    users = log.histories.subset(np.arange(3))
    table = model.trend_table(users)
    for event_N, score_NM in model.iter_scores(users, 64):
        for e, score_M in zip(event_N[:10], score_NM[:10].numpy(), strict=True):
            log_q_M = table.log_q_PM[table.row_of(users.timestamp_E[[e]])[0]].astype(float)
            order = np.argsort(-log_q_M, kind="stable")
            snapshot = replace(
                recommender.trend,
                item_ids=tuple(IDS[j] for j in order),
                log_q=log_q_M[order],
            )
            [ranked] = recommender.rank([as_queries(users)[e]], [IDS], trend=snapshot)
            served = {r.item_id: r.score for r in ranked}
            np.testing.assert_allclose([served[i] for i in IDS], score_M, atol=1e-5)


# A bundle with the wrong transition counts.


def _resign(path):
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {f.name: digest_of_file(f) for f in path.iterdir() if f.name != MANIFEST}
    (path / MANIFEST).write_text(json.dumps(manifest))


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def _other_catalogue(file):
    tensors = load_file(file)
    tensors["offset"] = torch.cat([tensors["offset"], tensors["offset"][-1:]])
    save_file(tensors, file)


def _item_beyond_the_catalogue(file):
    tensors = load_file(file)
    tensors["item"][0] = M
    save_file(tensors, file)


def _lacks_an_array(file):
    tensors = load_file(file)
    del tensors["probability"]
    save_file(tensors, file)


DAMAGE = {
    "missing": (lambda file: file.unlink(), "No such file"),
    "truncated": (_truncate, "cannot be loaded"),
    "other catalogue": (_other_catalogue, "do not fit the catalogue"),
    "unknown item": (_item_beyond_the_catalogue, "do not fit the catalogue"),
    "no probabilities": (_lacks_an_array, "probability"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("signed", [False, True])
def test_transition_counts_that_do_not_fit_are_refused(case, signed, path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "bundle")
    damage, message = DAMAGE[case]
    damage(copy / bundles.TRANSITIONS)
    if signed:  # the digests are right, the contents are not
        _resign(copy)
    else:
        message = "transitions.safetensors (is missing|does not match its digest)"
    with pytest.raises(BundleError, match=message):
        Recommender.load(copy)
