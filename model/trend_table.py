"""log q(t) of whole periods, as training and evaluation read it (§3.2, eq. 5; `model.trends`).

Shapes: M items, E events, P periods, N questions, U distinct rows, S items asked for, Z changes of
counts, F of them in question.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.trends import MAX_TABLE_CELLS, ResolvedTrend


@dataclass(frozen=True)
class TrendTable:
    """log q of every period that holds events, worked out on demand.

    Kept are the moments at which an item's count changes, in CSR form by item: from row `row_Z` on
    the count in force is `count_Z`, `delta_Z` more than before. So memory follows the events
    (at most two entries each), never periods × items.

    `period_P` are the period numbers (timestamp // period_seconds), ascending; `total_P` the events
    counted in each.
    """

    trend: ResolvedTrend
    num_items: int
    period_P: NDArray[np.int64]
    total_P: Tensor  # float64, smoothing included
    offset_M1: Tensor  # int64
    row_Z: Tensor  # int64, ascending within an item
    delta_Z: Tensor  # float32
    count_Z: Tensor  # float32

    @classmethod
    def build(
        cls,
        item_E: NDArray[np.int64],
        timestamp_E: NDArray[np.int64],
        num_items: int,
        trend: ResolvedTrend,
        periods: NDArray[np.int64] | None = None,
        own_periods: bool = True,
    ) -> Self:
        """Count `item_E` (events in any order) into one row per period.

        Args:
            periods: further period numbers that will be asked for (e.g. of test events).
            own_periods: whether the periods of the counted events themselves are kept.
        """
        own = np.unique(timestamp_E // trend.period_seconds)
        wanted = own if periods is None else np.union1d(own[: own_periods * len(own)], periods)
        rows = len(wanted)
        start_P = wanted * trend.period_seconds
        # An event counts from the first period that starts after it; with a window, until the
        # first that starts more than a window after it.
        enters_E = np.searchsorted(start_P, timestamp_E, side="right")
        key, delta = item_E * rows + enters_E, np.ones(len(item_E), dtype=np.int8)
        kept = [(key[enters_E < rows], delta[enters_E < rows])]
        if trend.window_seconds:
            leaves_E = np.searchsorted(start_P, timestamp_E + trend.window_seconds, side="right")
            gone = leaves_E < rows
            kept.append(((item_E * rows + leaves_E)[gone], -delta[gone]))
        key_Z, delta_Z = (np.concatenate(column) for column in zip(*kept, strict=True))
        key_Z, inverse_Z = np.unique(key_Z, return_inverse=True)
        delta_Z = np.bincount(inverse_Z, delta_Z, minlength=len(key_Z))
        key_Z, delta_Z = key_Z[delta_Z != 0], delta_Z[delta_Z != 0]
        offset_M1 = np.searchsorted(key_Z, np.arange(num_items + 1) * rows)
        row_Z = key_Z - np.repeat(np.arange(num_items) * rows, np.diff(offset_M1))
        # Within an item the changes add up from 0.
        sum_Z1 = np.r_[0.0, np.cumsum(delta_Z)]
        count_Z = sum_Z1[1:] - np.repeat(sum_Z1[offset_M1[:-1]], np.diff(offset_M1))
        total_P = np.bincount(row_Z, delta_Z, minlength=rows).cumsum() + trend.smoothing * num_items
        return cls(
            trend=trend,
            num_items=num_items,
            period_P=wanted,
            total_P=torch.from_numpy(total_P),
            offset_M1=torch.from_numpy(offset_M1.astype(np.int64)),
            row_Z=torch.from_numpy(row_Z.astype(np.int64)),
            delta_Z=torch.from_numpy(delta_Z).float(),
            count_Z=torch.from_numpy(count_Z).float(),
        )

    @cached_property
    def log_q_PM(self) -> NDArray[np.float32]:
        """Every row for every item: for catalogues and spans of which that is little."""
        return self.rows(torch.arange(len(self.period_P))).numpy()

    def row_of(self, timestamp_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each timestamp's period `[N]`; moments between rows use the row before them."""
        period_N = np.asarray(timestamp_N) // self.trend.period_seconds
        return np.clip(np.searchsorted(self.period_P, period_N, side="right") - 1, 0, None)

    def rows(self, row_U: Tensor) -> Tensor:
        """log q of every item in some rows (distinct, ascending), float32 `[U, M]`."""
        return self._counted(row_U, self._item_Z, self.row_Z, self.delta_Z, self.num_items)

    def every_item(self, row_N: Tensor) -> Tensor:
        """log q of every item in each row asked for, float32 `[N, M]`."""
        if self.num_items * len(self.period_P) <= MAX_TABLE_CELLS:
            return torch.from_numpy(self.log_q_PM).index_select(0, row_N)
        row_U, place_N = row_N.unique(return_inverse=True)
        return self.rows(row_U).index_select(0, place_N)

    def columns(self, row_U: Tensor, item_S: Tensor) -> Tensor:
        """log q of some items in some rows (distinct, ascending), float32 `[U, S]`."""
        start_S = self.offset_M1[item_S]
        length_S = self.offset_M1[item_S + 1] - start_S
        column_F = torch.repeat_interleave(length_S)
        entry_F = torch.arange(len(column_F), device=column_F.device)
        entry_F += (start_S - length_S.cumsum(0) + length_S)[column_F]
        return self._counted(
            row_U, column_F, self.row_Z[entry_F], self.delta_Z[entry_F], len(item_S)
        )

    def at(self, row_N: Tensor, item_N: Tensor) -> Tensor:
        """log q of one item in each row asked for, float32 `[N]`."""
        low_N, high_N = self.offset_M1[item_N], self.offset_M1[item_N + 1]
        start_N = low_N
        # Bisection in every item's own stretch: the first change after the row.
        for _ in range(int((high_N - low_N).max()).bit_length() if len(item_N) else 0):
            middle_N = (low_N + high_N) // 2
            before_N = self.row_Z[middle_N.clamp(max=len(self.row_Z) - 1)] <= row_N
            open_N = low_N < high_N
            low_N = torch.where(open_N & before_N, middle_N + 1, low_N)
            high_N = torch.where(open_N & ~before_N, middle_N, high_N)
        count_N = torch.zeros(len(item_N), device=row_N.device)
        if len(self.count_Z):
            count_N = self.count_Z[(low_N - 1).clamp(min=0)] * (low_N > start_N)
        return self._log_q(count_N, self.total_P[row_N])

    @cached_property
    def _item_Z(self) -> Tensor:
        return torch.repeat_interleave(self.offset_M1.diff())

    def _counted(
        self, row_U: Tensor, column_F: Tensor, row_F: Tensor, delta_F: Tensor, columns: int
    ) -> Tensor:
        """Changes added up to the counts in force, and these turned into log q."""
        place_F = torch.searchsorted(row_U, row_F)
        count = delta_F.new_zeros((len(row_U) + 1) * columns)
        count.index_add_(0, place_F * columns + column_F, delta_F)
        count_US = count.view(-1, columns)[:-1].cumsum(0)
        return self._log_q(count_US, self.total_P[row_U][:, None])

    def _log_q(self, count: Tensor, total: Tensor) -> Tensor:
        return (count + self.trend.smoothing).log_().sub_(total.log().float())
