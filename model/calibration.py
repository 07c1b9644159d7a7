"""Is the model as sure as it may be? Predicted uncertainty next to what happened.

Shapes: E events, N events of a block, M items.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.evaluation import BLOCK_CELLS, NextItemModel
from model.sequences import Histories

BINS = 10


def confidence(
    model: NextItemModel, histories: Histories, num_items: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Of every event `[E]`: entropy of the prediction (nats), probability of the first item,
    and whether that item was chosen."""
    entropy_E = np.full(histories.num_events, np.nan)
    first_E = np.full(histories.num_events, np.nan)
    right_E = np.zeros(histories.num_events, dtype=bool)
    for event_N, score_NM in model.iter_scores(histories, max(1, BLOCK_CELLS // num_items)):
        log_p_NM = torch.log_softmax(score_NM.float(), dim=1)
        entropy_E[event_N] = -(log_p_NM.exp() * log_p_NM.clamp(min=-1e4)).sum(dim=1).numpy()
        best = log_p_NM.max(dim=1)
        first_E[event_N] = best.values.exp().numpy()
        right_E[event_N] = best.indices.numpy() == histories.item_E[event_N]
    return entropy_E, first_E, right_E


def calibration(
    entropy_N: NDArray[np.float64],
    first_N: NDArray[np.float64],
    right_N: NDArray[np.bool_],
    nll_N: NDArray[np.float64],
) -> dict[str, Any]:
    """Tenths of the cases by predicted uncertainty, and by the first item's probability.

    `perplexity`: predicted (exp of the mean entropy) and measured (exp of the mean −log p) of each
    tenth; equal for a calibrated model. `first_item`: mean probability and share that was right.
    """
    if not len(nll_N):
        return {"perplexity": [], "first_item": [], "overall": None}
    perplexity = [
        {
            "cases": len(part),
            "predicted": float(np.exp(entropy_N[part].mean())),
            "measured": float(np.exp(nll_N[part].mean())),
        }
        for part in _parts(entropy_N)
    ]
    first_item = [
        {
            "cases": len(part),
            "predicted": float(first_N[part].mean()),
            "measured": float(right_N[part].mean()),
        }
        for part in _parts(first_N)
    ]
    overall = {
        "predicted": float(np.exp(entropy_N.mean())),
        "measured": float(np.exp(nll_N.mean())),
    }
    return {"perplexity": perplexity, "first_item": first_item, "overall": overall}


def _parts(key_N: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    order = np.argsort(key_N, kind="stable")
    return [part for part in np.array_split(order, BINS) if len(part)]
