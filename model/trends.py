"""Item trends log q(t) (§3.2, eq. 5): how popular each item was just before a moment.

Leak-free by construction: time is cut into periods of `period_seconds`; the q in force during a
period counts only events strictly before the period's start, at most `window_seconds` back.

Shapes: M items, P periods.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.settings import SettingsBase

HOUR, DAY = 3600, 86_400


class TrendSettings(SettingsBase):
    """Settings of the trend decomposition; None means: derived from the data."""

    period_seconds: int | None = None  # how often q is refreshed
    window_seconds: int | None = None  # how far back it counts; 0 = everything before
    smoothing: float = 1.0  # pseudo-count added to every item


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
