"""Full-ranking evaluation that every model goes through; protocols are in `model.splits`.

Shapes: E events of some histories, N events of a model's block, B rows of a chunk of it, M items,
C cut-offs, K recommended items, J held-out items.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.metrics import (
    multi_relevant_metrics,
    negative_log_likelihood,
    ranking_metrics,
    ranks,
    rmse,
)
from model.sequences import Histories
from model.splits import (
    Cases,
    ColdItemSplit,
    SplitSettings,
    UserSplit,
    last_events,
    later_events,
    split_users,
)

__all__ = [
    "BLOCK_CELLS",
    "Cases",
    "NextItemModel",
    "Outcomes",
    "SelectiveModel",
    "SplitSettings",
    "UserSplit",
    "ValueModel",
    "cold_item_metrics",
    "evaluate",
    "evaluate_values",
    "last_events",
    "later_events",
    "outcomes",
    "perplexity",
    "split_users",
    "squared_errors",
    "summarise",
]

BLOCK_CELLS = 2**25  # scores held at once (float32: 128 MiB), whatever the catalogue's size
CHUNK_CELLS = 2**19  # scores measured at once: 2 MiB stay in a core's cache


class NextItemModel(Protocol):
    """What can be evaluated: anything that scores each next event from what came before it."""

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        """Yield (event_N, score_NM), at most about `block` events at a time, each event once.

        Scores are log-probabilities up to a constant per row, trend included.
        """
        ...


@runtime_checkable
class SelectiveModel(Protocol):
    """A `NextItemModel` that can spare itself the scores of events nobody asks for."""

    def iter_scores_at(
        self, histories: Histories, block: int, event_N: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        """Like `iter_scores`, for the given events (ascending) only."""
        ...


@runtime_checkable
class ValueModel(Protocol):
    """Anything that predicts an event's value (a rating) from the events before it and its item."""

    def predict_values(self, histories: Histories) -> NDArray[np.float64]:
        """Predicted value of every event's item: float64 `[E]`.

        Raises:
            ValueError: the model was trained without values.
        """
        ...


@dataclass(frozen=True)
class Outcomes:
    """Per-event results `[E]` of one model on one set of histories; NaN where not read out."""

    rank_E: NDArray[np.float64]
    nll_E: NDArray[np.float64]
    ks: tuple[int, ...]
    coverage: dict[int, float]  # by k: share of the catalogue in anybody's top k
    popularity: dict[int, NDArray[np.float64]]  # by k: mean popularity `[E]` of the top k

    @property
    def k(self) -> int:
        """The first cut-off: the one that is reported first."""
        return self.ks[0]


def outcomes(
    model: NextItemModel,
    histories: Histories | Cases,
    num_items: int,
    k: int | Sequence[int] = 10,
    remove_seen: bool = False,
    popularity_M: NDArray[np.float64] | None = None,
) -> Outcomes:
    """Predict every event (of histories) or those read out (of cases) by full ranking.

    Scores beyond a model's own block of BLOCK_CELLS are never held; nothing is sampled.

    Args:
        k: cut-offs of coverage and popularity.
        remove_seen: items of the user's earlier events are no candidates, in the ranking and in
            the softmax alike. The item that was chosen always is one.
        popularity_M: popularity of each item in any unit, to be averaged over the top k.
    """
    cases = _as_cases(histories)
    log = cases.histories
    ks = (k,) if isinstance(k, int) else tuple(k)
    rank_E = np.full(log.num_events, np.nan)
    nll_E = np.full(log.num_events, np.nan)
    top = _TopItems(ks, num_items, log.num_events, popularity_M)
    seen = _SeenItems(log) if remove_seen else None
    for event_B, score_BM in _chunks(model, cases, num_items):
        target_B = torch.from_numpy(log.item_E[event_B])
        removed_B = None
        if seen is not None:
            score_BM, removed_B = seen.remove(event_B, score_BM)
        rank_E[event_B] = ranks(score_BM, target_B, removed_B)
        nll_E[event_B] = negative_log_likelihood(score_BM, target_B)
        top.add(event_B, score_BM)
    coverage = {k: float(top.recommended_CM[c].mean()) for c, k in enumerate(ks)}
    return Outcomes(rank_E, nll_E, ks, coverage, top.popularity)


def _as_cases(histories: Histories | Cases) -> Cases:
    if isinstance(histories, Cases):
        return histories
    return Cases(histories, np.arange(histories.num_events))


def _chunks(
    model: NextItemModel, cases: Cases, num_items: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield (event_B, score_BM) of the events read out, small pieces of the model's blocks."""
    block = max(1, BLOCK_CELLS // num_items)
    rows = max(1, CHUNK_CELLS // num_items)
    asked = cases.trimmed()
    own_E = np.full(asked.histories.num_events, -1, dtype=np.int64)  # trimmed → own event
    own_E[asked.event_N] = cases.event_N
    if isinstance(model, SelectiveModel) and len(asked) < asked.histories.num_events:
        blocks = model.iter_scores_at(asked.histories, block, asked.event_N)
    else:
        blocks = model.iter_scores(asked.histories, block)
    for event_N, score_NM in blocks:
        asked_N = np.flatnonzero(own_E[event_N] >= 0)
        with _one_thread():
            for start in range(0, len(asked_N), rows):
                row_B = asked_N[start : start + rows]
                whole = row_B[-1] - row_B[0] == len(row_B) - 1  # consecutive: no copy is needed
                score_BM = (
                    score_NM[row_B[0] : row_B[-1] + 1]
                    if whole
                    else score_NM[torch.from_numpy(row_B)]
                )
                yield own_E[event_N[row_B]], score_BM


@contextmanager
def _one_thread() -> Iterator[None]:
    """Measure chunks on one thread: they are so small that waiting for other threads costs more.

    On a machine where other processes run, a hundred times more. The model keeps its threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _SeenItems:
    """Takes the items of a user's earlier events out of score rows."""

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        # An item counts once per user, however often it was repeated: at its first event.
        by_item = np.lexsort((histories.item_E, histories.user_E))
        same = (np.diff(histories.item_E[by_item]) == 0) & (np.diff(histories.user_E[by_item]) == 0)
        first_E = np.ones(histories.num_events, dtype=bool)
        first_E[by_item[1:][same]] = False
        self.first_F = np.flatnonzero(first_E)
        self.before_E = np.cumsum(first_E) - first_E  # first events before each event
        start_E = histories.offset_U1[:-1][histories.user_E]
        self.user_before_E = self.before_E[start_E]

    def remove(
        self, event_B: NDArray[np.int64], score_BM: Tensor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """A copy with −∞ for the seen items but the target, and how many that were `[B]`."""
        score_BM = score_BM.clone()
        item_E = self.histories.item_E
        start_B = self.user_before_E[event_B]
        count_B = self.before_E[event_B] - start_B
        row_P = np.repeat(np.arange(len(event_B)), count_B)
        offset_B = np.cumsum(count_B) - count_B
        first_P = np.arange(len(row_P)) - np.repeat(offset_B - start_B, count_B)
        item_P = item_E[self.first_F[first_P]]
        other_P = item_P != item_E[event_B][row_P]
        row_P, item_P = row_P[other_P], item_P[other_P]
        score_BM[torch.from_numpy(row_P), torch.from_numpy(item_P)] = -float("inf")
        return score_BM, np.bincount(row_P, minlength=len(event_B))


class _TopItems:
    """Gathers which items are recommended, and how popular they are, at several cut-offs."""

    def __init__(
        self,
        ks: tuple[int, ...],
        num_items: int,
        num_events: int,
        popularity_M: NDArray[np.float64] | None,
    ) -> None:
        self.ks = ks
        self.depth = min(max(ks, default=0), num_items)
        self.recommended_CM = np.zeros((len(ks), num_items), dtype=bool)
        self.popularity_M = popularity_M
        self.popularity = (
            {} if popularity_M is None else {k: np.full(num_events, np.nan) for k in ks}
        )

    def add(self, event_B: NDArray[np.int64], score_BM: Tensor) -> None:
        if not self.depth:
            return
        best = score_BM.topk(self.depth, dim=1)
        item_BK = best.indices.numpy()
        # What has been taken out is not recommended when too little is left to fill the list.
        listed_BK = ~np.isneginf(best.values.numpy())
        for c, k in enumerate(self.ks):
            item_BC, listed_BC = item_BK[:, :k], listed_BK[:, :k]
            self.recommended_CM[c, item_BC[listed_BC]] = True
            if self.popularity_M is not None:
                sum_B = (self.popularity_M[item_BC] * listed_BC).sum(axis=1)
                count_B = listed_BC.sum(axis=1)
                self.popularity[k][event_B] = np.where(
                    count_B > 0, sum_B / np.maximum(count_B, 1), np.nan
                )


def summarise(
    result: Outcomes, event_N: NDArray[np.int64], ks: Sequence[int] | None = None
) -> dict[str, Any]:
    """PPL and ranking metrics at k over the chosen events.

    PPL = exp(mean −log p): the size of a uniform choice that would be as uncertain (§4).

    Args:
        ks: some of the result's cut-offs; None: all of them.
    """
    nll_N = result.nll_E[event_N]
    summary: dict[str, Any] = {
        "cases": len(event_N),
        "ppl": float(np.exp(nll_N.mean())) if len(event_N) else float("nan"),
    }
    for k in result.ks if ks is None else ks:
        summary |= ranking_metrics(result.rank_E[event_N], k)
        summary[f"coverage@{k}"] = result.coverage[k]
        if k in result.popularity:
            summary[f"popularity@{k}"] = float(np.nanmean(result.popularity[k][event_N]))
    return summary


def evaluate(
    model: NextItemModel,
    histories: Histories,
    num_items: int,
    k: int | Sequence[int] = 10,
    remove_seen: bool = False,
) -> dict[str, Any]:
    """Metrics of both read-outs: `last` (one case per user) and `every` (k ≥ 1)."""
    result = outcomes(model, histories, num_items, k, remove_seen)
    return {
        "last": summarise(result, last_events(histories)),
        "every": summarise(result, later_events(histories)),
    }


def perplexity(
    model: NextItemModel,
    histories: Histories | Cases,
    num_items: int,
    worth_E: NDArray[np.float32] | None = None,
) -> float:
    """PPL of the cases, or of every event but each user's first; NaN without any.

    Args:
        worth_E: what each event of the histories counts; None: all the same.
    """
    if isinstance(histories, Histories):
        histories = Cases(histories, later_events(histories))
    nll_E = np.full(histories.histories.num_events, np.nan)
    for event_B, score_BM in _chunks(model, histories, num_items):
        target_B = torch.from_numpy(histories.histories.item_E[event_B])
        nll_E[event_B] = negative_log_likelihood(score_BM, target_B)
    worth_N = np.ones(len(histories)) if worth_E is None else worth_E[histories.event_N]
    if not worth_N.any():
        return float("nan")
    return float(np.exp(np.average(nll_E[histories.event_N], weights=worth_N)))


def cold_item_metrics(
    model: NextItemModel | None, split: ColdItemSplit, num_items: int, ks: Sequence[int] = (5, 25)
) -> dict[str, NDArray[np.float64]]:
    """MRR, P@k and NDCG@k of each case `[N]`, ranking the held-out items among themselves.

    Args:
        model: None for the expectation of random choice.
    """
    num_cases = len(split.cases)
    item_J = torch.from_numpy(split.item_J)
    metrics: dict[str, NDArray[np.float64]] = {}

    def add(case_B: NDArray[np.int64], score_BJ: Tensor) -> None:
        part = multi_relevant_metrics(score_BJ, split.relevant(case_B), ks)
        for name, value_B in part.items():
            metrics.setdefault(name, np.full(num_cases, np.nan))[case_B] = value_B

    if model is None:
        rows = max(1, CHUNK_CELLS // len(item_J))
        for start in range(0, num_cases, rows):
            case_B = np.arange(start, min(start + rows, num_cases))
            add(case_B, torch.zeros(len(case_B), len(item_J)))
        return metrics
    for event_B, score_BM in _chunks(model, split.cases, num_items):
        add(np.searchsorted(split.cases.event_N, event_B), score_BM[:, item_J])
    return metrics


def squared_errors(
    model: ValueModel, histories: Histories | Cases, clip: tuple[float, float] | None = None
) -> NDArray[np.float64]:
    """Squared errors of predicted values: float64 `[E]`, NaN where there is no value or no case.

    Args:
        histories: of plain histories, every event but each user's first is a case.
        clip: the range of the values; predictions are held within it.

    Raises:
        ValueError: the histories have no values, or the model predicts none.
    """
    if isinstance(histories, Histories):
        histories = Cases(histories, later_events(histories))
    value_E = histories.histories.value_E
    if value_E is None:
        raise ValueError("these histories have no values")
    predicted_E = model.predict_values(histories.histories)
    if clip is not None:
        predicted_E = np.clip(predicted_E, *clip)
    error_E = np.full(len(value_E), np.nan)
    event_N = histories.event_N
    error_E[event_N] = (predicted_E[event_N] - value_E[event_N]) ** 2
    return error_E


def evaluate_values(
    model: ValueModel, histories: Histories | Cases, clip: tuple[float, float] | None = None
) -> dict[str, Any]:
    """`rmse` and number of `cases` of the predicted values; arguments as of `squared_errors`."""
    error_E = squared_errors(model, histories, clip)
    return {"cases": int((~np.isnan(error_E)).sum()), "rmse": rmse(error_E)}
