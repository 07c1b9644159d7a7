"""Popularity: every user gets the most frequent items of the training log."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from model.sequences import Histories


class Popularity:
    """p(a) = (count_a + α) / (Σ count + α·M)."""

    def __init__(self, num_items: int, smoothing: float = 1.0) -> None:
        self.num_items = num_items
        self.smoothing = smoothing
        self.log_p_M = torch.full((num_items,), -float(np.log(num_items)))

    def fit(self, train: Histories) -> "Popularity":
        count_M = np.bincount(train.item_E, minlength=self.num_items) + self.smoothing
        self.log_p_M = torch.from_numpy(np.log(count_M / count_M.sum())).float()
        return self

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        for start in range(0, histories.num_events, block):
            event_N = np.arange(start, min(start + block, histories.num_events))
            yield event_N, self.log_p_M.expand(len(event_N), -1)
