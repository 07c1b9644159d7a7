"""β and the bias of items that come after training: fitted, stored, and the same wherever used."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model import bundle as bundles
from model.catalogue import Catalogue
from model.evaluation import perplexity
from model.extension import as_new, with_catalogue
from model.new_items import LARGEST_BIAS, PRECISION, _Block, _fitted, _loss, fit_new_items
from model.recommender import Recommender
from model.schema import Schema
from model.splits import Cases
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend, snapshot_from_counts
from tests import synthetic

SCHEMA = Schema.parse({"items": {"section": "categorical"}})
HOUR, PER_HOUR, LIFE = 3600, 6, 2
TREND = ResolvedTrend(period_seconds=600, window_seconds=1800, smoothing=0.1)
SETTINGS = TrainSettings.parse(
    {
        "max_epochs": 6,
        "learning_rate": 0.01,
        "batch_events": 512,
        "network": {"embedding": 16, "hidden": 16, "control": 4, "dropout": 0.1},
    }
)


def newspaper(hours: int, users: int, seed: int):
    """Every hour has articles of its own, which are read for two hours, a few of them by most."""
    rng = np.random.default_rng(seed)
    popularity_M = np.random.default_rng(9).dirichlet(np.full(PER_HOUR, 0.4), hours).ravel()
    items, times = [], []
    for _ in range(users):
        begin = rng.integers(0, hours - LIFE)
        time_L = np.sort(rng.integers(begin * HOUR, (begin + LIFE) * HOUR, 12))
        chosen = []
        for time in time_L:
            first = max(0, int(time) // HOUR - LIFE + 1) * PER_HOUR
            alive_M = np.zeros(len(popularity_M))
            alive_M[first : (int(time) // HOUR + 1) * PER_HOUR] = 1.0
            p_M = alive_M * popularity_M
            chosen.append(int(rng.choice(len(p_M), p=p_M / p_M.sum())))
        items.append(chosen)
        times.append(time_L.tolist())
    return synthetic.histories(items, times)


def catalogue(num_items: int) -> Catalogue:
    return Catalogue(
        tuple(f"a{j:04d}" for j in range(num_items)),
        {"section": ["nsw"[j % 3] for j in range(num_items)]},
    )


@pytest.fixture(scope="module")
def trained():
    """A model of the first hours, what it was trained on, and the whole paper."""
    log = newspaper(16, 500, seed=0)
    known = 11 * PER_HOUR
    first = log.where(log.timestamp_E < 11 * HOUR)
    first = first.subset(np.flatnonzero(np.diff(first.offset_U1) > 1))
    cut = int(0.85 * len(first))
    train, valid = first.subset(np.arange(cut)), first.subset(np.arange(cut, len(first)))
    model = fit(train, valid, catalogue(known), SETTINGS, TREND, SCHEMA)
    return model, valid, log


def _blocks(rng, beta, bias, num_events=600, num_items=30):
    new_M = torch.from_numpy(rng.random(num_items) < 0.5)
    score_NM = torch.from_numpy(rng.normal(0, 1, (num_events, num_items))).float()
    log_q_NM = torch.log_softmax(
        torch.from_numpy(rng.normal(0, 2, (num_events, num_items))).float(), 1
    )
    p_NM = torch.softmax(score_NM + beta * log_q_NM + bias * new_M.float(), 1).double().numpy()
    item_N = torch.tensor([rng.choice(num_items, p=p / p.sum()) for p in p_NM])
    parts = zip(score_NM.split(256), log_q_NM.split(256), item_N.split(256), strict=True)
    return [_Block(*part, new_M) for part in parts]


@pytest.mark.parametrize(("beta", "bias"), [(1.0, 1.5), (0.3, -2.0), (0.0, 0.0)])
def test_what_was_planted_is_found(beta, bias):
    blocks = _blocks(np.random.default_rng(1), beta, bias, num_events=4000)
    found = _fitted(blocks, 0.5)
    np.testing.assert_allclose(found, (beta, bias), atol=0.12)


def test_slope_and_curvature_are_those_of_the_loss():
    blocks = _blocks(np.random.default_rng(2), 0.8, 1.0)
    prior_F = torch.tensor([0.5, 0.0], dtype=torch.float64)

    def brute_force(at_F):
        total = 0.5 * PRECISION * (at_F - prior_F).square().sum()
        for b in blocks:
            z_NM = b.score_NM.double() + at_F[0] * b.log_q_NM.double() + at_F[1] * b.new_M.double()
            total = total + torch.nn.functional.cross_entropy(z_NM, b.item_N, reduction="sum")
        return total

    at_F = torch.tensor([0.7, -0.4], dtype=torch.float64)
    loss, slope_F, curve_FF = _loss(blocks, at_F, prior_F)
    np.testing.assert_allclose(loss, brute_force(at_F), rtol=1e-5)
    np.testing.assert_allclose(
        slope_F, torch.autograd.functional.jacobian(brute_force, at_F), rtol=1e-3
    )
    np.testing.assert_allclose(
        curve_FF, torch.autograd.functional.hessian(brute_force, at_F), rtol=1e-3
    )


@pytest.mark.parametrize(("beta", "bias"), [(-0.3, 0.0), (-1.0, -2.0), (0.5, 14.0)])
def test_beyond_a_bound_the_rest_is_still_the_best(beta, bias):
    blocks = _blocks(np.random.default_rng(4), beta, bias, num_events=1000)
    found = torch.tensor(_fitted(blocks, 0.5), dtype=torch.float64)
    prior_F = torch.tensor([0.5, 0.0], dtype=torch.float64)
    loss = _loss(blocks, found, prior_F)[0]
    for step in ([0.02, 0.0], [-0.02, 0.0], [0.0, 0.02], [0.0, -0.02], [0.02, 0.02], [0.02, -0.02]):
        near = found + torch.tensor(step, dtype=torch.float64)
        if near[0] >= 0 and abs(float(near[1])) <= LARGEST_BIAS:
            assert _loss(blocks, near, prior_F)[0] > loss - 1e-3


def test_no_validation_events_leave_the_learned_weight(trained):
    model, valid, _ = trained
    before = float(model.network.new_beta)
    fit_new_items(model, Cases(valid, np.empty(0, dtype=np.int64)), np.arange(10))
    assert float(model.network.new_beta) == before


def test_few_events_change_little():
    blocks = _blocks(np.random.default_rng(3), 1.5, 3.0, num_events=3)
    beta, bias = _fitted(blocks, 0.5)
    assert abs(beta - 0.5) < 0.5 and abs(bias) < 0.5


def _scores(model, cases):
    return torch.cat([s for _, s in model.iter_scores_at(cases.histories, 64, cases.event_N)])


def test_made_new_is_as_left_out_and_added_again(trained):
    model, valid, _ = trained
    whole, item_J = catalogue(model.network.num_items), np.arange(0, 60, 3)
    fewer = whole.subset(np.setdiff1d(np.arange(len(whole)), item_J))
    again = with_catalogue(with_catalogue(model, whole, fewer), fewer, whole)
    again.trend_log = model.trend_log  # what was counted of them is lost on the way
    made = as_new(model, item_J)
    assert torch.equal(made.network.items.new_M, again.network.items.new_M)
    cases = Cases(valid, np.arange(valid.num_events))
    np.testing.assert_allclose(_scores(made, cases), _scores(again, cases), atol=1e-5)


def test_a_catalogue_that_has_not_grown_is_read_as_in_training(trained):
    model, valid, _ = trained
    cases = Cases(valid, np.arange(valid.num_events))
    plain = as_new(model, np.empty(0, dtype=np.int64))
    plain.network.new_beta.zero_()
    plain.network.items.new_bias.zero_()
    assert float(model.network.new_beta) != 0
    np.testing.assert_array_equal(_scores(model, cases), _scores(plain, cases))


def test_tomorrows_paper_is_predicted_better(trained):
    model, _, log = trained
    new = catalogue(16 * PER_HOUR)
    grown = with_catalogue(model, catalogue(model.network.num_items), new)
    grown.trend_log = log
    later = Cases(log, np.flatnonzero(log.timestamp_E >= 12 * HOUR))
    fitted = perplexity(grown, later, len(new))
    grown.network.new_beta.zero_()
    grown.network.items.new_bias.zero_()
    assert fitted < 0.97 * perplexity(grown, later, len(new))


def test_beta_grows_with_the_share_of_new_items_and_stays(trained):
    network = trained[0].network
    learned, more = float(network.beta.detach()), float(network.new_beta)
    share = float(network.new_share)
    beta_N = network.beta_at(torch.tensor([0.0, share / 2, share, 1.0])).detach()
    expected = [learned, learned + more / 2, learned + more, learned + more]
    np.testing.assert_allclose(beta_N, expected, rtol=1e-6)


def test_served_beta_is_that_of_evaluation(trained, tmp_path):
    model, _, log = trained
    whole = catalogue(model.network.num_items)
    snapshot = snapshot_from_counts(
        list(whole.item_ids),
        np.bincount(model.trend_log.item_E, minlength=len(whole)),
        num_items=len(whole),
        smoothing=0.1,
        as_of=11 * HOUR,
        window_seconds=0,
    )
    bundles.save(
        tmp_path / "bundle",
        model=model,
        catalogue=whole,
        schema=SCHEMA,
        settings=SETTINGS,
        trend=snapshot,
        metrics={},
    )
    recommender = Recommender.load(tmp_path / "bundle")
    assert recommender.beta_under(snapshot.item_ids, snapshot.log_q, snapshot.floor) == (
        recommender.beta
    )
    new = catalogue(16 * PER_HOUR)
    fields = [{"section": s} for s in new.fields["section"]]
    later = dict(zip(new.item_ids[len(whole) :], fields[len(whole) :], strict=True))
    grown = recommender.with_items(later)
    time = 14 * HOUR
    counted_E = (log.timestamp_E >= time - 1800) & (log.timestamp_E < time)
    count_M = np.bincount(log.item_E[counted_E], minlength=len(new))
    listed = np.flatnonzero(count_M)
    now = snapshot_from_counts(
        [new.item_ids[j] for j in listed],
        count_M[listed],
        num_items=len(new),
        smoothing=0.1,
        as_of=time,
        window_seconds=1800,
    )
    evaluated = replace(with_catalogue(model, whole, new), trend_log=log)
    log_q_1M = torch.from_numpy(now.dense(new.item_ids)).float()[None]
    expected = float(evaluated.trend_weight(log_q_1M).detach())
    served = grown.beta_under(now.item_ids, now.log_q, now.floor)
    assert served != recommender.beta
    np.testing.assert_allclose(served, expected, rtol=1e-5)
