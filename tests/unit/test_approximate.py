"""The approximate index: what it finds is scored exactly, and what it misses is measured."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import REGISTRY

from model import approximate, retrieval
from model.errors import InputError
from model.recommender import Recommender
from model.retrieval import Allowed, Ask, Retrieval, brute_force
from serving.predictor import Predictor
from serving.settings import ServeSettings
from tests.e2e.processes import ITEMS as BUNDLED
from tests.e2e.processes import random_bundle

pytest.importorskip("faiss")

ITEMS, SIZE = 20_000, 16
RECALL = 0.9


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """As if the catalogue were large."""
    monkeypatch.setattr(retrieval, "SMALL", 0)
    monkeypatch.setattr(approximate.Measured, "pays", True)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, SIZE), dtype=np.float32)
    w_MD = centres[rng.integers(50, size=ITEMS)]
    w_MD += 0.5 * rng.standard_normal(w_MD.shape, dtype=np.float32)
    return w_MD, rng.standard_normal(ITEMS, dtype=np.float32)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).standard_normal((64, SIZE), dtype=np.float32)


@pytest.fixture(scope="module")
def index(table, queries):
    index = Retrieval(*table)
    index.approximate(RECALL, queries)
    return index


def ask(x_D, top_n=50, allowed=None, bonus_item_S=(), bonus=0.0):
    item_S = np.array(bonus_item_S, dtype=np.int64)
    bonus_S = np.full(len(item_S), bonus, dtype=np.float32)
    return Ask(x_D, top_n, allowed or Allowed(ITEMS), item_S, bonus_S)


def recall(index, table, asks):
    """The share of the best items found; what is found is in order, with its exact scores."""
    hits = 0
    for one, found in zip(asks, index.top(asks), strict=True):
        everything = brute_force(*table, replace(one, top_n=ITEMS))
        score_M = np.full(ITEMS, np.nan)
        score_M[everything.item_C] = everything.score_C
        np.testing.assert_allclose(found.score_C, score_M[found.item_C], rtol=1e-5, atol=1e-5)
        assert len(found.item_C) == one.top_n and (np.diff(found.score_C) <= 0).all()
        hits += len(np.intersect1d(everything.item_C[: one.top_n], found.item_C))
    return hits / sum(one.top_n for one in asks)


def test_what_is_found_is_scored_exactly_and_the_measured_recall_is_that_of_other_queries(
    index, table, queries
):
    measured = index.approximate(RECALL, queries, like=index)
    assert measured.recall >= RECALL - 0.03 and measured.probes < measured.lists
    others = np.random.default_rng(2).standard_normal((40, SIZE), dtype=np.float32)
    found = recall(index, table, [ask(x_D) for x_D in others])
    assert found >= measured.recall - 0.03
    assert found < 1.0, "approximate indeed"


def test_a_higher_recall_takes_more_lists(table, queries, index):
    more = Retrieval(*table).approximate(0.999, queries, like=index)
    assert more.recall >= 0.98
    assert more.probes > index.approximate(RECALL, queries, like=index).probes


def test_excluded_items_never_come_and_changed_ones_always_do_as_they_should(index, table, queries):
    w_MD, b_M = table
    best = brute_force(w_MD, b_M, ask(queries[0])).item_C
    excluded = np.sort(best[:30])
    last = np.argsort(w_MD @ queries[0] + b_M)[:3]  # nothing but their bonus brings them in
    one = ask(queries[0], 50, Allowed(ITEMS, exclude=excluded), np.sort(last), 100.0)
    (found,) = index.top([one])
    assert set(found.item_C[:3]) == set(last)
    assert not set(found.item_C) & set(excluded)
    assert recall(index, table, [one]) >= 0.8


@pytest.mark.parametrize(
    "change",
    [
        {"top_n": 1000},
        {"allowed": Allowed(ITEMS, mask=np.arange(ITEMS) % 3 == 0)},
        {"allowed": Allowed(ITEMS, exclude=np.arange(5000))},
        {"allowed": Allowed(ITEMS, include=np.arange(0, ITEMS, 7))},
    ],
)
def test_what_the_index_is_not_made_for_stays_exact(index, table, queries, change):
    one = ask(queries[3], **change)
    (found,) = index.top([one])
    np.testing.assert_array_equal(found.item_C, brute_force(*table, one).item_C)


def test_where_it_does_not_pay_the_search_stays_exact(table, queries, monkeypatch):
    monkeypatch.setattr(approximate.Measured, "pays", False)
    index = Retrieval(*table)
    index.approximate(0.3, queries)
    for x_D in queries[:5]:
        (found,) = index.top([ask(x_D)])
        np.testing.assert_array_equal(found.item_C, brute_force(*table, ask(x_D)).item_C)


def test_without_faiss_a_person_is_told_what_to_install(table, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install 'hrnn-meta\[ann\]'"):
        Retrieval(*table).approximate(RECALL, queries)


def test_a_predictor_measures_at_load_reports_and_keeps_it_with_new_items(tmp_path):
    bundle = random_bundle(tmp_path / "bundle")
    settings = ServeSettings(model_dir=str(bundle), retrieval_recall=0.5, approximate_from=10)
    Predictor(settings).load()
    assert 0.5 <= REGISTRY.get_sample_value("hrnn_retrieval_recall") <= 1
    recommender = Recommender.load(bundle)
    measured = recommender.approximate(0.5)
    extended = recommender.with_items({"new": {}})
    assert recommender.recall == measured.recall
    assert len(extended.item_ids) == len(BUNDLED) + 1
    assert extended.retrieval._approximate._empty is recommender.retrieval._approximate._empty
    Predictor(settings.model_copy(update={"approximate_from": 10_000})).load()
    assert REGISTRY.get_sample_value("hrnn_retrieval_recall") == 1, "too small for it"


def test_an_index_that_did_not_pay_is_not_made_again_for_every_new_item(tmp_path, monkeypatch):
    monkeypatch.setattr(approximate.Measured, "pays", False)
    recommender = Recommender.load(random_bundle(tmp_path / "bundle"))
    recommender.approximate(0.5)
    made = []
    monkeypatch.setattr(retrieval, "ApproximateIndex", lambda *_: made.append(1))
    assert recommender.with_items({"new": {}}).recall == 1.0
    assert made == []
