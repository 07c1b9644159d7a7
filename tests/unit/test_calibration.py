"""Predicted uncertainty against a loop, and against outcomes drawn from the predictions."""

import numpy as np
import pytest
import torch

from model.calibration import calibration, confidence
from tests import synthetic

ITEMS = 8


class Scores:
    """Given scores, in two blocks."""

    def __init__(self, score_EM):
        self.score_EM = score_EM

    def iter_scores(self, histories, block):
        for part in np.array_split(np.arange(histories.num_events), 2):
            yield part, torch.from_numpy(self.score_EM[part])


def _log(score_EM, item_E):
    log = synthetic.successor(len(item_E) // 6, 6, ITEMS, seed=0)
    object.__setattr__(log, "item_E", item_E)
    return log


def test_confidence_against_a_loop():
    rng = np.random.default_rng(0)
    score_EM = rng.normal(size=(60, ITEMS)).astype(np.float32)
    score_EM[0, 3] = -np.inf  # an item that cannot be recommended
    log = _log(score_EM, rng.integers(ITEMS, size=60))
    entropy_E, first_E, right_E = confidence(Scores(score_EM), log, ITEMS)
    for e in range(60):
        p = np.exp(score_EM[e].astype(float))
        p /= p.sum()
        some = p[p > 0]
        assert entropy_E[e] == pytest.approx(-(some * np.log(some)).sum(), abs=1e-5)
        assert first_E[e] == pytest.approx(p.max(), abs=1e-6)
        assert right_E[e] == (log.item_E[e] == p.argmax())


def test_outcomes_drawn_from_the_predictions_lie_on_the_line_and_others_do_not():
    rng = np.random.default_rng(1)
    score_EM = (3 * rng.normal(size=(6000, ITEMS))).astype(np.float32)
    p_EM = np.exp(score_EM) / np.exp(score_EM).sum(axis=1, keepdims=True)
    item_E = np.array([rng.choice(ITEMS, p=p / p.sum()) for p in p_EM.astype(float)])
    for sharper, calibrated in ((1.0, True), (2.0, False)):
        scores = Scores(sharper * score_EM)
        log = _log(score_EM, item_E)
        log_p_EM = torch.log_softmax(torch.from_numpy(sharper * score_EM), dim=1).numpy()
        nll_E = -log_p_EM[np.arange(6000), item_E]
        got = calibration(*confidence(scores, log, ITEMS), nll_E)
        assert sum(t["cases"] for t in got["perplexity"]) == 6000
        assert len(got["first_item"]) == 10
        worst = max(abs(t["predicted"] - t["measured"]) for t in got["first_item"])
        assert (worst < 0.06) is calibrated
        ratio = got["overall"]["measured"] / got["overall"]["predicted"]
        assert (abs(ratio - 1) < 0.05) is calibrated
    empty = np.array([])
    assert calibration(empty, empty, empty.astype(bool), empty)["overall"] is None
