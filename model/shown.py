"""What was shown beside the item that was chosen, and not chosen: ragged, event after event.

Shapes: E events, U users, S shown items of all events, N events asked for, R shown items of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.catalogue import Catalogue
from model.columns import READ_EVENTS, new_column

IMPRESSION = "impression"


@dataclass(frozen=True)
class Shown:
    """Event e was chosen from a list with item[offset[e]], …, item[offset[e + 1] − 1] on it.

    `item_S` int32 catalogue positions in the order in which they were shown, each once an event;
    `offset_E1` int64 `[E + 1]`. An event without a list has none.
    """

    item_S: NDArray[np.int32]
    offset_E1: NDArray[np.int64]

    @classmethod
    def from_table(
        cls,
        path: Path,
        catalogue: Catalogue,
        item_E: NDArray[np.int64],
        offset_U1: NDArray[np.int64],
        most: int,
    ) -> Self | None:
        """Read `clean/interactions.parquet`; None: it has no impressions.

        Items that the catalogue lacks are left out: nothing could be learned of them.

        Args:
            item_E, offset_U1: the chosen items and the users' events, as in `Histories`.
            most: items of one list that are read, those shown first.
        """
        with pq.ParquetFile(path) as file:
            if IMPRESSION not in file.schema_arrow.names:
                return None
            lists = cls._lists(file, catalogue, most)
        return lists._not_chosen(item_E, offset_U1)

    @classmethod
    def _lists(cls, file: pq.ParquetFile, catalogue: Catalogue, most: int) -> Self:
        """The lists as they are, with what was chosen from them; −1: not in the catalogue."""
        metadata = file.metadata
        num_events, num_values = metadata.num_rows, 0
        for group in range(metadata.num_row_groups):
            chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
            num_values += sum(
                c.num_values for c in chunks if c.path_in_schema.split(".")[0] == IMPRESSION
            )
        item_S = new_column(min(num_values, num_events * most), np.int32)
        offset_E1 = new_column(num_events + 1, np.int64)
        offset_E1[0] = event = 0
        # Rows of many lists are read in portions of as many items.
        rows = max(1, int(READ_EVENTS * num_events / max(num_values, 1)))
        for batch in file.iter_batches(min(rows, READ_EVENTS), columns=[IMPRESSION]):
            lists = batch.column(IMPRESSION)
            length_E = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            rank_S = _ranks(length_E)
            first = lists.flatten().filter(pa.array(rank_S < most)).dictionary_encode()
            names = first.dictionary.to_pylist()
            code_S = first.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
            position = np.append(catalogue.encode(names), -1)  # the last: no id at all
            start, stop = offset_E1[event], event + len(length_E)
            np.cumsum(np.minimum(length_E, most), out=offset_E1[event + 1 : stop + 1])
            offset_E1[event + 1 : stop + 1] += start
            item_S[start : offset_E1[stop]] = position[code_S]
            event = stop
        return cls(item_S[: offset_E1[-1]], offset_E1)

    def _not_chosen(self, item_E: NDArray[np.int64], offset_U1: NDArray[np.int64]) -> Self:
        """Without the chosen items, unknown ones and those that are on a list a second time.

        Events of a user that follow each other with the same list are choices from one list.
        """
        offset_E1 = new_column(len(self.offset_E1), np.int64)
        offset_E1[0] = 0
        for user, until in _portions(self.offset_E1, offset_U1):
            first, last = int(offset_U1[user]), int(offset_U1[until])
            start, stop = self.offset_E1[first], self.offset_E1[last]
            item_S = self.item_S[start:stop].astype(np.int64)
            length_E = np.diff(self.offset_E1[first : last + 1])
            event_S = np.repeat(np.arange(last - first), length_E)
            # The list before, if it is as long, ends where this one begins.
            before_S = np.arange(stop - start) - length_E[event_S]
            differs_S = (before_S < 0) | (item_S != item_S[np.maximum(before_S, 0)])
            same_E = np.diff(length_E, prepend=-1) == 0
            same_E &= np.bincount(event_S[differs_S], minlength=last - first) == 0
            begin_U = offset_U1[user:until]
            same_E[begin_U[begin_U < last] - first] = False
            list_E = np.cumsum(~same_E)
            # Pairs as numbers; items from 0 on, as the unknown one is −1.
            width = 2 + max(int(item_S.max(initial=0)), int(item_E[first:last].max(initial=0)))
            chosen_E = list_E * width + item_E[first:last] + 1
            kept_S = (item_S >= 0) & ~np.isin(list_E[event_S] * width + item_S + 1, chosen_E)
            once_S = np.zeros(len(item_S), dtype=bool)
            once_S[np.unique(event_S * width + item_S + 1, return_index=True)[1]] = True
            kept_S &= once_S
            kept_E = np.bincount(event_S[kept_S], minlength=last - first)
            offset_E1[first + 1 : last + 1] = offset_E1[first] + np.cumsum(kept_E)
            # What is written never overtakes what is still to be read.
            self.item_S[offset_E1[first] : offset_E1[last]] = item_S[kept_S]
        return type(self)(self.item_S[: offset_E1[-1]], offset_E1)

    def of(self, event_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`item_R` and `place_R`: the items of these events, and of which of the N each is."""
        length_N = self.offset_E1[event_N + 1] - self.offset_E1[event_N]
        place_R = np.repeat(np.arange(len(event_N)), length_N)
        at_R = np.repeat(self.offset_E1[event_N], length_N) + _ranks(length_N)
        return self.item_S[at_R].astype(np.int64), place_R

    def taken(self, source: Callable[[int, int], NDArray[np.int64]], num_events: int) -> "Shown":
        """New event k is the old one that `source` names: places of a range of new ones."""
        offset_E1 = new_column(num_events + 1, np.int64)
        offset_E1[0] = 0
        for start, stop in self._ranges(num_events):
            event_N = source(start, stop)
            length_N = self.offset_E1[event_N + 1] - self.offset_E1[event_N]
            offset_E1[start + 1 : stop + 1] = offset_E1[start] + np.cumsum(length_N)
        item_S = new_column(int(offset_E1[-1]), np.int32)
        for start, stop in self._ranges(num_events):
            item_S[offset_E1[start] : offset_E1[stop]] = self.of(source(start, stop))[0]
        return Shown(item_S, offset_E1)

    def with_items(self, position_M: NDArray[np.int64]) -> "Shown":
        """In another catalogue: item j is now position[j]; −1: it is left out."""
        kept_M = position_M >= 0
        offset_E1 = new_column(len(self.offset_E1), np.int64)
        item_S = new_column(len(self.item_S), np.int32)
        offset_E1[0] = 0
        for start, stop in self._ranges(len(self.offset_E1) - 1):
            event_N = np.arange(start, stop)
            item_R, place_R = self.of(event_N)
            kept_R = kept_M[item_R]
            kept_N = np.bincount(place_R[kept_R], minlength=len(event_N))
            offset_E1[start + 1 : stop + 1] = offset_E1[start] + np.cumsum(kept_N)
            item_S[offset_E1[start] : offset_E1[stop]] = position_M[item_R[kept_R]]
        return Shown(item_S[: offset_E1[-1]], offset_E1)

    def _ranges(self, num_events: int) -> Iterator[tuple[int, int]]:
        """As many events at a time as have about READ_EVENTS items."""
        own = len(self.offset_E1) - 1
        step = max(1, READ_EVENTS * own // max(own, len(self.item_S), 1))
        for start in range(0, num_events, step):
            yield start, min(start + step, num_events)


def _ranks(length_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … of every list."""
    end_E = np.cumsum(length_E)
    return np.arange(end_E[-1] if len(end_E) else 0) - np.repeat(end_E - length_E, length_E)


def _portions(
    offset_E1: NDArray[np.int64], offset_U1: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """Ranges of users with about READ_EVENTS events and items shown."""
    total_U1 = offset_E1[offset_U1] + offset_U1
    user = 0
    while user < len(offset_U1) - 1:
        until = int(np.searchsorted(total_U1, total_U1[user] + READ_EVENTS, side="right")) - 1
        until = max(until, user + 1)
        yield user, until
        user = until
