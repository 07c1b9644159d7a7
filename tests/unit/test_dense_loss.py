"""The chunked dense loss equals the losses' definitions on full scores, with every gradient."""

import numpy as np
import pytest
import torch

from model import dense_loss as module
from model.dense_loss import DenseTargets, dense_loss
from model.losses import one_against_all, softmax_cross_entropy
from model.transitions import TransitionPrior, Transitions
from tests import synthetic

N, M, D = 13, 11, 5


@pytest.mark.parametrize("with_reward", [False, True])
@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_value_and_gradients(with_reward, with_extras, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CELLS", rows * M)
    torch.manual_seed(0)
    query, w, b = torch.randn(N, D), torch.randn(M, D), torch.randn(M)
    beta = torch.tensor(0.7)
    prior = TransitionPrior(M)
    prior.inverse_p_M = torch.rand(M) + 0.5
    log = synthetic.histories(
        [np.random.default_rng(u).permutation(M).tolist() for u in range(4)], [list(range(M))] * 4
    )
    transitions = Transitions.count(log, M)
    recent = torch.randint(-1, M, (N, prior.recent))
    log_q, period = torch.randn(3, M), torch.randint(3, (N,))
    target, weight, reward = torch.randint(M, (N,)), torch.rand(N), torch.rand(N)
    leaves = [t.requires_grad_() for t in (query, w, b, beta)]
    if with_extras:
        leaves += [prior.log_gamma, prior.log_kappa]

    phi, trend = torch.addmm(b, query, w.T), None
    given = DenseTargets(target, weight, reward if with_reward else None)
    coefficients = {}
    if with_extras:
        phi = phi + prior(transitions, recent)
        trend = beta * log_q[period]
        given = DenseTargets(
            target,
            weight,
            given.reward_N,
            log_q,
            period,
            transitions,
            recent,
            prior.alpha_R,
            prior.inverse_p_M,
        )
        coefficients = {"beta": beta, "gamma": prior.gamma, "kappa": prior.kappa}
    if with_reward:
        wanted = one_against_all(phi, target, reward, trend, weight)
    else:
        wanted = softmax_cross_entropy(phi, target, trend, weight)
    got = dense_loss(query, w, b, given, **coefficients)
    torch.testing.assert_close(got, wanted)
    for a, c in zip(
        torch.autograd.grad(3 * got, leaves, allow_unused=True),
        torch.autograd.grad(3 * wanted, leaves, allow_unused=True),
        strict=True,
    ):
        if c is None:
            assert a is None
        else:
            torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


def test_weights_of_zero_give_a_loss_of_zero():
    query, w, b = torch.randn(N, D, requires_grad=True), torch.randn(M, D), torch.randn(M)
    loss = dense_loss(query, w, b, DenseTargets(torch.zeros(N, dtype=torch.int64), torch.zeros(N)))
    loss.backward()
    assert loss.item() == 0.0 and not query.grad.any()
