"""Protocols: what a model is trained on, and which events it is asked to predict.

Shapes: E events, N cases (events that are read out), U users, M items, J held-out items,
R relevant (case, item) pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError
from model.sequences import Histories
from model.settings import SettingsBase


@dataclass(frozen=True)
class Cases:
    """Histories, and the events of theirs that are to be predicted.

    `event_N` int64, ascending positions in the histories. Event k of a user is predicted from the
    user's events before k, so events that are not read out are only ever input.
    """

    histories: Histories
    event_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.event_N)

    @property
    def user_N(self) -> NDArray[np.int64]:
        """The user (position in the histories) of every case."""
        return self.histories.user_E[self.event_N]

    def with_items(self, position_M: NDArray[np.int64]) -> "Cases":
        """The cases in another catalogue: item j is now position[j]; −1: its events go."""
        log = self.histories
        kept_E = position_M[log.item_E] >= 0
        event_N = self.event_N[kept_E[self.event_N]]
        return Cases(log.with_items(position_M), (np.cumsum(kept_E) - 1)[event_N])

    def trimmed(self) -> "Cases":
        """The same cases without what no case needs: users and events after the last one."""
        log = self.histories
        last_U = np.full(len(log), -1, dtype=np.int64)
        np.maximum.at(last_U, self.user_N, self.event_N)
        needed_E = np.arange(log.num_events) <= last_U[log.user_E]
        if needed_E.all() and (last_U >= 0).all():
            return self
        kept = log.where(needed_E).subset(np.flatnonzero(last_U >= 0))
        return Cases(kept, (np.cumsum(needed_E) - 1)[self.event_N])


def last_events(histories: Histories) -> NDArray[np.int64]:
    """The last event of every user who has one (the paper's read-out)."""
    return histories.offset_U1[1:][np.diff(histories.offset_U1) > 0] - 1


def later_events(histories: Histories) -> NDArray[np.int64]:
    """Every event but each user's first."""
    later_E = np.ones(histories.num_events, dtype=bool)
    later_E[histories.offset_U1[:-1][np.diff(histories.offset_U1) > 0]] = False
    return np.flatnonzero(later_E)


class SplitSettings(SettingsBase):
    """User split (§4.1): whole users are held out; every event of theirs is predicted.

    `assign`: `permutation` is the published protocol's and gives exact shares; when users join,
    others change sides. With `hash` a user's side depends on the id and the seed alone, so that a
    log that grows never trains a later model on the test users of an earlier one.

    Few events of a user tell little about a model, but in a shop those users may be all but a few,
    and most of what is bought. So `hash` trains on those of the training side who have a next event
    at all (what is chosen but once, by users who never come back, is not what others choose next);
    `permutation`, as published, leaves them out.
    """

    assign: Literal["permutation", "hash"] = "permutation"
    test_share: float = 0.2
    valid_share: float = 0.08
    min_events: int = 5  # users with fewer events are neither validated nor tested on
    seed: int = 0


@dataclass(frozen=True)
class UserSplit:
    """Histories of training, validation and test users."""

    train: Histories
    valid: Histories
    test: Histories


def split_users(
    histories: Histories, settings: SplitSettings, *, as_text: bool = False
) -> UserSplit:
    """Random user split, the same for everyone who asks with the same seed.

    Args:
        as_text: numeric user ids are sorted as text (1, 10, 2), as some published splits do.
    """
    if settings.assign == "hash":
        fewest = min(2, settings.min_events)
        return _split_by_hash(
            histories.subset(_natural_order(histories, fewest, as_text)), settings
        )
    kept = histories.subset(_natural_order(histories, settings.min_events, as_text))
    # The legacy generator is the published protocol's, so that results can be compared.
    order = np.random.RandomState(settings.seed).permutation(len(kept))
    num_test = max(1, round(settings.test_share * len(kept)))
    num_valid = max(1, round(settings.valid_share * len(kept)))
    test, valid, train = np.split(order, [num_test, num_test + num_valid])
    return UserSplit(*(kept.subset(np.sort(part)) for part in (train, valid, test)))


def _split_by_hash(histories: Histories, settings: SplitSettings) -> UserSplit:
    place_U = _hashed(histories.user_ids, settings.seed)
    long_U = np.diff(histories.offset_U1) >= settings.min_events
    # Without any long user on a side (there are few), the ones nearest to it go there; the others'
    # sides stay.
    held_out = settings.test_share + settings.valid_share
    last_test = max(settings.test_share, place_U[long_U].min(initial=1.0))
    rest_R = place_U[long_U & (place_U > last_test)]
    last_valid = max(held_out, rest_R.min(initial=1.0))
    train_U = place_U > np.where(long_U, last_valid, held_out)
    test_U = long_U & (place_U <= last_test)
    parts = (train_U, long_U & ~train_U & ~test_U, test_U)
    return UserSplit(*(histories.subset(np.flatnonzero(part_U)) for part_U in parts))


def _hashed(user_ids: Sequence[str], seed: int) -> NDArray[np.float64]:
    """A place in (0, 1] for every user, uniform over users, from id and seed alone: `[U]`."""
    digests = (hashlib.blake2b(f"{seed}/{u}".encode(), digest_size=8).digest() for u in user_ids)
    number_U = np.fromiter((int.from_bytes(d, "big") for d in digests), np.float64, len(user_ids))
    return (number_U + 1.0) / 2.0**64


def _natural_order(histories: Histories, min_events: int, as_text: bool) -> NDArray[np.int64]:
    """Users with enough events; ids that are all numbers sort as numbers (1, 2, 10)."""
    users = np.flatnonzero(np.diff(histories.offset_U1) >= min_events)
    ids = [histories.user_ids[u] for u in users]
    if not as_text and all(i.isascii() and i.isdigit() for i in ids):
        return users[np.argsort([int(i) for i in ids], kind="stable")]
    return users[np.argsort(np.array(ids), kind="stable")]


@dataclass(frozen=True)
class LeaveOneOut:
    """Every user's last event is the test, the one before it the validation."""

    train: Histories
    valid: Cases
    test: Cases


def leave_one_out(histories: Histories, min_events: int = 3) -> LeaveOneOut:
    """Split off the last two events of every user.

    Users with fewer than `min_events` events (at least 3) are trained on whole and not read out.
    The validation histories end with the event they predict: no test event is in them.

    Raises:
        InputError: no user has enough events.
    """
    length_U = np.diff(histories.offset_U1)
    read_U = length_U >= max(min_events, 3)
    if not read_U.any():
        raise InputError(f"leave-one-out: no user has {max(min_events, 3)} events or more")
    from_end_E = histories.offset_U1[1:][histories.user_E] - 1 - np.arange(histories.num_events)
    read_E = read_U[histories.user_E]
    train = histories.where(~read_E | (from_end_E >= 2))
    readers = np.flatnonzero(read_U)
    until_valid = histories.where(~read_E | (from_end_E >= 1)).subset(readers)
    until_test = histories.subset(readers)
    return LeaveOneOut(
        train=train.subset(np.flatnonzero(np.diff(train.offset_U1) > 0)),
        valid=Cases(until_valid, last_events(until_valid)),
        test=Cases(until_test, last_events(until_test)),
    )


@dataclass(frozen=True)
class Frame:
    """The cases of one stretch of time: start ≤ timestamp < end (Unix seconds)."""

    start: int
    end: int
    cases: Cases


@dataclass(frozen=True)
class TemporalSplit:
    """Training events are strictly before `cut` (Unix seconds), test events at or after it.

    `frames` cut the test cases into consecutive stretches (Figure 5); their histories are those of
    `test`, so a model can be evaluated once and summarised frame by frame. To retrain before a
    frame, train on `events_before(histories, frame.start)`.
    """

    cut: int
    train: Histories
    test: Cases
    frames: tuple[Frame, ...]


def split_time(
    histories: Histories, train_share: float = 0.7, frame_seconds: int | None = None
) -> TemporalSplit:
    """The first `train_share` of all events, by time, is trained on; the rest is predicted.

    Simultaneous events are never torn apart: all events of the second in which the share is
    reached belong to the test. Test users come with all of their earlier events.

    Args:
        frame_seconds: length of a rolling frame; None: one frame. Frames without events are
            left out.

    Raises:
        InputError: one side would be empty.
    """
    time_E = histories.timestamp_E
    if not 0.0 < train_share < 1.0 or len(time_E) < 2:
        raise InputError(
            f"a temporal split needs two events and a share between 0 and 1 (got {train_share})"
        )
    if frame_seconds is not None and frame_seconds <= 0:
        raise InputError(f"a frame lasts at least one second (got {frame_seconds})")
    rank = min(int(train_share * len(time_E)), len(time_E) - 1)
    cut = int(np.partition(time_E, rank)[rank])
    if cut == time_E.min():
        raise InputError("a temporal split is impossible: no event is before the cut")
    tested_U = np.zeros(len(histories), dtype=bool)
    tested_U[histories.user_E[time_E >= cut]] = True
    log = histories.subset(np.flatnonzero(tested_U))
    test_N = np.flatnonzero(log.timestamp_E >= cut)
    last = int(time_E.max())
    length = last + 1 - cut if frame_seconds is None else frame_seconds
    frame_N = (log.timestamp_E[test_N] - cut) // length
    frames = tuple(
        Frame(
            start=cut + int(f) * length,
            end=cut + (int(f) + 1) * length,
            cases=Cases(log, test_N[frame_N == f]),
        )
        for f in np.unique(frame_N)
    )
    return TemporalSplit(cut, events_before(histories, cut), Cases(log, test_N), frames)


def events_before(histories: Histories, time: int) -> Histories:
    """The events strictly before a moment (Unix seconds); users without any are left out."""
    kept = histories.where(histories.timestamp_E < time)
    return kept.subset(np.flatnonzero(np.diff(kept.offset_U1) > 0))


@dataclass(frozen=True)
class ColdItemSplit:
    """Half of the catalogue was never trained on; test users chose some of it (Table 7).

    `train` and `valid` hold no event of a held-out item. `cases` has one case per test user: what
    is read out is the position after all of the user's events with kept items. An event has to
    stand there; its item is the first held-out one the user chose and its time the time of that
    event or of the last kept one, whichever is later.

    `item_J` int64: catalogue positions of the held-out items, ascending. The user of case n chose
    those at the places relevant[offset[n]] … relevant[offset[n + 1] − 1] of `item_J`, each once.
    """

    train: Histories
    valid: Histories
    cases: Cases
    item_J: NDArray[np.int64]
    relevant_R: NDArray[np.int64]
    offset_N1: NDArray[np.int64]

    def relevant(self, case_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which held-out items the users of these cases chose: bool `[N, J]`."""
        relevant_NJ = np.zeros((len(case_N), len(self.item_J)), dtype=bool)
        for row_J, case in zip(relevant_NJ, case_N, strict=True):
            row_J[self.relevant_R[self.offset_N1[case] : self.offset_N1[case + 1]]] = True
        return relevant_NJ


def split_cold_items(
    split: UserSplit, num_items: int, share: float = 0.5, seed: int = 0
) -> ColdItemSplit:
    """Hold out a random share of the items from a user split.

    Test users who chose no held-out item are left out; those who chose nothing else are asked
    about with an empty history.

    Raises:
        InputError: nothing would be held out, or nothing would be left.
    """
    count = round(share * num_items)
    if not 0 < count < num_items:
        raise InputError(f"cannot hold out {count} of {num_items} items")
    item_J = np.sort(np.random.RandomState(seed).permutation(num_items)[:count])
    held_M = np.zeros(num_items, dtype=bool)
    held_M[item_J] = True
    place_M = np.cumsum(held_M) - 1

    log, held_E = split.test, held_M[split.test.item_E]
    first_U = np.full(len(log), log.num_events, dtype=np.int64)  # first event of a held-out item
    np.minimum.at(first_U, log.user_E[held_E], np.flatnonzero(held_E))
    asked = np.flatnonzero(first_U < log.num_events)
    # Every (user, held-out item) once, by user: rows of users without any do not occur.
    pair_R = np.unique(log.user_E[held_E] * count + place_M[log.item_E[held_E]])
    offset_N1 = np.r_[np.searchsorted(pair_R, asked * count), len(pair_R)].astype(np.int64)

    # The user's kept events in their order, then the first held-out one.
    is_first_E = np.zeros(log.num_events, dtype=bool)
    is_first_E[first_U[asked]] = True
    order = np.lexsort((np.arange(log.num_events), held_E, log.user_E))
    moved = log.reordered(order).where((~held_E | is_first_E)[order]).subset(asked)
    event_N = last_events(moved)
    time_E = moved.timestamp_E.copy()
    follows_N = np.diff(moved.offset_U1) > 1
    read_N = event_N[follows_N]
    time_E[read_N] = np.maximum(time_E[read_N], time_E[read_N - 1])
    return ColdItemSplit(
        train=_without(split.train, held_M),
        valid=_without(split.valid, held_M),
        cases=Cases(replace(moved, timestamp_E=time_E), event_N),
        item_J=item_J,
        relevant_R=pair_R % count,
        offset_N1=offset_N1,
    )


def _without(histories: Histories, held_M: NDArray[np.bool_]) -> Histories:
    kept = histories.where(~held_M[histories.item_E])
    return kept.subset(np.flatnonzero(np.diff(kept.offset_U1) > 0))
