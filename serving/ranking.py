"""Exact top-k of affinity + w·β·log q without seeing every item: a threshold algorithm.

The predictor knows affinities (φ̃), the transformer knows trends (log q). A search asks for the
top-N items by affinity and for the affinities of the T most trending items. Any item in neither
list scores at most (N-th affinity + best trend not asked for); once the k-th result is strictly
above that bound, no unseen item can enter or tie, and the top-k equals brute force.

A search is a plain state machine without I/O, so that the searches of a batch advance in
lockstep with one call to the predictor per round.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.query import Recommendation
from model.trends import TrendSnapshot
from serving.exploration import propensity
from serving.wire import AnswerError, Array, ItemList, Part, Scored

# A second round costs a whole call, asking for more only some kB. A list of trending items that
# is asked for whole leaves only the floor for unseen items: then the first k by affinity, and some
# for ties, are enough. With a part of it, affinity and trend independent, the bound is beaten at a
# depth near sqrt(k·M); the factor leaves some room.
SPARE = 8
MIN_ASK, MAX_ASK, ASK_FACTOR = 256, 16_384, 1.5
MAX_ROUNDS = 64  # N doubles every round: more than enough for any catalogue

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask the predictor next: the best `top_n`, and a part of the trending items."""

    top_n: int
    part: Part | None


Ask = Callable[[Question], Awaitable[Scored]]


@dataclass(frozen=True)
class Trend:
    """A trend snapshot prepared for look-ups; shared by the requests that use it."""

    items: ItemList  # by log q descending
    version: str | None
    num_items: int
    place: dict[str, int] = field(repr=False)  # in `items`

    @property
    def log_q_T(self) -> Float64:
        """Of `items`, descending."""
        return self.items.log_q_T

    @property
    def floor(self) -> float:
        """log q of all others."""
        return self.items.floor

    @classmethod
    def of(cls, snapshot: TrendSnapshot) -> "Trend":
        return cls(
            ItemList(snapshot.item_ids, snapshot.log_q, snapshot.floor),
            snapshot.version,
            snapshot.num_items,
            {item: t for t, item in enumerate(snapshot.item_ids)},
        )

    @classmethod
    def uniform(cls) -> "Trend":
        """No item trends: log q is 0 for all, so that score = affinity."""
        return cls(ItemList((), np.empty(0), 0.0), None, 0, {})

    def log_q(self, item_ids: Sequence[str]) -> Float64:
        """log q of some items: `[C]`."""
        place, log_q_T = self.place, self.log_q_T
        at_C = np.array([place.get(item, -1) for item in item_ids], dtype=np.int64)
        if not len(log_q_T):
            return np.full(len(at_C), self.floor)
        return np.where(at_C < 0, self.floor, log_q_T[at_C])

    def get(self, item_id: str) -> float:
        """log q of one item."""
        at = self.place.get(item_id)
        return self.floor if at is None else float(self.log_q_T[at])


@dataclass(frozen=True)
class _Known:
    """Items C with the parts of their scores; `listed` of them stand in the trend's order."""

    names: Callable[[int], str]
    affinity_C: Float64  # with exploration's bonus
    extra_C: Float64 | None
    limit_C: Float64 | None  # the most that this bonus could have been
    trend_C: Float64

    def best(self, k: int) -> list[Recommendation]:
        """The first k by score descending, ties by item id; those that may not come are NaN."""
        score_C = self.affinity_C + self.trend_C
        explored = self.extra_C is not None
        kept_C = _top(score_C, k + explored)
        rows = sorted((-float(score_C[c]), self.names(c), c) for c in kept_C.tolist())
        # What a result would have had to beat, had it got another bonus.
        threshold = -rows[k][0] if len(rows) > k else -math.inf
        results = []
        for minus, name, c in rows[:k]:
            trend = float(self.trend_C[c])
            if self.extra_C is None:
                results.append(Recommendation(name, -minus, float(self.affinity_C[c]), trend))
                continue
            extra = float(self.extra_C[c])
            affinity = float(self.affinity_C[c]) - extra
            came = None
            if self.limit_C is not None:
                came = propensity(affinity + trend, float(self.limit_C[c]), threshold)
            results.append(Recommendation(name, -minus, affinity, trend, extra, came))
        return results

    def brought_in(self, results: Sequence[Recommendation], k: int) -> int:
        """How many of the results would not be there without the bonus, as far as is known."""
        if self.extra_C is None:
            return 0
        plain = _Known(self.names, self.affinity_C - self.extra_C, None, None, self.trend_C)
        usual = {r.item_id for r in plain.best(k)}
        return sum(r.item_id not in usual for r in results)


def _top(score_C: Float64, k: int) -> NDArray[np.int64]:
    """Where the k largest are, and all that tie with the k-th; NaN never."""
    count = len(score_C) - int(np.isnan(score_C).sum())
    if k >= count:
        return np.flatnonzero(~np.isnan(score_C))
    # NaN sorts last.
    cut = np.partition(score_C, count - k)[count - k]
    return np.flatnonzero(score_C >= cut)


class Search:
    """Top k of affinity + weight·β·log q; `question` until None, an answer to `tell` for each.

    `coefficient` is weight·β. Ties are broken by item id ascending. Fewer than k come back when
    fewer are allowed.
    """

    def __init__(
        self,
        k: int,
        trend: Trend,
        weight: float = 1.0,
        first_ask: int | None = None,
        explored: bool = False,
        afresh: bool = False,
    ) -> None:
        """
        Args:
            first_ask: N and T of the first round; None: deep enough for most requests.
            explored: answers hold bonuses, so the first item that does not come is to be known.
            afresh: each question asks for all that its answer needs to be judged by itself, so
                that every round may be answered by another model. An answer that does not prove
                the top k is forgotten, and twice as much is asked for.
        """
        self._k, self._trend, self._weight = k, trend, weight
        self._to_prove = k + explored
        length = len(trend.items)
        depth = top_n = first_ask or 0
        self.afresh = afresh
        if first_ask is None and length <= MAX_ASK:
            depth, top_n = length, k + SPARE
        elif first_ask is None:
            depth = top_n = min(
                max(MIN_ASK, math.ceil(ASK_FACTOR * math.sqrt(k * trend.num_items))), MAX_ASK
            )
        self._top_n = max(self._to_prove + 1, top_n)
        # Without weight the order is the predictor's own: no trending item is needed.
        self._asked, self._depth = 0, 0 if weight == 0 else min(depth, length)
        self.coefficient = 0.0
        self.rounds = 0
        self._item_ids: list[str] = []  # of the best ones, as far as they are not in the list
        self._affinity_T = np.empty(0)  # of the list, as far as it was asked for
        self._extra_T: Float64 | None = None
        self._limit_T: Float64 | None = None
        self._known: _Known | None = None
        self.question: Question | None = self._next()

    def _next(self) -> Question:
        part = None
        # An empty part names the trend all the same: β depends on it.
        if self._weight != 0:
            part = Part(self._trend.items, 0 if self.afresh else self._asked, self._depth)
        return Question(self._top_n, part)

    def tell(self, answer: Scored) -> None:
        """Take the answer to `question`; sets the next one, or None when the top-k is proved.

        Raises:
            AnswerError: the answer is not one a predictor would give.
        """
        assert self.question is not None  # noqa: S101 - callers loop on it
        self.rounds += 1
        part = self.question.part
        if self.afresh:
            self._affinity_T, self._extra_T, self._limit_T = np.empty(0), None, None
        if len(answer.affinity_T) != (0 if part is None else part.end - part.first):
            raise AnswerError("not as many affinities as items of the list")
        self.coefficient = self._weight * answer.beta
        self._affinity_T = np.concatenate([self._affinity_T, answer.affinity_T], dtype=np.float64)
        self._extra_T = _longer(self._extra_T, answer.extra_T)
        self._limit_T = _longer(self._limit_T, answer.limit_T)
        self._asked = self._depth
        self._known = self._merge(answer)
        if answer.exhausted or self._proved(answer):
            self.question = None
            return
        if len(answer.item_ids) < self.question.top_n or self.rounds >= MAX_ROUNDS:
            raise AnswerError("fewer candidates than asked for, but not exhausted")
        self._top_n *= 2
        self._depth = min(max(2 * self._depth, 1), len(self._trend.items))
        if self._weight == 0:
            self._depth = 0
        self.question = self._next()

    def _merge(self, answer: Scored) -> _Known:
        """The part of the list asked for, and the best ones that are not in it."""
        trend, asked = self._trend, self._asked
        place = trend.place
        rest, log_q, ids = [], [], []
        for c, item in enumerate(answer.item_ids):
            at = place.get(item, -1)
            if not 0 <= at < asked:
                rest.append(c)
                ids.append(item)
                log_q.append(trend.floor if at < 0 else trend.log_q_T[at])
        listed = trend.items.item_ids
        self._item_ids = ids
        affinity = np.concatenate([self._affinity_T, answer.affinity_C[rest]], dtype=np.float64)
        # + 0.0 turns the −0.0 of a zero coefficient into 0.0
        trend_C = self.coefficient * np.concatenate([trend.log_q_T[:asked], log_q]) + 0.0
        extra = None if answer.extra_C is None else _longer(self._extra_T, answer.extra_C[rest])
        limit = None if answer.limit_C is None else _longer(self._limit_T, answer.limit_C[rest])

        def name(c: int) -> str:
            return listed[c] if c < asked else ids[c - asked]

        return _Known(name, affinity, extra, limit, trend_C)

    def _proved(self, answer: Scored) -> bool:
        if self.coefficient == 0:
            # The predictor orders by affinity and item id, which is then the final order.
            return len(answer.item_ids) >= self._to_prove
        whole = self._asked == len(self._trend.items)
        if self.afresh and whole and len(self._item_ids) >= self._to_prove:
            # All of the list, and as many others, whose order the floor leaves as it is (but for
            # affinities so close that the sum makes them equal: then any of them may come).
            return True
        assert self._known is not None  # noqa: S101 - told just now
        score_C = self._known.affinity_C + self._known.trend_C
        count = len(score_C) - int(np.isnan(score_C).sum())
        if count < self._to_prove or not len(answer.affinity_C):
            return False
        bound = float(answer.affinity_C[-1]) + self.coefficient * self._best_unseen_log_q()
        kth = float(np.partition(score_C, count - self._to_prove)[count - self._to_prove])
        return kth > bound  # strictly: an unseen item could tie and come first by its id

    def _best_unseen_log_q(self) -> float:
        """Largest log q of an item not seen; its smallest if trends count against an item."""
        trend = self._trend
        if self.coefficient < 0 or self._asked >= len(trend.items):
            return trend.floor
        seen = set(self._item_ids)
        for position in range(self._asked, len(trend.items)):
            if trend.items.item_ids[position] not in seen:
                return float(trend.log_q_T[position])
        return trend.floor

    def results(self) -> list[Recommendation]:
        """The top k; call when `question` is None."""
        assert self._known is not None  # noqa: S101 - answered
        return self._known.best(self._k)

    def brought_in(self, results: Sequence[Recommendation]) -> int:
        """How many of the results are there because of exploration alone."""
        assert self._known is not None  # noqa: S101 - answered
        return self._known.brought_in(results, self._k)


def _longer(before_T: Float64 | None, more_C: Array | None) -> Float64 | None:
    if more_C is None:
        return before_T
    return np.concatenate([np.empty(0) if before_T is None else before_T, more_C], dtype=np.float64)


def ranked(
    item_ids: Sequence[str],
    affinity_C: Array,
    trend: Trend,
    coefficient: float,
    k: int,
    extra_C: Array | None = None,
    limit_C: Array | None = None,
) -> tuple[list[Recommendation], int]:
    """Sort items by affinity + coefficient·log q descending, ties by item id.

    Returns:
        The first k, without those whose affinity is NaN; and how many of them are there because
        of `extra_C`, which the affinities hold.
    """
    known = _Known(
        item_ids.__getitem__,
        affinity_C.astype(np.float64),
        _longer(None, extra_C),
        _longer(None, limit_C),
        coefficient * trend.log_q(item_ids) + 0.0,
    )
    results = known.best(k)
    return results, known.brought_in(results, k)


async def top_k(
    ask: Ask, k: int, trend: Trend, weight: float = 1.0, first_ask: int | None = None
) -> tuple[list[Recommendation], int]:
    """Run one search to its end.

    Returns:
        The top k, and the number of calls to `ask`.
    """
    search = Search(k, trend, weight, first_ask)
    while search.question is not None:
        search.tell(await ask(search.question))
    return search.results(), search.rounds
