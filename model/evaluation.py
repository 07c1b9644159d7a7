"""Splits and full-ranking evaluation that every model goes through.

Shapes: E events, N cases of a block, M items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.metrics import negative_log_likelihood, ranking_metrics, ranks
from model.sequences import Histories
from model.settings import SettingsBase

BLOCK_CELLS = 2**25  # scores held at once (float32: 128 MiB), whatever the catalogue's size


class SplitSettings(SettingsBase):
    """User split (§4.1): whole users are held out; every event of theirs is predicted."""

    test_share: float = 0.2
    valid_share: float = 0.08
    min_events: int = 5  # users with fewer events are left out of all three parts
    seed: int = 0


@dataclass(frozen=True)
class UserSplit:
    """Histories of training, validation and test users."""

    train: Histories
    valid: Histories
    test: Histories


def split_users(histories: Histories, settings: SplitSettings) -> UserSplit:
    """Random user split, the same for everyone who asks with the same seed."""
    kept = histories.subset(_natural_order(histories, settings.min_events))
    # The legacy generator is the published protocol's, so that results can be compared.
    order = np.random.RandomState(settings.seed).permutation(len(kept))
    num_test = max(1, round(settings.test_share * len(kept)))
    num_valid = max(1, round(settings.valid_share * len(kept)))
    test, valid, train = np.split(order, [num_test, num_test + num_valid])
    return UserSplit(*(kept.subset(np.sort(part)) for part in (train, valid, test)))


def _natural_order(histories: Histories, min_events: int) -> NDArray[np.int64]:
    """Users with enough events; ids that are all numbers sort as numbers (1, 2, 10)."""
    users = np.flatnonzero(np.diff(histories.offset_U1) >= min_events)
    ids = [histories.user_ids[u] for u in users]
    if all(i.isascii() and i.isdigit() for i in ids):
        return users[np.argsort([int(i) for i in ids], kind="stable")]
    return users[np.argsort(np.array(ids), kind="stable")]


class NextItemModel(Protocol):
    """What can be evaluated: anything that scores each next event from what came before it."""

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        """Yield (event_N, score_NM), at most about `block` events at a time, each event once.

        Scores are log-probabilities up to a constant per row, trend included.
        """
        ...


@dataclass(frozen=True)
class Outcomes:
    """Per-event results `[E]` of one model on one set of histories."""

    rank_E: NDArray[np.float64]
    nll_E: NDArray[np.float64]
    coverage: float  # share of the catalogue in anybody's top k
    k: int


def outcomes(model: NextItemModel, histories: Histories, num_items: int, k: int = 10) -> Outcomes:
    """Score every event of every user by full ranking; memory bounded by BLOCK_CELLS."""
    rank_E = np.full(histories.num_events, np.nan)
    nll_E = np.full(histories.num_events, np.nan)
    recommended_M = torch.zeros(num_items, dtype=torch.bool)
    block = max(1, BLOCK_CELLS // num_items)
    for event_N, score_NM in model.iter_scores(histories, block):
        for part in range(0, len(event_N), block):
            event_B = event_N[part : part + block]
            score_BM = score_NM[part : part + block]
            target_B = torch.from_numpy(histories.item_E[event_B])
            rank_E[event_B] = ranks(score_BM, target_B)
            nll_E[event_B] = negative_log_likelihood(score_BM, target_B)
            top_BK = score_BM.topk(min(k, num_items), dim=1).indices
            recommended_M[top_BK.flatten()] = True
    return Outcomes(rank_E, nll_E, float(recommended_M.float().mean()), k)


def summarise(result: Outcomes, event_N: NDArray[np.int64]) -> dict[str, Any]:
    """PPL and ranking metrics over the chosen events.

    PPL = exp(mean −log p): the size of a uniform choice that would be as uncertain (§4).
    """
    nll_N = result.nll_E[event_N]
    return {
        "cases": len(event_N),
        "ppl": float(np.exp(nll_N.mean())) if len(event_N) else float("nan"),
        **ranking_metrics(result.rank_E[event_N], result.k),
        f"coverage@{result.k}": result.coverage,
    }


def last_events(histories: Histories) -> NDArray[np.int64]:
    """The last event of every user (the paper's read-out)."""
    return histories.offset_U1[1:] - 1


def later_events(histories: Histories) -> NDArray[np.int64]:
    """Every event but each user's first."""
    later_E = np.ones(histories.num_events, dtype=bool)
    later_E[histories.offset_U1[:-1]] = False
    return np.flatnonzero(later_E)


def evaluate(
    model: NextItemModel, histories: Histories, num_items: int, k: int = 10
) -> dict[str, Any]:
    """Metrics of both read-outs: `last` (one case per user) and `every` (k ≥ 1)."""
    result = outcomes(model, histories, num_items, k)
    return {
        "last": summarise(result, last_events(histories)),
        "every": summarise(result, later_events(histories)),
    }
