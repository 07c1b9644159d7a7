"""Exact top-k of affinity + w·β·log q without seeing every item: a threshold algorithm.

The predictor knows affinities (φ̃), the transformer knows trends (log q). A search asks for the
top-N items by affinity and for the affinities of the T most trending items. Any item in neither
list scores at most (N-th affinity + best trend not asked for); once the k-th result is strictly
above that bound, no unseen item can enter or tie, and the top-k equals brute force.

A search is a plain state machine without I/O, so that the searches of a batch advance in
lockstep with one call to the predictor per round.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.query import Recommendation
from model.trends import TrendSnapshot

# A second round costs a whole call, asking for more only some kB. With affinity and trend
# independent, the bound is beaten at a depth near sqrt(k·M); the factor leaves some room.
MIN_ASK, MAX_ASK, ASK_FACTOR = 256, 16_384, 1.5
MAX_ROUNDS = 64  # N doubles every round: more than enough for any catalogue


class AnswerError(Exception):
    """The predictor's answer contradicts the protocol."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The predictor's answer to one question.

    `item_ids` and `affinities`: allowed items by affinity descending, ties by item id.
    `scored`: affinities of the asked-for items that exist and are allowed.
    `exhausted`: `item_ids` holds every allowed item.
    """

    item_ids: list[str]
    affinities: list[float]
    scored: dict[str, float]
    exhausted: bool
    beta: float


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask the predictor next."""

    top_n: int
    score_items: list[str]


Ask = Callable[[int, list[str]], Awaitable[Candidates]]


@dataclass(frozen=True)
class Trend:
    """A trend snapshot prepared for look-ups; shared by the requests that use it."""

    item_ids: tuple[str, ...]  # by log q descending
    log_q: list[float]
    floor: float
    version: str | None
    num_items: int
    by_item: dict[str, float] = field(repr=False)

    @classmethod
    def of(cls, snapshot: TrendSnapshot) -> "Trend":
        log_q = snapshot.log_q.tolist()
        by_item = dict(zip(snapshot.item_ids, log_q, strict=True))
        return cls(
            snapshot.item_ids,
            log_q,
            snapshot.floor,
            snapshot.version,
            snapshot.num_items,
            by_item,
        )

    @classmethod
    def uniform(cls) -> "Trend":
        """No item trends: log q is 0 for all, so that score = affinity."""
        return cls((), [], 0.0, None, 0, {})

    def get(self, item_id: str) -> float:
        """log q of one item."""
        return self.by_item.get(item_id, self.floor)


class Search:
    """Top k of affinity + weight·β·log q; `question` until None, an answer to `tell` for each.

    `known` are the affinities told so far, `coefficient` is weight·β.

    Ties are broken by item id ascending. Fewer than k come back when fewer are allowed.
    """

    def __init__(
        self, k: int, trend: Trend, weight: float = 1.0, first_ask: int | None = None
    ) -> None:
        """
        Args:
            first_ask: N and T of the first round; None: deep enough for most requests.
        """
        self._k = k
        self._trend = trend
        self._weight = weight
        if first_ask is None:
            expected = math.ceil(ASK_FACTOR * math.sqrt(k * trend.num_items))
            first_ask = min(max(MIN_ASK, expected), MAX_ASK)
        self._top_n = max(k + 1, first_ask)
        self._asked = 0  # how many of trend.item_ids have been asked for
        self.known: dict[str, float] = {}
        self._scored: _Scored | None = None  # of everything known, once a round needed it
        self.coefficient = 0.0
        self.rounds = 0
        # Without weight the order is the predictor's own: no trending item is needed.
        self._depth = 0 if weight == 0 else min(self._top_n, len(trend.item_ids))
        self.question: Question | None = Question(self._top_n, list(trend.item_ids[: self._depth]))

    def tell(self, answer: Candidates) -> None:
        """Take the answer to `question`; sets the next one, or None when the top-k is proved.

        Raises:
            AnswerError: the answer is not one a predictor would give.
        """
        assert self.question is not None  # noqa: S101 - callers loop on it
        self.rounds += 1
        _check(answer)
        self.coefficient = self._weight * answer.beta
        self.known.update(zip(answer.item_ids, answer.affinities, strict=True))
        self.known.update(answer.scored)
        self._asked = self._depth
        self._scored = None
        if answer.exhausted or self._proved(answer):
            self.question = None
            return
        if len(answer.item_ids) < self.question.top_n or self.rounds >= MAX_ROUNDS:
            raise AnswerError("fewer candidates than asked for, but not exhausted")
        self._top_n *= 2
        self._depth = min(max(2 * self._depth, 1), len(self._trend.item_ids))
        if self._weight == 0:
            self._depth = 0
        self.question = Question(self._top_n, list(self._trend.item_ids[self._asked : self._depth]))

    def _proved(self, answer: Candidates) -> bool:
        if len(self.known) < self._k:
            return False
        if self.coefficient == 0:
            # The predictor orders by affinity and item id, which is then the final order.
            return len(answer.item_ids) >= self._k
        if not answer.affinities:
            return False
        bound = answer.affinities[-1] + self.coefficient * self._best_unseen_log_q()
        self._scored = _Scored.of(self.known, self._trend, self.coefficient)
        score_C = self._scored.score_C
        kth = float(np.partition(score_C, len(score_C) - self._k)[len(score_C) - self._k])
        return kth > bound  # strictly: an unseen item could tie and come first by its id

    def _best_unseen_log_q(self) -> float:
        """Largest log q of an item not seen; its smallest if trends count against an item."""
        if self.coefficient < 0:
            return self._trend.floor
        trend = self._trend
        for position in range(self._asked, len(trend.item_ids)):
            if trend.item_ids[position] not in self.known:
                return trend.log_q[position]
        return trend.floor

    def results(self) -> list[Recommendation]:
        """The top k; call when `question` is None."""
        scored = self._scored or _Scored.of(self.known, self._trend, self.coefficient)
        return scored.best(self._k)


@dataclass(frozen=True)
class _Scored:
    """Items C with their parts; score = affinity + trend."""

    item_ids: list[str]
    affinity_C: NDArray[np.float64]
    trend_C: NDArray[np.float64]
    score_C: NDArray[np.float64]

    @classmethod
    def of(cls, affinities: Mapping[str, float], trend: Trend, coefficient: float) -> "_Scored":
        get, floor = trend.by_item.get, trend.floor
        item_ids = list(affinities)
        affinity_C = np.array(list(affinities.values()), np.float64)
        log_q_C = np.array([get(item, floor) for item in item_ids], np.float64)
        # + 0.0 turns the −0.0 of a zero coefficient into 0.0
        trend_C = coefficient * log_q_C + 0.0
        return cls(item_ids, affinity_C, trend_C, affinity_C + trend_C)

    def best(self, k: int) -> list[Recommendation]:
        """The first k by score descending, ties by item id."""
        score_C = self.score_C
        kept = np.arange(len(score_C))
        if k < len(score_C):
            cut = np.partition(score_C, len(score_C) - k)[len(score_C) - k]
            kept = np.flatnonzero(score_C >= cut)
        rows = zip(
            (-score_C[kept]).tolist(),
            [self.item_ids[c] for c in kept.tolist()],
            self.affinity_C[kept].tolist(),
            self.trend_C[kept].tolist(),
            strict=True,
        )
        return [Recommendation(item, -minus, a, t) for minus, item, a, t in sorted(rows)[:k]]


def ranked(
    affinities: Mapping[str, float], trend: Trend, coefficient: float, k: int
) -> list[Recommendation]:
    """Sort items by affinity + coefficient·log q descending, ties by item id; the first k."""
    return _Scored.of(affinities, trend, coefficient).best(k)


def _check(answer: Candidates) -> None:
    if len(answer.item_ids) != len(answer.affinities):
        raise AnswerError("item_ids and affinities differ in length")
    numbers = [*answer.affinities, *answer.scored.values(), answer.beta]
    try:
        finite = bool(np.isfinite(np.asarray(numbers, dtype=np.float64)).all())
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise AnswerError("an affinity or beta is not a finite number")


async def top_k(
    ask: Ask, k: int, trend: Trend, weight: float = 1.0, first_ask: int | None = None
) -> tuple[list[Recommendation], int]:
    """Run one search to its end.

    Returns:
        The top k, and the number of calls to `ask`.
    """
    search = Search(k, trend, weight, first_ask)
    while search.question is not None:
        question = search.question
        search.tell(await ask(question.top_n, question.score_items))
    return search.results(), search.rounds
