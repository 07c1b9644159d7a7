"""Transition counts equal a plain loop; cross-fitted ones never count a user's own pairs."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.transitions import DAMPING, TransitionPrior, Transitions, pair_counts
from tests import synthetic

M = 6
LOGS = st.lists(st.lists(st.integers(0, M - 1), min_size=1, max_size=15), min_size=2, max_size=6)


def _log(users):
    return synthetic.histories(users, [list(range(len(u))) for u in users])


def _brute(users):
    counts = defaultdict(float)
    for user in users:
        for k, item in enumerate(user):
            for lag in range(1, 11):
                if k - lag >= 0:
                    counts[user[k - lag], item] += 1 / lag
    return counts


def _dense(transitions, rows):
    return torch.cat([transitions.scatter(torch.tensor([[r]]), torch.ones(1)) for r in rows])


@settings(max_examples=50, deadline=None)
@given(LOGS)
def test_counts_equal_a_loop(users):
    key, count = pair_counts(_log(users), M)
    brute = _brute(users)
    assert dict(zip(key.tolist(), count.tolist(), strict=True)) == pytest.approx(
        {i * M + j: c for (i, j), c in brute.items()}
    )
    probability = _dense(Transitions.count(_log(users), M), range(M)).numpy()
    for i in range(M):
        total = sum(c for (a, _), c in brute.items() if a == i)
        for j in range(M):
            assert probability[i, j] == pytest.approx(brute[i, j] / (total + DAMPING), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(LOGS)
def test_cross_fitted_counts_are_those_of_the_other_folds(users):
    log, fold = _log(users), np.arange(len(users)) % 2
    fitted = Transitions.cross_fitted(log, M, fold, 2)
    for f in (0, 1):
        others = Transitions.count(log.subset(np.flatnonzero(fold != f)), M)
        torch.testing.assert_close(
            _dense(fitted, range(f * M, (f + 1) * M)), _dense(others, range(M))
        )


def test_scatter_sums_the_rows_by_weight_and_skips_missing_items():
    transitions = Transitions.count(_log([[0, 1, 2, 3], [3, 1, 0]]), M)
    rows = torch.tensor([[0, 3, -1], [-1, -1, -1], [5, 0, 0]])
    dense = _dense(transitions, range(M))
    wanted = [0.5 * dense[0] + 0.3 * dense[3], 0 * dense[0], 0.5 * dense[5] + 0.5 * dense[0]]
    got = transitions.scatter(rows, torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(got, torch.stack(wanted))


def test_only_the_most_frequent_followers_are_kept():
    transitions = Transitions.count(_log([[0, 1], [0, 1], [0, 2]]), M, followers=1)
    assert transitions.item_Z[: int(transitions.offset_R1[1])].tolist() == [1]


def test_the_prior_turns_popularity_into_the_mixture_of_the_counts():
    transitions = Transitions.count(_log([[0, 1, 2], [0, 1, 3], [2, 1]]), M)
    p = torch.softmax(torch.randn(M), 0)
    prior, epsilon = TransitionPrior(M), 0.3
    prior.inverse_p_M = 1.0 / p
    with torch.no_grad():
        prior.log_gamma.fill_(0.0)
        prior.log_kappa.fill_(float(np.log((1 - epsilon) / epsilon)))
        recent = torch.tensor([[1, 0] + [-1] * 8])
        got = (p.log() + prior(transitions, recent)).exp() * epsilon
        followed = transitions.scatter(recent, prior.alpha_R)
    torch.testing.assert_close(got, epsilon * p + (1 - epsilon) * followed)


def test_foreign_arrays_are_refused():
    tensors = Transitions.count(_log([[0, 1, 2]]), M).tensors()
    assert Transitions.from_tensors(tensors, M).num_items == M
    with pytest.raises(ValueError, match="do not fit"):
        Transitions.from_tensors(tensors, M + 1)
    with pytest.raises(ValueError, match="do not fit"):
        Transitions.from_tensors(tensors | {"item": tensors["item"] + M}, M)


def test_some_columns_and_single_items_equal_the_dense_lookup():
    transitions = Transitions.count(_log([[0, 1, 2, 3], [3, 1, 0, 5]]), M)
    rows = torch.tensor([[0, 3, -1], [-1, -1, -1], [5, 0, 1]])
    weight = torch.rand(3)
    dense = transitions.scatter(rows, weight)
    columns, single = torch.tensor([0, 2, 5]), torch.tensor([2, 1, 5])
    torch.testing.assert_close(transitions.scatter(rows, weight, columns), dense[:, columns])
    torch.testing.assert_close(transitions.at(rows, weight, single), dense[range(3), single])


@settings(max_examples=50, deadline=None)
@given(LOGS, st.lists(st.integers(-1, M - 1), min_size=10, max_size=10))
def test_the_sparse_bonus_is_the_dense_one(users, recent):
    transitions, prior = Transitions.count(_log(users), M), TransitionPrior(M)
    prior.inverse_p_M.copy_(torch.arange(1.0, M + 1))
    with torch.no_grad():
        dense_M = prior(transitions, torch.tensor([recent]))[0].numpy()
        item_S, bonus_S = prior.sparse(transitions, np.array(recent))
    assert (np.diff(item_S) > 0).all()
    sparse_M = np.zeros(M)
    sparse_M[item_S] = bonus_S
    np.testing.assert_allclose(sparse_M, dense_M, atol=1e-6)
