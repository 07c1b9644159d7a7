"""HTTP of the event collector: bodies in, problems out, and the OpenAPI description of both."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from feature_repo.event_log import RefusedError, StorageFullError
from model.errors import UnavailableError
from model.schema import MAX_ID
from serving import collector_metrics as metrics
from serving.appender import QueueFullError
from serving.collector_schemas import Problem
from serving.process import log_failure
from serving.reasons import bounded


class _Rest(Convertor[str]):
    """The rest of a path; Starlette's own `path` stops at a line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _Rest())

_JSON = "application/json"

Handler = Callable[[Request], Awaitable[Response]]


class ProblemError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, reason: str, error: str, retry: bool = False) -> None:
        super().__init__(error)
        self.status, self.reason, self.retry = status, reason, retry


class Intake:
    """What may be held of requests that are being answered; for one event loop."""

    def __init__(self, max_body: int, max_buffered: int, max_requests: int) -> None:
        """
        Args:
            max_body: bytes of one body.
            max_buffered: bytes of all bodies together, as far as they have arrived.
            max_requests: being answered.
        """
        self._max_body, self._max_buffered = max_body, max_buffered
        self._max_requests = max_requests
        self._buffered = self._requests = 0

    @contextmanager
    def request(self, request: Request) -> Iterator[None]:
        """Around the answering of one.

        Raises:
            ProblemError: too many are being answered.
        """
        if self._requests >= self._max_requests:
            raise ProblemError(429, "busy", "too many requests at once; try again", retry=True)
        self._requests += 1
        request.state.held = 0
        try:
            yield
        finally:
            self._requests -= 1
            self._buffered -= request.state.held

    async def read_json(self, request: Request, deadline: float) -> Any:
        """The body, parsed. What is too large by its own word is not read at all.

        Args:
            deadline: seconds for all of it to arrive.

        Raises:
            ProblemError: too large, too slow, too much at once, or not plain JSON.
        """
        try:
            async with asyncio.timeout(deadline):
                body = await self._body(request)
        except TimeoutError:
            raise ProblemError(408, "slow_body", "the body did not arrive in time") from None
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            reason = "not_utf8" if "UTF-8" in str(error) else "not_json"
            raise ProblemError(400, reason, f"the body is not valid JSON: {error}") from None

    async def _body(self, request: Request) -> bytes:
        headers = request.headers
        kind = headers.get("content-type", _JSON)
        if kind.partition(";")[0].strip().lower() != _JSON:
            raise ProblemError(415, "not_json", "send the body as Content-Type: application/json")
        if headers.get("content-encoding", "identity") != "identity":
            raise ProblemError(415, "encoded", "send the body without Content-Encoding")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._too_large()
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self._max_body:
                raise self._too_large()
            if self._buffered + len(chunk) > self._max_buffered:
                raise ProblemError(429, "busy", "too much is being sent; try again", retry=True)
            self._buffered += len(chunk)
            request.state.held += len(chunk)
            body += chunk
        return bytes(body)

    def _too_large(self) -> ProblemError:
        return ProblemError(413, "too_large", f"the body is larger than {self._max_body} bytes")


def path_id(request: Request, name: str) -> str:
    """An id from the path.

    Raises:
        ProblemError: it cannot be one.
    """
    value: str = request.path_params[name]
    if not value or len(value) > MAX_ID or "\0" in value or not _encodable(value):
        raise ProblemError(400, "bad_id", f"{name}: 1 to {MAX_ID} characters of UTF-8, without NUL")
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\N{REPLACEMENT CHARACTER}" not in value  # what is left of a path that is not UTF-8


def answer(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _problem(error: Exception) -> ProblemError:
    """Status and reason of anything that can be raised while answering."""
    match error:
        case ProblemError():
            return error
        case QueueFullError():
            return ProblemError(429, "queue_full", str(error), retry=True)
        case StorageFullError():
            return ProblemError(507, "storage_full", str(error), retry=True)
        case RefusedError():
            return ProblemError(400, "bad_text", str(error))
        case UnavailableError():
            return ProblemError(503, "log_unavailable", str(error), retry=True)
        case HTTPException():
            reason = {404: "no_such_path", 405: "wrong_method"}.get(error.status_code, "http")
            return ProblemError(error.status_code, reason, str(error.detail))
    log_failure(error)
    return ProblemError(500, "internal", "internal error, see the collector's log")


@dataclass(frozen=True)
class Route:
    """One operation, as it is served and as OpenAPI describes it."""

    method: str
    path: str
    operation: str
    handler: Handler
    answer: type[BaseModel]
    bodies: Sequence[type[BaseModel]] = ()  # one of these
    parameters: Sequence[dict[str, Any]] = ()
    refused: Any = Problem  # what a 400 holds


def add_routes(
    app: FastAPI,
    routes: Sequence[Route],
    ready: Callable[[], bool],
    intake: Intake,
    admit: Callable[[], None],
) -> None:
    """Add the routes, health, metrics, and the handlers of all that is no route.

    Args:
        admit: called before a request that writes is read; raises where it would be refused.
    """
    for route in routes:
        responses: dict[int | str, dict[str, Any]] = {
            status: {"model": Problem, "description": text} for status, text in _PROBLEMS.items()
        }
        responses[400] |= {"model": route.refused}
        extra: dict[str, Any] = {"parameters": list(route.parameters)} if route.parameters else {}
        if route.bodies:
            schemas = [_inline(kind.model_json_schema()) for kind in route.bodies]
            schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
            extra["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
        else:
            for status in (408, 413, 415):
                del responses[status]
        app.add_api_route(
            route.path,
            _counted(route, intake, admit),
            methods=[route.method],
            operation_id=route.operation,
            summary=(route.answer.__doc__ or "").partition("\n")[0],
            response_model=route.answer,
            responses=responses,
            openapi_extra=extra,
        )

    async def live(_: Request) -> Response:
        return answer({"status": "alive"})

    async def readiness(_: Request) -> Response:
        return answer({"ready": ready()}, 200 if ready() else 503)

    async def exposition(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    for path, handler in (
        ("/v2/health/live", live),
        ("/v2/health/ready", readiness),
        ("/metrics", exposition),
    ):
        app.add_route(path, handler, methods=["GET"], include_in_schema=False)

    async def failed(_: Request, error: Exception) -> Response:
        return _problem_response(_problem(error))

    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(Exception, failed)


def _counted(route: Route, intake: Intake, admit: Callable[[], None]) -> Handler:
    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        try:
            with intake.request(request):
                if route.method != "GET":
                    admit()
                response = await route.handler(request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception as error:
            problem = _problem(error)
            metrics.REFUSED.labels(problem.reason).inc()
            response = _problem_response(problem)
        metrics.REQUESTS.labels(route.operation, str(response.status_code)).inc()
        metrics.REQUEST_SECONDS.labels(route.operation).observe(time.perf_counter() - started)
        return response

    return endpoint


_PROBLEMS = {
    400: "Refused: the body, or every event of it.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or holds too many events.",
    415: "The body is not sent as plain JSON.",
    429: "Too much is waiting or being sent; Retry-After says when to try again.",
    503: "The event log cannot be written now; Retry-After says when to try again.",
    507: "The event log's disk is full; nothing of the request was stored.",
}


def _problem_response(problem: ProblemError) -> Response:
    response = answer({"error": bounded(str(problem)), "reason": problem.reason}, problem.status)
    if problem.retry:
        response.headers["Retry-After"] = "1"
    return response


def path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1, "maxLength": MAX_ID}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _inline(schema: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A JSON schema with its `$defs` put where they are used (none of ours is recursive)."""
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    definitions = {**(definitions or {}), **schema.get("$defs", {})}
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {k: _inline(v, definitions) for k, v in schema.items() if k != "$defs"}
