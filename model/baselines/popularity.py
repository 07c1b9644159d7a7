"""Popularity: everybody gets the most frequent items, of the whole log or of the last while."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.baselines.base import NextItemBaseline, smoothed_popularity
from model.sequences import Histories
from model.trend_table import TrendTable
from model.trends import ResolvedTrend, TrendSettings, choose_trend


class Popularity(NextItemBaseline):
    """p(a) = (count_a + 1) / (Σ count + M), counted over the whole training log."""

    name = "popularity"

    def fit(self, train: Histories) -> Self:
        self.state = {"log_p": smoothed_popularity(train, self.num_items).log()}
        return self

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        return self.state["log_p"].expand(len(event_N), -1)


class RecentPopularity(NextItemBaseline):
    """log q(t): popularity just before each moment; period and window chosen on the log (§4.5)."""

    name = "recent-popularity"

    def fit(self, train: Histories) -> Self:
        trend = choose_trend(train.item_E, train.timestamp_E, self.num_items, TrendSettings())
        self.state = {
            "item": torch.from_numpy(train.item_E),
            "timestamp": torch.from_numpy(train.timestamp_E),
            "trend": torch.tensor([trend.period_seconds, trend.window_seconds]),
            "smoothing": torch.tensor(trend.smoothing, dtype=torch.float64),
        }
        return self

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        period, window = self.state["trend"].tolist()
        trend = ResolvedTrend(period, window, float(self.state["smoothing"]))
        time_N = histories.timestamp_E[event_N]
        table = TrendTable.build(
            self.state["item"].numpy(),
            self.state["timestamp"].numpy(),
            self.num_items,
            trend,
            np.unique(time_N // period),
            own_periods=False,
        )
        return torch.from_numpy(table.log_q_PM[table.row_of(time_N)])
