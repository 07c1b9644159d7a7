"""The transformer's client of the predictor: gRPC, one call for a batch, always a deadline."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import orjson

from model.errors import InputError, UnavailableError
from model.trends import TrendSnapshot
from serving import codec, metrics
from serving.guards import PUSHBACK, Breaker
from serving.kserve_api import pb, pb_grpc
from serving.ranking import AnswerError, Candidates
from serving.settings import MAX_MESSAGE_BYTES, ServeSettings


class PredictorError(UnavailableError):
    """The predictor gave no usable answer; `kind` is one of those of the metric."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"the predictor: {kind}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Scored:
    """The predictor's answer to one instance; `values` by item id, of task rate."""

    candidates: Candidates
    values: dict[str, float]
    model_version: str
    unknown_items: int
    unknown_score_items: int
    trend: dict[str, Any] | None = None  # of task trend
    bonus: dict[str, float] = field(default_factory=dict)  # in affinities


class PredictorClient:
    """Asks the predictor, unless it failed several times just now.

    Scoring changes nothing, so a call whose connection broke is repeated once, on another
    connection; a slow one is not, as that would make a slow predictor slower.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._breaker = Breaker("predictor", settings.breaker_failures, settings.breaker_seconds)
        self._channel: Any = None
        self._call: Any = None

    async def open(self) -> None:
        self._channel = grpc.aio.insecure_channel(
            self._settings.predictor_address,
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # All addresses of a headless service, not the first alone.
                ("grpc.lb_policy_name", "round_robin"),
                # A predictor that is back is used at once (by default after up to 2 minutes).
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 1000),  # time for one attempt to connect
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.enable_retries", 0),
            ],
        )
        self._call = pb_grpc.GRPCInferenceServiceStub(self._channel).ModelInfer

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def score(self, instances: Sequence[dict[str, Any]], timeout: float) -> list[Scored]:
        """One answer per instance.

        Args:
            timeout: seconds left for this call.

        Raises:
            InputError: the predictor refused an instance, e.g. an unknown filter field.
            PredictorError: it did not answer in time, or not sensibly.
        """
        if not self._breaker.allows():
            metrics.PREDICTOR_ERRORS.labels("open_circuit").inc()
            raise PredictorError("open_circuit")
        try:
            answers = await self._ask(instances, time.monotonic() + timeout)
        except InputError:
            self._breaker.succeeded()
            raise
        except PredictorError as failure:
            metrics.PREDICTOR_ERRORS.labels(failure.kind).inc()
            if failure.kind == "overloaded":  # alive; and asking less is the transformer's own gate
                self._breaker.succeeded()
            else:
                self._breaker.failed()
            raise
        except BaseException:
            self._breaker.gave_up()
            raise
        self._breaker.succeeded()
        return answers

    async def trend(self, timeout: float) -> TrendSnapshot:
        """The snapshot that the predictor's model was trained with.

        Raises:
            PredictorError: as for `score`.
        """
        ask = {"task": "trend", "timestamp": 0.0, "top_n": 0}
        (scored,) = await self._ask([ask], time.monotonic() + timeout)  # no user waits for it
        try:
            return TrendSnapshot.from_json(scored.trend or {})
        except (KeyError, TypeError, ValueError):
            raise PredictorError("invalid_answer") from None

    async def _ask(self, instances: Sequence[dict[str, Any]], deadline: float) -> list[Scored]:
        """One call, and another one if the connection broke.

        Args:
            deadline: in monotonic seconds.
        """
        request = pb.ModelInferRequest(
            model_name=self._settings.model_name,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name=codec.INPUT,
                    datatype="BYTES",
                    shape=[len(instances)],
                    contents=pb.InferTensorContents(
                        bytes_contents=[orjson.dumps(instance) for instance in instances]
                    ),
                )
            ],
        )
        for attempt in (1, 2):
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                raise PredictorError("deadline")
            try:
                response = await self._call(request, timeout=timeout)
                return _read(response, len(instances))
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.INVALID_ARGUMENT:
                    raise InputError(error.details()) from None
                if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise PredictorError("deadline") from None
                if code != grpc.StatusCode.UNAVAILABLE:
                    raise PredictorError("error") from None
                if any(key == PUSHBACK for key, _ in error.trailing_metadata() or ()):
                    raise PredictorError("overloaded") from None
            except AnswerError:
                raise PredictorError("invalid_answer") from None
            except asyncio.CancelledError:
                # A channel cut in the middle of a call cancels it; our own cancellation goes on.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
            if attempt == 1:
                metrics.PREDICTOR_RETRIES.inc()
        raise PredictorError("unavailable")


def _read(response: Any, expected: int) -> list[Scored]:
    """The answers in a response; `ranking` checks their numbers.

    Raises:
        AnswerError: it is not what a predictor answers.
    """
    try:
        (output,) = response.outputs
        values = [orjson.loads(value) for value in output.contents.bytes_contents]
    except ValueError as error:
        raise AnswerError(str(error)) from None
    if len(values) != expected:
        raise AnswerError(f"{len(values)} answers to {expected} instances")
    return [parse_answer(value) for value in values]


def parse_answer(value: Any) -> Scored:
    """One answer from its JSON object.

    Raises:
        AnswerError: a field is missing or has the wrong type.
    """
    try:
        candidates = Candidates(
            item_ids=value["item_ids"],
            affinities=value["affinities"],
            scored=value["scored"],
            exhausted=value["exhausted"],
            beta=value["beta"],
        )
        scored = Scored(
            candidates,
            values={str(item): float(v) for item, v in value["values"].items()},
            model_version=str(value["model_version"]),
            unknown_items=int(value["unknown_items"]),
            unknown_score_items=int(value["unknown_score_items"]),
            trend=value.get("trend"),
            bonus={str(i): float(b) for i, b in (value.get("bonus") or {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnswerError(repr(error)) from None
    if not all(map(math.isfinite, (*scored.values.values(), *scored.bonus.values()))):
        raise AnswerError("a value or bonus is not a finite number")
    if not (
        isinstance(candidates.item_ids, list)
        and all(isinstance(item, str) for item in candidates.item_ids)
        and isinstance(candidates.affinities, list)
        and isinstance(candidates.scored, dict)
        and isinstance(candidates.exhausted, bool)
    ):
        raise AnswerError("a field has the wrong type")
    return scored
