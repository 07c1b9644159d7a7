"""User histories and their cutting into truncated-BPTT batches (§2.1).

Shapes: E events, U users, N positions of one batch. A position k of a user stands *before* event
k: its input is event k − 1 (none for k = 0) and the time of event k; its target is event k.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.catalogue import Catalogue
from model.columns import READ_EVENTS, new_column
from model.shown import Shown


@dataclass(frozen=True)
class Histories:
    """Events of U users, concatenated user after user, each user's in time order.

    `item_E` int64 catalogue positions, `timestamp_E` int64 Unix seconds,
    `offset_U1` int64 `[U + 1]`: user u owns events offset[u] … offset[u + 1] − 1.
    `user_fields`: U values by field name, None where missing.
    `event_type_E`: E strings or None; `value_E` float64, NaN where missing; None: no such column.
    `context_fields`: E values of the request in which the event happened, by field name.
    `shown`: what else was on the list from which the event's item was chosen; None: not read.
    """

    user_ids: tuple[str, ...]
    item_E: NDArray[np.int64]
    timestamp_E: NDArray[np.int64]
    offset_U1: NDArray[np.int64]
    user_fields: dict[str, list[Any]] = field(default_factory=dict)
    event_type_E: NDArray[np.object_] | None = None
    value_E: NDArray[np.float64] | None = None
    context_fields: dict[str, NDArray[np.object_]] = field(default_factory=dict)
    shown: Shown | None = None

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def num_events(self) -> int:
        return len(self.item_E)

    @cached_property
    def user_E(self) -> NDArray[np.int64]:
        """The user (position in `user_ids`) of every event."""
        user_E = new_column(self.num_events, np.int64)
        for start in range(0, self.num_events, READ_EVENTS):
            part = user_E[start : start + READ_EVENTS]
            part[:] = self.user_of(np.arange(start, start + len(part)))
        return user_E

    def user_of(self, event_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The user (position in `user_ids`) of each of some events."""
        return np.searchsorted(self.offset_U1, event_N, side="right") - 1

    @classmethod
    def from_table(
        cls,
        path: Path,
        catalogue: Catalogue,
        min_events: int = 1,
        context: Sequence[str] = (),
        shown: int = 0,
    ) -> Self:
        """Read `clean/interactions.parquet` (sorted by user, time), users in order of id.

        Args:
            min_events: users with fewer events are left out.
            context: names of the request-context columns to read.
            shown: how many of the items that were shown with an event's are read at most.
        """
        present = set(pq.read_schema(path).names)
        optional = {n for n in ("event_type", "event_value") if n in present}
        names = ["user_id", "item_id", "timestamp", *sorted(optional), *context]
        with pq.ParquetFile(path) as file:
            num_events = file.metadata.num_rows
            item_E = new_column(num_events, np.int64)
            timestamp_E = new_column(num_events, np.int64)
            value_E = new_column(num_events, np.float64) if "event_value" in optional else None
            objects = {
                name: np.empty(num_events, dtype=object)
                for name in [*context, *(optional - {"event_value"})]
            }
            user_ids: list[str] = []
            starts: list[NDArray[np.int64]] = []
            end = 0
            for rows in file.iter_batches(READ_EVENTS, columns=names):
                part = slice(end, end + len(rows))
                user_code_E, user_names = _codes(rows.column("user_id"))
                item_code_E, item_names = _codes(rows.column("item_id"))
                item_E[part] = catalogue.encode(item_names)[item_code_E]
                timestamp_E[part] = rows.column("timestamp").to_numpy()
                if value_E is not None:
                    value_E[part] = rows.column("event_value").to_numpy(zero_copy_only=False)
                for name, column in objects.items():
                    column[part] = rows.column(name).to_pylist()
                new_E = np.diff(user_code_E, prepend=-1) != 0
                if user_ids and len(new_E):
                    new_E[0] = user_names[user_code_E[0]] != user_ids[-1]
                user_ids += [user_names[code] for code in user_code_E[new_E]]
                starts.append(np.flatnonzero(new_E) + end)
                end = part.stop
        offset_U1 = np.concatenate([*starts, [num_events]]).astype(np.int64)
        histories = cls(
            user_ids=tuple(user_ids),
            item_E=item_E,
            timestamp_E=timestamp_E,
            offset_U1=offset_U1,
            event_type_E=objects.pop("event_type", None),
            value_E=value_E,
            context_fields=objects,
            shown=Shown.from_table(path, catalogue, item_E, offset_U1, shown) if shown else None,
        )
        kept_U = np.flatnonzero(np.diff(histories.offset_U1) >= min_events)
        return histories if len(kept_U) == len(histories) else histories.subset(kept_U)

    def item_counts(self, num_items: int, since: int = 0) -> NDArray[np.int64]:
        """Events of each item `[M]`, those at or after a time (Unix seconds)."""
        count_M = np.zeros(num_items, dtype=np.int64)
        for start in range(0, self.num_events, READ_EVENTS):
            part = slice(start, start + READ_EVENTS)
            item_E = self.item_E[part]
            if since:
                item_E = item_E[self.timestamp_E[part] >= since]
            count_M += np.bincount(item_E, minlength=num_items)
        return count_M

    def subset(self, users: NDArray[np.int64]) -> Self:
        """The histories of the users at these positions, in the given order."""
        length = np.diff(self.offset_U1)[users]
        offset = np.r_[0, np.cumsum(length)].astype(np.int64)
        shift = self.offset_U1[users] - offset[:-1]

        def source(start: int, stop: int) -> NDArray[np.int64]:
            at = np.arange(start, stop)
            return at + shift[np.searchsorted(offset, at, side="right") - 1]

        return self._events(source, offset, users)

    def where(self, keep_E: NDArray[np.bool_]) -> Self:
        """Only the events marked true; users who lose all of theirs stay, empty."""
        kept_U = np.zeros(len(self), dtype=np.int64)
        np.add.at(kept_U, self.user_E[keep_E], 1)
        offset = np.r_[0, np.cumsum(kept_U)].astype(np.int64)
        kept = np.flatnonzero(keep_E)
        return self._events(lambda start, stop: kept[start:stop], offset, np.arange(len(self)))

    def with_items(self, position_M: NDArray[np.int64]) -> Self:
        """The same events in another catalogue: item j is now position[j]; −1: its events go."""
        item_E = position_M[self.item_E]
        shown = None if self.shown is None else self.shown.with_items(position_M)
        return replace(self, item_E=item_E, shown=shown).where(item_E >= 0)

    def reordered(self, source_E: NDArray[np.int64]) -> Self:
        """The same histories with event k replaced by event source[k] of the same user."""

        def source(start: int, stop: int) -> NDArray[np.int64]:
            return source_E[start:stop]

        return self._events(source, self.offset_U1, np.arange(len(self)))

    def _events(
        self,
        source: Callable[[int, int], NDArray[np.int64]],
        offset: NDArray[np.int64],
        users: NDArray[np.int64],
    ) -> Self:
        """New event k is the old one that `source` names: places of a range of new ones."""
        num_events = int(offset[-1])

        def copied(column: NDArray[Any]) -> NDArray[Any]:
            new = new_column(num_events, column.dtype)
            for start in range(0, num_events, READ_EVENTS):
                stop = min(start + READ_EVENTS, num_events)
                new[start:stop] = column[source(start, stop)]
            return new

        return type(self)(
            user_ids=tuple(self.user_ids[u] for u in users),
            item_E=copied(self.item_E),
            timestamp_E=copied(self.timestamp_E),
            offset_U1=offset,
            user_fields={n: [v[u] for u in users] for n, v in self.user_fields.items()},
            event_type_E=None if self.event_type_E is None else copied(self.event_type_E),
            value_E=None if self.value_E is None else copied(self.value_E),
            context_fields={n: copied(v) for n, v in self.context_fields.items()},
            shown=None if self.shown is None else self.shown.taken(source, num_events),
        )

    def with_user_fields(self, user_fields: dict[str, list[Any]]) -> Self:
        """The same events with fields of their users."""
        return replace(self, user_fields=user_fields)


def _codes(column: pa.Array) -> tuple[NDArray[np.int64], list[str]]:
    """Dictionary codes of a string column, and the strings."""
    encoded = column.dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), (
        encoded.dictionary.to_pylist()
    )


@dataclass(frozen=True)
class Batch:
    """Segments of up to `bptt` positions of different users, packed without padding.

    Positions are stored time-major like a `torch.nn.utils.rnn.PackedSequence`: first the first
    position of every segment (longest segment first), then the second positions, …

    `event_N` int64: the target event of each position. `batch_size_T` int64: how many segments
    reach step t. `previous_S` int64: the segment of the batch before that this one continues, or
    −1 where a history begins.
    """

    event_N: NDArray[np.int64]
    batch_size_T: NDArray[np.int64]
    previous_S: NDArray[np.int64]
    last_S: NDArray[np.int64]  # position in N of each segment's last step


def pack(start_S: NDArray[np.int64], length_S: NDArray[np.int64]) -> Batch:
    """Pack segments given by their first event and length; lengths must be descending."""
    steps = int(length_S[0]) if len(length_S) else 0
    batch_size_T = (length_S[None, :] > np.arange(steps)[:, None]).sum(axis=1)
    first_T = np.r_[0, np.cumsum(batch_size_T)]
    step_N = np.repeat(np.arange(steps), batch_size_T)
    segment_N = np.arange(first_T[-1]) - first_T[step_N]
    return Batch(
        event_N=start_S[segment_N] + step_N,
        batch_size_T=batch_size_T.astype(np.int64),
        previous_S=np.full(len(start_S), -1, dtype=np.int64),
        last_S=first_T[length_S - 1] + np.arange(len(start_S)),
    )


def bptt_batches(
    histories: Histories,
    *,
    bptt: int,
    batch_events: int,
    rng: np.random.Generator | None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Cut histories into batches of `batch_events` positions; every position exactly once.

    All are full until the users run out: equal shapes let a library keep what it made for them.

    A user's next segment always comes in the next batch, so the state of the batch before is all
    that has to be carried. Short histories are gathered until the batch is full.

    Args:
        rng: shuffles the users; None keeps their order (evaluation).
        share: (rank, W): of every batch, only what falls to one of W processes. Users are dealt
            out in turn and stay where they are; a process may get nothing of a batch.
    """
    rank, processes = share
    users = np.arange(len(histories)) if rng is None else rng.permutation(len(histories))
    length_U = np.diff(histories.offset_U1)[users]
    users = users[length_U > 0]
    begin_U, end_U = histories.offset_U1[users], histories.offset_U1[users + 1]
    # New users join until the batch is full: up to which one is a search in cumulative lengths.
    total_U = np.cumsum(np.minimum(end_U - begin_U, bptt))
    joined = 0
    start_S = end_S = owner_S = place_S = np.empty(0, dtype=np.int64)
    while True:
        over = 0
        room = batch_events - int(np.minimum(end_S - start_S, bptt).sum())
        if room > 0 and joined < len(users):
            before = int(total_U[joined - 1]) if joined else 0
            until = int(np.searchsorted(total_U, before + room)) + 1
            new = np.arange(joined, min(until, len(users)))
            over = max(0, int(total_U[new[-1]]) - before - room)
            start_S = np.concatenate([start_S, begin_U[new]])
            end_S = np.concatenate([end_S, end_U[new]])
            owner_S = np.concatenate([owner_S, new % processes])
            place_S = np.concatenate([place_S, np.full(len(new), -1)])
            joined = int(new[-1]) + 1
        if not len(start_S):
            return
        length_S = np.minimum(end_S - start_S, bptt)
        length_S[-1] -= over  # of the last one, what fits
        order = np.argsort(-length_S, kind="stable")
        start_S, end_S, owner_S, place_S = (
            column[order] for column in (start_S, end_S, owner_S, place_S)
        )
        length_S = length_S[order]
        own_S = owner_S == rank
        batch = pack(start_S[own_S], length_S[own_S])
        yield Batch(batch.event_N, batch.batch_size_T, place_S[own_S], batch.last_S)
        # Segments are numbered among those of their own process.
        place_S = np.empty_like(owner_S)
        for process in range(processes):
            mine_S = owner_S == process
            place_S[mine_S] = np.arange(mine_S.sum())
        start_S = start_S + length_S
        open_S = start_S < end_S
        start_S, end_S, owner_S, place_S = (
            column[open_S] for column in (start_S, end_S, owner_S, place_S)
        )
