"""Training begins at the likeliest mixture of popularity, counts and repeats."""

import numpy as np
import pytest
import torch

from experiments.generated import generated_task
from model.baselines.popularity import Popularity
from model.baselines.transition_counts import TransitionCounts
from model.evaluation import outcomes
from model.inputs import InputEncodings, Positions
from model.prior_start import Facts, Popularities, popularity_start, start_priors
from model.repeats import RepeatPrior
from model.training import TrainSettings, fit
from model.transitions import TransitionPrior, Transitions
from model.trend_table import TrendTable
from model.trends import ResolvedTrend, TrendSettings, choose_trend
from tests import synthetic

M, FOLDS = 12, 3


def _log(seed=0):
    """Users who often go on to the next item, or back to one they had."""
    rng = np.random.default_rng(seed)
    lists = []
    for _ in range(30):
        items = [int(rng.integers(M))]
        while len(items) < 9:
            kind = rng.random()
            after = (items[-1] + 1) % M if kind < 0.5 else int(rng.integers(M))
            items.append(int(rng.choice(items)) if kind > 0.8 else after)
        lists.append(items)
    return synthetic.histories(lists, [list(range(len(i))) for i in lists])


def _parts(log):
    rng = np.random.default_rng(1)
    fold_U = rng.integers(FOLDS, size=len(log))
    transitions = Transitions.cross_fitted(log, M, fold_U, FOLDS)
    p_M = torch.from_numpy(rng.dirichlet(np.full(M, 2.0))).float()
    return fold_U, transitions, p_M


def _softmax_loss(log, event_N, p_M, prior, transitions, fold_U, repeats):
    """−log likelihood by scoring every item as the network does."""
    positions = Positions.of(log, InputEncodings(num_items=M, session_gap=60), None)
    at_N = torch.from_numpy(event_N)
    item_NR = positions.recent_items(at_N, prior.recent)
    fold_N1 = torch.from_numpy(fold_U[log.user_E[event_N]])[:, None]
    row_NR = torch.where(item_NR >= 0, fold_N1 * M + item_NR, -1)
    phi_NM = p_M.log() + prior(transitions, row_NR) + repeats(positions.seen_items(at_N), M)
    log_p_NM = torch.log_softmax(phi_NM.double(), dim=1)
    return -log_p_NM[torch.arange(len(event_N)), positions.target[at_N]].sum()


def test_closed_form_is_the_softmax_over_all_items():
    log = _log()
    fold_U, transitions, p_M = _parts(log)
    event_N = np.sort(np.random.default_rng(2).permutation(log.num_events)[:100])
    prior, repeats = TransitionPrior(M), RepeatPrior()
    with torch.no_grad():
        prior.inverse_p_M = 1.0 / p_M
        prior.log_gamma.zero_()
        prior.log_kappa.fill_(0.7)
        torch.nn.init.normal_(repeats.rho)
        facts = Facts.of(log, event_N, p_M, prior, transitions, fold_U)
        got = facts.loss(prior.kappa.double(), repeats.rho.double())
        wanted = _softmax_loss(log, event_N, p_M, prior, transitions, fold_U, repeats)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)


def test_start_is_the_likeliest():
    log = _log()
    fold_U, transitions, p_M = _parts(log)
    prior, repeats = TransitionPrior(M), RepeatPrior()
    event_N = np.arange(log.num_events)
    facts = Facts.of(log, event_N, p_M, prior, transitions, fold_U)
    start_priors(facts, prior, repeats)
    assert float(prior.gamma.detach()) == 1.0
    assert float(prior.kappa.detach()) > 1.0  # half of the steps go on to the next item

    def held(log_kappa, rho_B):
        kappa = log_kappa.exp()
        observed = 2.0 * torch.log1p(kappa) - log_kappa + (rho_B.exp() - rho_B).sum()
        return float(facts.loss(kappa, rho_B) + observed)

    at = prior.log_kappa.detach().double(), repeats.rho.detach().double()
    least = held(*at)
    for step in (-0.1, 0.1):
        assert held(at[0] + step, at[1]) > least
        for bucket in range(4):
            moved_B = at[1].clone()
            moved_B[bucket] += step
            assert held(at[0], moved_B) > least


def test_where_counts_are_not_read_repeats_are_the_priors_to_tell():
    """Some items come four times in a row: of known ones the counts say which, of new ones only ρ
    can say how often."""
    rng = np.random.default_rng(0)
    lists = []
    for chosen in rng.integers(M, size=(60, 5)):
        lists.append(np.repeat(chosen, np.where(chosen < 4, 4, 1)).tolist())
    log = synthetic.histories(lists, [list(range(len(items))) for items in lists])
    fold_U, transitions, p_M = _parts(log)
    p_M = torch.full_like(p_M, 1.0 / M)
    prior, repeats = TransitionPrior(M), RepeatPrior()
    facts = Facts.of(log, np.arange(log.num_events), p_M, prior, transitions, fold_U)
    rho = []
    for without_counts in (0.0, 0.5, 1.0):
        start_priors(facts, prior, repeats, without_counts)
        rho.append(float(repeats.rho.detach()[0]))
    alone = RepeatPrior()
    start_priors(facts, None, alone)
    assert rho[0] < rho[1] - 0.3 < rho[2]
    assert rho[2] == pytest.approx(float(alone.rho.detach()[0]), abs=1e-3)


def test_without_counts_or_without_repeats_the_other_starts_alone():
    log = _log()
    fold_U, transitions, p_M = _parts(log)
    event_N = np.arange(log.num_events)
    repeats = RepeatPrior()
    start_priors(Facts.of(log, event_N, p_M, None, None, fold_U), None, repeats)
    assert repeats.rho.detach()[0] > 0.5  # one in five goes back to one of a few items
    prior = TransitionPrior(M)
    start_priors(Facts.of(log, event_N, p_M, prior, transitions, fold_U), prior, None)
    assert prior.kappa.detach() > 1.0


def test_weights_of_popularity_and_trend_by_brute_force():
    rng = np.random.default_rng(0)
    log = synthetic.histories(
        rng.integers(M, size=(20, 6)).tolist(),
        np.sort(rng.integers(0, 4000, size=(20, 6)), axis=1).tolist(),
    )
    trend = ResolvedTrend(period_seconds=1000, window_seconds=0, smoothing=1.0)
    table = TrendTable.build(log.item_E, log.timestamp_E, M, trend)
    event_N = np.sort(rng.permutation(log.num_events)[:50])
    facts = Popularities.of(table, log, event_N, log.item_counts(M))
    wanted = 0.0
    for event in event_N:
        item, before = log.item_E[event], log.timestamp_E < log.timestamp_E[event] // 1000 * 1000
        q_M = np.bincount(log.item_E[before], minlength=M) + 1.0
        # Without the event itself: one choice less of its item.
        count_M = np.bincount(log.item_E, minlength=M) + 1.0
        count_M[item] -= 1.0
        score_M = 0.6 * np.log(count_M / (log.num_events + M)) + 0.3 * np.log(q_M / q_M.sum())
        wanted -= score_M[item] - np.log(np.exp(score_M).sum())
    got = float(facts.loss(torch.tensor(0.6), torch.tensor(0.3)))
    assert got == pytest.approx(wanted, rel=1e-5)


def test_where_popularity_stands_still_the_whole_log_says_most():
    train = generated_task("noise", 0).train
    trend = choose_trend(train.item_E, train.timestamp_E, 300, TrendSettings())
    table = TrendTable.build(train.item_E, train.timestamp_E, 300, trend)
    count_M = train.item_counts(300)
    share, beta = popularity_start(Popularities.of(table, train, np.arange(2000), count_M))
    assert share > 0.8 and beta < 0.4


def test_where_popularity_flips_the_trend_says_it():
    """Items of the first half of the time never come again: the whole log would say half."""
    rng = np.random.default_rng(0)
    time = np.sort(rng.integers(0, 100_000, size=(300, 8)), axis=1)
    item = rng.integers(5, size=time.shape) + 5 * (time // 10_000)
    log = synthetic.histories(item.tolist(), time.tolist())
    trend = ResolvedTrend(period_seconds=500, window_seconds=2000, smoothing=0.1)
    table = TrendTable.build(log.item_E, log.timestamp_E, 50, trend)
    weighed = Popularities.of(table, log, np.arange(log.num_events), log.item_counts(50))
    share, beta = popularity_start(weighed)
    assert share < 0.3 and beta > 0.6


def _ranked(model, task):
    found = outcomes(model, task.test, task.num_items)
    rank_N, nll_N = (column[task.test.event_N] for column in (found.rank_E, found.nll_E))
    ndcg_N = np.where(rank_N <= 10, 1.0 / np.log2(1.0 + rank_N), 0.0)
    return float(np.exp(nll_N.mean())), float(ndcg_N.mean())


def _trained(task, **settings):
    train = task.train
    trend = choose_trend(train.item_E, train.timestamp_E, task.num_items, TrendSettings())
    settings = TrainSettings.parse({"max_epochs": 8} | settings)
    return fit(train, task.valid, task.log.catalogue, settings, trend)


def test_on_a_sparse_log_the_counts_are_what_training_begins_with():
    """Most pairs were seen once or twice, and there are five steps an epoch: PPL 500 where κ began
    at 1 on every log, NDCG@10 .26 where the counts had .54."""
    task = generated_task("sparse", 0)
    ppl, ndcg = _ranked(_trained(task), task)
    counted_ppl, counted_ndcg = _ranked(TransitionCounts(task.num_items).fit(task.train), task)
    assert ppl < 0.8 * counted_ppl
    assert ndcg > counted_ndcg - 0.005


@pytest.mark.parametrize("name", ["noise", "one-event", "few"])
def test_where_there_is_nothing_to_learn_popularity_stays(name):
    task = generated_task(name, 0)
    ppl, ndcg = _ranked(_trained(task, max_epochs=12), task)
    popular_ppl, popular_ndcg = _ranked(Popularity(task.num_items).fit(task.train), task)
    assert ppl < 1.01 * popular_ppl
    assert ndcg > popular_ndcg - 0.003


def test_of_a_log_in_which_nobody_has_a_second_event_the_first_ones_validate():
    model = _trained(generated_task("one-event", 0), max_epochs=2)
    assert all(np.isfinite(entry["valid_loss"]) for entry in model.curve)
