"""Item trends log q(t) (§3.2, eq. 5): how popular each item was just before a moment.

Leak-free by construction: time is cut into periods of `period_seconds`; the q in force during a
period counts only events strictly before the period's start, at most `window_seconds` back.

Shapes: M items, P periods.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from model.settings import SettingsBase

HOUR, DAY = 3600, 86_400


class TrendSettings(SettingsBase):
    """Settings of the trend decomposition; None means: derived from the data."""

    period_seconds: int | None = None  # how often q is refreshed
    window_seconds: int | None = None  # how far back it counts; 0 = everything before
    # pseudo-count added to every item
    smoothing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class TrendSnapshot:
    """q at one moment: log q of the counted items, and one floor for all others.

    `item_ids` are sorted by log_q descending (ties by item id), `log_q` is float64 and
    normalised over a catalogue of `num_items`: Σ exp(log_q) + (M − T)·exp(floor) = 1.
    `as_of` (Unix seconds): only events strictly before it were counted.
    """

    item_ids: tuple[str, ...]
    log_q: NDArray[np.float64]
    floor: float
    as_of: int
    window_seconds: int
    num_items: int

    @property
    def version(self) -> str:
        """Content digest, stable across processes."""
        payload = json.dumps([self.item_ids, self.log_q.tolist(), self.floor, self.as_of])
        return f"{self.as_of}-{hashlib.sha256(payload.encode()).hexdigest()[:8]}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; floats round-trip exactly."""
        return {
            "item_ids": list(self.item_ids),
            "log_q": self.log_q.tolist(),
            "floor": self.floor,
            "as_of": self.as_of,
            "window_seconds": self.window_seconds,
            "num_items": self.num_items,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: that did not write them.
        """
        item_ids = tuple(values["item_ids"])
        log_q_T = np.asarray(values["log_q"], dtype=np.float64)
        floor = float(values["floor"])
        if log_q_T.shape != (len(item_ids),):
            raise ValueError(f"trend: log_q of shape {log_q_T.shape} for {len(item_ids)} items")
        if not np.isfinite(log_q_T).all():
            raise ValueError("trend: log_q is not finite")
        if not math.isfinite(floor):
            raise ValueError("trend: floor is not finite")
        return cls(
            item_ids=item_ids,
            log_q=log_q_T,
            floor=floor,
            as_of=int(values["as_of"]),
            window_seconds=int(values["window_seconds"]),
            num_items=int(values["num_items"]),
        )

    def dense(self, item_ids: Sequence[str]) -> NDArray[np.float64]:
        """log q in the order of `item_ids` `[M]`; items not listed get the floor."""
        listed = dict(zip(self.item_ids, self.log_q.tolist(), strict=True))
        return np.asarray([listed.get(item, self.floor) for item in item_ids])


def snapshot_from_counts(
    item_ids: Sequence[str],
    counts: Sequence[int] | NDArray[np.int64],
    *,
    num_items: int,
    smoothing: float,
    as_of: int,
    window_seconds: int,
) -> TrendSnapshot:
    """q_j = (count_j + α) / (Σ count + α·M) for counted items; uncounted ones get the floor.

    Args:
        item_ids: the T items with counts, T ≤ M.
        counts: their event counts inside the window.
        num_items: M, the catalogue size the distribution is normalised over.
        smoothing: α > 0, so that no item's log q is −∞.
    """
    count_T = np.asarray(counts, dtype=np.float64)
    total = count_T.sum() + smoothing * num_items
    log_q_T = np.log((count_T + smoothing) / total)
    order = np.lexsort((np.asarray(item_ids, dtype=object).astype(str), -log_q_T))
    return TrendSnapshot(
        item_ids=tuple(item_ids[i] for i in order),
        log_q=log_q_T[order],
        floor=float(np.log(smoothing / total)),
        as_of=int(as_of),
        window_seconds=int(window_seconds),
        num_items=num_items,
    )


@dataclass(frozen=True)
class ResolvedTrend:
    """Trend settings with nothing left to derive; window_seconds 0 = everything before."""

    period_seconds: int
    window_seconds: int
    smoothing: float

    def settings(self) -> TrendSettings:
        return TrendSettings(
            period_seconds=self.period_seconds,
            window_seconds=self.window_seconds,
            smoothing=self.smoothing,
        )


def _window_counts(
    item_E: NDArray[np.int64],
    timestamp_E: NDArray[np.int64],
    num_items: int,
    period_seconds: int,
    window_seconds: int,
) -> Iterator[tuple[int, slice, NDArray[np.int64]]]:
    """Yield (period, slice of the period's events, counts_M in force), events sorted by time.

    Counts are advanced by the events that enter and leave the window, so a pass costs O(E).
    """
    period_E = timestamp_E // period_seconds
    count_M = np.zeros(num_items, dtype=np.int64)
    entered = left = 0
    starts = np.flatnonzero(np.r_[True, np.diff(period_E) > 0])[: len(period_E)]
    ends = np.r_[starts[1:], len(period_E)]
    for start, end in zip(starts, ends, strict=True):
        period = int(period_E[start])
        now = period * period_seconds
        np.add.at(count_M, item_E[entered:start], 1)
        entered = start
        if window_seconds:
            oldest = int(np.searchsorted(timestamp_E, now - window_seconds, side="left"))
            oldest = min(oldest, start)
            np.subtract.at(count_M, item_E[left:oldest], 1)
            left = oldest
        yield period, slice(int(start), int(end)), count_M


SMOOTHINGS = (1.0, 0.3, 0.1, 0.03, 0.01)  # a short window of a large catalogue bears little
TIE = 1e-6  # nats per event that rounding may make between two equal candidates
MAX_TABLE_CELLS = 2**27  # float32 cells of a TrendTable that is kept whole: 512 MiB
MAX_CHOICE_EVENTS = 5_000_000  # that `choose_trend` is given, about; some 500 MB while it chooses
MIN_CHOICE_ITEMS = 1000  # fewer say little about a catalogue


def items_for_choice(item_ids: Sequence[str], num_events: int) -> NDArray[np.bool_]:
    """Which items' events `choose_trend` has to see `[M]`: all, or of a long log a sample.

    Items and not events, so that counts stay what they are; by a digest of the id, so that
    whoever has the same log chooses the same. At least `MIN_CHOICE_ITEMS`, however long the log.
    """
    share = MAX_CHOICE_EVENTS / max(num_events, 1)
    chosen = max(MIN_CHOICE_ITEMS, round(share * len(item_ids)))
    if chosen >= len(item_ids):
        return np.ones(len(item_ids), dtype=bool)
    digest_M = np.fromiter((zlib.crc32(i.encode()) for i in item_ids), np.uint32, len(item_ids))
    return digest_M <= np.partition(digest_M, chosen - 1)[chosen - 1]


def choose_trend(
    item_E: NDArray[np.int64],
    timestamp_E: NDArray[np.int64],
    num_items: int,
    settings: TrendSettings,
    *,
    table_items: int | None = None,
) -> ResolvedTrend:
    """Fill in period, window and smoothing by the log's likelihood under its own past popularity.

    Every candidate is scored by Σ log q_{t}(a_t) over all events, q counting
    only events before the event's period: the choice needs no model and leaks nothing. A fast
    catalogue (news) gets hours, a film catalogue the whole past.

    Args:
        num_items: M of the items whose events are given (`items_for_choice`).
        table_items: M of the whole catalogue, whose `TrendTable` has to fit; None: `num_items`.
    """
    order = np.argsort(timestamp_E, kind="stable")
    item_E, timestamp_E = item_E[order], timestamp_E[order]
    span = int(timestamp_E[-1] - timestamp_E[0]) + 1 if len(timestamp_E) else 1
    periods = [settings.period_seconds] if settings.period_seconds else [HOUR, DAY, 7 * DAY]
    rows = table_items or num_items
    usable = [p for p in periods if (span // p + 1) * rows <= MAX_TABLE_CELLS] or periods[-1:]
    smoothings = SMOOTHINGS if settings.smoothing is None else (settings.smoothing,)
    best: tuple[float, ResolvedTrend] | None = None
    for period in usable:
        if settings.window_seconds is not None:
            windows = [settings.window_seconds]
        else:
            windows = [w for w in (period, 6 * HOUR, DAY, 7 * DAY, 30 * DAY) if period <= w < span]
            windows = [*dict.fromkeys(windows), 0]
        for window in windows:
            likelihoods = _prequential_log_likelihood(
                item_E, timestamp_E, num_items, period, window, smoothings
            )
            for smoothing, likelihood in zip(smoothings, likelihoods, strict=True):
                if best is None or likelihood > best[0] + TIE * len(item_E):
                    best = float(likelihood), ResolvedTrend(period, window, smoothing)
    assert best is not None  # noqa: S101 - both candidate lists are never empty
    return best[1]


def _prequential_log_likelihood(
    item_E: NDArray[np.int64],
    timestamp_E: NDArray[np.int64],
    num_items: int,
    period_seconds: int,
    window_seconds: int,
    smoothings: Sequence[float],
) -> NDArray[np.float64]:
    """Σ log q_t(a_t) under each smoothing."""
    alpha_A = np.asarray(smoothings)
    total_A = np.zeros(len(alpha_A))
    for _, events, count_M in _window_counts(
        item_E, timestamp_E, num_items, period_seconds, window_seconds
    ):
        in_window = events.start if not window_seconds else int(count_M.sum())
        count_N = count_M[item_E[events]]
        total_A += np.log(count_N + alpha_A[:, None]).sum(axis=1)
        total_A -= len(count_N) * np.log(in_window + alpha_A * num_items)
    return total_A
