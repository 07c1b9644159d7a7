"""The event log as tables to train on: events, users and items as Parquet files like anyone's.

Deleted users are not in it. Fields lie in the log as JSON objects; each becomes a column.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa

from components.event_sources import is_sql
from components.ingest.reader import quote_name, quote_text
from components.tables import INTERACTIONS, ITEMS, USERS, malformed_path, table_path
from feature_repo import event_tables as log
from feature_repo.event_log import EventLog, NewEvent, Outcome
from feature_repo.event_tables import cause, open_engine
from feature_repo.names import item_fields
from model.errors import InputError, UnavailableError
from model.schema import Schema

CONFIGURED = "event-log"  # as interactions: the log that HRNN_EVENT_LOG names
VARIABLE = "HRNN_EVENT_LOG"
ROWS = 20_000  # in memory at a time
TRANSACTION_ROWS = 5000
MAX_FIELDS = 500  # columns that the fields of one table may make

_POINTER = "'/' || replace(replace(key, '~', '~0'), '/', '~1')"  # to `key`, in JSON

_TEXTS = pa.list_(pa.string())
_SCHEMAS = {
    INTERACTIONS: (
        log.events,
        "context",
        {
            "event_id": pa.string(),
            "user_id": pa.string(),
            "item_id": pa.string(),
            "timestamp": pa.int64(),
            "event_type": pa.string(),
            "event_value": pa.float64(),
            "impression": _TEXTS,
        },
    ),
    USERS: (log.users, "fields", {"user_id": pa.string()}),
    ITEMS: (log.items, "fields", {"item_id": pa.string(), "created_at": pa.int64()}),
}


def address(interactions: str) -> str | None:
    """The log that `interactions` means; None: it is something else.

    Raises:
        InputError: it is the configured one, and none is configured.
    """
    if interactions != CONFIGURED:
        return interactions if is_sql(interactions) else None
    url = os.environ.get(VARIABLE, "")
    if not url:
        raise InputError(f"interactions is {CONFIGURED!r}, but {VARIABLE} is not set")
    return url


def export(url: str, folder: Path, memory_limit: str) -> dict[str, Path]:
    """Write the tables that have rows, all of one moment; returns their paths.

    Raises:
        InputError: no event log, or no event in it.
        UnavailableError: the database cannot be read.
    """
    folder.mkdir(parents=True)
    engine = open_engine(url)
    written = {}
    try:
        with engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                for table in _SCHEMAS:
                    path = folder / f"{table}.parquet"
                    if rows := _stream(connection, table, path):
                        written[table] = path
                        print(f"event log: {rows:,} rows of {table}", flush=True)
    except sa.exc.SQLAlchemyError as error:
        raise UnavailableError(f"cannot read the event log: {cause(error)}") from error
    finally:
        engine.dispose()
    if INTERACTIONS not in written:
        raise InputError("the event log holds no events yet")
    with duckdb.connect(config={"memory_limit": memory_limit}) as database:
        for table, path in written.items():
            _spread(database, path, _SCHEMAS[table][1], [*_SCHEMAS[table][2]])
    return written


def forget_deleted(url: str, tables: Path, memory_limit: str) -> dict[str, tuple[int, int]]:
    """Take the users that were deleted from a log out of ingested tables.

    Tables that come from elsewhere may still hold what was deleted on request.

    Returns:
        By table: rows removed, and lines that fit no header and name such a user.

    Raises:
        UnavailableError: the log cannot be read, so nobody knows who was deleted.
    """
    try:
        engine = open_engine(url)
    except InputError:
        return {}  # no log yet: nobody was deleted
    try:
        with engine.connect() as connection:
            deleted = list(connection.scalars(sa.select(log.deleted_users.c.user_id)))
    except sa.exc.SQLAlchemyError as error:
        raise UnavailableError(f"cannot read the event log: {cause(error)}") from error
    finally:
        engine.dispose()
    removed: dict[str, tuple[int, int]] = {}
    if not deleted:
        return removed
    # One thread: rows keep their order, which decides between events of one second.
    with duckdb.connect(config={"memory_limit": memory_limit, "threads": 1}) as database:
        database.register("deleted", pa.table({"user_id": pa.array(deleted, pa.string())}))
        for table in (INTERACTIONS, USERS):
            rows = _keep(database, table_path(tables, table), _BY_COLUMN)
            lines = _keep(database, malformed_path(tables, table), _BY_TEXT)
            if rows or lines:
                removed[table] = rows, lines
                print(f"{table}: {rows + lines:,} rows of users deleted on request are left out")
    return removed


_BY_COLUMN = "NOT EXISTS (FROM deleted WHERE deleted.user_id = t.user_id)"
# Which column of such a line is the user's nobody knows: all are looked at. An id that holds what
# separates columns or is quoted is looked for anywhere.
_BY_TEXT = r"""
    row NOT IN (
        SELECT row
        FROM (
            SELECT row, unnest(regexp_split_to_array(raw_line, '[,;\t|]')) AS part
            FROM read_parquet($path)
        )
        WHERE trim(part, ' "') IN (SELECT trim(user_id, ' "') FROM deleted)
    )
    AND NOT EXISTS (
        FROM deleted
        WHERE regexp_matches(user_id, '[,;\t|"\n\r]')
        AND contains(t.raw_line, replace(user_id, '"', '""'))
    )
"""


def _keep(database: duckdb.DuckDBPyConnection, path: Path, condition: str) -> int:
    """Leave the rows `t` of a file that fulfil a condition; returns how many went."""
    if not path.is_file():
        return 0
    rows = pq.read_metadata(path).num_rows
    kept = path.with_suffix(".kept")
    condition = condition.replace("$path", quote_text(str(path)))
    database.execute(
        f"COPY (SELECT * FROM read_parquet({quote_text(str(path))}) AS t WHERE {condition})"  # noqa: S608
        f" TO {quote_text(str(kept))} (FORMAT parquet, COMPRESSION zstd)"
    )
    left = pq.read_metadata(kept).num_rows
    kept.replace(path)
    if not left:
        path.unlink()
    return rows - left


def import_clean(events: EventLog, clean: Path) -> dict[str, tuple[int, int]]:
    """Put clean tables into a log; returns rows added and rows read, by table.

    Events without an id get one made of their contents, so that a repeated import adds nothing.
    Users and items that the log knows already stay as they are: it is newer.

    Raises:
        InputError: no clean tables there.
    """
    path = table_path(clean, INTERACTIONS)
    if not path.is_file():
        raise InputError(f"{clean}: no {path.name} there; give the `clean` folder of a run")
    schema = Schema.load(clean / "schema.json")
    counts = {INTERACTIONS: (0, 0)}
    equal: Counter[str] = Counter()  # rows of one user and second that say the same, so far
    last: tuple[str, int] | None = None
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=TRANSACTION_ROWS):
            new = []
            for row in batch.to_pylist():
                if last != (row["user_id"], row["timestamp"]):
                    last = (row["user_id"], row["timestamp"])
                    equal.clear()
                new.append(_new_event(row, schema, equal))
            with events.write() as transaction:
                stored = sum(o is Outcome.STORED for o in transaction.append(new))
            added, read = counts[INTERACTIONS]
            counts[INTERACTIONS] = (added + stored, read + len(new))
    for table, key, fields in (
        (USERS, "user_id", schema.users),
        (ITEMS, "item_id", item_fields(schema)),
    ):
        path = table_path(clean, table)
        if path.is_file():
            counts[table] = _import_side(events, path, key, [*fields])
    return counts


def _new_event(row: dict[str, Any], schema: Schema, equal: Counter[str]) -> NewEvent:
    context = {n: v for n in schema.context if (v := row.get(n)) is not None}
    event_id = row.get("event_id")
    if event_id is None:
        content = json.dumps(row, sort_keys=True, ensure_ascii=False)
        equal[content] += 1
        content += f" {equal[content]}"
        event_id = "import-" + hashlib.sha256(content.encode()).hexdigest()[:32]
    return NewEvent(
        event_id,
        row["user_id"],
        row["item_id"],
        row["timestamp"],
        row.get("event_type"),
        row.get("event_value"),
        None if row.get("impression") is None else tuple(row["impression"]),
        context or None,
    )


def _import_side(events: EventLog, path: Path, key: str, fields: list[str]) -> tuple[int, int]:
    added = read = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=TRANSACTION_ROWS):
            rows = batch.to_pylist()
            read += len(rows)
            with events.write() as transaction:
                known = transaction.known(key, [row[key] for row in rows])
                for row in rows:
                    if row[key] in known:
                        continue
                    added += 1
                    values = {n: row[n] for n in fields if row.get(n) is not None}
                    if key == "user_id":
                        transaction.put_user(row[key], values)
                    else:
                        transaction.put_item(row[key], values, row.get("created_at"))
    return added, read


def _stream(connection: sa.Connection, table: str, path: Path) -> int:
    source, fields, columns = _SCHEMAS[table]
    names = [*columns, fields]
    query = sa.select(*(source.c[name] for name in names)).order_by(source.c.seq)
    schema = pa.schema([*columns.items(), (fields, pa.string())])
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        result = connection.execution_options(yield_per=ROWS).execute(query)
        for part in result.partitions():
            *plain, objects = zip(*part, strict=True)
            values = [*plain, [None if v is None else json.dumps(v) for v in objects]]
            arrays = [pa.array(v, t) for v, t in zip(values, schema.types, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows += len(part)
    return rows


def _spread(database: duckdb.DuckDBPyConnection, path: Path, source: str, kept: list[str]) -> None:
    """Replace the column of JSON objects by a column for each of their keys, typed by its values.

    Lists become lists, columns of numbers only become numbers, everything else text.
    """
    relation, column = f"read_parquet({quote_text(str(path))})", quote_name(source)
    found = database.execute(
        f"""
        SELECT key, bool_and(kind = 'ARRAY'), bool_and(kind IN ('DOUBLE', 'BIGINT', 'UBIGINT'))
        FROM (SELECT key, json_type({column}, {_POINTER}) AS kind
              FROM (SELECT {column}, unnest(json_keys({column})) AS key FROM {relation}))
        WHERE kind <> 'NULL' GROUP BY key ORDER BY key LIMIT {MAX_FIELDS + 1}
        """  # noqa: S608 - our own names
    ).fetchall()
    if len(found) > MAX_FIELDS:
        raise InputError(f"{path.stem} of the event log have more than {MAX_FIELDS} fields")
    selected = [quote_name(name) for name in kept]
    taken = {name.lower(): name for name in kept}
    for key, is_list, is_number in found:
        before = taken.get(key.lower())
        if before in kept:
            print(f"event log: field {key!r} of {path.stem} is left out, as {before} is a column")
            continue
        if before is not None:
            raise InputError(
                f"{path.stem} of the event log have fields {before!r} and {key!r}, which differ"
                " only in upper and lower case; write one of them"
            )
        taken[key.lower()] = key
        pointer = quote_text("/" + key.replace("~", "~0").replace("/", "~1"))
        value = f"{column} ->> {pointer}"
        if is_list:
            value = f"CAST(json_extract({column}, {pointer}) AS VARCHAR[])"
        elif is_number:
            value = f"CAST({value} AS DOUBLE)"
        selected.append(f"{value} AS {quote_name(key)}")
    target = path.with_suffix(".wide")
    database.execute(
        f"COPY (SELECT {', '.join(selected)} FROM {relation})"  # noqa: S608 - quoted names
        f" TO {quote_text(str(target))} (FORMAT parquet, COMPRESSION zstd)"
    )
    target.replace(path)
