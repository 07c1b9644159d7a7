"""The transformer's client of the predictor: gRPC, one call for a batch, always a deadline."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc

from model.errors import InputError, UnavailableError
from model.query import Query
from model.trends import TrendSnapshot
from serving import metrics, wire
from serving.batching import Batcher
from serving.guards import PUSHBACK, Breaker
from serving.kserve_api import pb, pb_grpc
from serving.settings import MAX_MESSAGE_BYTES, ServeSettings
from serving.wire import AnswerError, Asked, Scored

MOST_TOGETHER = 64  # questions in one call, unless one request asks more
# While the predictor works on one, the next is on its way.
CALLS_AT_ONCE = 2
# Calls that carry their lists after a predictor did not hold one. Replicas answer in turn: were it
# the next call alone, it might always be another replica that gets them.
CALLS_WITH_LISTS = 8


class PredictorError(UnavailableError):
    """The predictor gave no usable answer; `kind` is one of those of the metric."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"the predictor: {kind}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Call:
    """What one request asks, and until when (monotonic seconds)."""

    asked: Sequence[Asked]
    deadline: float


class PredictorClient:
    """Asks the predictor, unless it failed several times just now.

    What requests ask at the same time goes in one call. Scoring changes nothing, so a call whose
    connection broke is repeated once, on another connection; a slow one is not, as that would make
    a slow predictor slower.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._breaker = Breaker("predictor", settings.breaker_failures, settings.breaker_seconds)
        self._channel: Any = None
        self._call: Any = None
        self._with_lists = 0  # calls to come that carry their lists
        self._calls: Batcher[_Call, list[Scored | InputError]] = Batcher(
            self._ask_all,
            most=min(MOST_TOGETHER, settings.max_instances),
            limit=CALLS_AT_ONCE,
            size=lambda call: len(call.asked),
        )

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
        await self._calls.close()
        if self._channel is not None:
            await self._channel.close()

    async def score(self, asked: Sequence[Asked], timeout: float) -> list[Scored | InputError]:
        """One answer per question, or why the predictor refused it, e.g. an unknown filter field.

        Args:
            timeout: seconds left for this call.

        Raises:
            PredictorError: it did not answer in time, or not sensibly.
        """
        if not self._breaker.allows():
            metrics.PREDICTOR_ERRORS.labels("open_circuit").inc()
            raise PredictorError("open_circuit")
        try:
            async with asyncio.timeout(timeout):
                answers = await self._calls.ask(_Call(asked, time.monotonic() + timeout))
        except (PredictorError, TimeoutError) as error:
            failure = error if isinstance(error, PredictorError) else PredictorError("deadline")
            metrics.PREDICTOR_ERRORS.labels(failure.kind).inc()
            if failure.kind == "overloaded":  # alive; and asking less is the transformer's own gate
                self._breaker.succeeded()
            else:
                self._breaker.failed()
            raise failure from None
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
        ask = Asked("trend", Query([], 0.0))
        (scored,) = await self._ask([ask], time.monotonic() + timeout)  # no user waits for it
        try:
            if isinstance(scored, InputError):
                raise ValueError(scored)
            return TrendSnapshot.from_json(scored.trend or {})
        except (KeyError, TypeError, ValueError, OverflowError):
            raise PredictorError("invalid_answer") from None

    async def _ask_all(
        self, calls: Sequence[_Call]
    ) -> Sequence[list[Scored | InputError] | Exception]:
        """One call for all; if it is one of them that the predictor fails with, one for each."""
        metrics.CALLS_TOGETHER.observe(len(calls))
        together = [one for call in calls for one in call.asked]
        try:
            answers = iter(await self._ask(together, max(call.deadline for call in calls)))
        except PredictorError as failure:
            if len(calls) == 1 or failure.kind not in ("error", "invalid_answer"):
                raise
            return await asyncio.gather(*map(self._ask_one, calls))
        return [list(islice(answers, len(call.asked))) for call in calls]

    async def _ask_one(self, call: _Call) -> list[Scored | InputError] | Exception:
        try:
            return await self._ask(call.asked, call.deadline)
        except PredictorError as failure:
            return failure

    async def _ask(self, asked: Sequence[Asked], deadline: float) -> list[Scored | InputError]:
        """One call, and another one if the connection broke or a list has to be sent.

        Args:
            deadline: in monotonic seconds.
        """
        lists = {one.part.of.name: one.part.of for one in asked if one.part is not None}
        sent = bool(lists) and self._with_lists > 0
        self._with_lists -= sent
        message, broken = wire.write_asks(asked, list(lists.values()) if sent else ()), False
        while True:
            timeout = deadline - time.monotonic()
            if timeout <= 0:
                raise PredictorError("deadline")
            try:
                response = await self._call(self._request(message), timeout=timeout)
                answers, missing = wire.read_answers(_value(response), asked)
                if not missing:
                    return answers
                if sent:
                    raise AnswerError("does not know a list that was sent")
                # Once more, with all lists: another predictor may answer this time.
                message, sent = wire.write_asks(asked, list(lists.values())), True
                self._with_lists = CALLS_WITH_LISTS
                continue
            except grpc.RpcError as error:
                code = error.code()
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
            if broken:
                raise PredictorError("unavailable")
            broken = True
            metrics.PREDICTOR_RETRIES.inc()

    def _request(self, message: bytes) -> Any:
        return pb.ModelInferRequest(
            model_name=self._settings.model_name,
            inputs=[
                pb.ModelInferRequest.InferInputTensor(
                    name=wire.ASKS,
                    datatype="BYTES",
                    shape=[1],
                    contents=pb.InferTensorContents(bytes_contents=[message]),
                )
            ],
        )


def _value(response: Any) -> bytes:
    """
    Raises:
        AnswerError: it is not what a predictor answers.
    """
    try:
        (output,) = response.outputs
        (value,) = output.contents.bytes_contents
    except ValueError as error:
        raise AnswerError(str(error)) from None
    return value
