"""The tables directory: names and columns that ingest writes and validate reads and writes."""

from pathlib import Path

import duckdb
import ibis
from ibis.backends.duckdb import Backend

from model.errors import InputError

INTERACTIONS, USERS, ITEMS = "interactions", "users", "items"
TABLES = (INTERACTIONS, USERS, ITEMS)
ID_COLUMN = {USERS: "user_id", ITEMS: "item_id"}
REQUIRED_COLUMNS = {
    INTERACTIONS: ("user_id", "item_id", "timestamp"),
    USERS: ("user_id",),
    ITEMS: ("item_id",),
}
EVENT_COLUMNS = ("user_id", "item_id", "timestamp", "event_id", "event_type", "event_value")
LIST_DELIMITER = "|"  # between the values of a multi-categorical field in a text column


def table_path(folder: Path, table: str) -> Path:
    """Where a table lives in a tables directory."""
    return folder / f"{table}.parquet"


def malformed_path(folder: Path, table: str) -> Path:
    """Lines of the source that could not be split into columns (`row`, `raw_line`, `problem`)."""
    return folder / f"malformed_{table}.parquet"


def connect(scratch: Path, memory_limit: str) -> Backend:
    """DuckDB through Ibis: UTC, at most `memory_limit` in memory, the rest spilled to `scratch`."""
    try:
        connection = ibis.duckdb.connect(temp_directory=str(scratch), memory_limit=memory_limit)
    except duckdb.ParserException:
        raise InputError(f"memory_limit: {memory_limit!r} is not a size; try '2GB'") from None
    connection.raw_sql("SET TimeZone = 'UTC'")
    # A progress bar in the middle of a run's log is noise.
    connection.raw_sql("SET enable_progress_bar = false")
    return connection
