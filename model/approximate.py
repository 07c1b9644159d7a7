"""An approximate index for catalogues too large to scan at every request: faiss's inverted lists.

Items lie in lists around centroids, one byte per number, and a query looks into the `probes` lists
that look best; what is found is scored again in float32 by the caller. How many lists it takes is
found when the index is built, by comparing with the exact search; the recall that is reported is
measured on other queries than those.

Shapes: M items, D embedding, B queries, C candidates.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.errors import InputError

log = logging.getLogger("hrnn.model")

LISTS = 4.0  # times √M: as many lists as faiss recommends
TRAINED_ON = 64  # items per list to find the centroids by
MORE = 2  # times as many candidates as asked for, as one byte per number mixes up the order
CHUNK = 131_072  # items added at a time
MEASURED_TOP = 128  # items of an answer that recall is measured over; more are not asked for
SEED = 1

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """`recall` over the best `MEASURED_TOP`; seconds per query, and those of an exact one."""

    recall: float
    probes: int
    lists: int
    seconds: float
    exact_seconds: float

    @property
    def pays(self) -> bool:
        """Faster than the exact search."""
        return self.seconds < self.exact_seconds


class ApproximateIndex:
    """Candidates for the largest w_j·x + b_j. Safe to share between threads."""

    def __init__(
        self,
        w_MD: Float32,
        b_M: Float32,
        x_BD: Float32,
        exact: Callable[[Float32, int], Int64],
        recall: float,
        like: Self | None = None,
    ) -> None:
        """
        Args:
            x_BD: queries as they will come, to measure with; half of them choose the probes.
            exact: the positions of the best items of one query.
            recall: to be reached over the best `MEASURED_TOP`.
            like: an index of nearly the same items, whose centroids are taken.

        Raises:
            InputError: faiss is not installed.
        """
        try:
            import faiss
        except ImportError:
            raise InputError(
                "retrieval_recall: an approximate index needs faiss: pip install 'hrnn-meta[ann]'"
            ) from None
        self._faiss: Any = faiss
        started = time.perf_counter()
        items = len(b_M)
        # The bias is one more number of an item, and 1 the query's.
        self._empty: Any = self._train(w_MD, b_M) if like is None else like._empty
        self._index: Any = faiss.clone_index(self._empty)
        for start in range(0, items, CHUNK):
            self._index.add(_with(w_MD[start : start + CHUNK], b_M[start : start + CHUNK]))
        self._probes = 1
        self.measured = self._measure(x_BD, exact, recall, items)
        log.info(
            "approximate index of %d items in %.1f s: recall@%d %.4f with %d of %d lists, "
            "%.2f ms a query (exact: %.2f ms)",
            items,
            time.perf_counter() - started,
            MEASURED_TOP,
            self.measured.recall,
            self.measured.probes,
            self.measured.lists,
            self.measured.seconds * 1e3,
            self.measured.exact_seconds * 1e3,
        )

    def _train(self, w_MD: Float32, b_M: Float32) -> Any:
        items, size = w_MD.shape
        lists = max(1, min(round(LISTS * math.sqrt(items)), items // 40))
        index = self._faiss.index_factory(
            size + 1, f"IVF{lists},SQ8", self._faiss.METRIC_INNER_PRODUCT
        )
        rng = np.random.default_rng(SEED)
        rows = np.sort(rng.choice(items, min(items, TRAINED_ON * lists), replace=False))
        index.train(_with(w_MD[rows], b_M[rows]))
        return index

    def _measure(
        self, x_BD: Float32, exact: Callable[[Float32, int], Int64], recall: float, items: int
    ) -> Measured:
        top = min(MEASURED_TOP, items)
        started = time.perf_counter()
        best = [exact(x_D, top) for x_D in x_BD]
        exact_seconds = (time.perf_counter() - started) / len(x_BD)
        chosen, other = slice(0, len(x_BD), 2), slice(1, len(x_BD), 2)
        lists = self._index.nlist
        while self._recall(x_BD[chosen], best[chosen], top) < recall and self._probes < lists:
            self._probes = min(2 * self._probes, lists)
        started = time.perf_counter()
        for x_D in x_BD[other]:
            self.search(x_D[None], top)
        seconds = (time.perf_counter() - started) / len(x_BD[other])
        found = self._recall(x_BD[other], best[other], top)
        return Measured(found, self._probes, lists, seconds, exact_seconds)

    def _recall(self, x_BD: Float32, best: list[Int64], top: int) -> float:
        """What is among the candidates is put in its place by the exact scores."""
        found = self.search(x_BD, top)
        hits = [len(np.intersect1d(f, b)) for f, b in zip(found, best, strict=True)]
        return sum(hits) / (top * len(best))

    def search(self, x_BD: Float32, count: int) -> list[Int64]:
        """Candidates for the best `count` of each query, in no order; they may be fewer."""
        ones = np.ones(len(x_BD), dtype=np.float32)
        parameters = self._faiss.SearchParametersIVF(nprobe=self._probes)
        _, item_BC = self._index.search(_with(x_BD, ones), MORE * count, params=parameters)
        return [item_C[item_C >= 0] for item_C in item_BC]


def _with(vector_ND: Float32, last_N: Float32) -> Float32:
    """The vectors with one more number each, C-contiguous."""
    return np.ascontiguousarray(np.column_stack([vector_ND, last_N]), dtype=np.float32)
