"""Transition counts: what followed the last ten items in other histories, beside popularity.

A Markov chain with a fixed decay: p = ε·popularity + (1 − ε)·Σ_r α_r·P(j | recent_r), α_r ∝ 1 / r.
The strongest simple baseline on sparse logs, and the prior that HRNN-meta builds on.
"""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.baselines.base import NextItemBaseline, recent_items, smoothed_popularity
from model.sequences import Histories
from model.transitions import WINDOW, Transitions

FOLDS = 5
FOLLOWERS = 200  # kept per item
EPSILON_GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


class TransitionCounts(NextItemBaseline):
    """ε is chosen by the likelihood of training users whose own pairs are not counted."""

    name = "transition-counts"

    def __init__(self, num_items: int) -> None:
        super().__init__(num_items)
        alpha_R = 1.0 / torch.arange(1.0, WINDOW + 1)
        self.alpha_R = alpha_R / alpha_R.sum()

    def fit(self, train: Histories) -> Self:
        p_M = smoothed_popularity(train, self.num_items)
        fold_U = np.arange(len(train)) % FOLDS
        fitted = Transitions.cross_fitted(train, self.num_items, fold_U, FOLDS, followers=FOLLOWERS)
        followed = []
        for start in range(0, train.num_events, 4096):
            event_N = np.arange(start, min(start + 4096, train.num_events))
            item_NR = recent_items(train, event_N, WINDOW)
            fold_N1 = fold_U[train.user_E[event_N]][:, None]
            row_NR = np.where(item_NR >= 0, fold_N1 * self.num_items + item_NR, -1)
            target_N = torch.from_numpy(train.item_E[event_N])
            followed.append(fitted.at(torch.from_numpy(row_NR), self.alpha_R, target_N))
        followed_E, p_E = torch.cat(followed).double(), p_M[train.item_E].double()
        epsilon = max(
            EPSILON_GRID, key=lambda e: float((e * p_E + (1 - e) * followed_E).log().mean())
        )
        counts = Transitions.count(train, self.num_items, followers=FOLLOWERS)
        self.state = counts.tensors() | {"p": p_M, "epsilon": torch.tensor(epsilon)}
        return self

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        counts = Transitions.from_tensors(self.state, self.num_items)
        recent_NR = torch.from_numpy(recent_items(histories, event_N, WINDOW))
        followed_NM = counts.scatter(recent_NR, self.alpha_R)
        epsilon = self.state["epsilon"]
        return (epsilon * self.state["p"] + (1.0 - epsilon) * followed_NM).log_()
