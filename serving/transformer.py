"""The transformer: features → predictor → trend bias → exact top-k; degrades, never hangs.

Every request is answered within its deadlines. What was missing is named in the answer's
`degraded` and counted.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol
from uuid import uuid4

import numpy as np

from model.errors import InputError, UnavailableError
from model.query import History, Query, Recommendation
from model.trends import TrendSnapshot
from serving import metrics
from serving.coverage import Coverage
from serving.features import Features, Reader, UserFeatures
from serving.process import freeze_garbage_collection, leave, log_in_background
from serving.ranking import Search, Trend, ranked
from serving.schemas import Filter, Instance, parse_instances, to_history
from serving.scoring import PredictorClient, PredictorError
from serving.server import JsonModel, main
from serving.settings import MULTIPROCESS, TRANSFORMER, ServeSettings
from serving.wire import AnswerError, Asked, Part, Scored

log = logging.getLogger("hrnn.serving")
exploration_log = logging.getLogger("hrnn.exploration")

FEATURES_UNAVAILABLE = "features_unavailable"
PREDICTOR_UNAVAILABLE = "predictor_unavailable"
NO_EVENTS = History.of(())
LOGGED_ITEMS = 1000  # of one answer


class Predictors(Protocol):
    """serving.scoring.PredictorClient, or a stand-in."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def score(
        self, asked: Sequence[Asked], timeout: float
    ) -> Sequence[Scored | InputError]: ...
    async def trend(self, timeout: float) -> TrendSnapshot: ...


class Work:
    """One instance on its way to an answer."""

    def __init__(
        self,
        instance: Instance,
        features: UserFeatures | None,
        trend: Trend,
        degraded: list[str],
        settings: ServeSettings,
    ) -> None:
        self.instance = instance
        self.trend = trend
        self.degraded = degraded
        self.unknown_items = 0
        self.rounds = 0
        self.version: str | None = None
        self.recommendation_id = uuid4().hex
        self.explored = 0  # items in the answer that would not be there without exploration
        self._items_out: list[dict[str, Any]] | None = None  # of the answer
        self.misfit = False  # what the store holds of the user does not fit the model
        # Fields of the store that the request does not give itself.
        self._stored = set(features.profile if features else ()) - instance.user.keys()
        self._user = {**(features.profile if features else {}), **instance.user}
        if instance.history is not None:
            history = to_history(instance.history)
        else:
            history = History.of(features.history) if features else NO_EVENTS
        # Events after the request time are not part of p(a | h, t). "Now" is never before the
        # newest event: clocks differ.
        if instance.timestamp is None:
            newest = float(history.time_L[-1]) if len(history) else 0.0
            timestamp = max(time.time(), newest)
        else:
            timestamp = instance.timestamp
            history = history.until(timestamp)
        # A stored one may be longer than one that is sent.
        history = history[-settings.max_history :]
        self._query = Query(
            history,
            timestamp,
            self._user,
            instance.context,
            instance.filter.to_filter(),
            instance.exclude_seen,
        )
        if instance.task != "recommend":
            self._items = list(dict.fromkeys(instance.items or []))
            self._k = instance.num_results or len(self._items)
        else:
            self._items = []
            self._k = instance.num_results or settings.default_num_results
        self._search: Search | None = None
        self._begin()

    def _begin(self, afresh: bool = False) -> None:
        if self.instance.task == "recommend":
            self._search = Search(
                self._k,
                self.trend,
                self.instance.trend_weight,
                explored=self.instance.exploration_weight > 0,
                afresh=afresh,
            )

    @property
    def answered(self) -> bool:
        return self._items_out is not None

    def ask(self) -> Asked:
        """What to ask the predictor next."""
        instance, search = self.instance, self._search
        question = None if search is None else search.question
        part = None if question is None else question.part
        if instance.task == "rank" and instance.trend_weight != 0:
            part = Part(self.trend.items, 0, 0)  # β depends on the trend
        return Asked(
            "rate" if instance.task == "rate" else "score",
            self._query,
            0 if question is None else question.top_n,
            self._items,
            part,
            self.version,
            instance.exploration_weight,
            self.recommendation_id,
        )

    def tell(self, scored: Scored) -> None:
        """Take an answer.

        Raises:
            AnswerError: it makes no sense.
        """
        self.rounds += 1
        afresh = self._search is not None and self._search.afresh
        if self.version not in (None, scored.model_version) and not afresh:
            # Affinities do not mix: the predictor changed its model between two rounds, or another
            # replica answers that never held this one. As replicas may differ for as long as they
            # like, the search begins again once, with questions whose answers stand alone.
            self.version = None
            self._begin(afresh=True)
            return
        self.version = scored.model_version
        self.unknown_items = scored.unknown_items + scored.unknown_asked
        if self._search is None and self.instance.task == "rate":
            rated = zip(self._items, scored.affinity_A.tolist(), strict=True)
            known = [{"item_id": i, "value": v} for i, v in rated if v == v]  # not NaN
            self._items_out = known[: self._k]
        elif self._search is None:
            coefficient = self.instance.trend_weight * scored.beta
            results, self.explored = ranked(
                self._items,
                scored.affinity_A,
                self.trend,
                coefficient,
                self._k,
                scored.extra_A,
                scored.limit_A,
            )
            self._answer(results)
        else:
            self._search.tell(scored)
            if self._search.question is None:
                results = self._search.results()
                self.explored = self._search.brought_in(results)
                self._answer(results)

    def _answer(self, results: Sequence[Recommendation]) -> None:
        if self.instance.exploration_weight == 0:
            self._items_out = [
                {"item_id": r.item_id, "score": r.score, "affinity": r.affinity, "trend": r.trend}
                for r in results
            ]
            return
        self._items_out = [
            {
                "item_id": r.item_id,
                "score": r.score,
                "affinity": r.affinity,
                "trend": r.trend,
                "exploration": r.exploration,
                "propensity": r.propensity,
            }
            for r in results
        ]

    def without_stored_fields(self, refusal: InputError) -> bool:
        """After a refusal: ask again without the store's fields if it is about one of them.

        The model may have changed its schema, or gone back to an older one, since they were
        stored: that is nothing the client can mend. The history stays.
        """
        reason = str(refusal)
        if not any(reason.startswith(f"user.{name}: ") for name in self._stored):
            return False
        self._stored = set()
        self.misfit = True
        self.degraded.append(FEATURES_UNAVAILABLE)
        self._query = replace(self._query, user=dict(self.instance.user))
        self.version = None  # affinities of another query do not mix with these
        self._begin()
        return True

    def fall_back(self) -> None:
        """Answer without the predictor: the trend's own order, log q as the score.

        The catalogue is the predictor's: only items of the snapshot are known to exist. So are
        items' fields: with a `where` filter nothing is known to pass. And nothing is known of
        values.
        """
        self.degraded.append(PREDICTOR_UNAVAILABLE)
        self.version = None
        self.unknown_items = self.explored = 0
        if self.instance.task == "rate":
            self._items_out = []
            return
        item_filter: Filter = self.instance.filter
        include = None if item_filter.include is None else set(item_filter.include)
        exclude = set(item_filter.exclude)
        if self.instance.exclude_seen:
            exclude.update(History.of(self._query.history).item_ids)
        candidates: Sequence[str]
        if self.instance.task == "rank":
            candidates = self._items
        elif include is not None:
            candidates = sorted(include)
        else:
            candidates = self.trend.items.item_ids
        known = self.trend.place
        passing = [
            i
            for i in candidates
            if i in known
            and i not in exclude
            and (include is None or i in include)
            and not item_filter.where
        ]
        results, _ = ranked(passing, np.zeros(len(passing)), self.trend, 1.0, self._k)
        self._answer(results)

    def log_exploration(self) -> None:
        """What an evaluation of this answer needs later; nothing of the user."""
        items = self._items_out or []
        data = {
            "recommendation_id": self.recommendation_id,
            "model_version": self.bundle_version,
            "trend_version": self.trend.version,
            "task": self.instance.task,
            "trend_weight": self.instance.trend_weight,
            "exploration_weight": self.instance.exploration_weight,
            "num_items": len(items),
            "items": [
                [item["item_id"], item["exploration"], item["propensity"]]
                for item in items[:LOGGED_ITEMS]
            ],
        }
        exploration_log.info("explored", extra={"data": data})

    @property
    def bundle_version(self) -> str | None:
        """Of the model that answered, without the revision of its new items."""
        return self.version and self.version.partition("+")[0]

    @property
    def drawn(self) -> bool:
        """Exploration had a part in the answer."""
        return self.instance.exploration_weight > 0 and self.version is not None

    @property
    def num_items(self) -> int:
        """In the answer."""
        return len(self._items_out or ())

    @property
    def item_ids(self) -> list[str]:
        """In the answer."""
        return [item["item_id"] for item in self._items_out or ()]

    def prediction(self) -> dict[str, Any]:
        """The answer as JSON."""
        assert self._items_out is not None  # noqa: S101 - called when answered
        prediction: dict[str, Any] = {
            "recommendation_id": self.recommendation_id,
            "model_version": self.bundle_version,
            "trend_version": None if self.instance.task == "rate" else self.trend.version,
            "degraded": self.degraded,
            "items": self._items_out,
        }
        if self.unknown_items:
            prediction["unknown_items"] = self.unknown_items
        return prediction


class Transformer(JsonModel):
    """Answers the public contract."""

    def __init__(
        self,
        settings: ServeSettings,
        open_reader: Callable[[], Reader],
        predictors: Predictors | None = None,
    ) -> None:
        super().__init__(settings)
        self._predictors = predictors or PredictorClient(settings)
        self._features = Features(open_reader, settings, self._predictors.trend)
        self._coverage = Coverage()

    def load(self) -> bool:
        """Connect to the feature store and read the trend; a store that is down is no error."""
        self._features.prepare()
        self.ready = True
        return True

    async def open(self) -> None:
        await self._predictors.open()
        await self._features.open()

    async def close(self) -> None:
        await self._features.close()
        await self._predictors.close()

    async def answer(self, instances: list[Any], record: metrics.RequestRecord) -> list[Any]:
        parsed = parse_instances(instances, self.settings)
        tasks = {instance.task for instance in parsed}
        record.task = tasks.pop() if len(tasks) == 1 else "mixed"
        with metrics.stage("features"):
            users = await self._read_users(parsed)
        trend, trend_problem = self._features.trend()  # one snapshot for the whole answer
        works = []
        for instance in parsed:
            features = users.get(instance.user_id) if instance.user_id is not None else None
            # Values do not depend on the trend.
            degraded = [trend_problem] if trend_problem and instance.task != "rate" else []
            if instance.user_id is not None and features is None:
                degraded.append(FEATURES_UNAVAILABLE)
            works.append(Work(instance, features, trend, degraded, self.settings))
        await self._rank(works)
        predictions = [work.prediction() for work in works]
        for work in works:
            metrics.UNKNOWN_ITEMS.inc(work.unknown_items)
            if work.instance.task != "rate":
                metrics.ITEMS.inc(work.num_items)
                metrics.EXPLORED.inc(work.explored)
                if self.settings.exploration_log and work.drawn:
                    work.log_exploration()
            if work.instance.task == "recommend":
                self._coverage.served(work.item_ids, trend)
            if work.misfit:
                metrics.FEATURE_ERRORS.labels("user", "bad_row").inc()
            for reason in work.degraded:
                metrics.FALLBACKS.labels(reason).inc()
                record.degraded = True
            if work.bundle_version is not None:
                record.version = work.bundle_version
                metrics.set_model_version(work.bundle_version)
        return predictions

    async def _read_users(self, instances: Sequence[Instance]) -> dict[str, UserFeatures]:
        """Features by user id; users that could not be read are absent."""
        ids = list(dict.fromkeys(i.user_id for i in instances if i.user_id is not None))
        if not ids:
            return {}
        found = await asyncio.gather(*map(self._features.user, ids), return_exceptions=True)
        users = {}
        for user_id, features in zip(ids, found, strict=True):
            if isinstance(features, UnavailableError):
                continue
            if isinstance(features, BaseException):
                raise features
            users[user_id] = features
            if not features.known:
                metrics.NEW_USERS.inc()
        return users

    async def _rank(self, works: Sequence[Work]) -> None:
        """Advance all instances in lockstep, one question to the predictor per round."""
        deadline = time.monotonic() + self.settings.predictor_deadline_seconds
        pending = list(works)
        try:
            while pending:
                with metrics.stage("predictor"):
                    answers = await self._predictors.score(
                        [work.ask() for work in pending], deadline - time.monotonic()
                    )
                with metrics.stage("ranking"):
                    for work, answer in zip(pending, answers, strict=True):
                        if isinstance(answer, InputError):
                            if work.without_stored_fields(answer):
                                continue
                            raise InputError(f"instances[{works.index(work)}].{answer}")
                        work.tell(answer)
                        if work.answered and work.instance.task == "recommend":
                            metrics.ROUNDS.observe(work.rounds)
                pending = [work for work in pending if not work.answered]
        except PredictorError:
            self._fall_back(pending)
        except AnswerError:
            metrics.PREDICTOR_ERRORS.labels("invalid_answer").inc()
            self._fall_back([work for work in pending if not work.answered])

    def _fall_back(self, pending: Sequence[Work]) -> None:
        for work in pending:
            if work.trend.version is None:
                raise UnavailableError(
                    "neither the predictor nor a trend snapshot is available; try again"
                )
            work.fall_back()


def build(settings: ServeSettings) -> Transformer:
    """A transformer on the configured feature store, ready to serve."""
    if not settings.feature_root:
        raise InputError("no feature store: give --feature-root, the folder `hrnn run` filled")
    root = settings.feature_root

    def open_reader() -> Reader:
        mode = os.environ.get(MULTIPROCESS)
        from feature_repo.store import FeatureReader, FeatureStoreSettings  # slow to import

        reader: Reader = FeatureReader(
            FeatureStoreSettings(
                root=root,
                online=settings.online_store,
                redis_url=settings.redis_url,
                registry_url=settings.registry_url,
            )
        )
        if mode is None:  # Feast has set it, and prometheus-client would warn at every turn
            os.environ.pop(MULTIPROCESS, None)
        freeze_garbage_collection()
        return reader

    # Many lines of a thousand items are not to hold up the event loop, nor is a slow reader.
    log_in_background(exploration_log, metrics.EXPLORATION_LINES_DROPPED.inc)
    transformer = Transformer(settings, open_reader)
    transformer.load()
    return transformer


if __name__ == "__main__":
    leave(main(TRANSFORMER, build))
