"""HTTP of the event collector: bodies in, problems out, and the OpenAPI description of both."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
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
from serving import collector_metrics as metrics
from serving.appender import QueueFullError
from serving.collector_schemas import MAX_ID, Problem
from serving.process import log_failure


class _Rest(Convertor[str]):
    """The rest of a path; Starlette's own `path` stops at a line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _Rest())

Handler = Callable[[Request], Awaitable[Response]]


class ProblemError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, reason: str, error: str, retry: bool = False) -> None:
        super().__init__(error)
        self.status, self.reason, self.retry = status, reason, retry


async def read_json(request: Request, max_bytes: int, deadline: float) -> Any:
    """The body, parsed.

    Args:
        deadline: seconds for all of it to arrive.

    Raises:
        ProblemError: too large, too slow, or not plain JSON.
    """
    try:
        async with asyncio.timeout(deadline):
            body = await _body(request, max_bytes)
    except TimeoutError:
        raise ProblemError(408, "slow_body", "the body did not arrive in time") from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        reason = "not_utf8" if "UTF-8" in str(error) else "not_json"
        raise ProblemError(400, reason, f"the body is not valid JSON: {error}") from None


async def _body(request: Request, max_bytes: int) -> bytes:
    kind = request.headers.get("content-type", "application/json")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ProblemError(415, "not_json", "send the body as Content-Type: application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ProblemError(415, "encoded", "send the body without Content-Encoding")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ProblemError(413, "too_large", f"the body is larger than {max_bytes} bytes")
    return bytes(body)


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


def add_routes(app: FastAPI, routes: Sequence[Route], ready: Callable[[], bool]) -> None:
    """Add the routes, health, metrics, and the handlers of all that is no route."""
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
            _counted(route.operation, route.handler),
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


def _counted(operation: str, handler: Handler) -> Handler:
    async def endpoint(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await handler(request)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception as error:
            problem = _problem(error)
            metrics.REFUSED.labels(problem.reason).inc()
            response = _problem_response(problem)
        metrics.REQUESTS.labels(operation, str(response.status_code)).inc()
        metrics.REQUEST_SECONDS.labels(operation).observe(time.perf_counter() - started)
        return response

    return endpoint


_JSON = "application/json"
_PROBLEMS = {
    400: "Refused: the body, or every event of it.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or holds too many events.",
    415: "The body is not sent as plain JSON.",
    429: "Too much is waiting; Retry-After says when to try again.",
    503: "The event log cannot be written now; Retry-After says when to try again.",
    507: "The event log's disk is full; nothing of the request was stored.",
}


def _problem_response(problem: ProblemError) -> Response:
    response = answer({"error": str(problem), "reason": problem.reason}, problem.status)
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
