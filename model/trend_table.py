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

from model.columns import READ_EVENTS, GrowingColumn
from model.item_ranges import item_ranges
from model.trends import MAX_TABLE_CELLS, ResolvedTrend

RANGE_EVENTS = 2**20  # whose changes are counted at once: some 150 MB while that lasts


@dataclass(frozen=True)
class TrendTable:
    """log q of every period that holds events, worked out on demand.

    Kept are the moments at which an item's count changes, in CSR form by item: from row `row_Z` on
    the count in force is `count_Z`, `delta_Z` more than before. So their number follows the events
    (at most two each), never periods × items; where they are many they are in files.

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
        own = _periods(timestamp_E, trend.period_seconds)
        wanted = own if periods is None else np.union1d(own[: own_periods * len(own)], periods)
        rows = len(wanted)
        start_P = wanted * trend.period_seconds
        size_M, delta_P = np.zeros(num_items, dtype=np.int64), np.zeros(rows)
        columns = (GrowingColumn(np.int64), GrowingColumn(np.float32), GrowingColumn(np.float32))
        for first, end, pieces in item_ranges(item_E, num_items, RANGE_EVENTS):
            key_Z = delta_Z = np.empty(0, dtype=np.int64)  # item · rows + row; events more or less
            for event_K in pieces:
                key_K = np.asarray(item_E[event_K]) * rows
                time_K = np.asarray(timestamp_E[event_K])
                # An event counts from the first period that starts after it; with a window, until
                # the first that starts more than a window after it.
                changes = [(np.searchsorted(start_P, time_K, side="right"), 1)]
                if trend.window_seconds:
                    time_K = time_K + trend.window_seconds
                    changes.append((np.searchsorted(start_P, time_K, side="right"), -1))
                keys, deltas = [key_Z], [delta_Z]
                for row_K, sign in changes:
                    keys.append((key_K + row_K)[row_K < rows])
                    deltas.append(np.full(len(keys[-1]), sign))
                key_Z, inverse_Z = np.unique(np.concatenate(keys), return_inverse=True)
                delta_Z = np.bincount(inverse_Z, np.concatenate(deltas), minlength=len(key_Z))
                key_Z, delta_Z = key_Z[delta_Z != 0], delta_Z[delta_Z != 0].astype(np.int64)
            offset_I1 = np.searchsorted(key_Z, np.arange(first, end + 1) * rows)
            size_I = np.diff(offset_I1)
            row_Z = key_Z - np.repeat(np.arange(first, end) * rows, size_I)
            # Within an item the changes add up from 0.
            sum_Z1 = np.r_[0, np.cumsum(delta_Z)]
            count_Z = sum_Z1[1:] - np.repeat(sum_Z1[offset_I1[:-1]], size_I)
            size_M[first:end] = size_I
            delta_P += np.bincount(row_Z, delta_Z, minlength=rows)
            for column, values in zip(columns, (row_Z, delta_Z, count_Z), strict=True):
                column.extend(values)
        row_Z, delta_Z, count_Z = (column.finish() for column in columns)
        return cls(
            trend=trend,
            num_items=num_items,
            period_P=wanted,
            total_P=torch.from_numpy(delta_P.cumsum() + trend.smoothing * num_items),
            offset_M1=torch.from_numpy(np.r_[0, np.cumsum(size_M)].astype(np.int64)),
            row_Z=torch.from_numpy(row_Z),
            delta_Z=torch.from_numpy(delta_Z),
            count_Z=torch.from_numpy(count_Z),
        )

    @cached_property
    def _every_PM(self) -> Tensor:
        return self.rows(torch.arange(len(self.period_P), device=self.row_Z.device))

    @property
    def log_q_PM(self) -> NDArray[np.float32]:
        """Every row for every item: for catalogues and spans of which that is little."""
        return self._every_PM.cpu().numpy()

    def row_of(self, timestamp_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each timestamp's period `[N]`; moments between rows use the row before them."""
        period_N = np.asarray(timestamp_N) // self.trend.period_seconds
        return np.clip(np.searchsorted(self.period_P, period_N, side="right") - 1, 0, None)

    def rows(self, row_U: Tensor) -> Tensor:
        """log q of every item in some rows (distinct, ascending), float32 `[U, M]`."""
        count = self.delta_Z.new_zeros((len(row_U) + 1) * self.num_items)
        for start in range(0, len(self.row_Z), READ_EVENTS):
            part = slice(start, start + READ_EVENTS)
            item_F = torch.repeat_interleave(self.offset_M1.clamp(part.start, part.stop).diff())
            place_F = torch.searchsorted(row_U, self.row_Z[part])
            place_F.mul_(self.num_items).add_(item_F)
            count.index_add_(0, place_F, self.delta_Z[part])
        return self._added_up(count, row_U)

    def every_item(self, row_N: Tensor) -> Tensor:
        """log q of every item in each row asked for, float32 `[N, M]`."""
        if self.num_items * len(self.period_P) <= MAX_TABLE_CELLS:
            return self._every_PM.index_select(0, row_N)
        row_U, place_N = row_N.unique(return_inverse=True)
        return self.rows(row_U).index_select(0, place_N)

    def columns(self, row_U: Tensor, item_S: Tensor) -> Tensor:
        """log q of some items in some rows (distinct, ascending), float32 `[U, S]`."""
        start_S = self.offset_M1[item_S]
        length_S = self.offset_M1[item_S + 1] - start_S
        column_F = torch.repeat_interleave(length_S)
        entry_F = torch.arange(len(column_F), device=column_F.device)
        entry_F += (start_S - length_S.cumsum(0) + length_S)[column_F]
        place_F = torch.searchsorted(row_U, self.row_Z[entry_F])
        count = self.delta_Z.new_zeros((len(row_U) + 1) * len(item_S))
        count.index_add_(0, place_F * len(item_S) + column_F, self.delta_Z[entry_F])
        return self._added_up(count, row_U)

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

    def _added_up(self, count: Tensor, row_U: Tensor) -> Tensor:
        """log q from changes of counts `[(U + 1) · columns]`, each in the row from which it is."""
        count_US = count.view(len(row_U) + 1, -1)[:-1].cumsum(0)
        return self._log_q(count_US, self.total_P[row_U][:, None])

    def _log_q(self, count: Tensor, total: Tensor) -> Tensor:
        return (count + self.trend.smoothing).log_().sub_(total.log().float())


def _periods(timestamp_E: NDArray[np.int64], period_seconds: int) -> NDArray[np.int64]:
    """The periods that hold events, ascending."""
    found = np.empty(0, dtype=np.int64)
    for start in range(0, len(timestamp_E), READ_EVENTS):
        found = np.union1d(found, timestamp_E[start : start + READ_EVENTS] // period_seconds)
    return found
