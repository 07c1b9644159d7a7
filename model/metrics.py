"""Metrics from full scores over the catalogue. Shapes: N cases, M items.

Ties share the expected rank: 1 + #better + #equal others / 2, so a constant scorer gets the
middle of the list and not its top. With several relevant items a case's metrics are their exact
expectations over all orders of the tied items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def ranks(
    score_NM: Tensor, target_N: Tensor, removed_N: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Expected rank (1 = best) of each target among all items: float64 `[N]`.

    NaN scores rank last.

    Args:
        removed_N: how many items of each row have been taken out by a score of −∞.
    """
    target_score_N1 = score_NM.gather(1, target_N[:, None])
    # NumPy counts booleans in a fraction of the time that torch takes to sum them.
    better_N = np.count_nonzero((score_NM > target_score_N1).numpy(), axis=1)
    equal_N = np.count_nonzero((score_NM == target_score_N1).numpy(), axis=1) - 1
    target_score_N = target_score_N1[:, 0].numpy()
    removed_N = np.zeros_like(equal_N) if removed_N is None else removed_N
    equal_N = np.where(np.isneginf(target_score_N), equal_N - removed_N, equal_N)
    last_N = score_NM.shape[1] - removed_N
    return np.where(np.isnan(target_score_N), last_N, 1.0 + better_N + equal_N / 2.0)


def negative_log_likelihood(score_NM: Tensor, target_N: Tensor) -> NDArray[np.float64]:
    """−log softmax(score)[target], in nats: float64 `[N]`.

    Differences and exponentials are taken in the scores' own precision and summed in double: for
    float32 scores within 1e-7 of a softmax in double, at a third of its time and no double copy.
    """
    best_N1 = score_NM.amax(dim=1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    z_N = (score_NM - best_N1).exp_().sum(dim=1, dtype=torch.float64)
    target_score_N = score_NM.gather(1, target_N[:, None])[:, 0]
    return (z_N.log() + best_N1[:, 0].double() - target_score_N.double()).numpy()


def ranking_metrics(rank_N: NDArray[np.float64], k: int) -> dict[str, float]:
    """MRR, Hit, NDCG, Precision and Recall at k for cases with one relevant item each."""
    return {name: float(value_N.mean()) for name, value_N in case_metrics(rank_N, k).items()}


def case_metrics(rank_N: NDArray[np.float64], k: int) -> dict[str, NDArray[np.float64]]:
    """The ranking metrics at k of every case `[N]`; their means are `ranking_metrics`."""
    hit_N = rank_N <= k
    return {
        f"mrr@{k}": np.where(hit_N, 1.0 / rank_N, 0.0),
        f"hit@{k}": hit_N.astype(np.float64),
        f"ndcg@{k}": np.where(hit_N, 1.0 / np.log2(1.0 + rank_N), 0.0),
        f"precision@{k}": hit_N / k,
        f"recall@{k}": hit_N.astype(np.float64),
    }


def multi_relevant_metrics(
    score_NM: Tensor, relevant_NM: NDArray[np.bool_], ks: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Metrics `[N]` of cases with one relevant item or more each, tied items in random order.

    `mrr`: one over the place of the first relevant item, without a cut-off. `precision@k`;
    `ndcg@k`: Σ 1 / log2(1 + place) over the relevant items up to place k, over the largest
    possible sum. NaN scores rank last. Equal scores for everything give random choice.
    """
    score_NM = torch.nan_to_num(score_NM, nan=-float("inf"), posinf=None, neginf=-float("inf"))
    sorted_NM, order_NM = torch.sort(score_NM, dim=1, descending=True)
    gain_NM = np.take_along_axis(relevant_NM, order_NM.numpy(), axis=1).astype(np.float64)
    num_cases, num_items = gain_NM.shape
    new_NM = np.ones((num_cases, num_items), dtype=bool)
    new_NM[:, 1:] = (sorted_NM[:, 1:] != sorted_NM[:, :-1]).numpy()
    # Runs of equal scores, counted through all rows: each place gets its run's mean gain.
    run_C = np.cumsum(new_NM.ravel()) - 1
    start_R = np.flatnonzero(new_NM.ravel())
    size_R = np.diff(np.r_[start_R, num_cases * num_items])
    found_R = np.add.reduceat(gain_NM.ravel(), start_R)
    expected_NM = (found_R / size_R)[run_C].reshape(num_cases, num_items)

    first_N = np.argmax(expected_NM > 0, axis=1) + np.arange(num_cases) * num_items
    run_N = run_C[first_N]
    run_N3 = np.stack([start_R[run_N] % num_items, size_R[run_N], found_R[run_N]], axis=1)
    distinct_D3, of_N = np.unique(run_N3.astype(np.int64), axis=0, return_inverse=True)
    mrr_D = np.array([_reciprocal_of_first(*map(int, run)) for run in distinct_D3])
    metrics = {"mrr": mrr_D[of_N.ravel()]}
    discount_M = 1.0 / np.log2(2.0 + np.arange(num_items))
    ideal_M1 = np.r_[0.0, np.cumsum(discount_M)]
    relevant_N = relevant_NM.sum(axis=1)
    for k in ks:
        top = slice(0, min(k, num_items))
        metrics[f"precision@{k}"] = expected_NM[:, top].sum(axis=1) / k
        dcg_N = expected_NM[:, top] @ discount_M[top]
        metrics[f"ndcg@{k}"] = dcg_N / ideal_M1[np.minimum(relevant_N, top.stop)]
    return metrics


def _reciprocal_of_first(before: int, size: int, relevant: int) -> float:
    """E[1 / place] of the first of `relevant` items in a shuffled run after `before` others."""
    if size == 1 or relevant == size:
        return 1.0 / (before + 1)
    place_I = np.arange(size - relevant + 1)
    # The first is at place i if all before it missed: p(i) = r / (g − i) · Π (1 − r / (g − j)).
    here_I = relevant / (size - place_I)
    missed_I = np.r_[1.0, np.cumprod(1.0 - here_I[:-1])]
    return float((missed_I * here_I / (before + 1 + place_I)).sum())


def rmse(squared_error_N: NDArray[np.float64]) -> float:
    """Root of the mean squared error over the cases that are not NaN; NaN without any."""
    known_N = squared_error_N[~np.isnan(squared_error_N)]
    return float(np.sqrt(known_N.mean())) if len(known_N) else float("nan")


def popularity_percentile(count_M: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of the items that are less popular, ties half: 0 = rarest, 1 = most popular `[M]`."""
    sorted_M = np.sort(count_M)
    below_M = np.searchsorted(sorted_M, count_M, side="left")
    upto_M = np.searchsorted(sorted_M, count_M, side="right")
    return (below_M + (upto_M - below_M - 1) / 2.0) / max(len(count_M) - 1, 1)
