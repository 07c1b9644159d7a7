"""Prometheus metrics of the event collector. Labels are bounded and never hold ids."""

from prometheus_client import Counter, Gauge, Histogram

from serving.metrics import SECONDS

REQUESTS = Counter(
    "hrnn_collector_requests_total",
    "Requests by operation (events, put_user, put_item, delete_user, items) and HTTP status",
    ["operation", "status"],
)
REQUEST_SECONDS = Histogram(
    "hrnn_collector_request_duration_seconds",
    "Time to answer a request, durability included",
    ["operation"],
    buckets=SECONDS,
)
EVENTS = Counter(
    "hrnn_collector_events_total",
    "Events by outcome (stored, duplicate, user_deleted, invalid)",
    ["outcome"],
)
REFUSED = Counter(
    "hrnn_collector_refused_total", "Events and requests refused, by reason", ["reason"]
)
COMMIT_SECONDS = Histogram(
    "hrnn_collector_commit_duration_seconds",
    "Time of a transaction, from its begin to its being durable",
    buckets=SECONDS,
)
COMMIT_WRITES = Histogram(
    "hrnn_collector_commit_writes",
    "Events and upserts that became durable together",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000),
)
COMMIT_ERRORS = Counter(
    "hrnn_collector_commit_errors_total",
    "Transactions that failed, by kind (full, refused, unavailable, error)",
    ["kind"],
)
QUEUED = Gauge("hrnn_collector_queued_writes", "Events and upserts waiting to be written")
VISIBLE_SECONDS = Histogram(
    "hrnn_collector_visible_seconds",
    "From the commit of a change until the online store has it",
    buckets=SECONDS,
)
LAG_SECONDS = Gauge(
    "hrnn_collector_lag_seconds",
    "Age of the oldest event that the online store does not have yet, 0: it has all; while that "
    "cannot be known, since when it is not known to have all",
)
LAG_CHANGES = Gauge(
    "hrnn_collector_lag_changes",
    "Changes of the log that the online store does not have yet; NaN: cannot be known now",
)
FOLLOWING = Gauge(
    "hrnn_collector_following",
    "Whether the last attempt to bring the online store up to date worked",
)
FOLLOW_ERRORS = Counter(
    "hrnn_collector_follow_errors_total",
    "Attempts to bring the online store up to date that failed",
)
REPLACED = Counter(
    "hrnn_collector_replaced_keys_total",
    "Keys of the online store that held something that is no row of features, and were replaced",
)
ERASING = Gauge(
    "hrnn_collector_erasing",
    "Whether the log's file still holds bytes of deleted rows (SQLite; PostgreSQL's VACUUM is its "
    "own)",
)
