"""A log of events to count, wherever it is: tables of a run, a Parquet file, the SQL event log.

The same Ibis expression is counted by DuckDB, by Spark, or (compiled to its dialect) by the
database that holds the event log, so that counts travel and not events.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import sqlalchemy as sa
from ibis.backends import BaseBackend

from components.engines import EngineName, open_engine
from components.tables import INTERACTIONS, ITEMS, table_path
from feature_repo.event_tables import cause
from feature_repo.event_tables import open_engine as open_log
from model.errors import InputError, UnavailableError

SQL_SCHEMES = ("sqlite:", "postgresql:", "postgresql+psycopg:", "postgres:")


def is_sql(uri: str) -> bool:
    """Whether an address is that of an event log in a database."""
    return uri.startswith(SQL_SCHEMES)


class EventSource(Protocol):
    """Events (`item_id`, `timestamp` in Unix seconds) and items that need not have one."""

    @property
    def events(self) -> ir.Table: ...
    @property
    def items(self) -> ir.Table | None: ...  # `item_id`

    def collect(self, expression: ir.Table) -> pa.Table:
        """The rows of an expression over `events` and `items`."""
        ...


@dataclass(frozen=True)
class _OnEngine:
    backend: BaseBackend
    events: ir.Table
    items: ir.Table | None

    def collect(self, expression: ir.Table) -> pa.Table:
        return self.backend.to_pyarrow(expression)


@contextmanager
def open_source(
    uri: str,
    engine: EngineName,
    scratch: Path,
    memory_limit: str,
    spark_master: str,
    deadline_seconds: int,
) -> Iterator[EventSource]:
    """Open a clean-tables folder, a Parquet file, or `sqlite:///…` or `postgresql://…`.

    Args:
        engine: what counts tables; an event log is counted by its own database.
        deadline_seconds: of one statement in PostgreSQL.

    Raises:
        InputError: nothing is there, or it is no log of events.
        UnavailableError: the database or the engine cannot be used.
    """
    if is_sql(uri):
        with _open_sql(uri, deadline_seconds) as source:
            yield source
        return
    path = Path(uri)
    interactions = table_path(path, INTERACTIONS) if path.is_dir() else path
    if not interactions.is_file() or interactions.suffix != ".parquet":
        raise InputError(
            f"{uri}: no events there; give the clean tables of a run, a Parquet file with item_id"
            " and timestamp, or the event log (sqlite:///PATH, postgresql://…)"
        )
    backend = open_engine(engine, scratch, memory_limit, spark_master)
    try:
        events = backend.read_parquet(str(interactions))
        missing = {"item_id", "timestamp"} - set(events.columns)
        if missing or not events.timestamp.type().is_integer():
            raise InputError(
                f"{interactions}: item_id and timestamp (whole Unix seconds) are needed, as in the"
                " clean tables of a run"
            )
        items = table_path(path, ITEMS) if path.is_dir() else None
        known = backend.read_parquet(str(items)) if items and items.exists() else None
        yield _OnEngine(backend, events, None if known is None else known.select("item_id"))
    finally:
        backend.disconnect()


@dataclass(frozen=True)
class _InDatabase:
    connection: sa.Connection
    events: ir.Table
    items: ir.Table | None

    def collect(self, expression: ir.Table) -> pa.Table:
        dialect = {"postgresql": "postgres"}.get(self.connection.dialect.name, "sqlite")
        statement = ibis.to_sql(expression, dialect=dialect)
        # Not through sa.text: a colon in it would be a parameter.
        rows = self.connection.exec_driver_sql(str(statement)).fetchall()
        schema = expression.schema().to_pyarrow()
        arrays = [pa.array([row[i] for row in rows], f.type) for i, f in enumerate(schema)]
        return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def _open_sql(uri: str, deadline_seconds: int) -> Iterator[_InDatabase]:
    engine = open_log(uri)
    try:
        # One transaction: all counts are of the same state of the log.
        with engine.connect() as connection:
            on_server = connection.dialect.name == "postgresql"
            if on_server:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                if on_server:
                    # Longer than the collector's: this may read a month of events.
                    milliseconds = deadline_seconds * 1000
                    connection.exec_driver_sql(f"SET LOCAL statement_timeout = {milliseconds:d}")
                yield _InDatabase(
                    connection,
                    ibis.table(
                        {"seq": "int64", "item_id": "string", "timestamp": "int64"}, name="events"
                    ).select("item_id", "timestamp"),
                    ibis.table({"seq": "int64", "item_id": "string"}, name="items").select(
                        "item_id"
                    ),
                )
    except sa.exc.SQLAlchemyError as error:
        raise UnavailableError(f"cannot read the event log: {cause(error)}") from error
    finally:
        engine.dispose()
