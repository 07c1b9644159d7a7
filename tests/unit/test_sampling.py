"""The alias tables hold q, draws follow it, and negatives appear as often as is claimed."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from model.sampling import AliasSampler, frequency_sampler


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table_q(sampler: AliasSampler) -> np.ndarray:
    """The distribution that the tables draw from, worked out slot by slot."""
    prob_M, alias_M = sampler.prob_M.numpy(), sampler.alias_M.numpy()
    q_M = prob_M.copy()
    np.add.at(q_M, alias_M, 1.0 - prob_M)
    return q_M / len(q_M)


def _chi_square(count_M: np.ndarray, expected_M: np.ndarray) -> float:
    return float(((count_M - expected_M) ** 2 / expected_M).sum())


def _chi_square_limit(freedom: int, z: float = 4.0) -> float:
    """Wilson–Hilferty; z = 4 is passed by chance 3 times in 100,000."""
    return freedom * (1 - 2 / (9 * freedom) + z * np.sqrt(2 / (9 * freedom))) ** 3


WEIGHTS = {
    "zipf": 1.0 / np.arange(1, 101),
    "one giant": np.r_[np.ones(50), 1000.0, np.ones(50)],
    "uniform": np.ones(100),
    "two kinds": np.r_[np.full(30, 5.0), np.full(70, 1.0)],
}


@given(
    st.one_of(
        st.lists(st.integers(1, 10), min_size=1, max_size=40),
        st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40),
    )
)
@example([1, 2, 3])  # an item that fills its slot exactly has nothing to give
@example([1] * 49)  # 1/49·49 < 1: by rounding no item is heavy
def test_tables_rebuild_the_wanted_distribution(weights):
    sampler = AliasSampler.build(weights)
    q_M = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    prob_M, alias_M = sampler.prob_M.numpy(), sampler.alias_M.numpy()
    assert ((prob_M >= 0) & (prob_M <= 1)).all()
    assert ((alias_M >= 0) & (alias_M < len(q_M))).all()
    np.testing.assert_allclose(_table_q(sampler), q_M, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(sampler.log_q_M.numpy(), np.log(q_M), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_draws_follow_q(name):
    sampler = AliasSampler.build(WEIGHTS[name])
    n = 200_000
    count_M = np.bincount(sampler.draw(n, _generator()).numpy(), minlength=len(WEIGHTS[name]))
    q_M = WEIGHTS[name] / WEIGHTS[name].sum()
    assert _chi_square(count_M, n * q_M) < _chi_square_limit(len(q_M) - 1)


def test_the_chi_square_check_sees_a_slightly_wrong_distribution():
    q_M = WEIGHTS["zipf"] / WEIGHTS["zipf"].sum()
    count_M = np.random.default_rng(0).multinomial(200_000, q_M)
    assert _chi_square(count_M, 200_000 * q_M) < _chi_square_limit(99)
    wrong_M = q_M**0.95 / (q_M**0.95).sum()
    assert _chi_square(count_M, 200_000 * wrong_M) > _chi_square_limit(99)


def test_a_million_items_keep_their_shares():
    weight_M = np.random.default_rng(0).permutation(1.0 / np.arange(1, 1_000_001))
    q_M = weight_M / weight_M.sum()
    # Errors of the running sums only reach heavy items, whose share is at least 1/M.
    np.testing.assert_allclose(_table_q(AliasSampler.build(weight_M)), q_M, rtol=1e-6)


def test_types_and_determinism():
    sampler = AliasSampler.build([3.0, 1.0, 2.0])
    assert sampler.prob_M.dtype == torch.float64
    assert sampler.alias_M.dtype == torch.int64
    assert sampler.log_q_M.dtype == torch.float32
    first, same, other = (sampler.draw(50, _generator(seed)) for seed in (1, 1, 2))
    assert first.dtype == torch.int64
    assert first.shape == (50,)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(sampler.negatives(4, _generator(3)), sampler.negatives(4, _generator(3)))


def test_frequency_is_flattened_and_unseen_items_keep_a_chance():
    q_M = frequency_sampler(np.array([0, 15, 80])).log_q_M.exp()
    torch.testing.assert_close(q_M / q_M[0], torch.tensor([1.0, 8.0, 27.0]))
    uniform_M = frequency_sampler(np.array([0, 15, 80]), power=0.0).log_q_M.exp()
    torch.testing.assert_close(uniform_M, torch.full((3,), 1 / 3))


def test_negatives_are_distinct_and_as_frequent_as_expected():
    sampler = AliasSampler.build(1.0 / np.arange(1, 31))
    generator, rounds, draws = _generator(), 20_000, 10
    count_M, pairs, sizes = np.zeros(30), 0, set()
    for _ in range(rounds):
        item_S = sampler.negatives(draws, generator).numpy()
        assert len(np.unique(item_S)) == len(item_S)
        count_M[item_S] += 1
        pairs += 0 in item_S and 1 in item_S
        sizes.add(len(item_S))
    chance_M = sampler.log_expected_count(torch.arange(30), draws).exp().numpy().astype(float)
    error_M = (count_M / rounds - chance_M) / np.sqrt(chance_M * (1 - chance_M) / rounds)
    assert np.abs(error_M).max() < 4.5
    # One item's presence says nothing about another's.
    both = chance_M[0] * chance_M[1]
    assert abs(pairs / rounds - both) < 4.5 * np.sqrt(both * (1 - both) / rounds)
    # The check is sharp: neither the mean count nor a fixed number of draws would pass it.
    assert chance_M[0] < 0.95 * draws * float(sampler.log_q_M[0].exp())
    assert len(sizes) > 5


def test_expected_counts_of_rare_and_of_certain_items():
    sampler = AliasSampler.build(np.r_[1.0, 1e-30, 1e-300])
    log_count = sampler.log_expected_count(torch.arange(3), 1000)
    assert float(log_count[0]) == 0.0
    expected = np.log(1000) + np.array([-30, -300]) * np.log(10)
    np.testing.assert_allclose(log_count[1:].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [1.0, np.nan], [[1.0]], [np.inf]])
def test_weights_that_are_no_distribution_are_refused(weights):
    with pytest.raises(ValueError, match="alias sampler"):
        AliasSampler.build(weights)
