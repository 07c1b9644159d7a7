"""The baselines against their definitions, written as loops."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.baselines import item_knn
from model.baselines.base import recent_items, with_request
from model.baselines.content import RIDGE, ContentProfile
from model.baselines.factors import RECENT as BPR_RECENT
from model.baselines.factors import BayesianPersonalisedRanking
from model.baselines.item_knn import ItemKNN
from model.baselines.next_item_fm import RECENT as FM_RECENT
from model.baselines.next_item_fm import NextItemFactorizationMachine
from model.baselines.popularity import Popularity, RecentPopularity
from model.baselines.ratings import DampedBias, RollingAverage
from model.catalogue import Catalogue
from model.evaluation import evaluate
from model.fields import FieldBags
from model.schema import FieldKind, Schema
from model.values import MEAN_DAMPING
from tests import synthetic

M = 12


def _log(seed=0, users=30):
    """Random histories of 0 … 9 events; item M − 1 never happens; every fifth value is missing."""
    rng = np.random.default_rng(seed)
    items = [rng.integers(M - 1, size=rng.integers(10)).tolist() for _ in range(users)]
    times = [np.sort(rng.integers(40 * 86_400, size=len(row))).tolist() for row in items]
    log = synthetic.histories(items, times)
    value_E = rng.integers(1, 6, size=log.num_events).astype(float)
    value_E[rng.random(log.num_events) < 0.2] = np.nan
    return replace(log, value_E=value_E)


def _users(log):
    return [slice(a, b) for a, b in itertools.pairwise(log.offset_U1)]


def _all_scores(model, log):
    return model.scores(log, np.arange(log.num_events))


def test_recent_items_are_the_user_s_own_newest_first():
    log = synthetic.histories([[1, 2, 3], [], [4, 5]], [[0, 1, 2], [], [0, 1]])
    got = recent_items(log, np.arange(5), 2)
    assert got.tolist() == [[-1, -1], [1, -1], [2, 1], [-1, -1], [4, -1]]


def test_a_request_follows_every_user_s_last_event():
    log = synthetic.histories([[1, 2], [], [3]], [[10, 20], [], [5]])
    asked = with_request(log)
    assert asked.offset_U1.tolist() == [0, 3, 4, 6]
    assert asked.timestamp_E[[2, 5]].tolist() == [21, 6]
    assert recent_items(asked, np.array([2, 3, 5]), 2).tolist() == [[2, 1], [-1, -1], [3, -1]]


def test_popularity_counts_the_training_log():
    log = _log()
    score_NM = _all_scores(Popularity(M).fit(log), log)
    count_M = np.bincount(log.item_E, minlength=M) + 1
    np.testing.assert_allclose(score_NM[3].exp(), count_M / count_M.sum(), rtol=1e-5)


def test_recent_popularity_counts_only_what_came_before_the_period():
    train, test = _log(0), _log(1)
    model = RecentPopularity(M).fit(train)
    period, window = model.state["trend"].tolist()
    smoothing = float(model.state["smoothing"])
    score_NM = _all_scores(model, test)
    for event, time in enumerate(test.timestamp_E):
        now = time // period * period
        counted_E = train.timestamp_E < now
        if window:
            counted_E &= train.timestamp_E >= now - window
        count_M = np.bincount(train.item_E[counted_E], minlength=M) + smoothing
        np.testing.assert_allclose(score_NM[event].exp(), count_M / count_M.sum(), rtol=1e-4)


def _cosines(log):
    """Cosine of the sets of users who chose two items `[M, M]`, 0 on the diagonal."""
    chosen = np.zeros((len(log), M))
    for user, events in enumerate(_users(log)):
        chosen[user, log.item_E[events]] = 1.0
    size = np.sqrt(chosen.sum(axis=0))
    cosine = chosen.T @ chosen / np.maximum(np.outer(size, size), 1e-12)
    np.fill_diagonal(cosine, 0.0)
    return cosine


def _knn_by_hand(log, cosine, p, epsilon, own):
    rows = []
    for events in _users(log):
        past = []
        for item in log.item_E[events]:
            near = np.zeros(M)
            for r, recent in enumerate(past[::-1][: item_knn.RECENT], start=1):
                near += (cosine[recent] + own * np.eye(M)[recent]) / r
            share = near / near.sum() if near.sum() > 0 else p
            rows.append(np.log(epsilon * p + (1 - epsilon) * share))
            past.append(item)
    return np.array(rows)


@pytest.mark.parametrize("mix", [None, (0.2, 0.0), (0.2, 1.0)])
def test_item_knn_equals_its_definition(mix):
    train, test = _log(0), _log(1)
    model = ItemKNN(M).fit(train)
    if mix is not None:
        model.state["mix"] = torch.tensor(mix)
    count_M = np.bincount(train.item_E, minlength=M) + 1
    expected = _knn_by_hand(
        test, _cosines(train), count_M / count_M.sum(), *model.state["mix"].tolist()
    )
    np.testing.assert_allclose(_all_scores(model, test), expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(expected).sum(axis=1), 1.0, atol=1e-9)


def test_item_knn_keeps_the_nearest(monkeypatch):
    monkeypatch.setattr(item_knn, "NEIGHBOURS", 3)
    log = _log()
    state = ItemKNN(M).fit(log).state
    for item, cosine_M in enumerate(_cosines(log)):
        assert item not in state["neighbour"][item][state["cosine"][item] > 0]
        np.testing.assert_allclose(state["cosine"][item], np.sort(cosine_M)[::-1][:3], atol=1e-6)


def test_item_knn_learns_whether_items_are_chosen_again():
    rng = np.random.default_rng(0)
    rows = [rng.choice(M, 2).repeat(6) for _ in range(60)]
    again = synthetic.histories([r.tolist() for r in rows], [list(range(12))] * 60)
    assert ItemKNN(M).fit(again).state["mix"][1] == 1.0
    once = [(np.arange(6) + rng.integers(M)) % M for _ in range(60)]
    never = synthetic.histories([r.tolist() for r in once], [list(range(6))] * 60)
    assert ItemKNN(M).fit(never).state["mix"][1] == 0.0


def test_item_knn_with_too_few_users_to_spare_any():
    log = synthetic.histories([[0, 1], [1, 2]], [[0, 1], [0, 1]])
    assert torch.isfinite(_all_scores(ItemKNN(M).fit(log), log)).all()


def test_bpr_represents_a_user_by_recent_items():
    train, test = _log(0), _log(1)
    state = (model := BayesianPersonalisedRanking(M, factors=4).fit(train)).state
    scale, weight = state["mix"].tolist()
    factor = state["item"].numpy()
    assert factor.shape == (M, 4)
    score_NM = _all_scores(model, test)
    for events in _users(test):
        for event in range(events.start, events.stop):
            past = test.item_E[events.start : event][::-1][:BPR_RECENT]
            total = sum(1 / r for r in range(1, len(past) + 1))
            user = sum((factor[a] / r for r, a in enumerate(past, 1)), np.zeros(4))
            user = user / max(total, 1e-6)
            expected = scale * factor @ user + weight * state["log_p"].numpy()
            np.testing.assert_allclose(score_NM[event], expected, atol=1e-5)


def _second_order(pairs, bias):
    """Rendle's eq. 1 by its double sum; `pairs`: (x_i, v_i) of every active feature."""
    total = bias
    for (x_a, v_a), (x_b, v_b) in itertools.combinations(pairs, 2):
        total += x_a * x_b * float(v_a @ v_b)
    return total


def test_next_item_fm_is_the_second_order_machine_up_to_a_constant_per_row():
    rng = np.random.default_rng(2)
    kinds = {"group": FieldKind.CATEGORICAL, "age": FieldKind.NUMERIC}

    def with_fields(log):
        return log.with_user_fields(
            {
                "group": [("a", "b", None)[u % 3] for u in range(len(log))],
                "age": rng.uniform(20, 60, len(log)).tolist(),
            }
        )

    train, test = with_fields(_log(0)), with_fields(_log(1, users=5))
    model = NextItemFactorizationMachine(M, kinds, factors=4).fit(train)
    state = {n: t.double().numpy() for n, t in model.state.items()}
    bags = FieldBags.encode(model.encodings, test.user_fields, len(test))
    rate = np.log1p(np.exp(state["decay"]))
    log_p_NM = _all_scores(model, test).double().log_softmax(dim=1)
    for user, events in enumerate(_users(test)):
        fields = []
        parts = zip(model.encodings, bags.token, bags.weight, bags.offset, strict=True)
        for encoding, token, weight, offset in parts:
            for t in range(int(offset[user]), int(offset[user + 1])):
                table = state[f"field.{encoding.name}"]
                fields.append((float(weight[t]), table[int(token[t])]))
        for event in range(events.start, events.stop):
            past = test.item_E[events.start : event][::-1][:FM_RECENT]
            weight = np.exp(-rate * np.arange(len(past)))
            weight = weight / np.sqrt(max(weight.sum(), 1e-6))
            context = [*fields, *((w, state["past"][a]) for w, a in zip(weight, past, strict=True))]
            score = np.array(
                [
                    _second_order([*context, (1.0, state["target"][j])], state["bias"][j])
                    for j in range(M)
                ]
            )
            expected = score - np.log(np.exp(score).sum())
            np.testing.assert_allclose(log_p_NM[event], expected, atol=1e-5)


def test_next_item_fm_reads_user_fields():
    log = synthetic.user_decides(300, 6, 8, seed=0)
    kinds = {"group": FieldKind.CATEGORICAL, "tags": FieldKind.MULTI_CATEGORICAL}
    train, test = log.subset(np.arange(250)), log.subset(np.arange(250, 300))
    first = test.where(~np.isin(np.arange(test.num_events) % 6, [1, 2, 3, 4, 5]))

    def perplexity(kinds):
        model = NextItemFactorizationMachine(8, kinds).fit(train)
        score_NM = _all_scores(model, first)
        chosen_N = score_NM.log_softmax(dim=1).gather(1, torch.from_numpy(first.item_E)[:, None])
        return float((-chosen_N.mean()).exp())

    assert perplexity(kinds) < 3.0, "two items of the user's group and tag are left"
    assert perplexity(None) > 6.0, "nothing is known before the first event"


def test_next_item_fm_learns_how_fast_the_past_fades():
    near = synthetic.successor(200, 12, M + 1, seed=0)  # the last item says it all
    train, test = near.subset(np.arange(160)), near.subset(np.arange(160, 200))
    model = NextItemFactorizationMachine(M + 1).fit(train)
    assert model.state["decay"] > -2.0, "faster than to begin with"
    popularity = Popularity(M + 1).fit(train)
    ppl = evaluate(model, test, M + 1)["every"]["ppl"]
    assert ppl < 0.6 * evaluate(popularity, test, M + 1)["every"]["ppl"]


def test_rolling_average_by_hand():
    train, test = _log(0), _log(1)
    mean = np.nanmean(train.value_E)
    expected = []
    for events in _users(test):
        for event in range(events.start, events.stop):
            of_item = train.value_E[train.item_E == test.item_E[event]]
            so_far = test.value_E[events.start : event]
            of_item, so_far = (v[~np.isnan(v)] for v in (of_item, so_far))
            parts = [v.mean() if len(v) else mean for v in (of_item, so_far)]
            expected.append(sum(parts) / 2)
    np.testing.assert_allclose(RollingAverage(M).fit(train).predict_values(test), expected)


def test_damped_bias_by_hand():
    train, test = _log(0), _log(1)
    mean, std = np.nanmean(train.value_E), np.nanstd(train.value_E)
    item_mean = np.zeros(M)
    for item in range(M):
        values = (train.value_E[train.item_E == item] - mean) / std
        values = values[~np.isnan(values)]
        item_mean[item] = values.sum() / (len(values) + MEAN_DAMPING)
    expected = []
    for events in _users(test):
        residuals = []
        for event in range(events.start, events.stop):
            item = test.item_E[event]
            user = sum(residuals) / (len(residuals) + MEAN_DAMPING)
            expected.append(mean + std * (item_mean[item] + user))
            if not np.isnan(test.value_E[event]):
                residuals.append((test.value_E[event] - mean) / std - item_mean[item])
    got = DampedBias(M).fit(train).predict_values(test)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_content_profile_by_hand():
    genres = [["a"], ["a", "b"], ["b"], [], ["c"]]
    catalogue = Catalogue(tuple("vwxyz"), {"genres": genres})
    schema = Schema.parse({"items": {"genres": "multi_categorical"}})
    train = synthetic.histories([[0, 0, 1], [2]], [[0, 1, 2], [0]])
    model = ContentProfile(5, catalogue).fit(train, schema)
    x = np.array(
        [[1, 0, 0, 1], [0.5**0.5, 0.5**0.5, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    )
    known, y = x[:3], np.log1p([2, 1, 1])
    popularity = x @ np.linalg.solve(known.T @ known + RIDGE * np.eye(4), known.T @ y)
    asked = synthetic.histories([[0, 2, 3]], [[0, 1, 2]])
    ((_, score_NM),) = model.iter_scores(asked, 10)
    for k, profile in enumerate([np.zeros(3), x[0, :3], x[0, :3] + x[2, :3]]):
        norm = np.linalg.norm(profile) * np.maximum(np.linalg.norm(x[:, :3], axis=1), 1e-12)
        cosine = x[:, :3] @ profile / np.maximum(norm, 1e-12)
        np.testing.assert_allclose(score_NM[k], popularity + cosine, atol=1e-5)
