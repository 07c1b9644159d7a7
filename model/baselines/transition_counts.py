"""Transition counts: what followed the last ten items in other histories, beside popularity.

A Markov chain with a fixed decay: p = ε·popularity + (1 − ε)·Σ_r α_r·P(j | recent_r), α_r ∝ 1 / r.
The strongest simple baseline on sparse logs, and the prior that HRNN-meta builds on.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sequences import Histories
from model.transitions import WINDOW, Transitions

FOLDS = 5
EPSILON_GRID = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


class TransitionCounts:
    """Implements `NextItemModel`; ε is chosen by the likelihood of cross-fitted training users."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.epsilon = 1.0
        self.p_M = torch.full((num_items,), 1.0 / num_items)
        self.transitions: Transitions | None = None
        alpha_R = 1.0 / torch.arange(1.0, WINDOW + 1)
        self.alpha_R = alpha_R / alpha_R.sum()

    def fit(self, train: Histories) -> Self:
        """Count, then choose ε on users whose own pairs are not in the counts."""
        count_M = np.bincount(train.item_E, minlength=self.num_items) + 1.0
        self.p_M = torch.from_numpy(count_M / count_M.sum()).float()
        fold_U = np.arange(len(train)) % FOLDS
        fitted = Transitions.cross_fitted(
            train, self.num_items, fold_U, FOLDS, followers=self.num_items
        )
        followed = [
            fitted.at(
                torch.where(
                    recent >= 0,
                    torch.from_numpy(fold_U[train.user_E[event_N]])[:, None] * self.num_items
                    + recent,
                    -1,
                ),
                self.alpha_R,
                torch.from_numpy(train.item_E[event_N]),
            )
            for event_N, recent in _recent(train, 4096)
        ]
        followed_E, p_E = torch.cat(followed).double(), self.p_M[train.item_E].double()
        self.epsilon = max(
            EPSILON_GRID, key=lambda e: float((e * p_E + (1 - e) * followed_E).log().mean())
        )
        self.transitions = Transitions.count(train, self.num_items, followers=self.num_items)
        return self

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """log p of every item at every event."""
        if self.transitions is None:
            raise ValueError("the counts are not fitted yet")
        for event_N, recent_NR in _recent(histories, block):
            followed_NM = self.transitions.scatter(recent_NR, self.alpha_R)
            p_NM = self.epsilon * self.p_M + (1.0 - self.epsilon) * followed_NM
            yield event_N, p_NM.log_()


def _recent(histories: Histories, block: int) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(event_N, the WINDOW items before each, newest first, −1 where there is none)."""
    first_E = np.repeat(histories.offset_U1[:-1], np.diff(histories.offset_U1))
    for start in range(0, histories.num_events, block):
        event_N = np.arange(start, min(start + block, histories.num_events))
        at_NR = event_N[:, None] - np.arange(1, WINDOW + 1)
        item_NR = histories.item_E[np.maximum(at_NR, 0)]
        yield event_N, torch.from_numpy(np.where(at_NR >= first_E[event_N, None], item_NR, -1))
