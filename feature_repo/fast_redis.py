"""Reading users from Redis below Feast's SDK, which takes ten times as long as Redis does.

All views of a user are one hash: one HMGET reads everything, and several users go in one round
trip. The key, the fields and the connection are made by Feast's own helpers, the values are
Feast's messages; tests compare with `get_online_features`. Feast is imported when first used.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from feature_repo.names import JOIN_KEY, USER

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore
    from redis.asyncio import Redis


class RedisUsers:
    """How what a feature service holds of users lies in Redis."""

    def __init__(self, store: "FeatureStore", service: "FeatureService") -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import _versioned_fv_name

        config = store.config
        self._value_of = _value_reader()
        self._project = config.project
        self._serialization = config.entity_key_serialization_version
        self._names: list[str] = []
        self._fields: list[bytes] = []
        for projection in service.feature_view_projections:
            view = store.get_feature_view(projection.name)
            stored = _versioned_fv_name(view, config)
            for feature in projection.features:
                self._names.append(f"{projection.name_to_use()}__{feature.name}")
                self._fields.append(_mmh3(f"{stored}:{feature.name}"))

    async def read(
        self, redis: "Redis", user_ids: Sequence[str]
    ) -> list[dict[str, Any] | Exception]:
        """Values by `view__feature` of each user, as `get_online_features` gives them.

        Returns:
            For a user whose values are none of Feast's, why they cannot be read.

        Raises:
            redis.RedisError, OSError: Redis cannot be read.
        """
        async with redis.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.execute_command("HMGET", self._key(user_id), *self._fields)
            rows = await pipe.execute(raise_on_error=False)
        for row in rows:
            # The one refusal that is about a key; of the others (LOADING, NOAUTH, …) all are.
            if isinstance(row, Exception) and not str(row).startswith("WRONGTYPE"):
                raise row
        return [self._values(row) for row in rows]

    def _values(self, row: Sequence[bytes | None] | Exception) -> dict[str, Any] | Exception:
        if isinstance(row, Exception):
            return row
        try:
            return {n: self._value_of(value) for n, value in zip(self._names, row, strict=True)}
        except Exception as error:
            return error

    def _key(self, user_id: str) -> bytes:
        from feast.infra.online_stores.helpers import _redis_key
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        entity = EntityKey(join_keys=[JOIN_KEY[USER]], entity_values=[Value(string_val=user_id)])
        return _redis_key(self._project, entity, self._serialization)


def connect(connection_string: str) -> "Redis":
    """An asynchronous client as Feast would configure it; it connects when it is first used.

    A read whose connection broke, as after a restart of Redis, is repeated once and at once.
    """
    from feast.infra.online_stores.redis import RedisOnlineStore
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError

    (node, *_), options = RedisOnlineStore._parse_connection_string(connection_string)
    if options.get("retry") is None:
        options["retry"] = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
    return Redis(host=node["host"], port=int(node["port"]), **options)


def _value_reader() -> Callable[[bytes | None], Any]:
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import feast_value_type_to_python_type

    def value_of(stored: bytes | None) -> Any:
        """A stored value as Feast's `to_dict` gives it; None: there is none."""
        if not stored:
            return None
        value = Value.FromString(stored)
        kind = value.WhichOneof("val")
        if kind in ("string_list_val", "int64_list_val", "double_list_val"):  # histories
            return list(getattr(value, kind).val)
        return feast_value_type_to_python_type(value)

    return value_of
