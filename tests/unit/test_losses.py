"""Losses against their definitions: sampled ones by enumerating every set of negatives."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.losses import (
    one_against_all,
    rating_regression,
    sampled_one_against_all,
    sampled_softmax,
    shown_softmax,
    softmax_cross_entropy,
)
from model.sampling import AliasSampler

N, M = 7, 6
Q = torch.tensor([0.9, 0.6, 0.4, 0.3, 0.1, 0.05], dtype=torch.float64)  # chance to be a negative
P = torch.tensor([0.02, 0.3, 0.08, 0.2, 0.1, 0.3], dtype=torch.float64)  # what users choose
REWARD = torch.tensor([0.9, 0.1, 0.0, 0.7, 0.3, 1.0], dtype=torch.float64)
Correct = Callable[[Tensor], Tensor]


def _batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    phi_NM = torch.randn(N, M, generator=generator, dtype=torch.float64).requires_grad_()
    target_N = torch.randint(M, (N,), generator=generator)
    trend_NM = torch.randn(N, M, generator=generator, dtype=torch.float64)
    return phi_NM, target_N, trend_NM


def _at(table_NM: Tensor, item_N: Tensor) -> Tensor:
    return table_NM.gather(1, item_N[:, None])[:, 0]


def _sampled(
    phi_NM: Tensor,
    target_N: Tensor,
    negative_S: Tensor,
    log_count_M: Tensor,
    trend_NM: Tensor | None = None,
    reward_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    log_count_target_M: Tensor | None = None,
) -> Tensor:
    """The sampled loss of dense scores, as training would call it."""
    log_count_target_M = log_count_M if log_count_target_M is None else log_count_target_M
    arguments = {
        "phi_target_N": _at(phi_NM, target_N),
        "phi_negative_NS": phi_NM[:, negative_S],
        "log_expected_count_target_N": log_count_target_M[target_N],
        "log_expected_count_negative_S": log_count_M[negative_S],
        "target_N": target_N,
        "negative_S": negative_S,
        "trend_target_N": None if trend_NM is None else _at(trend_NM, target_N),
        "trend_negative_NS": None if trend_NM is None else trend_NM[:, negative_S],
        "weight_N": weight_N,
    }
    if reward_N is None:
        return sampled_softmax(**arguments)
    return sampled_one_against_all(**arguments, reward_N=reward_N, num_items=phi_NM.shape[1])


def _expected_gradient(
    phi_M: Tensor,
    q_M: Tensor,
    *,
    rewards: bool = False,
    correct_negative: Correct = torch.log,
    correct_target: Correct = torch.log,
) -> Tensor:
    """Gradient of the sampled loss over all sets of negatives and all targets, each by its chance.

    No random numbers: every one of 2^M sets, items being in the set independently.
    """
    phi_M = phi_M.clone().requires_grad_()
    total = phi_M.new_zeros(())
    for present in product([False, True], repeat=M):
        present_M = torch.tensor(present)
        chance = float(torch.where(present_M, q_M, 1 - q_M).prod())
        loss = _sampled(
            phi_M.expand(M, M),
            torch.arange(M),
            present_M.nonzero()[:, 0],
            correct_negative(q_M),
            reward_N=REWARD if rewards else None,
            weight_N=P,
            log_count_target_M=correct_target(q_M),
        )
        total = total + chance * loss
    return torch.autograd.grad(total, phi_M)[0]


def _dense_gradient(phi_M: Tensor) -> Tensor:
    return phi_M.softmax(0) - P


def _none(q_M: Tensor) -> Tensor:
    return torch.zeros_like(q_M)


WRONG: dict[str, dict[str, Correct]] = {
    "flipped sign": {"correct_negative": lambda q: -q.log(), "correct_target": lambda q: -q.log()},
    "no correction": {"correct_negative": _none, "correct_target": _none},
    "target not corrected": {"correct_target": _none},
    "negatives not corrected": {"correct_negative": _none},
}


# Dense.


def test_softmax_cross_entropy_is_minus_log_p():
    phi_NM, target_N, trend_NM = _batch()
    p_NM = torch.exp(phi_NM + trend_NM) / torch.exp(phi_NM + trend_NM).sum(1, keepdim=True)
    expected = -_at(p_NM, target_N).log().mean()
    torch.testing.assert_close(softmax_cross_entropy(phi_NM, target_N, trend_NM), expected)


@pytest.mark.parametrize("name", ["dense", "sampled", "rewards", "sampled rewards"])
def test_weight_two_equals_the_event_twice_and_weight_zero_its_absence(name):
    phi_NM, target_N, trend_NM = _batch()
    reward_N = REWARD[target_N]
    negative_S = torch.tensor([0, 2, 3])

    def loss(row_N: Tensor, weight_N: Tensor | None) -> Tensor:
        phi, target, trend, reward = (x[row_N] for x in (phi_NM, target_N, trend_NM, reward_N))
        if name == "dense":
            return softmax_cross_entropy(phi, target, trend, weight_N)
        if name == "rewards":
            return one_against_all(phi, target, reward, trend, weight_N)
        return _sampled(
            phi,
            target,
            negative_S,
            Q.log(),
            trend,
            reward if name == "sampled rewards" else None,
            weight_N,
        )

    weight_N = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    twice = torch.arange(N).repeat_interleave(weight_N.long())
    torch.testing.assert_close(loss(torch.arange(N), weight_N), loss(twice, None))
    torch.testing.assert_close(loss(torch.arange(N), 5 * weight_N), loss(twice, None))
    none = loss(torch.arange(N), torch.zeros(N, dtype=torch.float64))
    assert float(none.detach()) == 0.0
    assert not torch.autograd.grad(none, phi_NM)[0].any()


# Sampled softmax.


@pytest.mark.parametrize("with_trend", [False, True])
@pytest.mark.parametrize("with_rewards", [False, True])
def test_all_items_sampled_once_equal_dense(with_trend, with_rewards):
    phi_NM, target_N, trend_NM = _batch()
    trend = trend_NM.requires_grad_() if with_trend else None
    reward_N = REWARD[target_N] if with_rewards else None
    every_S = torch.randperm(M, generator=torch.Generator().manual_seed(1))
    sampled = _sampled(phi_NM, target_N, every_S, _none(Q), trend, reward_N)
    dense = (
        softmax_cross_entropy(phi_NM, target_N, trend)
        if reward_N is None
        else one_against_all(phi_NM, target_N, reward_N, trend)
    )
    torch.testing.assert_close(sampled, dense)
    leaves = [phi_NM, trend_NM] if with_trend else [phi_NM]
    for ours, theirs in zip(
        torch.autograd.grad(sampled, leaves), torch.autograd.grad(dense, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_accidental_hits_are_left_out():
    phi_NM, target_N, _ = _batch()
    negative_S = target_N[:1]  # position 0's target; other positions may keep it
    sampled = _sampled(phi_NM[:1], target_N[:1], negative_S, Q.log())
    assert float(sampled.detach()) == 0.0  # nothing left to compare with
    other = (target_N[0] + 1) % M
    with_hit = _sampled(phi_NM[:1], target_N[:1], torch.stack([target_N[0], other]), Q.log())
    without = _sampled(phi_NM[:1], target_N[:1], other[None], Q.log())
    torch.testing.assert_close(with_hit, without)
    assert torch.isfinite(torch.autograd.grad(with_hit, phi_NM)[0]).all()


def test_two_items_by_hand():
    # softmax over {t: φ + trend − log Q}: 1 + .5 − log .5 against 2 − .25 − log .2.
    sampled = sampled_softmax(
        torch.tensor([1.0]),
        torch.tensor([[2.0]]),
        torch.tensor([0.5]).log(),
        torch.tensor([0.2]).log(),
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([0.5]),
        torch.tensor([[-0.25]]),
    )
    e = torch.tensor([1.5, 1.75]).exp() / torch.tensor([0.5, 0.2])
    torch.testing.assert_close(sampled, -(e[0] / e.sum()).log())


def test_no_negatives_at_all_teach_nothing():
    phi_NM, target_N, _ = _batch()
    nobody = torch.empty(0, dtype=torch.int64)
    for reward_N in (None, REWARD[target_N]):
        loss = _sampled(phi_NM, target_N, nobody, Q.log(), reward_N=reward_N)
        assert float(loss.detach()) == 0.0
        assert not torch.autograd.grad(loss, phi_NM)[0].any()


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.05])
def test_the_dense_solution_is_the_sampled_solution_for_any_sampler(scale):
    """φ = log p has no expected gradient, however few negatives there are; wrong forms have one."""
    right = _expected_gradient(P.log() + 3.0, scale * Q)
    assert right.abs().max() < 1e-12
    for name, wrong in WRONG.items():
        gradient = _expected_gradient(P.log() + 3.0, scale * Q, **wrong)
        assert gradient.abs().max() > 1e-4, name


def test_the_mean_gradient_converges_to_the_dense_one():
    """Anywhere, not only at the solution; the error shrinks with the number of draws."""
    phi_M = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 1.5], dtype=torch.float64)
    q_M = Q / Q.sum()

    def error(draws: float, **forms: Correct) -> float:
        chance_M = -torch.expm1(-draws * q_M)
        gradient = _expected_gradient(phi_M, chance_M, **forms)
        return float((gradient - _dense_gradient(phi_M)).norm())

    errors = [error(draws) for draws in (5, 20, 80, 320)]
    for fewer, more in pairwise(errors):
        assert more < 0.6 * fewer
    assert errors[-1] < 1e-3
    # At 20 draws the rare items are still missing often, and a wrong correction shows.
    for name, wrong in WRONG.items():
        assert error(20, **wrong) > 1.5 * errors[1], name


def test_the_mean_gradient_over_real_draws_vanishes_at_the_solution():
    """The sampler's negatives and its expected counts fit the loss."""
    sampler = AliasSampler.build(Q.numpy())
    generator = torch.Generator().manual_seed(0)
    draws, rounds = 3, 20_000
    log_count_M = sampler.log_expected_count(torch.arange(M), draws).double()
    drawn = Counter(tuple(sampler.negatives(draws, generator).tolist()) for _ in range(rounds))

    def error(log_count_M: Tensor) -> float:
        phi_M = P.log().requires_grad_()
        total = phi_M.new_zeros(())
        for items, times in drawn.items():
            negative_S = torch.tensor(items, dtype=torch.int64)
            total = total + times / rounds * _sampled(
                phi_M.expand(M, M), torch.arange(M), negative_S, log_count_M, weight_N=P
            )
        return float(torch.autograd.grad(total, phi_M)[0].norm())

    # An item's gradient varies by less than 0.2 between sets: 20,000 of them leave about 0.003.
    assert error(log_count_M) < 0.01
    assert error(-log_count_M) > 0.03
    assert error(torch.zeros(M).double()) > 0.03
    assert error(math.log(draws) + sampler.log_q_M.double()) > 0.01  # counts repeated draws


# Rewards.


def test_reward_one_is_softmax_cross_entropy():
    phi_NM, target_N, trend_NM = _batch()
    expected = softmax_cross_entropy(phi_NM, target_N, trend_NM)
    one_N = torch.ones(N, dtype=torch.float64)
    for literal in (False, True):
        loss = one_against_all(phi_NM, target_N, one_N, trend_NM, literal=literal)
        torch.testing.assert_close(loss, expected)
    sampled = _sampled(phi_NM, target_N, torch.tensor([1, 4]), Q.log(), trend_NM)
    rewarded = _sampled(phi_NM, target_N, torch.tensor([1, 4]), Q.log(), trend_NM, one_N)
    torch.testing.assert_close(rewarded, sampled)


def test_the_literal_loss_is_the_papers_formula_and_sinks_without_end():
    phi_NM, target_N, _ = _batch()
    reward_N = REWARD[target_N]
    log_z_N = phi_NM.exp().sum(1).log()
    expected = -(reward_N * _at(phi_NM, target_N) - log_z_N).mean()
    literal = one_against_all(phi_NM, target_N, reward_N, literal=True)
    torch.testing.assert_close(literal, expected)
    lower = one_against_all(phi_NM - 1000, target_N, reward_N, literal=True)
    torch.testing.assert_close(lower - literal, -1000 * (1 - reward_N).mean())
    # Held in place, the same shift changes nothing.
    held = one_against_all(phi_NM, target_N, reward_N)
    torch.testing.assert_close(one_against_all(phi_NM - 1000, target_N, reward_N), held)


def test_holding_it_in_place_leaves_all_comparisons_between_items_alone():
    phi_NM, target_N, trend_NM = _batch()
    reward_N = REWARD[target_N]
    held, literal = (
        torch.autograd.grad(
            one_against_all(phi_NM, target_N, reward_N, trend_NM, literal=literal), phi_NM
        )[0]
        for literal in (False, True)
    )
    projected = literal - literal.mean(dim=1, keepdim=True)
    torch.testing.assert_close(held, projected)
    assert (literal - projected).abs().max() > 0.01
    # It is the cross entropy of "item a with probability r, any item otherwise".
    click_NM = F.one_hot(target_N, M).double()
    mix_NM = reward_N[:, None] * click_NM + (1 - reward_N[:, None]) / M
    torch.testing.assert_close(
        one_against_all(phi_NM, target_N, reward_N, trend_NM),
        F.cross_entropy(phi_NM + trend_NM, mix_NM),
    )


def test_an_event_lowers_its_item_where_the_reward_is_below_its_probability():
    p_M = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.06, 0.04])
    for item, reward, lowered in [(0, 0.45, False), (0, 0.35, True), (1, 0.1, False), (1, 0, True)]:
        phi_1M = p_M.log()[None].clone().requires_grad_()
        loss = one_against_all(phi_1M, torch.tensor([item]), torch.tensor([float(reward)]))
        gradient = torch.autograd.grad(loss, phi_1M)[0][0, item]
        assert (float(gradient) > 0) == lowered
        assert (reward + (1 - reward) / M < p_M[item]) == lowered


def _solve(count_M: Tensor, reward_M: Tensor, log_q_M: Tensor | None = None) -> Tensor:
    """Biases that gradient descent finds for items shown `count_M` times."""
    bias_M = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([bias_M], lr=0.05)
    trend_MM = None if log_q_M is None else log_q_M.expand(M, M)
    for _ in range(2000):
        loss = one_against_all(
            bias_M.expand(M, M), torch.arange(M), reward_M, trend_MM, count_M / count_M.sum()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert bias_M.abs().max() < 20  # nothing runs away
    return bias_M.detach()


SHOWN = torch.tensor([30.0, 30.0, 30.0, 30.0, 30.0, 0.0], dtype=torch.float64)
EARNED = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.0, 0.0], dtype=torch.float64)
AVERAGE, POOR, REFUSED, NEVER = 0, 3, 4, 5


def test_what_one_against_all_learns_without_a_trend():
    bias_M = _solve(SHOWN, EARNED)
    p_M = SHOWN / SHOWN.sum()
    solution_M = p_M * EARNED + (1 - (p_M * EARNED).sum()) / M
    torch.testing.assert_close(bias_M.softmax(0), solution_M, atol=1e-4, rtol=1e-3)
    # Equally often shown, a poor item falls behind; a plain softmax sees no difference.
    assert bias_M[POOR] < bias_M[AVERAGE] - 0.3
    # An item refused every time ends where one ends that was never shown: not below it.
    assert bias_M[REFUSED] == pytest.approx(float(bias_M[NEVER]), abs=1e-3)
    assert bias_M[POOR] > bias_M[NEVER]


def test_with_exposure_in_the_trend_a_refused_item_falls_below_one_never_shown():
    q_M = (SHOWN + 1) / (SHOWN + 1).sum()
    bias_M = _solve(SHOWN, EARNED, q_M.log())
    p_M = SHOWN / SHOWN.sum()
    solution_M = p_M * EARNED + (1 - (p_M * EARNED).sum()) / M
    expected_M = (solution_M / q_M).log()
    torch.testing.assert_close(
        bias_M - bias_M.mean(), expected_M - expected_M.mean(), atol=1e-2, rtol=0
    )
    assert bias_M[REFUSED] < bias_M[POOR] < bias_M[AVERAGE]
    assert bias_M[REFUSED] < bias_M[NEVER] - 1
    assert bias_M[POOR] < bias_M[NEVER]


def test_events_of_low_reward_pull_a_learned_favourite_down():
    """Online: an item learned from clicks, then shown again and again without any."""
    bias_M = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    optimiser = torch.optim.SGD([bias_M], lr=0.1)
    drift = []
    for _ in range(50):
        loss = one_against_all(bias_M[None], torch.tensor([0]), torch.tensor([0.05]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        drift.append(float(bias_M.detach().sum()))
    assert bias_M[0] - bias_M[1] < 1.0
    assert drift[-1] == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_sampled_rewards_have_the_dense_solution(scale):
    solution_M = P * REWARD + (1 - (P * REWARD).sum()) / M
    gradient = _expected_gradient(solution_M.log() + 3.0, scale * Q, rewards=True)
    assert gradient.abs().max() < 1e-12
    for name, wrong in WRONG.items():
        gradient = _expected_gradient(solution_M.log(), scale * Q, rewards=True, **wrong)
        assert gradient.abs().max() > 1e-4, name


def test_sampled_rewards_do_not_drift():
    phi_NM, target_N, trend_NM = _batch()
    loss, lower = (
        _sampled(phi, target_N, torch.tensor([0, 3, 5]), Q.log(), trend_NM, REWARD[target_N])
        for phi in (phi_NM, phi_NM - 1000)
    )
    torch.testing.assert_close(loss, lower)


# Ratings.


def test_shown_softmax_is_the_softmax_over_each_list():
    generator = torch.Generator().manual_seed(0)
    phi_NM = torch.randn(6, 9, generator=generator, dtype=torch.float64) * 30
    target_N = torch.randint(9, (6,), generator=generator)
    weight_N = torch.rand(6, generator=generator, dtype=torch.float64)
    lists = [[j for j in range(9) if j % 3 == n % 3 and j != int(target_N[n])] for n in range(6)]
    lists[4] = []  # nothing was shown beside it
    place_R = torch.tensor([n for n, items in enumerate(lists) for _ in items])
    item_R = torch.tensor([j for items in lists for j in items])
    order = torch.randperm(len(place_R), generator=generator)  # in any order
    place_R, item_R = place_R[order], item_R[order]

    def listed(phi_NM: Tensor) -> Tensor:
        return shown_softmax(_at(phi_NM, target_N), phi_NM[place_R, item_R], place_R, weight_N)

    def by_list(phi_NM: Tensor) -> Tensor:
        nll = [
            -torch.log_softmax(phi_NM[n, [int(target_N[n]), *items]], dim=0)[0]
            for n, items in enumerate(lists)
        ]
        return (weight_N * torch.stack(nll)).sum() / weight_N.sum()

    torch.testing.assert_close(listed(phi_NM), by_list(phi_NM))
    gradient = torch.func.grad(listed)(phi_NM)
    torch.testing.assert_close(gradient, torch.func.grad(by_list)(phi_NM))
    assert not gradient[4].any()


def test_rating_regression_ignores_events_without_a_value():
    value_N = torch.tensor([1.0, torch.nan, 3.0, torch.nan])
    predicted_N = torch.tensor([2.0, 50.0, 3.5, -7.0], requires_grad=True)
    loss = rating_regression(value_N, predicted_N)
    assert float(loss.detach()) == pytest.approx((1.0 + 0.25) / 2)
    gradient_N = torch.autograd.grad(loss, predicted_N)[0]
    torch.testing.assert_close(gradient_N, torch.tensor([1.0, 0.0, 0.5, 0.0]))


def test_rating_regression_weights():
    value_N = torch.tensor([1.0, torch.nan, 3.0])
    predicted_N = torch.tensor([2.0, 50.0, 3.5])
    loss = rating_regression(value_N, predicted_N, torch.tensor([2.0, 9.0, 1.0]))
    assert float(loss) == pytest.approx((2 * 1.0 + 0.25) / 3)


def test_rating_regression_of_nothing_is_zero_and_can_be_differentiated():
    predicted_N = torch.tensor([2.0, 50.0], requires_grad=True)
    loss = rating_regression(torch.full((2,), torch.nan), predicted_N)
    assert float(loss.detach()) == 0.0
    assert torch.autograd.grad(loss, predicted_N)[0].tolist() == [0.0, 0.0]
    empty = rating_regression(torch.empty(0), predicted_N[:0])
    assert float(empty.detach()) == 0.0
