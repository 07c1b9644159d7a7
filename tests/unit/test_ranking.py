"""The threshold algorithm equals brute force over the whole catalogue."""

import asyncio
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.query import Recommendation
from model.trends import snapshot_from_counts
from serving.ranking import MAX_ASK, AnswerError, Search, Trend, top_k
from serving.wire import ItemList, Scored


class Oracle:
    """A predictor over a dictionary of affinities."""

    def __init__(self, affinity, beta=1.0, allowed=None):
        self.affinity = affinity
        self.beta = beta
        self.allowed = set(affinity) if allowed is None else allowed

    def phi(self, items):
        return np.array([self.affinity[i] if i in self.allowed else np.nan for i in items], float)

    async def ask(self, question):
        order = sorted(self.allowed, key=lambda i: (-self.affinity[i], i))
        best, part = order[: question.top_n], question.part
        return Scored(
            "v",
            self.beta + (part is None),  # which β is right depends on the trend, which a part names
            best,
            affinity_C=self.phi(best),
            affinity_T=self.phi(part.of.item_ids[part.first : part.end] if part else ()),
            exhausted=question.top_n >= len(order),
        )

    def brute_force(self, k, trend, weight):
        rows = []
        for item in self.allowed:
            bias = weight * self.beta * trend.get(item)
            rows.append(Recommendation(item, self.affinity[item] + bias, self.affinity[item], bias))
        return sorted(rows, key=lambda r: (-r.score, r.item_id))[:k]


def trend_of(counts, num_items):
    return Trend.of(
        snapshot_from_counts(
            list(counts),
            list(counts.values()),
            num_items=num_items,
            smoothing=0.5,
            as_of=0,
            window_seconds=0,
        )
    )


def solve(oracle, k, trend, weight=1.0, first_ask=1):
    return asyncio.run(top_k(oracle.ask, k, trend, weight, first_ask))


@st.composite
def catalogues(draw):
    """Few distinct values, so that ties are common; items the trend or the model lacks."""
    size = draw(st.integers(1, 60))
    values = st.sampled_from([-3.0, -1.5, -1.0, 0.0, 0.25, 2.0])
    wide = st.floats(-30, 30, width=32)
    affinity = {f"i{j}": draw(st.one_of(values, wide)) for j in range(size)}
    trending = draw(st.sets(st.integers(0, size + 5), max_size=size))
    counts = {f"i{j}": draw(st.integers(0, 4) | st.integers(0, 10**6)) for j in sorted(trending)}
    blocked = draw(st.sets(st.sampled_from(sorted(affinity))))
    allowed = set(affinity) - blocked if draw(st.booleans()) else set(affinity)
    return affinity, counts, allowed


@given(
    catalogue=catalogues(),
    k=st.integers(1, 80),
    weight=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    beta=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    first_ask=st.none() | st.integers(1, 8),
)
@settings(max_examples=400, deadline=None)
def test_equals_brute_force(catalogue, k, weight, beta, first_ask):
    affinity, counts, allowed = catalogue
    oracle = Oracle(affinity, beta, allowed)
    trend = trend_of(counts, len(affinity) + 6)
    results, rounds = solve(oracle, k, trend, weight, first_ask)
    assert results == oracle.brute_force(k, trend, weight)
    assert rounds <= math.ceil(math.log2(len(affinity) + 1)) + 2


@given(
    catalogue=catalogues(),
    k=st.integers(1, 80),
    weight=st.sampled_from([0.0, 0.3, 5.0]),
    betas=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=4),
    first_ask=st.none() | st.integers(1, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=400, deadline=None)
def test_answers_of_different_models_end_a_search_that_judges_each_alone(
    catalogue, k, weight, betas, first_ask, seed
):
    """Round after round by another replica with other affinities, β and allowed items: the top k
    is that of the one whose answer ended it."""
    affinity, counts, allowed = catalogue
    # Not so close together that only adding the floor makes them equal: see `_proved`.
    values = [round(value, 3) for value in affinity.values()]
    rng = random.Random(seed)
    replicas = []
    for beta in betas:
        rng.shuffle(values)
        blocked = set(rng.sample(sorted(affinity), len(affinity) - len(allowed)))
        replicas.append(
            Oracle(dict(zip(affinity, values, strict=True)), beta, set(affinity) - blocked)
        )
    trend = trend_of(counts, len(affinity) + 6)
    search = Search(k, trend, weight, first_ask, afresh=True)
    sizes = []
    while search.question is not None:
        part = search.question.part
        assert part is None or part.first == 0
        sizes.append((search.question.top_n, part.end if part else 0))
        oracle = replicas[search.rounds % len(replicas)]
        search.tell(asyncio.run(oracle.ask(search.question)))
    assert search.results() == oracle.brute_force(k, trend, weight)
    for (n, t), (next_n, next_t) in itertools.pairwise(sizes):
        assert next_n == 2 * n and next_t <= max(1, 2 * t)
    assert search.rounds <= math.ceil(math.log2(len(affinity) + 1)) + 2


def test_a_long_list_is_not_asked_for_whole():
    trend = trend_of({f"i{j:07}": 10**6 - j for j in range(50_000)}, 50_000)
    question = Search(10, trend, afresh=True).question
    assert question.part.end <= MAX_ASK and question.top_n <= MAX_ASK


@example(weight=1.0)
@given(weight=st.floats(0, 100))
@settings(deadline=None, max_examples=50)
def test_uniform_trend_leaves_the_affinity_order(weight):
    oracle = Oracle({"a": 1.0, "b": 3.0, "c": 1.0})
    results, rounds = solve(oracle, 3, Trend.uniform(), weight)
    assert [(r.item_id, r.trend) for r in results] == [("b", 0.0), ("a", 0.0), ("c", 0.0)]
    assert rounds <= 3


def test_a_tie_with_an_unseen_item_is_broken_by_id():
    # "a" ties with "z" in score and comes first by id, but is found last: low affinity, low trend.
    log_q_T = np.array([-1.0, -2.0, -3.0])
    trend = Trend(ItemList(("z", "y", "a"), log_q_T, -9.0), "v", 3, {"z": 0, "y": 1, "a": 2})
    oracle = Oracle({"z": 0.0, "y": -5.0, "a": 2.0})
    results, _ = solve(oracle, 1, trend)
    assert [r.item_id for r in results] == ["a"]


def test_a_negative_coefficient_is_exact_too():
    trend = trend_of({"a": 100, "b": 1}, 4)
    oracle = Oracle({"a": 0.0, "b": 0.0, "c": -0.1, "d": -8.0}, beta=-1.0)
    assert solve(oracle, 2, trend)[0] == oracle.brute_force(2, trend, 1.0)


@pytest.mark.parametrize("k", [1, 25, 100])
def test_nearly_always_one_round_on_realistic_scores(k):
    """Zipf popularity, affinities as spread as a trained model's: the defaults ask for enough."""
    rng = np.random.default_rng(0)
    num_items = 20_000
    ids = [f"i{j:05}" for j in range(num_items)]
    rounds = []
    for _ in range(10):
        counts = dict(zip(ids, (1e5 / rng.permutation(num_items).clip(1)).astype(int), strict=True))
        trend = trend_of(counts, num_items)
        oracle = Oracle(dict(zip(ids, rng.normal(0, 2, num_items).tolist(), strict=True)))
        results, n = asyncio.run(top_k(oracle.ask, k, trend))
        assert results == oracle.brute_force(k, trend, 1.0)
        rounds.append(n)
    assert np.mean(rounds) <= 1.2


def test_a_list_that_is_asked_for_whole_is_one_round():
    """Unseen items then have the floor, so that the first k by affinity are enough."""
    rng = np.random.default_rng(1)
    ids = [f"i{j:04}" for j in range(3000)]
    trend = trend_of(dict(zip(ids[::3], rng.zipf(1.3, 1000).tolist(), strict=True)), len(ids))
    for k in (1, 10, 200):
        oracle = Oracle(dict(zip(ids, rng.normal(0, 2, len(ids)).tolist(), strict=True)))
        results, rounds = asyncio.run(top_k(oracle.ask, k, trend))
        assert (results, rounds) == (oracle.brute_force(k, trend, 1.0), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"affinity_T": np.array([1.0])},  # not as many as the list has
        {"item_ids": ["a", "b"], "exhausted": False},  # fewer than asked for, yet more to come
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(change):
    values = {"item_ids": ["a", "b"], "affinity_C": np.array([2.0, 1.0]), "exhausted": True}
    values |= {"affinity_T": np.array([2.0, 1.0])}
    answer = Scored("v", 1.0, **(values | change))
    with pytest.raises(AnswerError):
        Search(25, trend_of({"a": 3, "c": 8}, 9)).tell(answer)
