"""The chunked losses equal the losses' definitions on full scores, with every gradient."""

import numpy as np
import pytest
import torch

from model import fused_loss as module
from model.fused_loss import Targets, fused_loss
from model.lifts import Lifts
from model.losses import (
    one_against_all,
    sampled_one_against_all,
    sampled_softmax,
    softmax_cross_entropy,
)
from model.repeats import BUCKETS, RepeatPrior, SeenItems
from model.transitions import TransitionPrior, Transitions
from tests import synthetic

N, M, D = 13, 11, 5
LANES = 16  # a size that needs no filling up
CHUNKS = [1, 4, 100]


class _Case:
    """Random scores of N positions, with everything that can be added to them."""

    def __init__(self, size: int = D) -> None:
        torch.manual_seed(0)
        self.query, self.w, self.b = torch.randn(N, size), torch.randn(M, size), torch.randn(M)
        self.beta = torch.tensor(0.7)
        self.prior = TransitionPrior(M)
        self.prior.inverse_p_M = torch.rand(M) + 0.5
        log = synthetic.histories(
            [np.random.default_rng(u).permutation(M).tolist()[: 4 + u] for u in range(4)],
            [list(range(4 + u)) for u in range(4)],
        )
        self.transitions = Transitions.count(log, M)
        self.recent = torch.randint(-1, M, (N, self.prior.recent))
        self.recent[3] = -1
        self.log_q, self.period = torch.randn(3, M), torch.randint(3, (N,))
        self.target, self.weight, self.reward = (
            torch.randint(M, (N,)),
            torch.rand(N),
            torch.rand(N),
        )
        self.weight[2] = 0.0
        self.leaves = [t.requires_grad_() for t in (self.query, self.w, self.b, self.beta)]
        self.repeats = RepeatPrior()
        torch.nn.init.normal_(self.repeats.rho)
        count = torch.randint(5, (N,))
        self.seen = SeenItems(
            torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)]),
            torch.cat([torch.randperm(M)[:c] for c in count]),
            torch.randint(BUCKETS, (int(count.sum()),)),
        )
        self.leaves += [self.prior.log_gamma, self.prior.log_kappa, self.repeats.rho]

    @property
    def coefficients(self):
        prior = self.prior
        return {
            "beta": self.beta,
            "gamma": prior.gamma,
            "kappa": prior.kappa,
            "rho": self.repeats.rho,
        }


def _assert_same(got, wanted, leaves):
    torch.testing.assert_close(got, wanted)
    for a, c in zip(
        torch.autograd.grad(3 * got, leaves, allow_unused=True, retain_graph=True),
        torch.autograd.grad(3 * wanted, leaves, allow_unused=True),
        strict=True,
    ):
        if c is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", request.param)
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("size", [D, LANES])
@pytest.mark.parametrize("with_reward", [False, True])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.usefixtures("chunk")
def test_dense_value_and_gradients(with_reward, with_extras, size):
    c = _Case(size)
    phi, trend = torch.addmm(c.b, c.query, c.w.T), None
    given = {"column_N": c.target, "weight_N": c.weight}
    coefficients = {}
    if with_extras:
        phi = phi + c.prior(c.transitions, c.recent) + c.repeats(c.seen, M)
        given["seen"] = c.seen
        trend = c.beta * c.log_q[c.period]
        given["lifts"] = Lifts.dense(c.transitions, c.recent, c.prior.alpha_R, c.prior.inverse_p_M)
        given["log_q"] = lambda part: c.log_q[c.period[part]]
        coefficients = c.coefficients
    if with_reward:
        given["reward_N"] = c.reward
        wanted = one_against_all(phi, c.target, c.reward, trend, c.weight)
    else:
        wanted = softmax_cross_entropy(phi, c.target, trend, c.weight)
    got = fused_loss(c.query, c.w, c.b, Targets(**given), **coefficients)
    _assert_same(got, wanted, c.leaves)


@pytest.mark.parametrize("size", [D, LANES])
@pytest.mark.parametrize("with_reward", [False, True])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.usefixtures("chunk")
def test_sampled_value_and_gradients(with_reward, with_extras, size):
    c = _Case(size)
    negative = torch.tensor([0, 2, 3, 7, 8])
    correction_N, correction_S = -torch.rand(N), -torch.rand(len(negative))
    item, place = torch.cat([negative, c.target]).unique(return_inverse=True)
    phi_N = (c.query * c.w[c.target]).sum(1) + c.b[c.target]
    phi_NS = torch.addmm(c.b[negative], c.query, c.w[negative].T)
    trend_N = trend_NS = None
    at = torch.searchsorted(negative, c.target).clamp(max=len(negative) - 1)
    given = {
        "column_N": torch.where(negative[at] == c.target, at, -1),
        "weight_N": c.weight,
        "place_S": place[: len(negative)],
        "place_N": place[len(negative) :],
    }
    hit_N = c.b[c.target] - correction_N
    coefficients = {}
    if with_extras:
        bonus_N = c.prior.at(c.transitions, c.recent, c.target)
        repeat_N = c.repeats.at(c.seen, c.target)
        phi_N = phi_N + bonus_N + repeat_N
        phi_NS = phi_NS + c.prior(c.transitions, c.recent, negative)
        phi_NS = phi_NS + c.repeats(c.seen, M)[:, negative]
        trend_N = c.beta * c.log_q[c.period, c.target]
        trend_NS = c.beta * c.log_q[c.period][:, negative]
        lifts, lift_N = Lifts.sampled(
            c.transitions,
            c.recent,
            c.prior.alpha_R,
            c.prior.inverse_p_M,
            negative,
            c.target,
        )
        torch.testing.assert_close(c.prior.gamma * torch.log1p(c.prior.kappa * lift_N), bonus_N)
        hit_N = hit_N + bonus_N + repeat_N + trend_N
        given["seen"] = c.seen.among(negative)
        given |= {"lifts": lifts, "log_q": lambda part: c.log_q[c.period[part]][:, negative]}
        coefficients = c.coefficients
    arguments = (phi_N, phi_NS, correction_N, correction_S, c.target, negative)
    if with_reward:
        given |= {
            "reward_N": c.reward,
            "any_item_S": torch.exp(-correction_S) / M,
        }
        wanted = sampled_one_against_all(*arguments, c.reward, M, trend_N, trend_NS, c.weight)
    else:
        wanted = sampled_softmax(*arguments, trend_N, trend_NS, c.weight)
    got = fused_loss(
        c.query,
        c.w[item],
        c.b[negative] - correction_S,
        Targets(**given),
        hit_N=hit_N,
        **coefficients,
    )
    _assert_same(got, wanted, c.leaves)


@pytest.mark.parametrize("size", [D, LANES])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_half_precision_is_near(sampled, size, even):
    c = _Case(size)
    weight = torch.full((N,), 0.3) if even else c.weight
    place = {"place_S": torch.arange(M), "place_N": M + torch.arange(N) % 2} if sampled else {}
    w, targets = c.w, {}
    if sampled:
        w = torch.cat([c.w, torch.randn(2, size)])
        targets = {"hit_N": torch.randn(N) - 300.0}
    column = torch.where(torch.arange(N) % 3 > 0, -1, c.target) if sampled else c.target
    bias = c.b - 300.0  # bfloat16 alone would round the scores to multiples of 2
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        given = Targets(column, weight, **place, dtype=dtype)
        loss = fused_loss(c.query, w, bias, given, **targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, c.leaves[:3])])
    for exact, near in zip(*results, strict=True):
        assert near.dtype == torch.float32
        assert float((near - exact).abs().max()) < 2.0 / 256 * max(1.0, float(exact.abs().max()))


def test_no_negatives_leave_nothing_to_compare_with():
    c = _Case()
    place_N, place_S = torch.zeros(N, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    given = Targets(torch.full((N,), -1), torch.ones(N), place_N, place_S)
    hit_N = torch.randn(N, requires_grad=True)
    loss = fused_loss(c.query, c.w[:1], c.b[:0], given, hit_N=hit_N)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not hit_N.grad.any() and not c.query.grad.any()


def test_chunks_are_alike_and_as_long_as_memory_allows():
    rows = module._chunk_rows
    assert rows(100, 1000, 4) == 100
    assert rows(2100, 1024, 4) == 700 and rows(2100, 1024, 2) == 1050  # 4 MiB
    assert rows(1024, 10_000, 4) == 512  # 20 MiB
    assert rows(1024, 20_000, 4) == 256 and rows(1024, 10**6, 4) == 64


def test_weights_of_zero_give_a_loss_of_zero():
    query, w, b = torch.randn(N, D, requires_grad=True), torch.randn(M, D), torch.randn(M)
    loss = fused_loss(query, w, b, Targets(torch.zeros(N, dtype=torch.int64), torch.zeros(N)))
    loss.backward()
    assert loss.item() == 0.0 and not query.grad.any()
