"""Metrics against brute force and known answers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.baselines.popularity import Popularity
from model.evaluation import SplitSettings, evaluate, later_events, outcomes, split_users
from model.metrics import (
    multi_relevant_metrics,
    negative_log_likelihood,
    popularity_percentile,
    ranking_metrics,
    ranks,
    rmse,
)
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


@given(
    scores=st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=9),
    shift=st.sampled_from([0.0, 1e3, -1e4]),
)
def test_likelihood_is_as_good_as_in_double(scores, shift):
    score = torch.tensor([scores], dtype=torch.float32) + shift
    row = score[0].double().numpy()
    for target in range(len(scores)):
        expected = np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
        got = negative_log_likelihood(score, torch.tensor([target]))
        assert got[0] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_likelihood_over_a_large_catalogue_does_not_drift():
    score = torch.randn(3, 300_000, generator=torch.Generator().manual_seed(0)) * 4
    target = torch.tensor([0, 5, 299_999])
    expected = torch.nn.functional.cross_entropy(score.double(), target, reduction="none").numpy()
    np.testing.assert_allclose(negative_log_likelihood(score, target), expected, atol=1e-7)


def test_removed_items_are_no_ties_of_an_impossible_target():
    low = -float("inf")
    score = torch.tensor([[low, low, 1.0, low]])  # items 1 and 3 taken out
    assert ranks(score, torch.tensor([0]), np.array([2]))[0] == 2


def brute_force(scores, relevant, ks):
    """Means over all orders of the items that the scores allow."""
    totals, orders = {}, 0
    for order in itertools.permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        orders += 1
        gains = [float(relevant[i]) for i in order]
        totals["mrr"] = totals.get("mrr", 0.0) + 1 / (gains.index(1.0) + 1)
        for k in ks:
            dcg = sum(g / np.log2(2 + place) for place, g in enumerate(gains[:k]))
            best = sorted(gains, reverse=True)
            ideal = sum(g / np.log2(2 + place) for place, g in enumerate(best[:k]))
            totals[f"precision@{k}"] = totals.get(f"precision@{k}", 0.0) + sum(gains[:k]) / k
            totals[f"ndcg@{k}"] = totals.get(f"ndcg@{k}", 0.0) + dcg / ideal
    return {name: total / orders for name, total in totals.items()}


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.booleans()), min_size=1, max_size=6).filter(
        lambda items: any(relevant for _, relevant in items)
    )
)
def test_several_relevant_items_against_all_orders_of_ties(items):
    scores, relevant = zip(*items, strict=True)
    ks = (1, 3, 10)
    # A second row shows that rows do not mix.
    score = torch.tensor([scores, scores[::-1]], dtype=torch.float32)
    got = multi_relevant_metrics(score, np.array([relevant, relevant[::-1]]), ks)
    expected = brute_force(scores, relevant, ks)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx([value, value]), name


def test_many_ties_give_the_harmonic_mean_of_random_choice():
    got = multi_relevant_metrics(torch.zeros(1, 1000), np.arange(1000)[None] == 7, (5,))
    assert got["mrr"][0] == pytest.approx((1 / np.arange(1, 1001)).mean())
    assert got["precision@5"][0] == pytest.approx(1 / 1000)


def test_nan_never_wins_among_several_relevant_items():
    score = torch.tensor([[float("nan"), 0.0, 1.0]])
    got = multi_relevant_metrics(score, np.array([[True, False, False]]), (1,))
    assert got["mrr"][0] == pytest.approx(1 / 3)


def test_popularity_percentile():
    got = popularity_percentile(np.array([0, 9, 4, 4, 1]))
    np.testing.assert_allclose(got, [0.0, 1.0, 0.625, 0.625, 0.25])


def test_rmse_skips_what_has_no_value():
    assert rmse(np.array([4.0, np.nan, 0.0])) == pytest.approx(np.sqrt(2))
    assert np.isnan(rmse(np.array([np.nan])))
