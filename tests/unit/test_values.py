"""The user's taste from values so far equals a ridge regression by hand, and never peeks."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from model import trainer, values
from model.catalogue import Catalogue
from model.evaluation import squared_errors
from model.loader import sample_of
from model.schema import Schema
from model.splits import SplitSettings, split_users
from model.train_settings import TrainSettings
from model.training import fit
from model.values import (
    MEAN_DAMPING,
    RIDGE,
    SHARE_DAMPING,
    ValueHead,
    item_means,
    item_tastes,
    running_tastes,
    shares_kept,
)
from tests import synthetic


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    chunk=st.sampled_from([1, 4, 1000]),
    seed=st.integers(0, 50),
)
def test_running_tastes_equal_ridge_regressions_by_hand(lengths, chunk, seed):
    rng = np.random.default_rng(seed)
    offset = np.r_[0, np.cumsum(lengths)]
    item = rng.integers(6, size=offset[-1])
    value = np.where(rng.random(offset[-1]) < 0.3, np.nan, rng.normal(size=offset[-1]))
    mean, taste = rng.normal(size=6), rng.normal(size=(6, 2))
    whole, values.CHUNK = values.CHUNK, chunk
    try:
        got = running_tastes(
            torch.from_numpy(item),
            torch.from_numpy(value).float(),
            offset,
            torch.from_numpy(mean).float(),
            torch.from_numpy(taste).float(),
        ).numpy()
    finally:
        values.CHUNK = whole
    for start, end in itertools.pairwise(offset):
        for k in range(start, end):
            before = [e for e in range(start, k) if not np.isnan(value[e])]
            x = np.c_[taste[item[before]], np.ones(len(before))]
            gram = x.T @ x + np.diag([RIDGE, RIDGE, MEAN_DAMPING])
            w = np.linalg.solve(gram, x.T @ (value[before] - mean[item[before]]))
            np.testing.assert_allclose(got[k, :-1], w, atol=1e-4)
            np.testing.assert_allclose(got[k, -1], len(before) / (len(before) + MEAN_DAMPING))


def test_item_means_are_damped_and_skip_missing_values():
    got = item_means(np.array([0, 0, 1]), np.array([3.0, np.nan, 1.0], np.float32), 3)
    np.testing.assert_allclose(got, [3 / (1 + MEAN_DAMPING), 1 / (1 + MEAN_DAMPING), 0.0])


def test_of_a_long_log_some_users_say_what_items_are_worth(monkeypatch):
    rng = np.random.default_rng(0)
    log = synthetic.gap_decides(40, 10, 4, seed=0)
    log = replace(log, value_E=rng.normal(size=log.num_events))
    settings, catalogue = TrainSettings(), Catalogue(tuple("abcd"))
    whole = trainer.Trainer(log, catalogue, settings, None, Schema()).network.values
    monkeypatch.setattr(trainer, "RATED_EVENTS", 100)
    some = trainer.Trainer(log, catalogue, settings, None, Schema())
    sample = sample_of(log, 100, np.random.default_rng(settings.seed))
    assert len(sample) < len(log)
    value_E = some.encodings.standardise(sample.value_E, sample.num_events).numpy()
    got = some.network.values.mean_M
    np.testing.assert_array_equal(got, item_means(sample.item_E, value_E, 4))
    assert not torch.equal(got, whole.mean_M)


def test_tastes_find_what_divides_the_users():
    rng = np.random.default_rng(0)
    side, kind = rng.choice([-1.0, 1.0], 300), np.where(np.arange(20) < 10, 1.0, -1.0)
    user, item = np.repeat(np.arange(300), 20), np.tile(np.arange(20), 300)
    value = side[user] * kind[item] + 0.1 * rng.normal(size=6000)
    tastes = item_tastes(
        torch.from_numpy(item),
        torch.from_numpy(user),
        torch.from_numpy(value).float(),
        torch.zeros(20),
        300,
    ).numpy()
    assert tastes.shape == (20, values.TASTES)
    first = tastes[:, 0] * np.sign(tastes[0, 0])
    assert (np.sign(first) == kind).all()
    assert np.abs(tastes[:, 1:]).max() < 0.1 * np.abs(first).min()


def test_of_what_was_learned_as_much_is_kept_as_new_users_bear_out():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(5000, 4))
    value = parts @ [1.0, 0.7, 0.0, 1.0] - 0.5 * parts[:, 2] + 0.1 * rng.normal(size=5000)
    np.testing.assert_allclose(shares_kept(value, parts), [0.7, 0.0, 1.0], atol=0.02)
    np.testing.assert_array_equal(shares_kept(value[:0], parts[:0]), 1.0)  # nothing is known


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), events=st.integers(0, 40), scale=st.sampled_from([0.1, 1, 30]))
def test_shares_are_those_of_a_general_bounded_least_squares_solver(seed, events, scale):
    rng = np.random.default_rng(seed)
    parts, value = scale * rng.normal(size=(events, 4)), rng.normal(size=events)
    damping = SHARE_DAMPING**0.5
    expected = lsq_linear(
        np.concatenate([parts[:, 1:], damping * np.eye(3)]),
        np.concatenate([value - parts[:, 0], np.full(3, damping)]),
        bounds=(0.0, 1.0),
        method="bvls",
    )
    np.testing.assert_allclose(shares_kept(value, parts), expected.x, atol=1e-6)


def test_a_head_that_keeps_shares_predicts_the_shares_of_its_parts():
    torch.manual_seed(0)
    head = ValueHead(5, 6, dropout=0.0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    h, taste, item = torch.randn(9, 6), torch.randn(9, 10), torch.randint(5, (9,))
    before = head(h, taste, item)
    head.keep(np.array([0.5, 0.25, 0.0]))
    torch.testing.assert_close(head(h, taste, item), before * torch.tensor([1, 0.5, 0.25, 0.0]))


def test_a_model_that_learned_its_users_by_heart_is_no_worse_than_their_averages(monkeypatch):
    """Values that nothing foretells: what the head learned of them is thrown away."""
    rng = np.random.default_rng(0)
    log = synthetic.gap_decides(40, 10, 4, seed=0)
    log = replace(log, value_E=rng.normal(size=log.num_events))
    split = split_users(log, SplitSettings())
    kept = []
    monkeypatch.setattr(ValueHead, "keep", lambda self, share_P: kept.append(share_P))
    chosen = TrainSettings(max_epochs=30, value_weight=10.0)
    learned = fit(split.train, split.valid, Catalogue(tuple("abcd")), chosen, None)
    monkeypatch.undo()
    before = np.nanmean(squared_errors(learned, split.valid))
    learned.network.values.keep(kept[0])
    assert np.nanmean(squared_errors(learned, split.valid)) < before
