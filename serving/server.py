"""A KServe model server that binds where it is told, refuses bad input with 4xx and stops cleanly.

KServe's own server listens on all interfaces, answers much bad input with 500, lets anyone unload
a model, and logs request contents with every error. The routes kept are listed in `Edge` and
`Rest._routes`.
"""

import asyncio
import logging
import os
import socket
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException

from model.errors import HrnnError, InputError, UnavailableError
from serving import codec, metrics, wire
from serving.guards import PUSHBACK, RETRY_AFTER_SECONDS, Gate, OverloadedError
from serving.http import Bodies, GaveWayError, http_config
from serving.kserve_api import (
    AsyncServerInterceptor,
    DataPlane,
    InferenceServicer,
    InvalidInput,
    Model,
    ModelNotFound,
    ModelNotReady,
    ModelServer,
    ServerNotReady,
    V1Endpoints,
    V2Endpoints,
    metrics_handler,
    pb,
    pb_grpc,
)
from serving.process import (
    Signals,
    Uvicorn,
    configure_logging,
    exit_with_parent,
    in_use,
    log_failure,
    parse_arguments,
    reserve,
)
from serving.reasons import bounded
from serving.settings import EXIT_WITH_PARENT, MAX_MESSAGE_BYTES, PREDICTOR, ServeSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("hrnn.serving")

SWITCH_SECONDS = 0.0005


class JsonModel(Model):  # type: ignore[misc]
    """A KServe model whose instances and predictions are JSON objects, whatever the protocol."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(settings.model_name)
        self.settings = settings

    @abstractmethod
    async def answer(self, instances: list[Any], record: metrics.RequestRecord) -> list[Any]:
        """One prediction per instance, in order.

        Raises:
            InputError: an instance is wrong; the message names the field.
            UnavailableError: nothing can be answered now.
        """

    async def answer_message(self, message: bytes, record: metrics.RequestRecord) -> bytes:
        """The answer to a message of serving.wire.

        Raises:
            InputError: it cannot be read.
        """
        raise InputError(f"inputs: expected one tensor named {codec.INPUT!r}")

    async def predict(
        self,
        payload: Any,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> Any:
        try:
            with metrics.request() as record:
                instances = codec.read_instances(payload)
                predictions = await self.answer(instances, record)
                metrics.INSTANCES.observe(len(predictions))
        except InputError as error:
            raise InvalidInput(str(error)) from None
        return codec.write_predictions(payload, predictions, record.version)

    async def open(self) -> None:
        """Start what lives in the event loop; called before the server accepts requests."""

    async def close(self) -> None:
        """Stop what `open` started."""

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": codec.INPUT, "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        return [{"name": codec.OUTPUT, "datatype": "BYTES", "shape": [-1]}]


class Plane(DataPlane):  # type: ignore[misc]
    """KServe's data plane, honest about readiness."""

    async def get_model(self, name: str) -> Any:
        model = self.get_model_from_registry(name)
        if not model.ready:  # KServe would load it again, inside the event loop
            raise ModelNotReady(name)
        return model

    async def ready(self) -> bool:
        models = self.model_registry.get_models().values()
        return bool(models) and all(model.ready for model in models)


class Servicer(InferenceServicer):  # type: ignore[misc]
    """gRPC Open Inference Protocol without the calls that load and unload models.

    Messages between transformer and predictor do not take KServe's way through arrays and JSON.
    """

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if len(request.inputs) != 1 or request.inputs[0].name != wire.ASKS:
            return await super().ModelInfer(request, context)
        model = await self._data_plane.get_model(request.model_name)
        values = request.inputs[0].contents.bytes_contents
        if len(values) != 1:
            raise InputError(f"inputs.{wire.ASKS}: must hold one value")
        with metrics.request() as record:
            answer = await model.answer_message(values[0], record)
        output = pb.ModelInferResponse.InferOutputTensor(
            name=wire.ANSWERS,
            datatype="BYTES",
            shape=[1],
            contents=pb.InferTensorContents(bytes_contents=[answer]),
        )
        return pb.ModelInferResponse(model_name=request.model_name, outputs=[output])

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "models are loaded at start-up")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "models are loaded at start-up")


@contextmanager
def _counted() -> Iterator[None]:
    """Around all that is done for one prediction: whatever refuses it, it is counted once."""
    with metrics.arrival() as arrived:
        try:
            yield
        except (OverloadedError, grpc.aio.AbortError):  # the gate has; whoever aborts has a reason
            raise
        except (InvalidInput, InputError, HTTPException, ModelNotFound):
            arrived.refused("invalid")
            raise
        except (ModelNotReady, UnavailableError):
            arrived.refused("unavailable")
            raise
        except Exception:
            arrived.refused("error")
            raise


class StatusInterceptor(AsyncServerInterceptor):
    """Exceptions to gRPC status codes, without request contents in the log."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Messages that cannot be read are refused by `intercept`; gRPC would answer INTERNAL."""
        handler = await super().intercept_service(  # type: ignore[no-untyped-call]
            continuation, handler_call_details
        )
        if handler is None or handler.request_deserializer is None:
            return handler
        read = handler.request_deserializer

        def tolerant(message: bytes) -> Any:
            try:
                return read(message)
            except DecodeError:
                return None

        return handler._replace(request_deserializer=tolerant)

    async def intercept(
        self, method: Callable[..., Any], request: Any, context: Any, method_name: str
    ) -> Any:
        try:
            if not method_name.endswith("/ModelInfer"):  # health must be answered when it is full
                return await method(_read(request), context)
            with _counted():
                message = _read(request)
                with self._gate.admit():
                    return await method(message, context)
        except OverloadedError as error:
            pushback = ((PUSHBACK, str(1000 * RETRY_AFTER_SECONDS)),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error), pushback)
        except (InvalidInput, InputError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, bounded(str(error)))
        except ModelNotFound as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, bounded(str(error)))
        except (ModelNotReady, UnavailableError) as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, bounded(str(error)))
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            log_failure(error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error, see the server's log")


def _read(message: Any) -> Any:
    """
    Raises:
        InputError: it could not be read.
    """
    if message is None:
        raise InputError("the message is cut off or is not of this method's type")
    return message


class Rest:
    """The HTTP routes of one server."""

    def __init__(self, plane: Plane, settings: ServeSettings, gate: Gate | None = None) -> None:
        self._plane = plane
        self._settings = settings
        self.gate = gate or Gate(settings.max_in_flight)
        # Clients that send slowly must not take the places of those that have sent.
        self._bodies = Bodies(settings, self.gate)

    def application(self) -> "ASGIApp":
        """What uvicorn calls."""
        return Edge(self, self._routes())

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        v1, v2 = V1Endpoints(self._plane), V2Endpoints(self._plane)
        get: list[tuple[str, Callable[..., Any]]] = [
            ("/", self._plane.live),
            ("/metrics", metrics_handler),
            ("/v1/models", v1.models),
            ("/v1/models/{model_name}", v1.model_ready),
            ("/v2", v2.metadata),
            ("/v2/health/live", v2.live),
            ("/v2/health/ready", v2.ready),
            ("/v2/models", v2.models),
            ("/v2/models/{model_name}", self._model_metadata),
            ("/v2/models/{model_name}/ready", self._model_ready),
        ]
        for path, endpoint in get:
            app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(ModelNotFound, _not_found)
        app.add_exception_handler(Exception, _server_error)
        app.add_exception_handler(ModelNotReady, _not_ready)
        app.add_exception_handler(ServerNotReady, _not_ready)
        return app

    async def _model_metadata(self, model_name: str) -> Any:
        return await self._plane.model_metadata(model_name)

    async def _model_ready(self, model_name: str) -> Any:
        if not await self._plane.model_ready(model_name):
            raise ModelNotReady(model_name)
        return {"name": model_name, "ready": True}

    async def predict(
        self,
        name: str,
        open_inference: bool,
        headers: Sequence[tuple[bytes, bytes]],
        receive: "Receive",
    ) -> Response:
        """Answer one prediction, whatever comes."""
        try:
            with _counted():
                _check_encoding(headers)
                body = await self._bodies.read(receive)
                with self.gate.admit():
                    model = await self._plane.get_model(name)
                    payload = codec.parse_json(body)
                    if open_inference:
                        payload = codec.infer_request(payload, name)
                    # Not through KServe's data plane, whose hooks and histograms nothing here uses.
                    result = await model.predict(payload)
                    content = result.to_rest()[0] if open_inference else result
                    return Response(orjson.dumps(content), media_type="application/json")
        except HTTPException as error:
            return _error(error.status_code, error.detail, error.headers)
        except (InvalidInput, InputError) as error:
            return _error(400, str(error))
        except ModelNotFound as error:
            return _error(404, str(error))
        except GaveWayError as error:
            return _unavailable(error, {"Connection": "close"})
        except (ModelNotReady, UnavailableError) as error:
            return _unavailable(error)
        except Exception as error:
            log_failure(error)
            return _error(500, "internal error, see the server's log")


class Edge:
    """The two routes of predictions before all others, which take FastAPI's longer way."""

    def __init__(self, rest: Rest, routes: FastAPI) -> None:
        self._rest, self._routes = rest, routes
        # The same for all, so that a refusal costs next to nothing.
        refusal = _unavailable(OverloadedError(rest.gate.reason))
        self._refusal: list[Message] = [
            {"type": "http.response.start", "status": 503, "headers": refusal.raw_headers},
            {"type": "http.response.body", "body": refusal.body},
        ]

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        name = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            open_inference = path.startswith("/v2/models/") and path.endswith("/infer")
            if open_inference:
                name = path[len("/v2/models/") : -len("/infer")]
            elif path.startswith("/v1/models/") and path.endswith(":predict"):
                name = path[len("/v1/models/") : -len(":predict")]
        if not name or "/" in name:
            await self._routes(scope, receive, send)
            return
        if self._rest.gate.full:  # before the body is read
            self._rest.gate.shed()
            for message in self._refusal:
                await send(message)
            return
        response = await self._rest.predict(name, open_inference, scope["headers"], receive)
        await response(scope, receive, send)


def _check_encoding(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """
    Raises:
        HTTPException: 415 not JSON, or compressed.
    """
    for name, value in headers:
        if name == b"content-type":
            if value.partition(b";")[0].strip().lower() != b"application/json":
                raise HTTPException(415, "send the body as Content-Type: application/json")
        elif name == b"content-encoding" and value != b"identity":
            raise HTTPException(415, "send the body without Content-Encoding")


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = orjson.dumps({"error": bounded(message)})
    return Response(body, status, headers=headers, media_type="application/json")


def _unavailable(error: Exception, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    return _error(503, str(error), {"Retry-After": str(RETRY_AFTER_SECONDS), **headers})


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    return _error(error.status_code, error.detail)


async def _not_found(_: Request, error: Exception) -> Response:
    return _error(404, str(error))


async def _not_ready(_: Request, error: Exception) -> Response:
    return _unavailable(error)


async def _server_error(_: Request, error: Exception) -> Response:
    log_failure(error)
    return _error(500, "internal error, see the server's log")


class Server(ModelServer):  # type: ignore[misc]
    """One model on HTTP and gRPC, both bound to `host`."""

    def __init__(
        self,
        model: JsonModel,
        settings: ServeSettings,
        http_socket: socket.socket,
        grpc_port: int,
        max_message_bytes: int,
    ) -> None:
        super().__init__(
            http_port=http_socket.getsockname()[1],
            grpc_port=grpc_port,
            workers=1,
            enable_latency_logging=False,
        )
        self.dataplane = Plane(self.registered_models)
        self._model = model
        self._settings = settings
        self._http_socket = http_socket
        self._gate = Gate(settings.max_in_flight)  # of both protocols together
        self._max_message_bytes = max_message_bytes
        self.register_model(model)

    def run(self) -> None:
        """Serve until told to stop (`Signals`); requests in flight are finished first."""
        try:
            import uvloop

            factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
        except ImportError:
            factory = None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        signals = Signals(self._settings.drain_seconds)
        # The event loop shares the interpreter with threads that read features or score; by
        # default each could make it wait for 5 ms at a time.
        sys.setswitchinterval(SWITCH_SECONDS)
        await self._model.open()
        grpc_server = await self._start_grpc()
        grace = self._settings.grace_seconds
        app = Rest(self.dataplane, self._settings, self._gate).application()
        http_server = Uvicorn(http_config(app, self._settings, lifespan="off"))
        http_task = asyncio.create_task(http_server.serve([self._http_socket]))
        stop_task = asyncio.create_task(signals.wait())
        log.info(
            "serving %s on http://%s:%d and grpc://%s:%d",
            self._model.name,
            self._settings.host,
            self.http_port,
            self._settings.host,
            self.grpc_port,
        )
        await asyncio.wait({http_task, stop_task}, return_when=asyncio.FIRST_COMPLETED)
        http_server.should_exit = True
        await asyncio.gather(http_task, grpc_server.stop(grace), return_exceptions=True)
        await self._model.close()
        self._model.ready = False
        stop_task.cancel()
        if not http_task.cancelled() and http_task.exception() is not None:
            raise http_task.exception()  # type: ignore[misc]

    async def _start_grpc(self) -> Any:
        # Without so_reuseport=0 a second server would share the port silently.
        server = grpc.aio.server(
            ThreadPoolExecutor(max_workers=1),
            interceptors=(StatusInterceptor(self._gate),),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", self._max_message_bytes),
            ],
        )
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(
            Servicer(self.dataplane, self.model_repository_extension), server
        )
        try:
            server.add_insecure_port(f"{self._settings.host}:{self.grpc_port}")
        except RuntimeError:
            raise in_use(self._settings.host, self.grpc_port) from None
        await server.start()
        return server


def main(
    role: str,
    build: Callable[[ServeSettings], JsonModel],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run one role until it is told to stop.

    Returns:
        0 after a clean stop, 2 after an error a person can fix (one sentence on stderr).
    """
    configure_logging(role)
    try:
        settings = parse_arguments(role, sys.argv[1:] if arguments is None else arguments)
        if os.environ.get(EXIT_WITH_PARENT):
            exit_with_parent(settings.drain_seconds + settings.grace_seconds)
        predictor = role == PREDICTOR
        http_port = settings.predictor_http_port if predictor else settings.transformer_http_port
        grpc_port = settings.predictor_grpc_port if predictor else settings.transformer_grpc_port
        with reserve(settings.host, http_port) as http_socket:
            reserve(settings.host, grpc_port).close()  # gRPC binds its port itself
            model = build(settings)
            limit = MAX_MESSAGE_BYTES if predictor else settings.max_body_bytes
            Server(model, settings, http_socket, grpc_port, limit).run()
    except HrnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
