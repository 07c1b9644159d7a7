"""Ranking metrics from full scores over the catalogue. Shapes: N cases, M items.

Ties share the expected rank: 1 + #better + #equal others / 2, so a constant scorer gets the
middle of the list and not its top.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def ranks(score_NM: Tensor, target_N: Tensor) -> NDArray[np.float64]:
    """Expected rank (1 = best) of each target among all items; NaN scores rank last."""
    target_score_N1 = score_NM.gather(1, target_N[:, None])
    better_N = (score_NM > target_score_N1).sum(dim=1)
    equal_N = (score_NM == target_score_N1).sum(dim=1) - 1
    rank_N = 1.0 + better_N.double() + equal_N.double() / 2.0
    rank_N[torch.isnan(target_score_N1[:, 0])] = score_NM.shape[1]
    return rank_N.numpy()


def negative_log_likelihood(score_NM: Tensor, target_N: Tensor) -> NDArray[np.float64]:
    """−log softmax(score)[target] `[N]`, in nats."""
    log_z_N = torch.logsumexp(score_NM.double(), dim=1)
    return (log_z_N - score_NM.double().gather(1, target_N[:, None])[:, 0]).numpy()


def ranking_metrics(rank_N: NDArray[np.float64], k: int) -> dict[str, float]:
    """MRR, Hit, NDCG, Precision and Recall at k for cases with one relevant item each."""
    hit_N = rank_N <= k
    return {
        f"mrr@{k}": float(np.mean(np.where(hit_N, 1.0 / rank_N, 0.0))),
        f"hit@{k}": float(np.mean(hit_N)),
        f"ndcg@{k}": float(np.mean(np.where(hit_N, 1.0 / np.log2(1.0 + rank_N), 0.0))),
        f"precision@{k}": float(np.mean(hit_N) / k),
        f"recall@{k}": float(np.mean(hit_N)),
    }
