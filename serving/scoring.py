"""The transformer's client of the predictor: gRPC, one call for a batch, always a deadline."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import orjson

from model.errors import InputError
from serving import codec, metrics
from serving.kserve_api import pb, pb_grpc
from serving.ranking import AnswerError, Candidates
from serving.settings import MAX_MESSAGE_BYTES, ServeSettings


class PredictorError(Exception):
    """The predictor gave no usable answer; `kind` is one of those of the metric."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Scored:
    """The predictor's answer to one instance; `values` by item id, of task rate."""

    candidates: Candidates
    values: dict[str, float]
    model_version: str
    unknown_items: int
    unknown_score_items: int


class PredictorClient:
    """Asks the predictor; no retries, as a slow answer is worse than a fallback."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._channel: Any = None
        self._stub: Any = None

    async def open(self) -> None:
        self._channel = grpc.aio.insecure_channel(
            self._settings.predictor_address,
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                # A predictor that is back is used at once (by default after up to 2 minutes).
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 1000),  # time for one attempt to connect
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.enable_retries", 0),
            ],
        )
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

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
        try:
            if timeout <= 0:
                raise PredictorError("deadline")
            response = await self._stub.ModelInfer(request, timeout=timeout)
            return _read(response, len(instances))
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.INVALID_ARGUMENT:
                raise InputError(error.details()) from None
            kinds = {
                grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
                grpc.StatusCode.UNAVAILABLE: "unavailable",
            }
            failure = PredictorError(kinds.get(code, "error"))
        except PredictorError as error:
            failure = error
        except AnswerError:
            failure = PredictorError("invalid_answer")
        except asyncio.CancelledError:
            # A channel cut in the middle of a call cancels it; our own cancellation goes on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            failure = PredictorError("unavailable")
        metrics.PREDICTOR_ERRORS.labels(failure.kind).inc()
        raise failure


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
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnswerError(repr(error)) from None
    if not all(map(math.isfinite, scored.values.values())):
        raise AnswerError("a value is not a finite number")
    if not (
        isinstance(candidates.item_ids, list)
        and all(isinstance(item, str) for item in candidates.item_ids)
        and isinstance(candidates.affinities, list)
        and isinstance(candidates.scored, dict)
        and isinstance(candidates.exhausted, bool)
    ):
        raise AnswerError("a field has the wrong type")
    return scored
