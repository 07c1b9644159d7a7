"""One contract for everything that recommends: HRNN-meta with every encoder, and the baselines.

A model that peeks at what it is to predict, depends on the size of a block, or comes back
different from disk fails here. What is tested is listed in `tests.contract.registry`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from model import bundle as bundles
from model.baselines.base import with_request
from model.baselines.transition_counts import TransitionCounts
from model.evaluation import evaluate
from model.hrnn import TrainedHRNN
from model.splits import SplitSettings, split_users
from model.trends import snapshot_from_counts
from tests import synthetic
from tests.contract.registry import REGISTRY, hrnn_schema

M = 20
ENTRIES = {entry.name: entry for entry in REGISTRY}
NEXT_ITEM = [e.name for e in REGISTRY if e.next_item]
VALUES = [e.name for e in REGISTRY if e.values]
BASELINES = [e.name for e in REGISTRY if e.baseline]
HRNN = [e.name for e in REGISTRY if not e.baseline]
CATALOGUE = synthetic.catalogue(M)


def _log():
    log = synthetic.successor(80, 10, M, seed=0)
    rng = np.random.default_rng(0)
    value_E = np.where(rng.random(log.num_events) < 0.2, np.nan, rng.normal(size=log.num_events))
    kinds = np.array([("buy", "view")[j % 2] for j in log.item_E], dtype=object)
    log = replace(log, value_E=value_E, event_type_E=kinds)
    return log.with_user_fields({"group": [("a", "b", None)[u % 3] for u in range(len(log))]})


SPLIT = split_users(_log(), SplitSettings())
NOBODY = SPLIT.test.subset(np.empty(0, dtype=np.int64))


def _make(name, train=SPLIT.train):
    return ENTRIES[name].make(train, SPLIT.valid, CATALOGUE)


@pytest.fixture(scope="module")
def fitted():
    """Every model, fitted once: name → model."""
    return {name: _make(name) for name in ENTRIES}


@pytest.fixture(scope="module")
def fitted_without():
    """Fits a model, by name, on a log in which items 0 … 4 never happen."""
    train = SPLIT.train.where(SPLIT.train.item_E >= 5)
    return lru_cache(lambda name: _make(name, train))


def _scores(model, histories, block=1000):
    out = torch.full((histories.num_events, M), torch.nan)
    seen = np.zeros(histories.num_events, dtype=int)
    for event_N, score_NM in model.iter_scores(histories, block):
        assert event_N.dtype == np.int64
        assert score_NM.dtype == torch.float32
        assert score_NM.shape == (len(event_N), M)
        seen[event_N] += 1
        out[event_N] = score_NM
    assert (seen == 1).all(), "every event is scored exactly once"
    return out


def _predict(name, model):
    """What the model says of every event, as an array: scores or values."""
    if name == "scores":
        return lambda log: _scores(model, log).numpy()
    return model.predict_values


CONTRACTS = [(n, "scores") for n in NEXT_ITEM] + [(n, "values") for n in VALUES]


def _assert_same_in_any_block(model, histories):
    whole = _scores(model, histories)
    for block in (1, 7):
        torch.testing.assert_close(_scores(model, histories, block), whole, atol=1e-5, rtol=1e-5)


def _assert_alone_as_in_a_batch(predict, histories):
    """Nobody's predictions depend on who else is asked about."""
    whole = predict(histories)
    for user in (0, 3):
        rows = slice(histories.offset_U1[user], histories.offset_U1[user + 1])
        alone = predict(histories.subset(np.array([user])))
        np.testing.assert_allclose(alone, whole[rows], atol=1e-5, rtol=1e-5)


def _assert_no_peeking(predict, histories, *, item_is_given):
    """Positions up to k must not notice that event k and later ones are others."""
    before = predict(histories)
    user, k = 2, 4
    at = histories.offset_U1[user] + k
    end = histories.offset_U1[user + 1]
    item_E = histories.item_E.copy()
    item_E[at + item_is_given : end] = (item_E[at + item_is_given : end] + 1) % M
    value_E = histories.value_E.copy()
    value_E[at:end] = 9.0
    kind_E = histories.event_type_E.copy()
    kind_E[at:end] = np.where(kind_E[at:end] == "buy", "view", "buy")  # another one everywhere
    changed = predict(replace(histories, item_E=item_E, value_E=value_E, event_type_E=kind_E))
    np.testing.assert_allclose(changed[: at + 1], before[: at + 1], atol=1e-5)
    np.testing.assert_allclose(changed[end:], before[end:], atol=1e-5)
    return changed, before, slice(at + 1, end)


def _assert_the_future_does_not_matter(predict, histories):
    """The first events of everybody are predicted the same when the later ones are cut off."""
    place_E = np.arange(histories.num_events) - histories.offset_U1[:-1][histories.user_E]
    for length in (1, 3, 6):
        kept_E = place_E < length
        cut = predict(histories.where(kept_E))
        np.testing.assert_allclose(cut, predict(histories)[kept_E], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_scores_are_finite_and_the_same_in_any_block(fitted, name):
    assert torch.isfinite(_scores(fitted[name], SPLIT.test)).all()
    _assert_same_in_any_block(fitted[name], SPLIT.test)


@pytest.mark.parametrize("name", NEXT_ITEM)
@pytest.mark.parametrize("block", [1, 7, 50])
def test_a_block_holds_no_more_rows_than_asked_for(fitted, name, block):
    rows = [len(event_N) for event_N, _ in fitted[name].iter_scores(SPLIT.test, block)]
    assert max(rows) <= block


@pytest.mark.parametrize(("name", "what"), CONTRACTS)
def test_a_user_alone_gets_what_the_batch_gets(fitted, name, what):
    _assert_alone_as_in_a_batch(_predict(what, fitted[name]), SPLIT.test)


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_nothing_is_known_of_the_event_to_predict(fitted, name):
    changed, before, later = _assert_no_peeking(
        _predict("scores", fitted[name]), SPLIT.test, item_is_given=False
    )
    if ENTRIES[name].reads_past:
        assert not np.allclose(changed[later], before[later]), "the past is read"


@pytest.mark.parametrize(("name", "what"), CONTRACTS)
def test_what_comes_later_does_not_matter(fitted, name, what):
    _assert_the_future_does_not_matter(_predict(what, fitted[name]), SPLIT.test)


@pytest.mark.parametrize("name", NEXT_ITEM)
def test_users_with_one_event_and_users_with_none(fitted, name):
    log = SPLIT.test.where(SPLIT.test.user_E != 1)  # user 1 has no event left
    assert torch.isfinite(_scores(fitted[name], log)).all()
    first = np.zeros(SPLIT.test.num_events, dtype=bool)
    first[SPLIT.test.offset_U1[:-1]] = True
    whole = _scores(fitted[name], SPLIT.test)
    torch.testing.assert_close(
        _scores(fitted[name], SPLIT.test.where(first)), whole[first], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("name", "what"), CONTRACTS)
def test_nobody_at_all(fitted, name, what):
    assert len(_predict(what, fitted[name])(NOBODY)) == 0


@pytest.mark.parametrize(("name", "what"), CONTRACTS)
def test_items_that_training_never_saw(fitted_without, name, what):
    asked = replace(SPLIT.test, item_E=SPLIT.test.item_E % 5)  # histories of nothing else
    predicted = _predict(what, fitted_without(name))(asked)
    assert np.isfinite(predicted).all()


@pytest.mark.parametrize(("name", "what"), CONTRACTS)
def test_users_whose_fields_are_unknown(fitted, name, what):
    predict = _predict(what, fitted[name])
    missing = SPLIT.test.with_user_fields({"group": [None] * len(SPLIT.test)})
    absent = SPLIT.test.with_user_fields({})
    np.testing.assert_array_equal(predict(absent), predict(missing))
    never_seen = SPLIT.test.with_user_fields({"group": ["z"] * len(SPLIT.test)})
    assert np.isfinite(predict(never_seen)).all()


@pytest.mark.parametrize("name", [n for n in BASELINES if ENTRIES[n].next_item])
def test_baselines_recommend_from_the_last_event_on(fitted, name):
    model = fitted[name]
    assert model.num_items == M
    lists = model.recommend(SPLIT.test, k=100)
    scores = _scores(model, with_request(SPLIT.test))
    for user, (items, values) in enumerate(lists):
        assert sorted(items) == list(range(M)), "k beyond the catalogue gives all of it"
        row = scores[SPLIT.test.offset_U1[user + 1] + user]
        np.testing.assert_allclose(values, row[items], atol=1e-5)
        assert (np.diff(values) <= 0).all()
    for user, (items, _) in enumerate(model.recommend(SPLIT.test, k=5, exclude_seen=True)):
        rows = slice(SPLIT.test.offset_U1[user], SPLIT.test.offset_U1[user + 1])
        assert not set(items) & set(SPLIT.test.item_E[rows])


@pytest.mark.parametrize("name", [n for n in BASELINES if ENTRIES[n].next_item])
def test_baselines_recommend_to_users_without_a_past(fitted, name):
    model = fitted[name]
    assert model.recommend(NOBODY, k=5) == []
    empty = SPLIT.test.where(np.zeros(SPLIT.test.num_events, dtype=bool))
    for exclude_seen in (False, True):
        lists = model.recommend(empty, k=5, exclude_seen=exclude_seen)
        assert [len(items) for items, _ in lists] == [5] * len(SPLIT.test)
    everything = synthetic.histories([list(range(M))], [list(range(M))])
    [(items, values)] = model.recommend(everything, k=5, exclude_seen=True)
    assert len(items) == len(values) == 0, "nothing is left"


@pytest.mark.parametrize(("name", "what"), [c for c in CONTRACTS if c[0] in BASELINES])
def test_baselines_come_back_from_disk(fitted, name, what, tmp_path):
    fitted[name].save(tmp_path / name)
    assert not list(tmp_path.rglob("*.pkl"))
    again = ENTRIES[name].baseline.load(tmp_path / name)
    assert again.num_items == M
    np.testing.assert_array_equal(
        _predict(what, again)(SPLIT.test), _predict(what, fitted[name])(SPLIT.test)
    )


@pytest.mark.parametrize("name", HRNN)
def test_hrnn_comes_back_from_disk(fitted, name, tmp_path):
    model: TrainedHRNN = fitted[name]
    snapshot = snapshot_from_counts(
        [], np.empty(0), num_items=M, smoothing=1.0, as_of=0, window_seconds=0
    )
    bundles.save(
        tmp_path / name,
        model=model,
        catalogue=CATALOGUE,
        schema=hrnn_schema(),
        settings=ENTRIES[name].settings,
        trend=snapshot,
        metrics={},
    )
    again = bundles.load(tmp_path / name).model
    again.trend_log = model.trend_log
    assert torch.equal(_scores(again, SPLIT.test), _scores(model, SPLIT.test))
    np.testing.assert_array_equal(
        again.predict_values(SPLIT.test), model.predict_values(SPLIT.test)
    )


@pytest.mark.parametrize("name", ENTRIES)
def test_the_same_seed_gives_the_same_model(fitted, name):
    again = _make(name)
    for what in [what for n, what in CONTRACTS if n == name]:
        np.testing.assert_allclose(
            _predict(what, again)(SPLIT.test),
            _predict(what, fitted[name])(SPLIT.test),
            rtol=1.3e-6,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", [n for n in NEXT_ITEM if n in BASELINES and ENTRIES[n].reads_past])
def test_a_planted_sequence_is_found(fitted, name):
    ours = evaluate(fitted[name], SPLIT.test, M)["every"]["ppl"]
    assert ours < 0.95 * evaluate(fitted["popularity"], SPLIT.test, M)["every"]["ppl"]


@pytest.mark.parametrize("name", VALUES)
def test_values_are_predicted_without_seeing_them(fitted, name):
    predicted = fitted[name].predict_values(SPLIT.test)
    assert predicted.shape == (SPLIT.test.num_events,)
    assert predicted.dtype == np.float64
    assert np.isfinite(predicted).all()
    changed, before, later = _assert_no_peeking(
        fitted[name].predict_values, SPLIT.test, item_is_given=True
    )
    assert not np.allclose(changed[later], before[later]), "the values before are read"


@pytest.mark.parametrize("name", [n for n in VALUES if n in BASELINES])
def test_value_baselines_need_values(name):
    with pytest.raises(ValueError, match="no values"):
        _make(name, replace(SPLIT.train, value_E=None))


def test_a_baseline_does_not_load_as_another(fitted, tmp_path):
    fitted["popularity"].save(tmp_path)
    with pytest.raises(bundles.BundleError, match="popularity"):
        TransitionCounts.load(tmp_path)


class _Broken:
    """Scores made from a function of the histories: float `[E, M]`, or `[E]` for values."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def iter_scores(self, histories, block):
        score_EM = torch.from_numpy(self.function(histories)).float()
        for start in range(0, histories.num_events, block):
            event_N = np.arange(start, min(start + block, histories.num_events))
            yield event_N, score_EM[event_N]

    def predict_values(self, histories):
        return self.function(histories)


def _one_hot(item_E):
    return np.eye(M)[item_E]


def _next_item_of_same_user(log):
    last_E = np.isin(np.arange(log.num_events), log.offset_U1[1:] - 1)
    return _one_hot(np.where(last_E, log.item_E, np.roll(log.item_E, -1)))


PEEKING = {
    "the item itself": lambda log: _one_hot(log.item_E),
    "the item after it": _next_item_of_same_user,
    "how often it comes later": lambda log: np.stack(
        [np.bincount(log.item_E[log.user_E == u], minlength=M) for u in log.user_E]
    ).astype(float),
    "its event type": lambda log: np.outer(log.event_type_E == "buy", np.ones(M)),
}


def test_the_suite_passes_a_model_that_keeps_the_contract():
    before = _Broken(lambda log: _one_hot(np.roll(log.item_E, 1)) * _has_past(log)[:, None])
    predict = _predict("scores", before)
    _assert_no_peeking(predict, SPLIT.test, item_is_given=False)
    _assert_the_future_does_not_matter(predict, SPLIT.test)
    _assert_alone_as_in_a_batch(predict, SPLIT.test)
    _assert_same_in_any_block(before, SPLIT.test)


def _has_past(log):
    return ~np.isin(np.arange(log.num_events), log.offset_U1[:-1])


@pytest.mark.parametrize("what", PEEKING)
def test_the_suite_notices_a_model_that_peeks(what):
    predict = _predict("scores", _Broken(PEEKING[what]))
    with pytest.raises(AssertionError):
        _assert_no_peeking(predict, SPLIT.test, item_is_given=False)


def test_the_suite_notices_a_look_at_what_comes_later():
    for what in ("the item after it", "how often it comes later"):
        with pytest.raises(AssertionError):
            _assert_the_future_does_not_matter(
                _predict("scores", _Broken(PEEKING[what])), SPLIT.test
            )


@pytest.mark.parametrize(
    "function",
    [
        lambda log: np.nan_to_num(log.value_E),  # the value to predict
        lambda log: np.nan_to_num(np.roll(log.value_E, -1)),  # the one after it
        lambda log: np.array([np.nanmean(log.value_E[log.user_E == u]) for u in log.user_E]),
    ],
)
def test_the_suite_notices_a_look_at_the_value(function):
    with pytest.raises(AssertionError):
        _assert_no_peeking(_Broken(function).predict_values, SPLIT.test, item_is_given=True)


def test_the_suite_notices_that_other_users_matter():
    crowd = _Broken(lambda log: np.tile(np.bincount(log.item_E, minlength=M), (log.num_events, 1)))
    with pytest.raises(AssertionError):
        _assert_alone_as_in_a_batch(_predict("scores", crowd), SPLIT.test)


def test_the_suite_notices_that_the_block_matters():
    class Blocky(_Broken):
        def iter_scores(self, histories, block):
            for event_N, score_NM in super().iter_scores(histories, block):
                yield event_N, score_NM + torch.arange(len(event_N))[:, None]

    with pytest.raises(AssertionError):
        _assert_same_in_any_block(Blocky(lambda log: np.zeros((log.num_events, M))), SPLIT.test)


def test_the_suite_notices_events_left_out_or_scored_twice():
    class Forgetful(_Broken):
        def iter_scores(self, histories, block):
            yield from list(super().iter_scores(histories, block))[1:]

    class Repeating(_Broken):
        def iter_scores(self, histories, block):
            yield from super().iter_scores(histories, block)
            yield from super().iter_scores(histories, block)

    for kind in (Forgetful, Repeating):
        with pytest.raises(AssertionError, match="exactly once"):
            _scores(kind(lambda log: np.zeros((log.num_events, M))), SPLIT.test)
