"""The predictor: histories in, affinities φ̃ of the best candidates, or predicted values, out.

Shapes: B instances, M items, C candidates.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from model.errors import BundleError, InputError
from model.query import Event, Query
from model.trends import TrendSnapshot
from serving import metrics
from serving.champions import Champions
from serving.exploration import uncertainty, uniform
from serving.process import leave
from serving.schemas import ScoreInstance, parse_score_instances
from serving.server import JsonModel, main
from serving.settings import PREDICTOR, ServeSettings

if TYPE_CHECKING:  # imports torch
    from model.retrieval import Allowed

log = logging.getLogger("hrnn.serving")

RATED_AT_ONCE = 20_000  # items over a batch; each takes 1.5 kB or so


class Retrieved(Protocol):
    """What the predictor reads of model.recommender.Retrieved."""

    @property
    def item_ids(self) -> list[str]: ...
    @property
    def affinities(self) -> list[float]: ...
    @property
    def scored(self) -> dict[str, float]: ...
    @property
    def exhausted(self) -> bool: ...
    @property
    def extra(self) -> dict[str, float]: ...


class Scorer(Protocol):
    """What the predictor needs of model.recommender.Recommender."""

    version: str
    item_ids: tuple[str, ...]
    beta: float
    trend: TrendSnapshot

    @property
    def rates(self) -> bool: ...
    def knows(self, item_id: str) -> bool: ...
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
    def retrieve(
        self, asks: Sequence[Any], items: Sequence[Sequence[str]]
    ) -> Sequence[Retrieved]: ...
    def rate(
        self, queries: Sequence[Query], items: Sequence[Sequence[str]]
    ) -> list[list[tuple[str, float]]]: ...


class LoadedModel:
    """One model version, ready to answer; never changes, so that threads can share it."""

    def __init__(self, scorer: Scorer) -> None:
        self.version = scorer.version
        self._scorer = scorer
        self._sigma_M = uncertainty(scorer.trend, scorer.item_ids)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every path once, so that the first request finds no cold one."""
        items = self._scorer.item_ids
        history = [Event(items[i % len(items)], float(i)) for i in range(100)] if items else []
        queries = [
            Query(history=[], timestamp=0.0),
            Query(history=history[:1], timestamp=1000.0),
            Query(history=history, timestamp=1000.0, exclude_seen=True),
        ]
        for batch in (queries[:1], queries[2:], queries, queries * 5):
            restrictions = [self._scorer.restriction(query) for query in batch]
            more = [items[:10]] * len(batch)
            asks = self._scorer.asks(batch, restrictions, [256] * len(batch), [None] * len(batch))
            self._scorer.retrieve(asks, more)
            if self._scorer.rates:
                self._scorer.rate(batch, more)

    def score(self, instances: Sequence[ScoreInstance]) -> list[dict[str, Any]]:
        """One answer per instance.

        Raises:
            InputError: the model cannot read an instance, or cannot do what it asks for.
        """
        queries = [instance.to_query() for instance in instances]
        restrictions = []
        for i, (instance, query) in enumerate(zip(instances, queries, strict=True)):
            try:
                self._scorer.check(query)
                restrictions.append(self._scorer.restriction(query))
            except InputError as error:
                raise InputError(f"instances[{i}].{error}") from None
            if instance.task == "rate" and not self._scorer.rates:
                raise InputError(
                    f"instances[{i}].task: this model cannot rate: the log it was trained on has "
                    "no event values, or all are the same"
                )
        answers = [self._answer(*one) for one in zip(instances, queries, strict=True)]
        scored = [b for b, instance in enumerate(instances) if instance.task == "score"]
        rated = [b for b, instance in enumerate(instances) if instance.task == "rate"]
        with metrics.stage("model"):
            asks = self._scorer.asks(
                [queries[b] for b in scored],
                [restrictions[b] for b in scored],
                [instances[b].top_n for b in scored],
                [self._bonus(instances[b]) for b in scored],
            )
            asked = [self._scorer.passing(restrictions[b], instances[b].score_items) for b in rated]
            values = self._rate([queries[b] for b in rated], asked)
        with metrics.stage("candidates"):
            found = self._scorer.retrieve(asks, [instances[b].score_items for b in scored])
        for b, one in zip(scored, found, strict=True):
            answers[b] |= {
                "item_ids": one.item_ids,
                "affinities": one.affinities,
                "scored": one.scored,
                "exhausted": one.exhausted,
            }
            if one.extra:
                answers[b]["bonus"] = one.extra
        for b, value in zip(rated, values, strict=True):
            answers[b]["values"] = dict(value)
        for b, instance in enumerate(instances):
            if instance.task == "trend":
                answers[b]["trend"] = self._scorer.trend.to_json()
        return answers

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

    def _bonus(self, instance: ScoreInstance) -> NDArray[np.float64] | None:
        """What exploration adds to each item `[M]`; None if the instance does not explore."""
        if instance.exploration_weight == 0:
            return None
        uniform_M = uniform(instance.seed, len(self._sigma_M))
        return instance.exploration_weight * self._sigma_M * uniform_M

    def _answer(self, instance: ScoreInstance, query: Query) -> dict[str, Any]:
        """An answer without items yet."""
        knows = self._scorer.knows
        return {
            "item_ids": [],
            "affinities": [],
            "scored": {},
            "values": {},
            "exhausted": False,
            "beta": self._scorer.beta,
            "model_version": self._scorer.version,
            "unknown_items": sum(not knows(e.item_id) for e in query.history),
            "unknown_score_items": sum(not knows(item) for item in instance.score_items),
        }


class Predictor(JsonModel):
    """Answers candidate questions of the transformer with one model version per answer.

    It follows the model store: a new champion is loaded, verified and warmed up in the background
    and then swapped in. One that cannot be used is refused, and the model in use stays.
    """

    def __init__(self, settings: ServeSettings, scorer: Scorer | None = None) -> None:
        super().__init__(settings)
        # One thread: PyTorch gains nothing from two requests at once, and the event loop
        # stays free for health checks.
        threads = (settings.model_threads,)
        self._executor = ThreadPoolExecutor(1, "model", keep_to_threads, threads)
        self._loader = ThreadPoolExecutor(1, "loader", keep_to_threads, threads)
        self._champions: Champions[LoadedModel] | None = None
        self._follower: asyncio.Task[None] | None = None
        self._models: tuple[LoadedModel, ...] = ()  # the one in use, then the one before it
        if scorer is not None:
            self._use(LoadedModel(scorer))

    @property
    def version(self) -> str:
        """Of the model in use."""
        return self._models[0].version

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
        # Collecting what imports made takes a tenth of a second, in the middle of a request.
        gc.collect()
        gc.freeze()
        self._champions = Champions(self.settings.model_dir, load_model)
        self._use(self._champions.first())
        return True

    def _use(self, model: LoadedModel) -> None:
        self._models = (model, *self._models[:1])
        metrics.set_model_version(model.version)
        self.ready = True

    async def open(self) -> None:
        """Follow the model store from now on."""
        if self._champions is not None:
            self._follower = asyncio.create_task(self._follow(self._champions))

    async def close(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        for executor in (self._executor, self._loader):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._champions is not None:
            self._champions.close()

    async def _follow(self, champions: Champions[LoadedModel]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.model_refresh_seconds)
            model = await loop.run_in_executor(self._loader, champions.next, self.version)
            if model is None:
                continue
            before = self._models[0]
            self._use(model)
            log.info("model %s replaces %s", model.version, before.version)
            # Searches of several rounds end with the version that they began with.
            loop.call_later(2 * self.settings.predictor_deadline_seconds, self._forget, before)

    def _forget(self, model: LoadedModel) -> None:
        self._models = tuple(m for i, m in enumerate(self._models) if i == 0 or m is not model)

    async def answer(self, instances: list[Any], record: metrics.RequestRecord) -> list[Any]:
        record.task = "score"
        parsed = parse_score_instances(instances, self.settings)
        loop = asyncio.get_running_loop()
        model = self._model(parsed)
        record.version = model.version
        return await loop.run_in_executor(self._executor, model.score, parsed)

    def _model(self, instances: Sequence[ScoreInstance]) -> LoadedModel:
        """The version that the instances began with if it is still there, else the newest."""
        wanted = {instance.model_version for instance in instances}
        return next((m for m in self._models if wanted == {m.version}), self._models[0])


def keep_to_threads(number: int) -> None:
    """Let the calling thread's matrix products use so many threads.

    OpenMP keeps the number per calling thread: one that did not ask for its own gets all cores,
    and on a busy machine a product of microseconds then waits for milliseconds until the last of
    them has been given time.
    """
    import torch

    threadpoolctl.threadpool_limits(number)
    torch.set_num_threads(number)


def load_model(path: Path) -> LoadedModel:
    """Verify, load and warm up a bundle.

    Raises:
        BundleError: it is missing, corrupt, foreign, or fails in the warm-up.
    """
    from model.recommender import Recommender

    start = time.perf_counter()
    recommender = Recommender.load(path)
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
