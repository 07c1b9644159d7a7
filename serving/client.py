"""A typed client of the service's V1 contract."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from model.errors import HrnnError, InputError, UnavailableError
from model.query import Event, FieldValue, ItemFilter, Recommendation
from serving.schemas import Prediction as PredictionSchema
from serving.schemas import RecommendedItem

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Rating:
    """The value predicted for an item."""

    item_id: str
    value: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer: items best first. `degraded` names what the service had to do without.

    `model_version` is None when the predictor did not answer, `trend_version` when there was
    no trend snapshot or none was needed. Task rate answers in `ratings` instead of `items`.
    """

    recommendation_id: str
    model_version: str | None
    trend_version: str | None
    degraded: tuple[str, ...]
    items: tuple[Recommendation, ...]
    unknown_items: int = 0
    ratings: tuple[Rating, ...] = ()


class Client:
    """Asks a running transformer; a context manager, safe to share between threads."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8080",
        model_name: str = "hrnn-meta",
        timeout: float = 5.0,
    ) -> None:
        """
        Args:
            url: the transformer's address.
            timeout: seconds for one call.
        """
        self._url = url.rstrip("/")
        self._path = f"/v1/models/{model_name}:predict"
        # The service is close by: a proxy from the environment would only be in the way.
        self._http = httpx.Client(base_url=self._url, timeout=timeout, trust_env=False)

    def recommend(
        self,
        user_id: str | None = None,
        *,
        num_results: int | None = None,
        timestamp: float | None = None,
        history: Sequence[Event] | None = None,
        user: Mapping[str, FieldValue] | None = None,
        context: Mapping[str, FieldValue] | None = None,
        item_filter: ItemFilter | None = None,
        exclude_seen: bool = False,
        trend_weight: float = 1.0,
        exploration_weight: float = 0.0,
    ) -> Prediction:
        """The best items for a user at a moment.

        Args:
            timestamp: request time, Unix seconds; None: now.
            history: replaces the stored one.
            user: fields; override the stored ones.
            context: fields of the request, such as the device.
            exploration_weight: of a random bonus for items of which little is known.

        Raises:
            InputError: the service refused the request; the message names the field.
            UnavailableError: it could not be reached, or could not answer.
        """
        return self._one(
            {
                "user_id": user_id,
                "num_results": num_results,
                "timestamp": timestamp,
                "history": _events(history),
                "user": dict(user or {}),
                "context": dict(context or {}),
                "filter": _filter(item_filter),
                "exclude_seen": exclude_seen,
                "trend_weight": trend_weight,
                "exploration_weight": exploration_weight,
            }
        )

    def rank(
        self,
        items: Sequence[str],
        user_id: str | None = None,
        *,
        timestamp: float | None = None,
        history: Sequence[Event] | None = None,
        user: Mapping[str, FieldValue] | None = None,
        context: Mapping[str, FieldValue] | None = None,
        trend_weight: float = 1.0,
        exploration_weight: float = 0.0,
    ) -> Prediction:
        """Order `items` for a user; unknown ones are left out. Arguments as for `recommend`."""
        return self._one(
            {
                "task": "rank",
                "items": list(items),
                "user_id": user_id,
                "timestamp": timestamp,
                "history": _events(history),
                "user": dict(user or {}),
                "context": dict(context or {}),
                "trend_weight": trend_weight,
                "exploration_weight": exploration_weight,
            }
        )

    def rate(
        self,
        items: Sequence[str],
        user_id: str | None = None,
        *,
        timestamp: float | None = None,
        history: Sequence[Event] | None = None,
        user: Mapping[str, FieldValue] | None = None,
        context: Mapping[str, FieldValue] | None = None,
    ) -> Prediction:
        """Predict the value (a rating, say) of each of `items`, in `ratings` in the order given.

        Unknown items are left out. Arguments as for `recommend`.

        Raises:
            InputError: also when the model was trained on a log without values.
        """
        return self._one(
            {
                "task": "rate",
                "items": list(items),
                "user_id": user_id,
                "timestamp": timestamp,
                "history": _events(history),
                "user": dict(user or {}),
                "context": dict(context or {}),
            }
        )

    def predict(self, instances: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """A batch of instances as in docs/serving.md; one prediction each, in order."""
        body = {"instances": [dict(instance) for instance in instances]}
        try:
            content = json.dumps(body, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise InputError(f"the request cannot be sent as JSON: {error}") from None
        answer = self._call("POST", self._path, content=content, headers=_JSON)
        try:
            predictions = [PredictionSchema.model_validate(p) for p in answer["predictions"]]
        except (KeyError, TypeError, ValueError):
            raise UnavailableError(f"{self._url} did not answer with predictions") from None
        return [_prediction(p) for p in predictions]

    def ready(self) -> bool:
        """Whether the transformer is reachable and ready."""
        try:
            return self._call("GET", "/v2/health/ready").get("ready") is True
        except HrnnError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _one(self, instance: dict[str, Any]) -> Prediction:
        (prediction,) = self.predict([{k: v for k, v in instance.items() if v is not None}])
        return prediction

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **arguments)
            answer = response.json()
        except httpx.TimeoutException:
            raise UnavailableError(
                f"{self._url} did not answer within {self._http.timeout.read} s"
            ) from None
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"no service at {self._url} ({error}): start one with `hrnn serve`"
            ) from None
        except ValueError:
            raise UnavailableError(f"{self._url} is not this service: no JSON answer") from None
        reason = answer.get("error", "no reason given") if isinstance(answer, dict) else "?"
        if 400 <= response.status_code < 500:
            raise InputError(f"the service refused the request: {reason}")
        if response.status_code != 200:
            raise UnavailableError(
                f"the service could not answer (HTTP {response.status_code}): {reason}"
            )
        if not isinstance(answer, dict):
            raise UnavailableError(f"{self._url} is not this service")
        return answer


def _prediction(p: PredictionSchema) -> Prediction:
    items, ratings = [], []
    for item in p.items:
        if isinstance(item, RecommendedItem):
            items.append(Recommendation(**item.model_dump()))
        else:
            ratings.append(Rating(item.item_id, item.value))
    return Prediction(
        recommendation_id=p.recommendation_id,
        model_version=p.model_version,
        trend_version=p.trend_version,
        degraded=tuple(p.degraded),
        items=tuple(items),
        unknown_items=p.unknown_items,
        ratings=tuple(ratings),
    )


def _events(history: Sequence[Event] | None) -> list[dict[str, Any]] | None:
    if history is None:
        return None
    return [{k: v for k, v in asdict(e).items() if v is not None} for e in history]


def _filter(item_filter: ItemFilter | None) -> dict[str, Any] | None:
    if item_filter is None:
        return None
    values: dict[str, Any] = {
        "exclude": sorted(item_filter.exclude),
        "where": {name: sorted(values) for name, values in item_filter.where.items()},
    }
    if item_filter.include is not None:
        values["include"] = sorted(item_filter.include)
    return values
