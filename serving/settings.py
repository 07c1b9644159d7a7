"""Settings of the serving processes; from HRNN_* variables in containers, flags on a laptop."""

import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from model.errors import InputError
from model.settings import SettingsBase

PREDICTOR, TRANSFORMER, COLLECTOR = "predictor", "transformer", "collector"  # the roles

ENV_PREFIX = "HRNN_"
EXIT_WITH_PARENT = "HRNN_EXIT_WITH_PARENT"  # set by the launcher: stop when stdin closes
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's mode for forked servers
MAX_MESSAGE_BYTES = 64 * 2**20  # gRPC between transformer and predictor; gRPC's default is 4 MiB

Port = Annotated[int, Field(ge=1, le=65535)]


class ServeSettings(SettingsBase):
    """Addresses, deadlines and limits. Durations in seconds, sizes in bytes.

    Every field can be set by the environment variable HRNN_<FIELD IN CAPITALS>.
    """

    host: str = "127.0.0.1"  # what all processes bind to; 0.0.0.0 in a container
    transformer_http_port: Port = 8080
    transformer_grpc_port: Port = 8081
    predictor_http_port: Port = 8090
    predictor_grpc_port: Port = 8091
    predictor_host: str | None = None  # host[:port] of the predictor's gRPC; None: same host
    collector_http_port: Port = 8100
    model_name: str = "hrnn-meta"

    model_dir: str | None = None  # a bundle, or a model store: folder or s3://…
    model_refresh_seconds: PositiveFloat = 5.0  # how often the store is asked for its champion
    # The collector whose new items the predictor serves, http://HOST:PORT; None: none but trained.
    items_url: str | None = None
    items_refresh_seconds: PositiveFloat = 0.5  # how often they are asked for; less while it fails
    items_deadline_seconds: PositiveFloat = 2.0
    max_live_items: PositiveInt = 10_000  # new or changed since training; further ones wait for it
    # Share of the best items that must be found. Below 1, catalogues of at least `approximate_from`
    # items are searched by an approximate index, where that is faster (pip install hrnn-meta[ann]).
    retrieval_recall: Annotated[float, Field(gt=0, le=1)] = 1.0
    approximate_from: PositiveInt = 200_000
    model_threads: PositiveInt = 1  # PyTorch threads; more than one pays off above ~100k items

    # The feature store; the same names as feature_repo.store.FeatureStoreSettings.from_env.
    feature_root: str | None = None
    online_store: Literal["sqlite", "redis"] = "sqlite"
    redis_url: str | None = None
    registry_url: str | None = None

    feature_deadline_seconds: PositiveFloat = 0.5
    predictor_deadline_seconds: PositiveFloat = 1.0  # all rounds of one request together
    trend_refresh_seconds: PositiveFloat = 5.0
    trend_deadline_seconds: PositiveFloat = 5.0
    trend_stale_seconds: PositiveFloat = 60.0  # without a successful read: answers are labelled
    trend_stale_periods: PositiveFloat = 3.0  # of the log since the trend was counted: the same
    feature_threads: PositiveInt = 8
    # In a row, until a dependency is not asked any more. Requests that wait for one read of users
    # in vain count each, or a store that hangs would keep many waiting.
    breaker_failures: PositiveInt = 5
    breaker_seconds: PositiveFloat = 1.0  # until one request tries it again
    exploration_log: bool = True  # a line for every answer that explores
    max_in_flight: PositiveInt = 24  # requests of one process at a time; the rest get 503
    body_deadline_seconds: PositiveFloat = 10.0  # for the body of a request to arrive; its head too
    max_head_bytes: PositiveInt = 64 * 2**10  # request line and headers, HTTP only
    # What is being sent may take. Beyond, a predictor or transformer refuses (503) what has been
    # sent for longest, a collector (429) what comes last.
    max_buffered_bytes: PositiveInt = 64 * 2**20  # of all bodies together
    max_open_requests: PositiveInt = 2000  # whose body is being sent; collector: being answered
    # After SIGTERM: for new requests of whoever has yet to hear that this process ends. Then
    # `grace_seconds` for those in flight.
    drain_seconds: NonNegativeFloat = 0.0
    grace_seconds: NonNegativeFloat = 10.0

    # The event log (sqlite:///PATH or postgresql://USER@HOST/DATABASE) and its collector.
    event_log: str | None = None
    max_events: PositiveInt = 1000  # of one request
    max_queued_writes: PositiveInt = 20_000  # further ones get 429
    append_deadline_seconds: PositiveFloat = 5.0  # until an event must be durable
    visible_wait_seconds: NonNegativeFloat = 0.25  # how long an answer waits for the online store
    follow_seconds: PositiveFloat = 0.5  # how often other collectors' changes are looked for
    max_ahead_seconds: NonNegativeFloat = 300.0  # an event may lie in the future

    default_num_results: PositiveInt = 25
    max_num_results: PositiveInt = 100_000
    max_total_results: PositiveInt = 400_000  # over the instances of one request
    max_instances: PositiveInt = 256
    max_history: PositiveInt = 1000
    max_items: PositiveInt = 10_000  # of `items`, of each filter list
    max_body_bytes: PositiveInt = 4 * 2**20

    @property
    def predictor_address(self) -> str:
        """host:port of the predictor's gRPC server."""
        host = self.predictor_host or self.host
        return host if ":" in host else f"{host}:{self.predictor_grpc_port}"

    @property
    def transformer_url(self) -> str:
        return f"http://{self.host}:{self.transformer_http_port}"

    @property
    def predictor_url(self) -> str:
        return f"http://{self.host}:{self.predictor_http_port}"

    @property
    def collector_url(self) -> str:
        return f"http://{self.host}:{self.collector_http_port}"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read HRNN_* variables; empty ones count as unset.

        Raises:
            InputError: names the variable and what is wrong with it.
        """
        values = {
            name: environ[variable]
            for name in cls.model_fields
            if environ.get(variable := ENV_PREFIX + name.upper())
        }
        try:
            return cls.parse(values)
        except InputError as error:
            message = str(error)
            for name in values:
                message = message.replace(f"settings.{name}:", f"{ENV_PREFIX}{name.upper()}:")
            raise InputError(message) from None

    def to_env(self) -> dict[str, str]:
        """Inverse of `from_env`: every field, unset ones as empty strings."""
        return {
            ENV_PREFIX + name.upper(): "" if value is None else str(value)
            for name, value in self.model_dump(mode="json").items()
        }

    def with_free_ports(self) -> Self:
        """The same settings on ports that were free a moment ago (for tests)."""
        names = [name for name in type(self).model_fields if name.endswith("_port")]
        ports: dict[str, int] = {}
        with ExitStack() as stack:
            for name in names:
                sock = stack.enter_context(socket.socket())
                sock.bind((self.host, 0))
                ports[name] = sock.getsockname()[1]
        return self.model_copy(update=ports)
