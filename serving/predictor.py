"""The predictor: histories in, affinities φ̃ of the best candidates, or predicted values, out.

Shapes: B instances, M items, C candidates.
"""

import asyncio
import contextlib
import logging
import os
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from model.errors import BundleError, HrnnError, InputError, UnavailableError
from model.query import Event, FieldValue, History, Query
from model.trends import TrendSnapshot
from serving import metrics
from serving.batching import Batcher
from serving.champions import Champions
from serving.exploration import uncertainty, uniform
from serving.live_items import ItemFeed
from serving.process import freeze_garbage_collection, leave, log_failure
from serving.schemas import ScoreInstance, parse_score_instances
from serving.server import JsonModel, main
from serving.settings import PREDICTOR, ServeSettings
from serving.wire import (
    Asked,
    ItemList,
    Limits,
    Part,
    Scored,
    read_asks,
    write_answers,
    write_missing,
)

if TYPE_CHECKING:  # imports torch
    from model.recommender import Retrieved
    from model.retrieval import Allowed

log = logging.getLogger("hrnn.serving")

ITEMS_RETRY_SECONDS = 10.0  # at most, while new items cannot be served
BUILD_SHARE = 10  # a build with new items is followed by a pause so many times as long
RATED_AT_ONCE = 20_000  # items over a batch; each takes 1.5 kB or so
MOST_TOGETHER = 64  # by one use of the model: what so many ordinary questions cost
# What costs as much as an ordinary question does, besides it.
MORE_EVENTS = 200
MORE_ITEMS = 500  # to be scored by name, or rated
MORE_RESULTS = 500
MORE_CELLS = 2**17  # of numbers or truth values for every item, as exploration and filters need
LISTS_KEPT = 8  # of trending items: those of the transformers there are, old and new
MAX_LIST = 1_000_000
# Before a swap the new model reads the histories that the old one has read last, so many at once,
# each time followed by a pause so many times as long: answers go on meanwhile.
READ_TOGETHER = 8
READ_PAUSE = 2.0
TAKE_OVER_SECONDS = 10.0  # at most; who is not read by then is read when he asks


class Scorer(Protocol):
    """What the predictor needs of model.recommender.Recommender."""

    version: str
    item_ids: tuple[str, ...]
    recall: float
    trend: TrendSnapshot

    @property
    def rates(self) -> bool: ...
    def beta_under(
        self, item_ids: Sequence[str], log_q_T: NDArray[np.float64], floor: float
    ) -> float: ...
    def unknown(self, item_ids: Sequence[str]) -> int: ...
    def check(self, query: Query) -> None: ...
    def restriction(self, query: Query) -> "Allowed": ...
    def passing(self, restriction: "Allowed", items: Sequence[str]) -> list[str]: ...
    def asks(
        self,
        queries: Sequence[Query],
        restrictions: Sequence["Allowed"],
        top_n: Sequence[int],
        extras: Sequence[NDArray[np.float64] | None],
    ) -> Sequence[Any]: ...
    def listed(self, item_ids: Sequence[str]) -> Any: ...
    def retrieve(
        self, asks: Sequence[Any], items: Sequence[Sequence[str]], lists: Sequence[Any]
    ) -> "Sequence[Retrieved]": ...
    def rate(
        self, queries: Sequence[Query], items: Sequence[Sequence[str]]
    ) -> list[list[tuple[str, float]]]: ...
    def readable(
        self, items: Mapping[str, Mapping[str, FieldValue]]
    ) -> tuple[dict[str, Mapping[str, FieldValue]], int]: ...
    def with_items(self, items: Mapping[str, Mapping[str, FieldValue]]) -> "Scorer": ...
    def recent(self) -> Sequence[Any]: ...
    def forget_old(self) -> None: ...
    def prepare_filters(self) -> None: ...
    def read_ahead(self, recent: Sequence[Any]) -> None: ...


@dataclass(frozen=True)
class _Prepared:
    """A list of trending items as one model reads it."""

    beta: float  # while this is the trend
    list_items: Callable[[], Any]  # Scorer.listed: large, and not every question needs it

    @cached_property
    def listed(self) -> Any:
        """The items, ready to be scored."""
        return self.list_items()


class LoadedModel:
    """One model version, ready to answer; never changes, so that threads can share it."""

    def __init__(self, scorer: Scorer, revision: str = "") -> None:
        """
        Args:
            revision: of the items that it has besides those of its bundle.
        """
        self.bundle_version = scorer.version
        # Answers of models that differ in items must not be mixed either.
        self.version = f"{scorer.version}+{revision}" if revision else scorer.version
        self.scorer = self._scorer = scorer
        self._sigma_M = uncertainty(scorer.trend, scorer.item_ids)
        trend = scorer.trend
        self._own_beta = scorer.beta_under(trend.item_ids, trend.log_q, trend.floor)
        self._lists: OrderedDict[str, _Prepared] = OrderedDict()
        self._list_sigmas: OrderedDict[str, NDArray[np.float64]] = OrderedDict()
        scorer.prepare_filters()
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every path once, so that the first request finds no cold one.

        Raises:
            BundleError: an answer is not finite.
        """
        if not np.isfinite(self._own_beta):
            raise self._not_finite("values of β")
        items = self._scorer.item_ids
        history = [Event(items[i % len(items)], float(i)) for i in range(100)] if items else []
        queries = [
            Query(history=[], timestamp=0.0),
            Query(history=history[:1], timestamp=1000.0),
            Query(history=history, timestamp=1000.0, exclude_seen=True),
        ]
        trending = self._scorer.listed(self._scorer.trend.item_ids)
        # Few results and many are searched for in different ways, as are few queries and many.
        for batch, top_n in (
            (queries[:1], 25),
            (queries[2:], 256),
            (queries, 25),
            (queries * 5, 25),
            (queries * 5, 256),
        ):
            restrictions = [self._scorer.restriction(query) for query in batch]
            more = [items[:10]] * len(batch)
            asks = self._scorer.asks(batch, restrictions, [top_n] * len(batch), [None] * len(batch))
            found = self._scorer.retrieve(asks, more, [trending] * len(batch))
            for query, best in zip(batch, found, strict=True):
                scores = [best.affinity_C]
                if not query.exclude_seen:  # NaN: not allowed
                    scores.append(best.affinity_A)
                if not np.isfinite(np.concatenate(scores)).all():
                    raise self._not_finite("scores")
            if self._scorer.rates:
                rated = self._scorer.rate(batch, more)
                if not np.isfinite([value for values in rated for _, value in values]).all():
                    raise self._not_finite("predicted values")

    def _not_finite(self, what: str) -> BundleError:
        return BundleError(
            f"model {self.version}: its {what} are not finite although its weights are, which are "
            "too large to calculate with; train it again"
        )

    def prepare(self, lists: Iterable[ItemList]) -> None:
        """Have trending items ready before anybody asks for them; not while it is in use."""
        for items in lists:
            prepared = self._prepared(Part(items, 0, len(items)))
            if prepared is not None and len(items):
                _ = prepared.listed

    def read_as(self, before: "LoadedModel") -> None:
        """Read the histories that another model has read last, while that one is in use.

        A model without states would read every user's history anew in the seconds after a swap.

        Raises:
            Exception: of a whole number of histories read together not one can be read.
        """
        recent = before.scorer.recent()
        end = time.monotonic() + TAKE_OVER_SECONDS
        failed = 0
        for start in range(0, len(recent), READ_TOGETHER):
            began = time.monotonic()
            errors = self._read_ahead(recent[start : start + READ_TOGETHER])
            if len(errors) == READ_TOGETHER:
                raise errors[0]
            if errors and not failed:  # once: the others will be alike
                log_failure(errors[0])
            failed += len(errors)
            now = time.monotonic()
            if now > end:
                log.info("%d of %d recent histories read ahead", start + READ_TOGETHER, len(recent))
                break
            time.sleep(READ_PAUSE * (now - began))
        if failed:
            log.error("%d of %d recent histories could not be read ahead", failed, len(recent))

    def _read_ahead(self, recent: Sequence[Any]) -> list[Exception]:
        """Read some; why those that could not be read could not."""
        try:
            self._scorer.read_ahead(recent)
        except Exception as error:
            if len(recent) == 1:
                return [error]
            return [one for history in recent for one in self._read_ahead([history])]
        return []

    def score(self, asked: Sequence[Asked]) -> list[Scored | InputError]:
        """One answer per question, or why the model cannot read it or do what it asks for."""
        answers: list[Scored | InputError | None] = [None] * len(asked)
        restrictions: dict[int, Allowed] = {}
        for b, one in enumerate(asked):
            try:
                self._scorer.check(one.query)
                restrictions[b] = self._scorer.restriction(one.query)
                if one.task == "rate" and not self._scorer.rates:
                    raise InputError(
                        "task: this model cannot rate: the log it was trained on has no event "
                        "values, or all are the same"
                    )
            except InputError as error:
                answers[b] = error
        good = [b for b in range(len(asked)) if answers[b] is None]
        scored = [b for b in good if asked[b].task == "score"]
        rated = [b for b in good if asked[b].task == "rate"]
        with metrics.stage("model"):
            asks = self._scorer.asks(
                [asked[b].query for b in scored],
                [restrictions[b] for b in scored],
                [asked[b].top_n for b in scored],
                [self._bonus(asked[b]) for b in scored],
            )
            passing = [self._scorer.passing(restrictions[b], asked[b].items) for b in rated]
            values = self._rate([asked[b].query for b in rated], passing)
        lists = [self._prepared(asked[b].part) for b in scored]
        with metrics.stage("candidates"):
            found = self._scorer.retrieve(
                asks,
                [asked[b].items for b in scored],
                [
                    None if one is None or not asked[b].part else one.listed
                    for b, one in zip(scored, lists, strict=True)
                ],
            )
        for b, best, prepared in zip(scored, found, lists, strict=True):
            answers[b] = self._scored(asked[b], best, prepared)
        for b, value in zip(rated, values, strict=True):
            by_item = dict(value)
            value_A = np.array([by_item.get(item, np.nan) for item in asked[b].items])
            answers[b] = replace(self._empty(asked[b]), affinity_A=value_A)
        for b in good:
            if asked[b].task == "trend":
                answers[b] = replace(self._empty(asked[b]), trend=self._scorer.trend.to_json())
        return [answer for answer in answers if answer is not None]

    def _prepared(self, part: Part | None) -> "_Prepared | None":
        """The list that a part is asked of, prepared for this model; the last few are kept."""
        if part is None:
            return None
        items = part.of
        name = items.name
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = _Prepared(
                self._scorer.beta_under(items.item_ids, items.log_q_T, items.floor),
                partial(self._scorer.listed, items.item_ids),
            )
            while len(self._lists) > LISTS_KEPT:
                self._lists.popitem(last=False)
        else:
            self._lists.move_to_end(name)
        return found

    def _scored(self, asked: Asked, best: "Retrieved", prepared: "_Prepared | None") -> Scored:
        part = slice(0) if asked.part is None else slice(asked.part.first, asked.part.end)
        scored = Scored(
            self.version,
            self._own_beta if prepared is None else prepared.beta,
            best.item_ids,
            best.affinity_C,
            best.affinity_A,
            best.affinity_T[part],
            exhausted=best.exhausted,
            unknown_items=self._scorer.unknown(History.of(asked.query.history).item_ids),
            unknown_asked=self._scorer.unknown(asked.items),
        )
        if best.extra_T is None:
            return scored
        return replace(
            scored,
            extra_C=best.extra_C,
            extra_A=best.extra_A,
            extra_T=best.extra_T[part],
            limit_C=asked.exploration_weight * self._sigma(best.item_ids),
            limit_A=asked.exploration_weight * self._sigma(asked.items),
            limit_T=asked.exploration_weight * self._sigma_of(asked.part),
        )

    def _sigma(self, item_ids: Sequence[str]) -> NDArray[np.float64]:
        """σ of some items; 0 for those that the model does not know."""
        ids, sigma_M = self._scorer.item_ids, self._sigma_M  # in ascending order
        places = [(i, bisect_left(ids, i)) for i in item_ids]
        found = (sigma_M[j] if j < len(ids) and ids[j] == i else 0.0 for i, j in places)
        return np.fromiter(found, np.float64, len(places))

    def _empty(self, asked: Asked) -> Scored:
        return Scored(
            self.version,
            self._own_beta,
            [],
            unknown_items=self._scorer.unknown(History.of(asked.query.history).item_ids),
            unknown_asked=self._scorer.unknown(asked.items),
        )

    def _sigma_of(self, part: Part | None) -> NDArray[np.float64]:
        """σ of a part of a list; the whole list's is kept."""
        if part is None:
            return np.empty(0)
        sigma_T = self._list_sigmas.get(part.of.name)
        if sigma_T is None:
            sigma_T = self._list_sigmas[part.of.name] = self._sigma(part.of.item_ids)
            while len(self._list_sigmas) > LISTS_KEPT:
                self._list_sigmas.popitem(last=False)
        return sigma_T[part.first : part.end]

    def _rate(
        self, queries: Sequence[Query], items: Sequence[Sequence[str]]
    ) -> list[list[tuple[str, float]]]:
        """Values of each query's items; as many queries together as fit, one at least."""
        values: list[list[tuple[str, float]]] = []
        while len(values) < len(queries):
            start = len(values)
            total = np.cumsum([len(ids) for ids in items[start:]])
            end = start + max(1, int(np.searchsorted(total, RATED_AT_ONCE, side="right")))
            values += self._scorer.rate(queries[start:end], items[start:end])
        return values

    def _bonus(self, asked: Asked) -> NDArray[np.float64] | None:
        """What exploration adds to each item `[M]`; None if the question does not explore."""
        if asked.exploration_weight == 0:
            return None
        uniform_M = uniform(asked.seed, len(self._sigma_M))
        return asked.exploration_weight * self._sigma_M * uniform_M


Call = Sequence[tuple[LoadedModel, Asked]]
Answers = list[Scored | InputError]


class Predictor(JsonModel):
    """Answers candidate questions of the transformer with one model version per answer.

    It follows the model store: a new champion is loaded, verified and warmed up in the background
    and then swapped in. One that cannot be used is refused, and the model in use stays. With
    `items_url` it follows the event log's items likewise, and serves those it was not trained on.
    """

    def __init__(self, settings: ServeSettings, scorer: Scorer | None = None) -> None:
        super().__init__(settings)
        # One thread: PyTorch gains nothing from two requests at once, and the event loop
        # stays free for health checks.
        threads = (settings.model_threads,)
        self._executor = ThreadPoolExecutor(1, "model", keep_to_threads, threads)
        self._loader = ThreadPoolExecutor(1, "loader", keep_to_threads, threads)
        self._champions: Champions[LoadedModel] | None = None
        self._feed: ItemFeed | None = None
        self._followers: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()  # one after the other: champions, items
        self._models: tuple[LoadedModel, ...] = ()  # the one in use, then the one before it
        # What callers ask for at the same time is answered by one use of the model.
        self._uses: Batcher[Call, Answers] = Batcher(
            self._score_all, most=MOST_TOGETHER, size=_cost
        )
        self._lists: OrderedDict[str, ItemList] = OrderedDict()
        self._limits = Limits(
            settings.max_instances, settings.max_history, settings.max_items, MAX_LIST
        )
        if scorer is not None:
            self._use(LoadedModel(scorer))

    @property
    def version(self) -> str:
        """Of the model in use, as its bundle says."""
        return self._models[0].bundle_version

    def load(self) -> bool:
        """Load and warm up the bundle that the settings name.

        Raises:
            InputError: no model directory is set.
            BundleError: there is none, or it cannot be used.
            UnavailableError: the model store cannot be read.
        """
        if self.settings.model_dir is None:
            raise InputError("no model: give --model-dir, a bundle or a model store")
        import model.recommender  # noqa: F401 - slow to import, and to be frozen

        keep_to_threads(self.settings.model_threads)
        freeze_garbage_collection()  # before the first model: one that is replaced is to be freed
        metrics.set_canary(os.environ.get("HRNN_CANARY", ""))
        load = partial(load_model, settings=self.settings)
        self._champions = Champions(self.settings.model_dir, load)
        loaded = self._champions.first()
        if self.settings.items_url is not None:
            self._feed = ItemFeed(
                self.settings.items_url,
                self.settings.items_deadline_seconds,
                self.settings.max_live_items,
            )
            loaded = self._with_known_items(self._feed, loaded)
        self._use(loaded)
        return True

    def _use(self, model: LoadedModel) -> None:
        self._models = (model, *self._models[:1])
        metrics.set_model_version(model.bundle_version)
        metrics.RETRIEVAL_RECALL.set(model.scorer.recall)
        self.ready = True

    def _swap(self, model: LoadedModel) -> None:
        before = self._models[0]
        self._use(model)
        # Searches of several rounds end with the version that they began with.
        wait = 2 * self.settings.predictor_deadline_seconds
        asyncio.get_running_loop().call_later(wait, self._forget, before)

    async def open(self) -> None:
        """Follow the model store and the new items from now on."""
        if self._champions is not None:
            self._followers.append(asyncio.create_task(self._follow_store(self._champions)))
        if self._feed is not None:
            self._followers.append(asyncio.create_task(self._follow_items(self._feed)))

    async def close(self) -> None:
        for task in self._followers:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._uses.close()
        for executor in (self._executor, self._loader):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._champions is not None:
            self._champions.close()

    async def _follow_store(self, champions: Champions[LoadedModel]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.model_refresh_seconds)
            self._models[0].scorer.forget_old()
            async with self._changing:
                lists = list(self._lists.values())
                ready = partial(self._made_ready, before=self._models[0], lists=lists)
                before = self.version
                model = await loop.run_in_executor(self._loader, champions.next, before, ready)
                if model is None:
                    continue
                self._swap(model)
                log.info("model %s replaces %s", model.bundle_version, before)

    async def _follow_items(self, feed: ItemFeed) -> None:
        """Serve new items soon after they are known, but keep most of a core for answers."""
        loop = asyncio.get_running_loop()
        shortest, failures = self.settings.items_refresh_seconds, 0
        pause = shortest
        while True:
            await asyncio.sleep(pause)
            try:
                async with self._changing:
                    started = time.monotonic()
                    lists = list(self._lists.values())
                    model = await loop.run_in_executor(
                        self._loader, self._with_items, feed, self._models[0], False, lists
                    )
                    if model is not None:
                        self._swap(model)
            except Exception as error:
                step = "read" if isinstance(error, UnavailableError) else "build"
                metrics.ITEM_FEED_ERRORS.labels(step).inc()
                if not failures:  # once, not every few seconds
                    reason = str(error) if isinstance(error, HrnnError) else type(error).__name__
                    log.warning("new items cannot be served (%s): %s", step, reason)
                failures += 1
                pause = min(shortest * 2**failures, ITEMS_RETRY_SECONDS)
                continue
            if failures:
                log.info("new items are served again")
            failures = 0
            built = time.monotonic() - started
            pause = shortest if model is None else max(shortest, BUILD_SHARE * built)

    def _with_known_items(self, feed: ItemFeed, model: LoadedModel) -> LoadedModel:
        """Another model with the new items; without them where they cannot be built."""
        try:
            return self._with_items(feed, model, anew=True) or model
        except Exception as error:
            metrics.ITEM_FEED_ERRORS.labels("build").inc()
            log.error("new items cannot be served (build): %s", type(error).__name__)
            return model

    def _made_ready(
        self, model: LoadedModel, before: LoadedModel, lists: Sequence[ItemList]
    ) -> LoadedModel:
        """A new champion as it goes into use: with new items, and what answers would wait for.

        Blocking, in the loader's thread.
        """
        feed = self._feed
        items = {} if feed is None else dict(feed.items)
        try:
            if feed is not None:
                model = self._with_known_items(feed, model)
            model.read_as(before)
            model.prepare(lists)
        except Exception:
            if feed is not None:  # for the model that stays, again
                feed.items = items
                feed.rebase(before.scorer.readable)
            raise
        return model

    def _with_items(
        self, feed: ItemFeed, model: LoadedModel, anew: bool, lists: Iterable[ItemList] = ()
    ) -> LoadedModel | None:
        """The model with the items that are new now; None: it is up to date.

        Blocking, in the loader's thread.

        Args:
            anew: this model is not the one that the feed was read for; what is known has to do
                where the collector cannot be asked.
            lists: to be prepared.

        Raises:
            UnavailableError: the collector cannot be asked.
        """
        if anew:
            feed.rebase(model.scorer.readable)
        try:
            feed.poll(model.scorer.readable)
        except UnavailableError:
            if not anew:
                raise
            metrics.ITEM_FEED_ERRORS.labels("read").inc()
        if not feed.changed:
            return None
        started = time.perf_counter()
        extended = LoadedModel(model.scorer.with_items(feed.items), feed.revision())
        extended.prepare(lists)
        feed.changed = False
        metrics.LIVE_ITEMS_BUILD_SECONDS.set(time.perf_counter() - started)
        metrics.LIVE_ITEMS.set(len(feed.items))
        return extended

    def _forget(self, model: LoadedModel) -> None:
        self._models = tuple(m for i, m in enumerate(self._models) if i == 0 or m is not model)

    async def answer(self, instances: list[Any], record: metrics.RequestRecord) -> list[Any]:
        """The public form: JSON objects, for people and tools."""
        record.task = "score"
        parsed = parse_score_instances(instances, self.settings)
        answers = []
        scored_all = await self._in_parts([one.to_asked() for one in parsed])
        for i, (instance, scored) in enumerate(zip(parsed, scored_all, strict=True)):
            if isinstance(scored, InputError):
                raise InputError(f"instances[{i}].{scored}")
            record.version = scored.model_version
            answers.append(to_json(instance, scored))
        return answers

    async def answer_message(self, message: bytes, record: metrics.RequestRecord) -> bytes:
        """The transformer's form; see serving.wire.

        Raises:
            InputError: the message cannot be read.
        """
        record.task = "score"
        read = read_asks(message, self._limits)
        for items in read.lists:
            self._lists[items.name] = items
        answers: list[Scored | InputError | None] = []
        asked, missing = [], set()
        for one, part in zip(read.asked, read.parts, strict=True):
            if isinstance(one, InputError):
                answers.append(one)
                continue
            if part is not None:
                name, first, end = part
                items_or_none = self._lists.get(name)
                if items_or_none is None:
                    missing.add(name)
                    continue
                self._lists.move_to_end(name)
                if not first <= end <= len(items_or_none):
                    answers.append(InputError("part: reaches beyond its list"))
                    continue
                one = replace(one, part=Part(items_or_none, first, end))
            answers.append(None)
            asked.append(one)
        while len(self._lists) > LISTS_KEPT:
            self._lists.popitem(last=False)
        if missing:
            return write_missing(sorted(missing))
        scored = iter(await self._in_parts(asked))
        whole = [next(scored) if answer is None else answer for answer in answers]
        metrics.INSTANCES.observe(len(whole))
        return write_answers(whole)

    async def _in_parts(self, asked: Sequence[Asked]) -> list[Scored | InputError]:
        """Answers part by part: between them others get their turn.

        Each question's model is the one that its search began with if that is still there, else
        the newest, and stays the same whatever is loaded meanwhile. Whoever is cancelled has the
        rest not worked on.
        """
        newest = self._models[0]
        versions = {model.version: model for model in self._models}
        call = [(versions.get(one.model_version or "", newest), one) for one in asked]
        answers: list[Scored | InputError] = []
        while len(answers) < len(call):
            part: list[tuple[LoadedModel, Asked]] = []
            cost = 0
            for use in islice(call, len(answers), None):
                cost += _cost([use])
                if part and cost > MOST_TOGETHER:
                    break
                part.append(use)
            answers += await self._uses.ask(part)
        return answers

    async def _score_all(self, calls: Sequence[Call]) -> Sequence[Answers | Exception]:
        """Answer several calls by one use of each model version that they need."""
        metrics.CALLS_TOGETHER.observe(len(calls))
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, _score_all, calls)
        except Exception:
            if len(calls) == 1:
                raise

        async def alone(call: Call) -> Answers | Exception:
            try:
                (answer,) = await loop.run_in_executor(self._executor, _score_all, [call])
            except Exception as error:
                return error
            return answer

        # One of them fails; the others were only asked at the same time.
        return await asyncio.gather(*map(alone, calls))


def _cost(call: Call) -> int:
    """What a call costs its models, in ordinary questions."""
    return sum(_cost_of(asked, len(model.scorer.item_ids)) for model, asked in call)


def _cost_of(asked: Asked, num_items: int) -> int:
    """What a question costs the model, in ordinary ones."""
    query = asked.query
    every_item = int(asked.exploration_weight != 0) * 8 + len(query.filter.where)
    return (
        1
        + len(query.history) // MORE_EVENTS
        + len(asked.items) // MORE_ITEMS
        + min(asked.top_n, num_items) // MORE_RESULTS
        + every_item * num_items // MORE_CELLS
    )


def to_json(instance: ScoreInstance, scored: Scored) -> dict[str, Any]:
    """An answer in its public form."""
    asked = {
        item: value
        for item, value in zip(instance.score_items, scored.affinity_A.tolist(), strict=False)
        if value == value  # NaN: unknown or not allowed
    }
    answer = {
        "item_ids": scored.item_ids,
        "affinities": scored.affinity_C.tolist(),
        "scored": {} if instance.task == "rate" else asked,
        "values": asked if instance.task == "rate" else {},
        "exhausted": scored.exhausted,
        "beta": scored.beta,
        "model_version": scored.model_version,
        "unknown_items": scored.unknown_items,
        "unknown_score_items": scored.unknown_asked,
    }
    if scored.extra_C is not None and scored.extra_A is not None:
        answer["bonus"] = dict(zip(scored.item_ids, scored.extra_C.tolist(), strict=True)) | {
            item: bonus
            for item, bonus in zip(instance.score_items, scored.extra_A.tolist(), strict=True)
            if item in asked
        }
    if scored.trend is not None:
        answer["trend"] = scored.trend
    return answer


def _score_all(calls: Sequence[Call]) -> list[Answers]:
    """Every question by its model; those of the same model together."""
    together = [use for call in calls for use in call]
    answers: list[Scored | InputError | None] = [None] * len(together)
    members: dict[int, list[int]] = {}
    for b, (model, _) in enumerate(together):
        members.setdefault(id(model), []).append(b)
    for some in members.values():
        model = together[some[0]][0]
        for b, answer in zip(some, model.score([together[b][1] for b in some]), strict=True):
            answers[b] = answer
    all_answers = iter(answers)
    return [[a for a in islice(all_answers, len(call)) if a is not None] for call in calls]


def keep_to_threads(number: int) -> None:
    """Let the calling thread's matrix products use so many threads.

    OpenMP keeps the number per calling thread: one that did not ask for its own gets all cores,
    and on a busy machine a product of microseconds then waits for milliseconds until the last of
    them has been given time.
    """
    import torch

    threadpoolctl.threadpool_limits(number)
    torch.set_num_threads(number)


def load_model(path: Path, settings: ServeSettings) -> LoadedModel:
    """Verify, load and warm up a bundle.

    Raises:
        BundleError: it is missing, corrupt, foreign, or fails in the warm-up.
        InputError: an approximate index is asked for, and faiss is not installed.
    """
    from model.recommender import Recommender

    start = time.perf_counter()
    recommender = Recommender.load(path)
    approximate = settings.retrieval_recall < 1
    if approximate and len(recommender.item_ids) >= settings.approximate_from:
        recommender.approximate(settings.retrieval_recall)
    try:
        loaded = LoadedModel(recommender)
    except (InputError, RuntimeError, ValueError, LookupError) as error:
        raise BundleError(f"{path} fails when it is used: {error}") from error
    seconds = time.perf_counter() - start
    metrics.BUNDLE_LOAD_SECONDS.set(seconds)
    log.info("loaded model %s in %.2f s", loaded.version, seconds)
    return loaded


def build(settings: ServeSettings) -> Predictor:
    """A predictor, loaded and warm."""
    predictor = Predictor(settings)
    predictor.load()
    return predictor


if __name__ == "__main__":
    leave(main(PREDICTOR, build))
