"""Rows into the online store, as they are: one level below Feast's data frames."""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from feature_repo.batches import batches
from feature_repo.event_tables import ERASE_WAIT_MILLISECONDS
from feature_repo.names import JOIN_KEY, VIEW_ENTITY

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

log = logging.getLogger("hrnn.features")

R = TypeVar("R")
Row = tuple[str, dict[str, Any], float]  # key, value protos by feature, event time (Unix seconds)


def protos(row: Mapping[str, Any]) -> dict[str, Any]:
    """Feast's wire values of plain ones, exact for int64 and float64."""
    from feast.protos.feast.types import Value_pb2 as wire

    lists = {
        "item_ids": ("string_list_val", wire.StringList),
        "event_types": ("string_list_val", wire.StringList),
        "timestamps": ("int64_list_val", wire.Int64List),
        "event_values": ("double_list_val", wire.DoubleList),
        "log_q": ("double_list_val", wire.DoubleList),
    }
    values = {}
    for name, value in row.items():
        if name in JOIN_KEY.values() or value is None:
            continue
        if name in lists:
            kind, build = lists[name]
            values[name] = wire.Value(**{kind: build(val=value)})
        elif isinstance(value, str):
            values[name] = wire.Value(string_val=value)
        elif isinstance(value, int):
            values[name] = wire.Value(int64_val=value)
        else:
            values[name] = wire.Value(double_val=value)
    return values


def write_rows(store: "FeatureStore", view: "str | FeatureView", rows: Iterable[Row]) -> int:
    """Write rows as they are; missing features become null.

    One level below `write_to_online_store`, which takes pandas frames only (ten times slower for
    one row) and refuses rows of nulls. What else lies under a row's key in Redis is replaced: one
    such key would keep all others from being written.

    Args:
        view: its name, or the view, which saves the 3 ms that Feast takes to look it up.

    Returns:
        How many keys held something else.
    """
    from feast.protos.feast.types.Value_pb2 import Value

    if isinstance(view, str):
        view = store.get_feature_view(view)
    features = [f.name for f in view.features]
    provider = store._get_provider()
    replaced = 0
    for batch in batches(rows):
        data: list[Any] = [
            (
                _entity_key(view, key),
                {name: values.get(name, Value()) for name in features},
                datetime.fromtimestamp(time, UTC),
                None,
            )
            for key, values, time in batch
        ]
        try:
            provider.online_write_batch(store.config, view, data, None)
        except Exception as error:
            if not is_wrong_type(error):
                raise
            replaced += remove_wrong_types(store, view, [key for key, _, _ in batch])
            provider.online_write_batch(store.config, view, data, None)
    return replaced


def is_wrong_type(error: Exception) -> bool:
    """Whether Redis says that a key holds something that is no hash, so no row of Feast's."""
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError) and "WRONGTYPE" in str(error)


def remove_wrong_types(store: "FeatureStore", view: "FeatureView", keys: Sequence[str]) -> int:
    """Remove what is no row where rows of these keys belong (Redis); returns how many."""
    online: Any = store._get_provider().online_store
    own = online._generate_redis_keys_for_entities(
        store.config, [_entity_key(view, key) for key in keys]
    )
    client = online._get_client(store.config.online_store)
    with client.pipeline(transaction=False) as pipe:
        for key in own:
            pipe.type(key)
        kinds = pipe.execute()
    wrong = [key for key, kind in zip(own, kinds, strict=True) if kind not in (b"hash", b"none")]
    if wrong:
        client.delete(*wrong)
        log.warning("%d keys in Redis held no features: removed", len(wrong))
    return len(wrong)


def read_row(store: "FeatureStore", view: "FeatureView", key: str) -> dict[str, Any]:
    """The scalars of one row by feature; nulls are absent, and so is all of an unknown row."""
    return read_rows(store, view, [key])[0]


def read_rows(
    store: "FeatureStore", view: "FeatureView", keys: Sequence[str], features: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The same of several rows; of these features alone, if any are named."""
    entities = [_entity_key(view, key) for key in keys]
    names = list(features) or [f.name for f in view.features]
    found = store._get_provider().online_read(store.config, view, entities, names)
    return [
        {
            name: getattr(value, kind)
            for name, value in (values or {}).items()
            if (kind := value.WhichOneof("val")) is not None
        }
        for _, values in found
    ]


def rows_or_errors(
    read: Callable[[Sequence[str]], Sequence[R]], keys: Sequence[str]
) -> list[R | Exception]:
    """What `read` gives of keys; of each that cannot be decoded, why.

    Feast does not tell which row it stumbled over, so it is looked for by halves: b bad ones of n
    take 2·b·log2(n) reads or so.

    Raises:
        Exception: of `read`, where it is about the store and not about what a row holds.
    """
    try:
        return list(read(keys))
    except Exception as error:
        if _is_the_stores(error):
            raise
        if len(keys) == 1:
            return [error]
    middle = len(keys) // 2
    return rows_or_errors(read, keys[:middle]) + rows_or_errors(read, keys[middle:])


def _is_the_stores(error: Exception) -> bool:
    from redis.exceptions import RedisError

    return isinstance(error, OSError | MemoryError | sqlite3.Error | RedisError)


def relax(store: "FeatureStore") -> None:
    """Let this store's writes not wait for the disk.

    For rows that are written again if they are lost, and whose loss is noticed. SQLite then loses
    the newest commits with the power, in order, and nothing else; Redis decides for itself.
    """
    if (connection := _sqlite(store)) is not None:
        connection.execute("PRAGMA synchronous=NORMAL")


def overwrite(store: "FeatureStore") -> None:
    """Let this store's writes overwrite the bytes of what they replace (SQLite)."""
    if (connection := _sqlite(store)) is not None:
        connection.execute("PRAGMA secure_delete=ON")


def erase_traces(store: "FeatureStore") -> bool:
    """Give up the bytes of replaced rows that SQLite's write-ahead log still has.

    Returns:
        Whether it is done; false: somebody reads an older state, try again.
    """
    connection = _sqlite(store)
    if connection is None:
        return True
    (wait,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute(f"PRAGMA busy_timeout = {ERASE_WAIT_MILLISECONDS}")
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {wait}")
    return not busy


def _sqlite(store: "FeatureStore") -> sqlite3.Connection | None:
    """The connection through which Feast writes; None: another online store."""
    if store.config.online_store.type != "sqlite":
        return None
    online: Any = store._get_provider().online_store
    connection: sqlite3.Connection = online._get_conn(store.config)
    return connection


def _entity_key(view: "FeatureView", key: str) -> Any:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    join_key = JOIN_KEY[VIEW_ENTITY[view.name]]
    return EntityKey(join_keys=[join_key], entity_values=[Value(string_val=key)])
