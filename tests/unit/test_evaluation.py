"""Full-ranking evaluation against loops over events and items."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluate.measure import QUANTILES, measure
from components.evaluate.steps import EvaluateSettings
from model.baselines.popularity import Popularity
from model.bootstrap import paired_difference, paired_ratio
from model.errors import InputError
from model.evaluation import (
    Cases,
    cold_item_metrics,
    evaluate_values,
    later_events,
    outcomes,
    perplexity,
    summarise,
)
from model.sequences import Histories
from model.slices import slices
from model.splits import UserSplit, leave_one_out, split_cold_items
from tests import synthetic

ITEMS = 7


class TableModel:
    """Scores by a fixed table of (user, number of earlier events), in shuffled, uneven blocks."""

    def __init__(self, num_items=ITEMS, seed=0, levels=5):
        self.num_items, self.seed, self.levels = num_items, seed, levels
        self.yielded = []

    def score(self, user_id, earlier):
        rng = np.random.default_rng([self.seed, int(user_id[1:]), earlier])
        return rng.integers(self.levels, size=self.num_items).astype(np.float32)  # many ties

    def rows(self, log, event_N):
        earlier = np.arange(log.num_events) - log.offset_U1[:-1][log.user_E]
        rows = [self.score(log.user_ids[log.user_E[e]], int(earlier[e])) for e in event_N]
        return torch.from_numpy(np.array(rows))

    def iter_scores(self, histories, block):
        order = np.random.default_rng(1).permutation(histories.num_events)
        for start in range(0, len(order), min(block, 5)):
            event_N = order[start : start + min(block, 5)]
            self.yielded.extend(event_N.tolist())
            yield event_N, self.rows(histories, event_N)


class SelectiveTable(TableModel):
    def iter_scores_at(self, histories, block, event_N):
        for start in range(0, len(event_N), min(block, 3)):
            part = event_N[start : start + min(block, 3)]
            self.yielded.extend(part.tolist())
            yield part, self.rows(histories, part)


@st.composite
def logs(draw):
    users = draw(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=9), min_size=1, max_size=5))
    users.append([0, 1, 0])
    return synthetic.histories(users, [list(range(len(user))) for user in users])


def by_loop(model, log, remove_seen, k):
    """(rank, −log p, items that may be and items that must be recommended) of every event."""
    found = []
    for u, user in enumerate(log.user_ids):
        events = range(log.offset_U1[u], log.offset_U1[u + 1])
        for n, e in enumerate(events):
            target = int(log.item_E[e])
            seen = {int(log.item_E[s]) for s in events[:n]} if remove_seen else set()
            candidates = [j for j in range(ITEMS) if j == target or j not in seen]
            score = model.score(user, n)
            better = sum(score[j] > score[target] for j in candidates)
            equal = sum(score[j] == score[target] for j in candidates) - 1
            nll = np.log(sum(np.exp(float(score[j])) for j in candidates)) - float(score[target])
            top = {j for j in candidates if sum(score[i] > score[j] for i in candidates) < k}
            sure = {j for j in candidates if sum(score[i] >= score[j] for i in candidates) <= k}
            found.append((1 + better + equal / 2, nll, top, sure))
    return found


@given(logs(), st.booleans(), st.integers(1, ITEMS))
@settings(deadline=None)
def test_outcomes_against_a_loop(log, remove_seen, k):
    model = TableModel()
    popularity_M = np.arange(ITEMS) * 10.0
    result = outcomes(model, log, ITEMS, (k, ITEMS), remove_seen, popularity_M)
    expected = by_loop(model, log, remove_seen, k)
    np.testing.assert_allclose(result.rank_E, [rank for rank, _, _, _ in expected])
    np.testing.assert_allclose(result.nll_E, [nll for _, nll, _, _ in expected], rtol=1e-6)
    # All candidates are recommended when the list is as long as the catalogue.
    whole = [
        np.mean([popularity_M[j] for j in by_loop_candidates(log, e, remove_seen)])
        for e in range(log.num_events)
    ]
    np.testing.assert_allclose(result.popularity[ITEMS], whole)
    assert result.coverage[ITEMS] == 1.0
    # Which of the tied items make up the list is open; those above the ties are always in it.
    possible = set.union(*(top for _, _, top, _ in expected))
    certain = set.union(*(sure for _, _, _, sure in expected))
    assert len(certain) <= round(result.coverage[k] * ITEMS) <= len(possible)


def by_loop_candidates(log, event, remove_seen):
    start = log.offset_U1[log.user_E[event]]
    seen = set(log.item_E[start:event].tolist()) if remove_seen else set()
    return [j for j in range(ITEMS) if j == log.item_E[event] or j not in seen]


@given(logs(), st.booleans(), st.data())
@settings(deadline=None)
def test_cases_are_the_same_events_and_no_more_is_asked_for(log, remove_seen, data):
    event_N = np.array(sorted(data.draw(st.sets(st.integers(0, log.num_events - 1), min_size=1))))
    whole = outcomes(TableModel(), log, ITEMS, 3, remove_seen)
    for model in (TableModel(), SelectiveTable()):
        part = outcomes(model, Cases(log, event_N), ITEMS, 3, remove_seen)
        np.testing.assert_array_equal(part.rank_E[event_N], whole.rank_E[event_N])
        np.testing.assert_array_equal(part.nll_E[event_N], whole.nll_E[event_N])
        others = np.setdiff1d(np.arange(log.num_events), event_N)
        assert np.isnan(part.rank_E[others]).all()
        assert len(set(model.yielded)) == len(model.yielded)
    assert len(model.yielded) == len(event_N)
    last = {int(log.user_E[e]): int(e) for e in event_N}
    plain = TableModel()
    outcomes(plain, Cases(log, event_N), ITEMS)
    assert len(plain.yielded) == sum(e + 1 - int(log.offset_U1[u]) for u, e in last.items())


@pytest.mark.parametrize("remove_seen", [False, True])
def test_small_chunks_do_not_change_results(monkeypatch, remove_seen):
    log = synthetic.successor(20, 8, ITEMS, seed=1)
    model = TableModel()
    whole = outcomes(model, log, ITEMS, 3, remove_seen)
    monkeypatch.setattr("model.evaluation.CHUNK_CELLS", 2 * ITEMS)
    parts = outcomes(model, log, ITEMS, 3, remove_seen)
    np.testing.assert_array_equal(whole.rank_E, parts.rank_E)
    np.testing.assert_allclose(whole.nll_E, parts.nll_E, rtol=1e-12)
    assert whole.coverage == parts.coverage


def test_the_number_of_threads_is_left_as_it_was():
    log = synthetic.successor(20, 8, ITEMS, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outcomes(TableModel(), log, ITEMS)
        assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            outcomes(TableModel(ITEMS - 3), log, ITEMS, remove_seen=True)  # items beyond the table
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_models_own_scores_are_left_as_they_are():
    log = synthetic.histories([[0, 1, 2, 0, 1]], [[0, 1, 2, 3, 4]])
    model = Popularity(3).fit(log)  # yields one row, expanded: writing would hit all events
    before = model.state["log_p"].clone()
    result = outcomes(model, log, 3, 2, remove_seen=True)
    assert torch.equal(model.state["log_p"], before)
    assert result.rank_E[2] == 1  # only the third item was left


def test_a_million_items_fit_into_the_memory_of_a_block():
    num_items = 1_000_000
    log = synthetic.histories([list(range(60))], [list(range(60))])
    asked = []

    class Wide:
        def iter_scores(self, histories, block):
            asked.append(block)
            for start in range(0, histories.num_events, block):
                event_N = np.arange(start, min(start + block, histories.num_events))
                score_NM = torch.zeros(len(event_N), num_items)
                score_NM[:, :100] = 1.0
                yield event_N, score_NM

    chunks = []
    tracemalloc.start()  # NumPy's memory; the tensors are seen through their sizes
    with pytest.MonkeyPatch.context() as patch:
        from model import evaluation

        measured = evaluation.negative_log_likelihood

        def recorded(score_NM, target_N):
            chunks.append(score_NM.numel())
            return measured(score_NM, target_N)

        patch.setattr(evaluation, "negative_log_likelihood", recorded)
        result = outcomes(Wide(), log, num_items, 10, remove_seen=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked[0] * num_items <= 2**25
    assert max(chunks) <= max(num_items, 2**19)
    assert peak < 64 * 2**20
    # Item n is asked for after items 0 … n − 1: 100 − n equals are left at the top.
    np.testing.assert_allclose(result.rank_E, 1 + (99 - np.arange(60)) / 2)


def test_perplexity_of_cases_and_of_histories():
    log = synthetic.successor(20, 5, ITEMS, seed=0)
    model = TableModel()
    nll_E = outcomes(model, log, ITEMS).nll_E
    assert perplexity(model, log, ITEMS) == pytest.approx(np.exp(nll_E[later_events(log)].mean()))
    test = leave_one_out(log).test
    assert perplexity(model, test, ITEMS) == pytest.approx(np.exp(nll_E[test.event_N].mean()))


def test_several_cut_offs_in_one_summary():
    log = synthetic.successor(10, 5, ITEMS, seed=0)
    events = later_events(log)
    both = summarise(outcomes(TableModel(), log, ITEMS, (2, 5)), events)
    for k in (2, 5):
        one = summarise(outcomes(TableModel(), log, ITEMS, k), events)
        assert both == both | one
    assert summarise(outcomes(TableModel(), log, ITEMS, (2, 5)), events, (5,)) == one


@pytest.mark.parametrize("seed", range(3))
def test_cold_items_against_sorting_by_hand(seed):
    log = synthetic.successor(30, 6, 20, seed=seed)
    users = UserSplit(log.subset(np.arange(15)), log.subset(np.arange(3)), log)
    split = split_cold_items(users, 20, seed=seed)
    model = TableModel(20, seed, levels=10**6)
    got = cold_item_metrics(model, split, 20, (5,))
    cases = split.cases.histories
    for n, user in enumerate(cases.user_ids):
        score = model.score(user, int(np.diff(cases.offset_U1)[n]) - 1)
        ranked = sorted(split.item_J, key=lambda j: -score[j])
        u = log.user_ids.index(user)
        chosen = set(log.item_E[log.offset_U1[u] : log.offset_U1[u + 1]].tolist())
        hits = [float(j in chosen) for j in ranked]
        dcg = sum(h / np.log2(2 + place) for place, h in enumerate(hits[:5]))
        ideal = sum(1 / np.log2(2 + place) for place in range(min(5, int(sum(hits)))))
        assert got["mrr"][n] == pytest.approx(1 / (1 + hits.index(1.0)))
        assert got["precision@5"][n] == pytest.approx(sum(hits[:5]) / 5)
        assert got["ndcg@5"][n] == pytest.approx(dcg / ideal)
    assert len(got["mrr"]) == len(cases)


def test_random_choice_is_what_random_scores_give_on_average():
    log = synthetic.successor(30, 6, 20, seed=0)
    split = split_cold_items(UserSplit(log, log, log), 20)
    expected = cold_item_metrics(None, split, 20)
    drawn = [cold_item_metrics(TableModel(20, s, 10**6), split, 20) for s in range(60)]
    for name, value_N in expected.items():
        sampled = np.mean([d[name].mean() for d in drawn])
        assert sampled == pytest.approx(value_N.mean(), abs=0.02), name


def test_rmse_counts_events_with_a_value_but_the_first():
    log = synthetic.histories([[0, 1, 2], [1, 2]], [[0, 1, 2], [0, 1]])
    value_E = np.array([5.0, 3.0, np.nan, 1.0, 4.0])
    valued = Histories(log.user_ids, log.item_E, log.timestamp_E, log.offset_U1, value_E=value_E)

    class Threes:
        def predict_values(self, histories):
            return np.full(histories.num_events, 3.0)

    assert evaluate_values(Threes(), valued) == {"cases": 2, "rmse": pytest.approx(np.sqrt(0.5))}
    clipped = evaluate_values(Threes(), Cases(valued, np.array([0, 2])), clip=(4.0, 5.0))
    assert clipped == {"cases": 1, "rmse": 1.0}
    with pytest.raises(ValueError, match="no values"):
        evaluate_values(Threes(), log)


@given(logs(), st.integers(0, 3))
def test_slices_against_a_loop(log, gap):
    count_M = np.array([0, 1, 4, 5, 49, 50, 1000])
    masks = slices(log, count_M, gap)
    history = {0: "first", 1: "1-4", 4: "1-4", 5: "5-19", 19: "5-19", 20: "20+"}
    item = ["never", "1-4", "1-4", "5-49", "5-49", "50+", "50+"]
    for u in range(len(log)):
        for n, e in enumerate(range(log.offset_U1[u], log.offset_U1[u + 1])):
            bucket = history[max(edge for edge in history if edge <= n)]
            opens = n == 0 or log.timestamp_E[e] - log.timestamp_E[e - 1] > gap
            assert {name for name, mask in masks.items() if mask[e]} == {
                f"history/{bucket}",
                f"item/{item[log.item_E[e]]}",
                "session/first" if opens else "session/within",
            }
    assert not any(name.startswith("session") for name in slices(log, count_M))


def test_measured_figures_are_those_of_summaries_and_of_paired_comparisons():
    log = synthetic.successor(20, 6, ITEMS, seed=0)
    results = {
        name: outcomes(TableModel(seed=seed), log, ITEMS, 3)
        for seed, name in enumerate(("new", "old"))
    }
    masks = slices(log, np.bincount(log.item_E, minlength=ITEMS))
    groups = {"every": later_events(log), "some": np.flatnonzero(masks["history/1-4"])}
    groups["none"] = np.array([], dtype=np.int64)
    draws = {"level": 0.9, "samples": 50, "seed": 5}
    got = measure(results, groups, log, references=["old"], **draws)
    for group in ("every", "some"):
        event_N = groups[group]
        for name, result in results.items():
            summary = summarise(result, event_N)
            for metric, interval in got.intervals[name][group].items():
                value = interval if metric == "cases" else interval["value"]
                assert value == pytest.approx(summary[metric])
        user_N = log.user_E[event_N]
        ratio = paired_ratio(
            results["new"].nll_E[event_N], results["old"].nll_E[event_N], user_N, **draws
        )
        against = got.against["old"]["new"][group]
        assert _without_quantiles(against["ppl"]) == pytest.approx(ratio.to_json())
        quantiles = against["ppl"]["quantiles"]
        assert [float(q) for q in quantiles] == sorted(QUANTILES)
        assert (quantiles["0.05"], quantiles["0.95"]) == pytest.approx((ratio.low, ratio.high))
        hit = [(results[name].rank_E[event_N] <= 3).astype(float) for name in ("new", "old")]
        difference = paired_difference(*hit, user_N, **draws)
        assert _without_quantiles(against["hit@3"]) == pytest.approx(difference.to_json())
    assert got.intervals["new"]["none"] == got.against["old"]["new"]["none"] == {"cases": 0}
    assert set(got.against["old"]) == {"new"}


def _without_quantiles(comparison):
    return {name: value for name, value in comparison.items() if name != "quantiles"}


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"more_k": [0]}, {"level": 1.0}, {"samples": 0}, {"level": 95}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match="evaluate"):
        EvaluateSettings.parse(wrong, "evaluate")
