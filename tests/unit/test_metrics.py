"""Metrics against brute force and known answers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.baselines.popularity import Popularity
from model.evaluation import SplitSettings, evaluate, later_events, outcomes, split_users
from model.metrics import negative_log_likelihood, ranking_metrics, ranks
from tests import synthetic


@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    target=st.integers(0, 11),
)
def test_rank_is_the_mean_over_all_orders_of_ties(scores, target):
    target %= len(scores)
    own = scores[target]
    better = sum(s > own for s in scores)
    equal = sum(s == own for s in scores) - 1
    expected = np.mean([better + 1 + place for place in range(equal + 1)])
    got = ranks(torch.tensor([scores], dtype=torch.float32), torch.tensor([target]))
    assert got[0] == pytest.approx(expected)


def test_known_values():
    metrics = ranking_metrics(np.array([1.0, 2.0, 11.0]), 10)
    assert metrics["hit@10"] == pytest.approx(2 / 3)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 2) / 3)
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3)) / 3)
    assert metrics["precision@10"] == pytest.approx(2 / 30)


def test_nan_scores_do_not_win():
    score = torch.tensor([[float("nan"), 1.0, 2.0]])
    assert ranks(score, torch.tensor([0]))[0] == 3


def test_uniform_scores_have_ppl_of_the_catalogue():
    nll = negative_log_likelihood(torch.zeros(4, 7), torch.tensor([0, 1, 2, 3]))
    assert np.exp(nll.mean()) == pytest.approx(7)


def test_popularity_matches_a_loop():
    log = synthetic.successor(30, 8, 10, seed=1)
    split = split_users(log, SplitSettings())
    metrics = evaluate(Popularity(10).fit(split.train), split.test, 10, k=3)
    counts = np.bincount(split.train.item_E, minlength=10) + 1.0
    nll, hits, cases = 0.0, 0, 0
    for u in range(len(split.test)):
        start, end = split.test.offset_U1[u : u + 2]
        for j in split.test.item_E[start + 1 : end]:
            nll -= np.log(counts[j] / counts.sum())
            better, equal = (counts > counts[j]).sum(), (counts == counts[j]).sum() - 1
            hits += 1 + better + equal / 2 <= 3
            cases += 1
    assert metrics["every"]["cases"] == cases
    assert metrics["every"]["ppl"] == pytest.approx(np.exp(nll / cases), rel=1e-5)
    assert metrics["every"]["hit@3"] == pytest.approx(hits / cases)
    assert metrics["last"]["cases"] == len(split.test)


def test_blocks_do_not_change_results(monkeypatch):
    log = synthetic.successor(20, 8, 10, seed=1)
    model = Popularity(10).fit(log)
    whole = outcomes(model, log, 10)
    monkeypatch.setattr("model.evaluation.BLOCK_CELLS", 30)
    parts = outcomes(model, log, 10)
    np.testing.assert_array_equal(whole.rank_E, parts.rank_E)
    assert whole.coverage == parts.coverage


def test_split_is_by_user_complete_and_stable():
    log = synthetic.successor(50, 6, 10, seed=2)
    split = split_users(log, SplitSettings())
    parts = [set(p.user_ids) for p in (split.train, split.valid, split.test)]
    assert [len(p) for p in parts] == [36, 4, 10]
    assert set.union(*parts) == set(log.user_ids)
    assert split_users(log, SplitSettings()).test.user_ids == split.test.user_ids
    assert split_users(log, SplitSettings(seed=1)).test.user_ids != split.test.user_ids
    assert len(later_events(log)) == log.num_events - 50
