"""How much of the catalogue is served, and how popular it is, without keeping ids.

A recommender that shows the same few items to everybody looks healthy by all other metrics.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence

from serving import metrics
from serving.ranking import Trend

CELLS = 2**20  # bytes; enough for some millions of items
WINDOW_SECONDS = 600.0


class DistinctCounter:
    """Estimates how many distinct items there were, by linear counting (Whang et al., 1990).

    Each item marks the cell that its hash names; with z of m cells left unmarked, −m·ln(z / m)
    items were seen. The error is below 1% while items are not many more than cells.
    """

    def __init__(self, cells: int = CELLS) -> None:
        """
        Args:
            cells: a power of two.
        """
        self._marks = bytearray(cells)

    def add(self, items: Iterable[str]) -> None:
        marks, mask = self._marks, len(self._marks) - 1
        for item in items:
            marks[hash(item) & mask] = 1

    def estimate(self) -> float:
        left = self._marks.count(0)
        return -len(self._marks) * math.log(max(left, 1) / len(self._marks))


class Coverage:
    """Of answers to `recommend`; the share is that of the last full window."""

    def __init__(
        self, seconds: float = WINDOW_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._counter = DistinctCounter()
        self._until = clock() + seconds

    def served(self, item_ids: Sequence[str], trend: Trend) -> None:
        """Count one answer."""
        if not item_ids or not trend.num_items:
            return
        place, last = trend.place, len(trend.items)
        ranks = sum(place.get(item, last) for item in item_ids) / len(item_ids)
        metrics.SERVED_RANK.observe(ranks / trend.num_items)
        if self._clock() >= self._until:
            metrics.SERVED_COVERAGE.set(self._counter.estimate() / trend.num_items)
            self._counter = DistinctCounter()
            self._until = self._clock() + self._seconds
        self._counter.add(item_ids)
