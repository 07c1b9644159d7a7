"""Prometheus metrics of both processes. Labels are bounded and never hold ids."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prometheus_client import Counter, Gauge, Histogram

from model.errors import InputError, UnavailableError
from model.trends import TrendSnapshot

# Fine between 1 and 50 ms, where answers are; coarse up to the deadlines.
SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)

REQUESTS = Counter(
    "hrnn_requests_total",
    "Requests by task (recommend, rank, rate, score, mixed, unknown) and outcome "
    "(ok, degraded, invalid, unavailable, shed, error)",
    ["task", "outcome"],
)
REQUEST_SECONDS = Histogram(
    "hrnn_request_duration_seconds", "Time to answer a request", ["task"], buckets=SECONDS
)
IN_FLIGHT = Gauge("hrnn_requests_in_flight", "Requests being answered")
INSTANCES = Histogram(
    "hrnn_request_instances",
    "Instances in a request",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
CALLS_TOGETHER = Histogram(
    "hrnn_batched_requests",
    "Requests that were worked on together because they came at the same time (transformer: in one "
    "call to the predictor; predictor: calls by one use of the model)",
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
STAGE_SECONDS = Histogram(
    "hrnn_stage_duration_seconds",
    "Time in a stage of answering (transformer: features, predictor, ranking; "
    "predictor: model, candidates)",
    ["stage"],
    buckets=SECONDS,
)
ROUNDS = Histogram(
    "hrnn_threshold_rounds",
    "Calls to the predictor until the top-k was proved exact",
    buckets=(1, 2, 3, 4, 6, 8, 12, 16),
)
FALLBACKS = Counter(
    "hrnn_fallbacks_total",
    "Answers degraded, by reason "
    "(features_unavailable, trend_unavailable, trend_stale, predictor_unavailable)",
    ["reason"],
)
FEATURE_ERRORS = Counter(
    "hrnn_feature_errors_total",
    "Reads of the feature store that failed, by read (user, trend) and kind "
    "(deadline, error, full, open_circuit)",
    ["read", "kind"],
)
PREDICTOR_ERRORS = Counter(
    "hrnn_predictor_errors_total",
    "Calls to the predictor that failed, by kind "
    "(deadline, unavailable, overloaded, invalid_answer, error, open_circuit)",
    ["kind"],
)
PREDICTOR_RETRIES = Counter(
    "hrnn_predictor_retries_total", "Calls to the predictor repeated on another connection"
)
BREAKER_OPEN = Gauge(
    "hrnn_circuit_open",
    "Whether a dependency (features, predictor) is not asked because it failed in a row",
    ["dependency"],
)
ITEMS = Counter("hrnn_served_items_total", "Items in answers to recommend and rank")
SERVED_COVERAGE = Gauge(
    "hrnn_served_coverage",
    "Distinct items in answers to recommend, as a share of the catalogue, estimated over the last "
    "full ten minutes with traffic",
)
SERVED_RANK = Histogram(
    "hrnn_served_trend_rank",
    "Mean place of an answer's items among the trending ones, as a share of the catalogue: near 0 "
    "when everybody gets the most popular ones",
    buckets=(0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
)
EXPLORED = Counter(
    "hrnn_explored_items_total",
    "Those of them that are there because of exploration alone",
)
EXPLORATION_LINES_DROPPED = Counter(
    "hrnn_exploration_lines_dropped_total",
    "Lines of the exploration log that were not written because too many waited to be",
)
FROZEN = Gauge(
    "hrnn_gc_frozen_objects", "Objects of the start that the garbage collector looks at no more"
)
UNKNOWN_ITEMS = Counter(
    "hrnn_unknown_items_total",
    "Items in histories and in lists to rank or rate that the model does not know",
)
NEW_USERS = Counter("hrnn_unknown_users_total", "Requests for a user the feature store lacks")
MODEL_INFO = Gauge("hrnn_model_info", "1 for the model version that answers", ["version"])
RETRIEVAL_RECALL = Gauge(
    "hrnn_retrieval_recall",
    "Share of the best items that the search finds, measured when the model was loaded; 1: exact",
)
BUNDLE_LOAD_SECONDS = Gauge(
    "hrnn_bundle_load_seconds", "Time to verify, load and warm up the model bundle"
)
MODEL_REFRESHES = Counter(
    "hrnn_model_refreshes_total",
    "Attempts to use another champion, by outcome (swapped, refused, unreadable)",
    ["outcome"],
)
MODEL_IS_CHAMPION = Gauge(
    "hrnn_model_is_champion", "Whether the model in use is the model store's champion"
)
CHAMPION_UNCHECKED = Gauge(
    "hrnn_champion_unchecked_since_timestamp_seconds",
    "When the champion was promoted, while its release has yet to check it; 0 once it has",
)
CANARY_UNTIL = Gauge(
    "hrnn_canary_until_timestamp_seconds",
    "When the run that tries this canary must have ended it; 0: this is no canary",
)
LIVE_ITEMS = Gauge(
    "hrnn_live_items", "Items served from the event log's metadata: new or changed since training"
)
LIVE_ITEMS_LEFT_OUT = Gauge(
    "hrnn_live_items_left_out", "New items that are not served because there are too many"
)
LIVE_ITEM_VALUES_UNFIT = Counter(
    "hrnn_live_item_values_unfit_total",
    "Values of new items that were left out because they do not fit the field's kind",
)
LIVE_ITEMS_BUILD_SECONDS = Gauge(
    "hrnn_live_items_build_seconds", "Time that the last build of the model with new items took"
)
ITEM_FEED_READ = Gauge(
    "hrnn_item_feed_last_read_timestamp_seconds",
    "When all new items were last read successfully from the collector",
)
ITEM_FEED_ERRORS = Counter(
    "hrnn_item_feed_errors_total",
    "Attempts to serve new items that failed, by step (read, build)",
    ["step"],
)
TREND_AS_OF = Gauge(
    "hrnn_trend_as_of_timestamp_seconds", "The moment the trend snapshot in use was counted for"
)
TREND_READ = Gauge(
    "hrnn_trend_last_read_timestamp_seconds", "When the trend snapshot was last read successfully"
)
TREND_AGE = Gauge(
    "hrnn_trend_age_seconds",
    "Now minus the moment the trend snapshot was counted for; large on a historical log",
)
TREND_LAG = Gauge(
    "hrnn_trend_lag_seconds",
    "How far the log has gone on, by the newest event seen in a history, since the moment the "
    "trend snapshot was counted for",
)
TREND_PERIOD = Gauge(
    "hrnn_trend_period_seconds", "How often the trend is expected to be counted anew; 0: unknown"
)

_version: str | None = None


def set_model_version(version: str) -> None:
    """Show `version` as the one in use, and no other."""
    global _version
    if version != _version:
        MODEL_INFO.clear()
        MODEL_INFO.labels(version).set(1)
        _version = version


def set_canary(mark: str) -> None:
    """Show until when a run that has marked this predictor as its canary must have ended it.

    Args:
        mark: the variable HRNN_CANARY, JSON with `until` in Unix seconds; "": no canary.
    """
    try:
        until = float(json.loads(mark)["until"]) if mark else 0.0
    except (ValueError, TypeError, KeyError):
        until = 1.0  # somebody edited it: nobody ends it any more
    CANARY_UNTIL.set(until)


def trend_read(snapshot: TrendSnapshot, lag: int, period: int) -> None:
    """Record a successful read of the trend snapshot; `lag` and `period` in seconds."""
    TREND_AS_OF.set(snapshot.as_of)
    TREND_READ.set_to_current_time()
    TREND_AGE.set_function(lambda: time.time() - snapshot.as_of)
    TREND_LAG.set(lag)
    TREND_PERIOD.set(period)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Time a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        STAGE_SECONDS.labels(name).observe(time.perf_counter() - start)


class RequestRecord:
    """What `request` counts; filled in as it becomes known."""

    task = "unknown"
    degraded = False
    version: str | None = None  # of the model that answered


class Arrival:
    """A request from its arrival on; counted once, by `request` or as refused before it."""

    counted = False

    def refused(self, outcome: str) -> None:
        """Count it, unless it has been."""
        if not self.counted:
            self.counted = True
            REQUESTS.labels(RequestRecord.task, outcome).inc()


_arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


@contextmanager
def arrival() -> Iterator[Arrival]:
    """Around all that is done for one request."""
    arrived = Arrival()
    token = _arrival.set(arrived)
    try:
        yield arrived
    finally:
        _arrival.reset(token)


@contextmanager
def request() -> Iterator[RequestRecord]:
    """Count and time one request by its task and how it ended."""
    record = RequestRecord()
    outcome = "error"
    start = time.perf_counter()
    with IN_FLIGHT.track_inprogress():
        try:
            yield record
            outcome = "degraded" if record.degraded else "ok"
        except InputError:
            outcome = "invalid"
            raise
        except UnavailableError:
            outcome = "unavailable"
            raise
        finally:
            REQUEST_SECONDS.labels(record.task).observe(time.perf_counter() - start)
            REQUESTS.labels(record.task, outcome).inc()
            if (arrived := _arrival.get()) is not None:
                arrived.counted = True
