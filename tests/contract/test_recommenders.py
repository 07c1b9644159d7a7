"""One contract for everything that recommends: HRNN-meta with every encoder, and the baselines.

A model that peeks at what it is to predict, depends on the size of a block, or comes back
different from disk fails here.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model import bundle as bundles
from model.baselines.base import with_request
from model.baselines.factors import BayesianPersonalisedRanking
from model.baselines.popularity import Popularity, RecentPopularity
from model.baselines.ratings import (
    DampedBias,
    FactorizationMachine,
    ItemAutoRec,
    RollingAverage,
)
from model.baselines.transition_counts import TransitionCounts
from model.evaluation import evaluate
from model.network import NetworkSettings
from model.schema import Schema
from model.splits import SplitSettings, split_users
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend, snapshot_from_counts
from tests import synthetic

M = 20
NEXT_ITEM = {
    "popularity": Popularity,
    "recent-popularity": RecentPopularity,
    "transition-counts": TransitionCounts,
    "bpr": BayesianPersonalisedRanking,
}
VALUES = {
    "rolling-average": RollingAverage,
    "damped-bias": DampedBias,
    "factorization-machine": FactorizationMachine,
    "i-autorec": ItemAutoRec,
}
HRNN = {
    "gru": {},
    "lstm": {"encoder": "lstm"},
    "transformer": {"encoder": "transformer"},
    "hgru": {"encoder": "hgru"},
    "multi_hot": {"encoder": "multi_hot"},
    "untied": {"tied": False, "transitions": False},
}
CATALOGUE = synthetic.catalogue(M)
SCHEMA = Schema.parse({"users": {"group": "categorical"}})


def _log():
    log = synthetic.successor(80, 10, M, seed=0)
    rng = np.random.default_rng(0)
    value_E = np.where(rng.random(log.num_events) < 0.2, np.nan, rng.normal(size=log.num_events))
    kinds = np.array([("buy", "view")[j % 2] for j in log.item_E], dtype=object)
    log = replace(log, value_E=value_E, event_type_E=kinds)
    return log.with_user_fields({"group": [("a", "b", None)[u % 3] for u in range(len(log))]})


SPLIT = split_users(_log(), SplitSettings())


def _hrnn(name, seed=0):
    network = NetworkSettings(embedding=16, hidden=16, control=4, **HRNN[name])
    settings = TrainSettings(network=network, max_epochs=2, batch_events=128, seed=seed)
    trend = ResolvedTrend(86_400, 0, 1.0)
    return fit(SPLIT.train, SPLIT.valid, CATALOGUE, settings, trend, SCHEMA), settings


@pytest.fixture(scope="module")
def fitted():
    """Every model, fitted once: name → model."""
    models = {name: make(M).fit(SPLIT.train) for name, make in (NEXT_ITEM | VALUES).items()}
    return models | {name: _hrnn(name)[0] for name in HRNN}


def _scores(model, histories, block=1000):
    out = torch.full((histories.num_events, M), torch.nan)
    seen = np.zeros(histories.num_events, dtype=int)
    for event_N, score_NM in model.iter_scores(histories, block):
        seen[event_N] += 1
        out[event_N] = score_NM.float()
    assert (seen == 1).all(), "every event is scored exactly once"
    return out


def _assert_no_peeking(predict, histories, *, item_is_given):
    """Positions up to k must not notice that event k and later ones are others."""
    before = predict(histories)
    user, k = 2, 4
    at = histories.offset_U1[user] + k
    end = histories.offset_U1[user + 1]
    item_E = histories.item_E.copy()
    item_E[at + item_is_given : end] = (item_E[at + item_is_given : end] + 1) % M
    value_E = histories.value_E.copy()
    value_E[at:end] = 9.0
    kind_E = histories.event_type_E.copy()
    kind_E[at:end] = "buy"
    changed = predict(replace(histories, item_E=item_E, value_E=value_E, event_type_E=kind_E))
    np.testing.assert_allclose(changed[: at + 1], before[: at + 1], atol=1e-5)
    np.testing.assert_allclose(changed[end:], before[end:], atol=1e-5)
    return changed, before, slice(at + 1, end)


@pytest.mark.parametrize("name", [*NEXT_ITEM, *HRNN])
def test_scores_are_finite_and_the_same_in_any_block(fitted, name):
    whole = _scores(fitted[name], SPLIT.test)
    assert torch.isfinite(whole).all()
    for block in (1, 7):
        small = _scores(fitted[name], SPLIT.test, block)
        torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*NEXT_ITEM, *HRNN])
def test_a_user_alone_gets_what_the_batch_gets(fitted, name):
    whole = _scores(fitted[name], SPLIT.test)
    for user in (0, 3):
        rows = slice(SPLIT.test.offset_U1[user], SPLIT.test.offset_U1[user + 1])
        alone = _scores(fitted[name], SPLIT.test.subset(np.array([user])))
        torch.testing.assert_close(alone, whole[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*NEXT_ITEM, *HRNN])
def test_nothing_is_known_of_the_event_to_predict(fitted, name):
    changed, before, later = _assert_no_peeking(
        lambda log: _scores(fitted[name], log).numpy(), SPLIT.test, item_is_given=False
    )
    if name not in ("popularity", "recent-popularity"):
        assert not np.allclose(changed[later], before[later]), "the past is read"


def test_the_suite_notices_a_model_that_peeks():
    class Peeking:
        def iter_scores(self, histories, block):
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(histories.item_E), M)
            yield np.arange(histories.num_events), one_hot.float()

    with pytest.raises(AssertionError):
        _assert_no_peeking(
            lambda log: _scores(Peeking(), log).numpy(), SPLIT.test, item_is_given=False
        )


@pytest.mark.parametrize("name", [*NEXT_ITEM, *HRNN])
def test_users_with_one_event_and_users_with_none(fitted, name):
    log = SPLIT.test.where(SPLIT.test.user_E != 1)  # user 1 has no event left
    assert torch.isfinite(_scores(fitted[name], log)).all()
    first = np.zeros(SPLIT.test.num_events, dtype=bool)
    first[SPLIT.test.offset_U1[:-1]] = True
    whole = _scores(fitted[name], SPLIT.test)
    torch.testing.assert_close(
        _scores(fitted[name], SPLIT.test.where(first)), whole[first], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_baselines_recommend_from_the_last_event_on(fitted, name):
    model = fitted[name]
    lists = model.recommend(SPLIT.test, k=100)
    scores = _scores(model, with_request(SPLIT.test))
    for user, (items, values) in enumerate(lists):
        assert sorted(items) == list(range(M)), "k beyond the catalogue gives all of it"
        row = scores[SPLIT.test.offset_U1[user + 1] + user]
        np.testing.assert_allclose(values, row[items], atol=1e-5)
        assert (np.diff(values) <= 0).all()
    for user, (items, _) in enumerate(model.recommend(SPLIT.test, k=5, exclude_seen=True)):
        rows = slice(SPLIT.test.offset_U1[user], SPLIT.test.offset_U1[user + 1])
        assert not set(items) & set(SPLIT.test.item_E[rows])


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_next_item_baselines_come_back_from_disk(fitted, name, tmp_path):
    fitted[name].save(tmp_path / name)
    again = NEXT_ITEM[name].load(tmp_path / name)
    assert torch.equal(_scores(again, SPLIT.test), _scores(fitted[name], SPLIT.test))


@pytest.mark.parametrize("name", HRNN)
def test_hrnn_comes_back_from_disk(name, tmp_path):
    model, settings = _hrnn(name)
    snapshot = snapshot_from_counts(
        [], np.empty(0), num_items=M, smoothing=1.0, as_of=0, window_seconds=0
    )
    bundles.save(
        tmp_path / name,
        model=model,
        catalogue=CATALOGUE,
        schema=SCHEMA,
        settings=settings,
        trend=snapshot,
        metrics={},
    )
    again = bundles.load(tmp_path / name).model
    again.trend_log = model.trend_log
    assert torch.equal(_scores(again, SPLIT.test), _scores(model, SPLIT.test))
    np.testing.assert_array_equal(
        again.predict_values(SPLIT.test), model.predict_values(SPLIT.test)
    )


@pytest.mark.parametrize("name", [*NEXT_ITEM, *HRNN])
def test_same_seed_same_scores(fitted, name):
    again = _hrnn(name)[0] if name in HRNN else NEXT_ITEM[name](M).fit(SPLIT.train)
    torch.testing.assert_close(_scores(again, SPLIT.test), _scores(fitted[name], SPLIT.test))


@pytest.mark.parametrize("name", [n for n in NEXT_ITEM if "popularity" not in n])
def test_a_planted_sequence_is_found(fitted, name):
    ours = evaluate(fitted[name], SPLIT.test, M)["every"]["ppl"]
    assert ours < 0.95 * evaluate(fitted["popularity"], SPLIT.test, M)["every"]["ppl"]


@pytest.mark.parametrize("name", [*VALUES, *HRNN])
def test_values_are_predicted_without_seeing_them(fitted, name):
    predicted = fitted[name].predict_values(SPLIT.test)
    assert predicted.shape == (SPLIT.test.num_events,)
    assert np.isfinite(predicted).all()
    changed, before, later = _assert_no_peeking(
        fitted[name].predict_values, SPLIT.test, item_is_given=True
    )
    assert not np.allclose(changed[later], before[later]), "the values before are read"


@pytest.mark.parametrize("name", VALUES)
def test_value_baselines_come_back_from_disk(fitted, name, tmp_path):
    fitted[name].save(tmp_path / name)
    again = VALUES[name].load(tmp_path / name)
    np.testing.assert_array_equal(
        again.predict_values(SPLIT.test), fitted[name].predict_values(SPLIT.test)
    )


@pytest.mark.parametrize("name", VALUES)
def test_value_baselines_need_values(name):
    with pytest.raises(ValueError, match="no values"):
        VALUES[name](M).fit(replace(SPLIT.train, value_E=None))


def test_a_baseline_does_not_load_as_another(fitted, tmp_path):
    fitted["popularity"].save(tmp_path)
    with pytest.raises(bundles.BundleError, match="popularity"):
        TransitionCounts.load(tmp_path)
