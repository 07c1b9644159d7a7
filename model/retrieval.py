"""Exact top-N of w_j·x + b_j over a large catalogue, at the speed of reading a quarter of it.

Reading the float32 item vectors is what a scan costs. So the scan reads an int8 copy, which gives
each item an approximate score and a bound on its error; only items that the bound cannot rule out
are scored in float32. With ŵ_j, x̂ the rounded vectors,

    |w_j·x − ŵ_j·x̂| = |(w_j − ŵ_j)·x + ŵ_j·(x − x̂)| ≤ ‖w_j − ŵ_j‖·‖x‖ + ‖ŵ_j‖·‖x − x̂‖,

and both item norms are known. If N items are surely at least t, an item that is surely below t is
not among the top N. Nothing is left to chance: the result is that of scoring every item.

The approximate scores are looked at group by group (a group's maximum is its bound), so that few
of them are touched twice. Items that a sparse bonus changes (the transition prior) are scored in
float32 at once and left out of the scan's count.

Shapes: M items, D embedding, B queries, K groups of GROUP items, C candidates, S items with bonus,
T items of a list.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import approximate
from model.approximate import ApproximateIndex

Float32 = NDArray[np.float32]
Scores = NDArray[np.float32] | NDArray[np.float64]  # float64 where an extra is added
Int64 = NDArray[np.int64]

GROUP = 16
CHUNK = 16_384  # items whose scores for a batch fit a core's cache
SMALL = 4096  # catalogues up to here are scored whole: no scan pays
SPARSE = 64  # where at most 1 in 64 items is allowed, these alone are scored
MANY_EXCLUDED = 4096  # beyond, exclusions become a mask
PART = 32  # values whose maximum is looked at for them
TOGETHER = 32  # queries of one pass over the table
BATCH_SHARE = 256  # a pass for many scores whole groups exactly: at most M / 256 of them for each
MIN_ROWS = 32  # of an int8 product
MEASURED_ROWS = 131_072  # of the table, to choose the method by time
WORTH_MEASURING = 2**21  # numbers in the table; below, either is quick

_NONE: Int64 = np.empty(0, dtype=np.int64)


class Method(StrEnum):
    """What the scan reads."""

    AUTO = "auto"  # the faster one here, by measurement
    FLOAT32 = "float32"
    INT8 = "int8"


@dataclass(frozen=True)
class Allowed:
    """Which of M items may be returned: in `include` and `mask` (None: all), not in `exclude`.

    `include` and `exclude` are positions, ascending and distinct.
    """

    num_items: int
    include: Int64 | None = None
    exclude: Int64 = field(default_factory=lambda: _NONE)
    mask: NDArray[np.bool_] | None = None

    @property
    def unrestricted(self) -> bool:
        """Every item is allowed."""
        return self.include is None and self.mask is None and not len(self.exclude)

    def passes(self, item_C: Int64) -> NDArray[np.bool_]:
        """Whether each of these items is allowed: `[C]`."""
        passes_C = np.ones(len(item_C), dtype=np.bool_)
        if self.mask is not None:
            passes_C &= self.mask[item_C]
        if self.include is not None:
            passes_C &= _is_in(item_C, self.include)
        if len(self.exclude):
            passes_C &= ~_is_in(item_C, self.exclude)
        return passes_C

    def dense(self) -> NDArray[np.bool_]:
        """One truth value per item `[M]`."""
        allowed_M = np.ones(self.num_items, np.bool_) if self.mask is None else self.mask.copy()
        if self.include is not None:
            included_M = np.zeros(self.num_items, np.bool_)
            included_M[self.include] = True
            allowed_M &= included_M
        allowed_M[self.exclude] = False
        return allowed_M


def _is_in(item_C: Int64, sorted_S: Int64) -> NDArray[np.bool_]:
    if not len(sorted_S):
        return np.zeros(len(item_C), dtype=np.bool_)
    place_C = np.searchsorted(sorted_S, item_C)
    return sorted_S[np.minimum(place_C, len(sorted_S) - 1)] == item_C


@dataclass(frozen=True)
class Ask:
    """One query: x float32 `[D]`, how many items, which ones, and what some get on top.

    `bonus_item_S` (ascending, distinct positions) get `bonus_S` added to w_j·x + b_j, and every
    item its part of `extra_M`, if given.
    """

    x_D: Float32
    top_n: int
    allowed: Allowed
    bonus_item_S: Int64
    bonus_S: Float32
    extra_M: NDArray[np.float64] | None = None


class Listed:
    """A list of items that many queries ask for (the trending ones), prepared for scoring.

    `position_T` are distinct positions of the catalogue, −1 for items that it does not hold.
    """

    def __init__(self, w_MD: Float32, b_M: Float32, position_T: Int64) -> None:
        self.position_T = position_T
        self.unknown_T = position_T < 0
        self.row_T = np.maximum(position_T, 0)
        self.w_DT = torch.from_numpy(np.ascontiguousarray(w_MD.take(self.row_T, axis=0).T))
        self.b_T = b_M.take(self.row_T)
        self.b_T[self.unknown_T] = np.nan
        self._place_S = np.flatnonzero(~self.unknown_T)
        self._place_S = self._place_S[np.argsort(position_T[self._place_S], kind="stable")]
        self._position_S = position_T[self._place_S]

    def places(self, item_C: Int64) -> tuple[Int64, NDArray[np.bool_]]:
        """Where some items stand in the list, and which of them do."""
        if not len(self._position_S):
            return item_C[:0], np.zeros(len(item_C), dtype=np.bool_)
        at_C = np.searchsorted(self._position_S, item_C)
        at_C = np.minimum(at_C, len(self._position_S) - 1)
        hit_C = self._position_S[at_C] == item_C
        return self._place_S[at_C[hit_C]], hit_C


@dataclass(frozen=True)
class Found:
    """The best allowed items, score descending, ties by position; `exhausted`: all of them."""

    item_C: Int64
    score_C: Scores
    exhausted: bool


def brute_force(w_MD: Float32, b_M: Float32, ask: Ask) -> Found:
    """What `Retrieval.top` finds, by scoring and sorting everything."""
    score_M: Scores = (w_MD @ ask.x_D + b_M).astype(np.float32)
    score_M[ask.bonus_item_S] += ask.bonus_S
    if ask.extra_M is not None:
        score_M = score_M + ask.extra_M
    item_C = np.flatnonzero(ask.allowed.dense())
    order = np.lexsort((item_C, -score_M[item_C]))[: max(ask.top_n, 0)]
    return Found(item_C[order], score_M[item_C[order]], ask.top_n >= len(item_C))


@dataclass(frozen=True)
class _Errors:
    """What bounds the errors of one query's scores."""

    norm: float  # ‖x‖
    off: float  # ‖x − x̂‖
    slack: float  # of float32 arithmetic, in the scan and in the exact scores

    def bound(self, error: Any, norm: Any) -> Any:
        """Of the error of the scores of items with ‖w_j − ŵ_j‖ and ‖ŵ_j‖: numbers or arrays."""
        return self.norm * error + self.off * norm + self.slack


@dataclass(frozen=True)
class _Queries:
    """B queries as a scan reads them."""

    x_BD: torch.Tensor
    step_B1: torch.Tensor  # int8: the size of one step of x
    errors: list[_Errors]


class _Scan(ABC):
    """Approximate scores of rows of the table, and norms that bound their errors."""

    error_M: Float32  # ‖w_j − ŵ_j‖
    norm_M: Float32  # ‖ŵ_j‖

    def __init__(self, w_MD: Float32, b_M: Float32) -> None:
        self._size = w_MD.shape[1]
        self._b_M = torch.from_numpy(b_M)
        squares_M = np.einsum("md,md->m", w_MD, w_MD)
        self._largest = math.sqrt(float(squares_M.max(initial=0.0)))
        self._largest_bias = float(np.abs(b_M).max(initial=0.0))

    def queries(self, x_BD: Float32) -> _Queries:
        """Prepare queries."""
        read_BD, step_B1, rounded_BD = self._read(x_BD)
        norm_B = np.linalg.norm(x_BD.astype(np.float64), axis=1)
        off_B = np.linalg.norm(x_BD - rounded_BD, axis=1)
        # Of a sum of D products, computed twice: D·2⁻²⁴ of the sum of their sizes each time.
        slack_B = (self._size + 8) * 2.0**-23 * (1.01 * self._largest * norm_B + self._largest_bias)
        # A little more, so that float32 keeps the sums bounds.
        columns = (norm_B * 1.00001, off_B * 1.00001, slack_B)
        errors = [_Errors(*one) for one in zip(*(c.tolist() for c in columns), strict=True)]
        return _Queries(read_BD, step_B1, errors)

    @abstractmethod
    def _read(self, x_BD: Float32) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
        """The queries as multiplied with the table, the step of each, and what they became."""

    @abstractmethod
    def scores(self, rows: slice, queries: _Queries, work: torch.Tensor, out: torch.Tensor) -> None:
        """Approximate scores of rows, float32 `[B, rows]`, into `out`.

        Args:
            work: scratch, so many int32 side by side at least.
        """


class _Float32Scan(_Scan):
    """The table itself; only rounding stands between its scores and the exact ones."""

    def __init__(self, w_MD: Float32, b_M: Float32) -> None:
        super().__init__(w_MD, b_M)
        self._w_MD = w_MD
        self.error_M = np.zeros(len(w_MD), dtype=np.float32)
        self.norm_M = self.error_M

    def _read(self, x_BD: Float32) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
        x_BD = np.ascontiguousarray(x_BD)
        return torch.from_numpy(x_BD), torch.ones(len(x_BD), 1), x_BD.astype(np.float64)

    def scores(self, rows: slice, queries: _Queries, work: torch.Tensor, out: torch.Tensor) -> None:
        x_BD = queries.x_BD.numpy()
        # For one query einsum is as fast as BLAS or faster, and waits for no other threads.
        if len(x_BD) == 1:
            np.einsum("cd,d->c", self._w_MD[rows], x_BD[0], out=out.numpy()[0])
        else:
            np.matmul(x_BD, self._w_MD[rows].T, out=out.numpy())
        out += self._b_M[rows]


class _Int8Scan(_Scan):
    """One byte per number, one scale per item; integer dot products are exact."""

    def __init__(self, w_MD: Float32, b_M: Float32) -> None:
        super().__init__(w_MD, b_M)
        items = len(w_MD)
        self._q_MD = torch.empty(w_MD.shape, dtype=torch.int8)  # begins with a cache line
        q_MD = self._q_MD.numpy()
        scale_M = np.empty(items, dtype=np.float32)
        self.error_M = np.empty(items, dtype=np.float32)
        self.norm_M = np.empty(items, dtype=np.float32)
        for start in range(0, items, CHUNK):
            rows = slice(start, start + CHUNK)
            w_CD = w_MD[rows].astype(np.float64)
            scale_C = np.maximum(np.abs(w_CD).max(axis=1) / 127.0, 1e-30).astype(np.float32)
            q_CD = np.clip(np.rint(w_CD / scale_C[:, None]), -127, 127)
            rounded_CD = q_CD * scale_C[:, None].astype(np.float64)
            q_MD[rows], scale_M[rows] = q_CD, scale_C
            # A little more than the norm, so that rounding to float32 keeps it a bound.
            self.error_M[rows] = np.linalg.norm(w_CD - rounded_CD, axis=1) * 1.00001
            self.norm_M[rows] = np.linalg.norm(rounded_CD, axis=1) * 1.00001
        self._scale_M = torch.from_numpy(scale_M)

    def _read(self, x_BD: Float32) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
        x64_BD = x_BD.astype(np.float64)
        step_B = np.maximum(np.abs(x64_BD).max(axis=1, initial=0.0) / 127.0, 1e-30)
        step_B1 = step_B.astype(np.float32)[:, None]
        q_BD = np.clip(np.rint(x64_BD / step_B1), -127, 127)
        return (
            torch.from_numpy(q_BD.astype(np.int8)),
            torch.from_numpy(step_B1),
            q_BD * step_B1.astype(np.float64),
        )

    def scores(self, rows: slice, queries: _Queries, work: torch.Tensor, out: torch.Tensor) -> None:
        q_RD, scale_R, b_R = self._q_MD[rows], self._scale_M[rows], self._b_M[rows]
        if len(queries.x_BD) == 1:
            dot_1R = work[: len(q_RD)].view(1, -1)
            torch._int_mm(q_RD, queries.x_BD.T, out=dot_1R.T)
            out.copy_(dot_1R)
            step = float(queries.step_B1[0, 0])
            torch.addcmul(b_R, out, scale_R, value=step, out=out)
        else:  # items side by side, so that what follows takes whole vectors of them
            dot_BR = work[: out.numel()].view(out.shape)
            torch._int_mm(queries.x_BD, q_RD.T, out=dot_BR)
            out.copy_(dot_BR)
            torch.addcmul(b_R, out.mul_(scale_R), queries.step_B1, out=out)


@dataclass(frozen=True)
class Measured:
    """Why a method was chosen: seconds per item scanned, for one query and for 8 together."""

    one: dict[Method, float]
    batch: dict[Method, float]


class Retrieval:
    """Item vectors ready to be searched; safe to share between threads."""

    def __init__(self, w_MD: Float32, b_M: Float32, method: Method = Method.AUTO) -> None:
        """
        Args:
            w_MD: item vectors, float32, C-contiguous; not copied.
            b_M: item biases, float32.
            method: what the scan reads, float32 where int8 products are not exact here; AUTO
                measures (a tenth of a second).
        """
        self._w_MD = np.ascontiguousarray(w_MD, dtype=np.float32)
        self._b_M = np.ascontiguousarray(b_M, dtype=np.float32)
        self.num_items = len(b_M)
        self.measured: Measured | None = None
        self.batch_from = 8  # queries from which one pass over the table for all is faster
        if method is Method.AUTO:
            method = self._choose()
        elif method is Method.INT8 and not int8_products_are_exact(self._w_MD.shape[1]):
            method = Method.FLOAT32
        self.method = method
        scan: type[_Scan] = _Int8Scan if method is Method.INT8 else _Float32Scan
        self._scan = scan(self._w_MD, self._b_M)
        # As many equal chunks as needed; a group is every (CHUNK / GROUP)-th item of a chunk, so
        # that maxima over groups are taken with whole vectors of items side by side.
        self._chunks = max(1, -(-self.num_items // CHUNK))
        self._groups = -(-self.num_items // (self._chunks * GROUP))  # per chunk
        self._chunk = self._groups * GROUP
        self._padded = self._chunks * self._chunk > self.num_items
        self._error_K = self._group_max(self._scan.error_M)
        self._norm_K = self._group_max(self._scan.norm_M)
        self._largest_error = float(self._error_K.max(initial=0.0))
        self._largest_norm = float(self._norm_K.max(initial=0.0))
        self._approximate: ApproximateIndex | None = None
        self._local = threading.local()
        self._item_M = np.arange(self.num_items if self.num_items <= SMALL else 0)

    def _group_max(self, value_M: Float32) -> Float32:
        padded = np.zeros(self._chunks * self._chunk, dtype=np.float32)
        padded[: self.num_items] = value_M
        return padded.reshape(self._chunks, GROUP, self._groups).max(axis=1).ravel()

    def _choose(self) -> Method:
        """The faster method here, on a part of the table."""
        if self._w_MD.size < WORTH_MEASURING:
            return Method.FLOAT32
        rows = slice(0, MEASURED_ROWS)
        w_RD, b_R = self._w_MD[rows], self._b_M[rows]
        one: dict[Method, float] = {}
        batch: dict[Method, float] = {}
        for method, kind in ((Method.FLOAT32, _Float32Scan), (Method.INT8, _Int8Scan)):
            if method is Method.INT8 and not int8_products_are_exact(w_RD.shape[1]):
                continue
            scan = kind(w_RD, b_R)
            one[method] = _seconds_per_item(scan, w_RD[:1], len(w_RD))
            batch[method] = _seconds_per_item(scan, w_RD[:8], len(w_RD))
        self.measured = Measured(one, batch)
        best = min(one, key=one.__getitem__)
        self.batch_from = max(2, math.ceil(batch[best] / one[best]))
        return best

    def approximate(
        self, recall: float, x_BD: Float32, like: "Retrieval | None" = None
    ) -> approximate.Measured:
        """Search an approximate index from now on where that is faster; the scores stay exact.

        Queries with masks, many exclusions, extras or large results are still answered exactly.

        Args:
            recall: of the best `approximate.MEASURED_TOP` items, to be reached.
            x_BD: queries as they will come.
            like: of nearly the same items, to save time.

        Raises:
            InputError: faiss is not installed.
        """

        def exact(x_D: Float32, top_n: int) -> Int64:
            nothing = np.empty(0, dtype=np.float32)
            return self._single(Ask(x_D, top_n, Allowed(self.num_items), _NONE, nothing)).item_C

        other = None if like is None else like._approximate
        index = ApproximateIndex(self._w_MD, self._b_M, x_BD, exact, recall, other)
        if index.measured.pays:
            self._approximate = index
        return index.measured

    def top(self, asks: Sequence[Ask]) -> list[Found]:
        """The best allowed items of every query: exactly those of scoring all items, unless
        `approximate` was called.
        """
        if 0 < self.num_items <= SMALL:
            return self._small(asks)
        found: list[Found | None] = [None] * len(asks)
        scanned = []
        for i, ask in enumerate(asks):
            rows = self._few(ask)
            if rows is None:
                scanned.append(i)
            else:
                found[i] = self._sorted(ask, rows, self.score(ask, rows), len(rows))
        # Masks and extras change the scores themselves, which only a pass for one query keeps; and
        # where many are asked for, those scores save exact ones.
        together = [i for i in scanned if asks[i].extra_M is None and not _dense(asks[i].allowed)]
        if self._approximate is not None:
            near = [i for i in together if asks[i].top_n <= approximate.MEASURED_TOP]
            results = self._nearby(self._approximate, [asks[i] for i in near])
            for i, result in zip(near, results, strict=True):
                found[i] = result
            together = [i for i in together if found[i] is None]
        together = [i for i in together if asks[i].top_n <= max(1, self.num_items // BATCH_SHARE)]
        while len(together) >= self.batch_from:
            some, together = together[:TOGETHER], together[TOGETHER:]
            for i, result in zip(some, self._batch([asks[i] for i in some]), strict=True):
                found[i] = result
        for i in scanned:
            if found[i] is None:
                found[i] = self._single(asks[i])
        return [f for f in found if f is not None]

    def _nearby(self, index: ApproximateIndex, asks: Sequence[Ask]) -> list[Found | None]:
        """From the approximate index; None: too few were found."""
        if not asks:
            return []
        # What is excluded or changed may be among the first and is left out.
        most = max(a.top_n + len(a.allowed.exclude) + len(a.bonus_item_S) for a in asks)
        found: list[Found | None] = []
        for ask, item_C in zip(
            asks, index.search(np.stack([ask.x_D for ask in asks]), most), strict=True
        ):
            skip_M = self._skip()
            left_out = np.concatenate([ask.allowed.exclude, ask.bonus_item_S])
            skip_M[left_out] = True
            item_C = item_C[~skip_M[item_C]]
            skip_M[left_out] = False
            changed = ask.bonus_item_S[ask.allowed.passes(ask.bonus_item_S)]
            item_C = np.concatenate([item_C, changed])
            if len(item_C) < ask.top_n:
                found.append(None)
                continue
            allowed = self.num_items - len(ask.allowed.exclude)
            found.append(self._sorted(ask, item_C, self.score(ask, item_C), allowed))
        return found

    def _small(self, asks: Sequence[Ask]) -> list[Found]:
        """All scores of all queries by one product."""
        x_BD = torch.from_numpy(np.stack([ask.x_D for ask in asks]))
        score_BM: Float32 = torch.mm(x_BD, torch.from_numpy(self._w_MD).T).numpy()
        score_BM += self._b_M
        found = []
        for ask, score_M in zip(asks, score_BM, strict=True):
            score_M[ask.bonus_item_S] += ask.bonus_S
            all_M: Scores = score_M if ask.extra_M is None else score_M + ask.extra_M
            if ask.allowed.unrestricted:
                found.append(self._sorted(ask, self._item_M, all_M, self.num_items))
            else:
                item_C = np.flatnonzero(ask.allowed.dense())
                found.append(self._sorted(ask, item_C, all_M[item_C], len(item_C)))
        return found

    def listed(self, position_T: Int64) -> Listed:
        """Prepare a list of items that many queries ask for."""
        return Listed(self._w_MD, self._b_M, position_T)

    def score_listed(self, asks: Sequence[Ask], listed: Listed) -> list[Scores]:
        """Scores of a list for each query, `[T]`; NaN for what is unknown or not allowed."""
        x_BD = torch.from_numpy(np.stack([ask.x_D for ask in asks]))
        score_BT: Float32 = torch.mm(x_BD, listed.w_DT).numpy()
        score_BT += listed.b_T
        scores: list[Scores] = []
        for ask, score_T in zip(asks, score_BT, strict=True):
            place_S, hit_S = listed.places(ask.bonus_item_S)
            score_T[place_S] += ask.bonus_S[hit_S]
            if not ask.allowed.unrestricted:
                score_T[~ask.allowed.passes(listed.row_T)] = np.nan
            extra_M = ask.extra_M
            scores.append(score_T if extra_M is None else score_T + extra_M[listed.row_T])
        return scores

    def score(self, ask: Ask, item_C: Int64) -> Scores:
        """Exact scores of some items, bonus and extra included: `[C]`."""
        score_C = self._plain(ask, item_C)
        if len(ask.bonus_item_S) and len(item_C):
            place_C = np.searchsorted(ask.bonus_item_S, item_C)
            place_C = np.minimum(place_C, len(ask.bonus_item_S) - 1)
            hit_C = ask.bonus_item_S[place_C] == item_C
            score_C[hit_C] += ask.bonus_S[place_C[hit_C]]
        return score_C

    def _plain(self, ask: Ask, item_C: Int64) -> Scores:
        """Exact scores of items without bonus: `[C]`."""
        everything = len(item_C) == self.num_items and bool((item_C[1:] > item_C[:-1]).all())
        w_CD = self._w_MD if everything else self._w_MD.take(item_C, axis=0)
        score_C: Float32 = np.einsum("cd,d->c", w_CD, ask.x_D)  # each row by itself
        score_C += self._b_M.take(item_C)
        return score_C if ask.extra_M is None else score_C + ask.extra_M[item_C]

    def _few(self, ask: Ask) -> Int64 | None:
        """The allowed items, where scoring them all is cheaper than a scan; None: scan."""
        allowed = ask.allowed
        if ask.top_n <= 0 or self.num_items == 0:
            # Nothing is asked for; whether there is anything decides `exhausted`.
            return np.flatnonzero(allowed.dense())[: max(1, -ask.top_n)]
        if allowed.include is not None:
            return allowed.include[allowed.passes(allowed.include)]
        if ask.top_n > self.num_items // 4:
            return np.flatnonzero(allowed.dense())
        if allowed.mask is not None:
            count = int(np.count_nonzero(allowed.mask))
            if count <= self.num_items // SPARSE or ask.top_n >= count // 4:
                item_C = np.flatnonzero(allowed.mask)
                return item_C[allowed.passes(item_C)]
        return None

    @staticmethod
    def _sorted(ask: Ask, item_C: Int64, score_C: Scores, num_allowed: int) -> Found:
        """The first `top_n` of candidates that hold them."""
        top_n = max(ask.top_n, 0)
        if 0 < top_n < len(item_C):
            nth = np.partition(score_C, len(score_C) - top_n)[len(score_C) - top_n]
            kept = np.flatnonzero(score_C >= nth)
            item_C, score_C = item_C[kept], score_C[kept]
        order = np.lexsort((item_C, -score_C))[:top_n]
        return Found(item_C[order], score_C[order], ask.top_n >= num_allowed)

    def _single(self, ask: Ask) -> Found:
        """One pass for one query; all approximate scores are kept."""
        queries = self._scan.queries(ask.x_D[None])
        (errors,) = queries.errors
        work, score_1P = self._buffers(1, self._chunks * self._chunk)
        rows = slice(0, self.num_items)
        self._scan.scores(rows, queries, work, score_1P[:, rows])
        score_P = score_1P[0]
        score_P[self.num_items :] = -torch.inf
        if ask.extra_M is not None:
            score_P[rows] += torch.from_numpy(ask.extra_M)
            largest = max(abs(float(ask.extra_M.max())), abs(float(ask.extra_M.min())))
            errors = replace(errors, slack=errors.slack * 2 + 2.0**-22 * largest)
        mask_M = ask.allowed.dense() if _dense(ask.allowed) else None
        if mask_M is not None:
            np.copyto(score_P.numpy()[rows], -np.inf, where=~mask_M)
        max_K = score_P.view(self._chunks, GROUP, self._groups).amax(dim=1).flatten().numpy()
        return self._select(ask, errors, max_K, score_P.numpy(), mask_M)

    def _batch(self, asks: Sequence[Ask]) -> list[Found]:
        """One pass for all queries; of the approximate scores only the groups' maxima are kept."""
        queries = self._scan.queries(np.stack([ask.x_D for ask in asks]))
        work, score_BC = self._buffers(len(asks), self._chunk)
        score_BGH = score_BC.view(-1, GROUP, self._groups)
        max_BHG = torch.empty(len(asks), self._chunks, self._groups)
        for chunk in range(self._chunks):
            start = chunk * self._chunk
            size = max(0, min(self._chunk, self.num_items - start))
            if size:
                rows = slice(start, start + size)
                self._scan.scores(rows, queries, work, score_BC[:, :size])
            if size < self._chunk:
                score_BC[:, size:] = -torch.inf
            torch.amax(score_BGH, dim=1, out=max_BHG[:, chunk])
        max_BK = max_BHG.flatten(1).numpy()
        return [
            self._select(ask, errors, max_K, None, None)
            for ask, errors, max_K in zip(asks, queries.errors, max_BK, strict=True)
        ]

    def _select(
        self,
        ask: Ask,
        errors: _Errors,
        max_K: Float32,
        rough_P: Float32 | None,
        mask_M: NDArray[np.bool_] | None,
    ) -> Found:
        """The top N from the groups' maxima.

        Args:
            max_K: overwritten.
            rough_P: the approximate scores; None: they were not kept.
            mask_M: what the maxima already respect; None: exclusions are still to be left out.
        """
        top_n = ask.top_n
        exclude = ask.allowed.exclude if mask_M is None else _NONE
        left_out = np.concatenate([exclude, ask.bonus_item_S])
        skip_M = self._skip()
        skip_M[left_out] = True

        def look(group_C: Int64) -> Int64:
            """The groups' items that count."""
            row_C = self._rows(group_C)
            keep_C = ~skip_M[row_C]
            if mask_M is not None:
                keep_C &= mask_M[row_C]
            return row_C[keep_C]

        # First the N groups that look best, but for those whose maximum may not count. The N-th
        # exact score among their items is one that N items surely reach.
        changed_C = self._group_of(left_out)
        their_max_C = max_K[changed_C]
        max_K[changed_C] = -np.inf
        first_C = _largest(max_K, top_n)
        max_K[changed_C] = their_max_C
        row_C = look(first_C)
        surely, rest_C = -np.inf, _NONE
        if rough_P is not None and len(row_C) > top_n:
            best_C = np.argpartition(rough_P.take(row_C), len(row_C) - top_n)
            rest_C = row_C[best_C[: len(row_C) - top_n]]
            row_C = row_C[best_C[len(row_C) - top_n :]]
        items, scores = [row_C], [self._plain(ask, row_C)]
        if len(row_C) >= top_n:
            surely = np.partition(scores[0], len(row_C) - top_n)[len(row_C) - top_n]
        # Then every group and item that its bound cannot rule out.
        max_K[first_C] = np.nan
        widest = errors.bound(self._largest_error, self._largest_norm)
        open_C = np.flatnonzero(max_K >= surely - widest)
        bound_C = errors.bound(self._error_K[open_C], self._norm_K[open_C])
        row_C = look(open_C[max_K[open_C] + bound_C >= surely])
        skip_M[left_out] = False
        if rough_P is not None:
            row_C = np.concatenate([rest_C, row_C])
            bound_C = errors.bound(self._scan.error_M[row_C], self._scan.norm_M[row_C])
            row_C = row_C[rough_P.take(row_C) + bound_C >= surely]
        changed_C = ask.bonus_item_S[ask.allowed.passes(ask.bonus_item_S)]
        items += [row_C, changed_C]
        scores += [self._plain(ask, row_C), self.score(ask, changed_C)]
        num_allowed = self.num_items if mask_M is None else int(np.count_nonzero(mask_M))
        score_C: Scores = np.concatenate(scores)  # type: ignore[assignment]
        return self._sorted(ask, np.concatenate(items), score_C, num_allowed - len(exclude))

    def _rows(self, group_C: Int64) -> Int64:
        """The items of some groups."""
        chunk_C, place_C = np.divmod(group_C, self._groups)
        first_C = chunk_C * self._chunk + place_C
        row_C = (first_C[:, None] + np.arange(GROUP) * self._groups).ravel()
        return row_C[row_C < self.num_items] if self._padded else row_C

    def _group_of(self, item_C: Int64) -> Int64:
        """The group of each item: inverse of `_rows`."""
        chunk_C, place_C = np.divmod(item_C, self._chunk)
        return chunk_C * self._groups + place_C % self._groups

    def _buffers(self, queries: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Int32 scratch and float32 `[queries, rows]` of this thread."""
        size = queries * rows
        kept = getattr(self._local, "buffers", None)
        if kept is None or kept[0].numel() < size:
            kept = torch.empty(size, dtype=torch.int32), torch.empty(size, dtype=torch.float32)
            self._local.buffers = kept
        work, score = kept
        return work, score[:size].view(queries, rows)

    def _skip(self) -> NDArray[np.bool_]:
        """All false `[M]`, to be left so; this thread's own."""
        skip_M: NDArray[np.bool_] | None = getattr(self._local, "skip", None)
        if skip_M is None:
            skip_M = self._local.skip = np.zeros(self.num_items, dtype=np.bool_)
        return skip_M


def _largest(value_K: Float32, count: int) -> Int64:
    """Places of the `count` largest values, in no order.

    The count-th largest of the maxima of parts is reached by so many values: only those that reach
    it are looked at more closely.
    """
    if count >= len(value_K):
        return np.arange(len(value_K))
    parts = len(value_K) // PART
    at_C: Int64 | None = None
    if parts > count:
        max_P = value_K[: parts * PART].reshape(PART, parts).max(axis=0)
        reached = np.partition(max_P, parts - count)[parts - count]
        at_C = np.flatnonzero(value_K >= reached)
        value_K = value_K[at_C]
    place_C = np.argpartition(value_K, len(value_K) - count)[len(value_K) - count :]
    return place_C if at_C is None else at_C[place_C]


def _dense(allowed: Allowed) -> bool:
    """Whether a mask, or so many exclusions that one is better, has to be applied."""
    return allowed.mask is not None or len(allowed.exclude) > MANY_EXCLUDED


def int8_products_are_exact(size: int) -> bool:
    """Whether this machine's int8 matrix product is right at the extremes.

    Without VNNI instructions some kernels add pairs in 16 bits, which overflow; and some versions
    of PyTorch take a row of one number for a column.
    """
    w = torch.full((MIN_ROWS, size), 127, dtype=torch.int8)
    w[1::2] = -127
    w[2::4, ::2] = -127
    x = torch.full((TOGETHER, size), 127, dtype=torch.int8)
    x[::2, ::2] = -127
    for left, right in ((w, x[:1].T), (x[:2], w.T), (x, w.T)):
        out = torch.empty(len(left), right.shape[1], dtype=torch.int32)
        try:
            torch._int_mm(left, right, out=out)
        except RuntimeError:
            return False
        if not torch.equal(out.long(), left.long() @ right.long()):
            return False
    return True


def _seconds_per_item(scan: _Scan, x_BD: Float32, rows: int, rounds: int = 5) -> float:
    """Best of some passes over the first `rows` items, by chunks for more than one query."""
    queries = scan.queries(x_BD)
    size = rows if len(x_BD) == 1 else min(rows, CHUNK)
    work = torch.empty(len(x_BD) * size, dtype=torch.int32)
    out = torch.empty(len(x_BD), size)
    best = math.inf
    for _ in range(rounds):
        started = time.perf_counter()
        for start in range(0, rows - size + 1, size):
            scan.scores(slice(start, start + size), queries, work, out)
        best = min(best, time.perf_counter() - started)
    return best / (rows // size * size)
