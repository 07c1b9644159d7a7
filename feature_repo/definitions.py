"""Entities, sources, views and services of the feature store, built from a schema."""

import inspect
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any, cast

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.types import Array, FeastType, Float64, Int64, String

from feature_repo.names import (
    CATALOGUE,
    CATALOGUE_POPULARITY,
    EVENT_TIMESTAMP,
    FIELD_TAG,
    FIRST_SEEN,
    HISTORY_LENGTH_TAG,
    ITEM,
    ITEM_METADATA,
    ITEM_POPULARITY,
    ITEM_TREND,
    JOIN_KEY,
    KIND_TAG,
    LIVE_CHECKPOINT,
    PUSH_SOURCE,
    SERVING_TREND,
    SERVING_USER,
    SERVING_USER_V1,
    TRAINING,
    TREND_SNAPSHOT,
    USER,
    USER_HISTORY,
    USER_LIVE,
    USER_PROFILE,
    VIEW_ENTITY,
    ViewOptions,
    feature_names,
    item_fields,
    source_pattern,
)
from feature_repo.on_demand import item_log_q
from model.schema import FieldKind, Schema

OWNER = "recommendations"
NEVER = timedelta(0)  # Feast's "does not expire"

_TYPE: dict[FieldKind, FeastType] = {
    FieldKind.CATEGORICAL: String,
    FieldKind.TEXT: String,
    FieldKind.MULTI_CATEGORICAL: Array(String),
    FieldKind.NUMERIC: Float64,
}


@dataclass(frozen=True)
class Definitions:
    """Everything `feast apply` registers."""

    entities: dict[str, Entity]
    views: dict[str, FeatureView]
    on_demand: dict[str, OnDemandFeatureView]
    services: dict[str, FeatureService]

    def objects(self) -> list[Any]:
        groups = (self.entities, self.views, self.on_demand, self.services)
        return [thing for group in groups for thing in group.values()]


def build(sources: Path, schema: Schema, options: ViewOptions) -> Definitions:
    """Definitions over the Parquet files in `sources` (absolute).

    Raises:
        InputError: field names that cannot be told apart.
    """
    entities = {
        name: Entity(name=name, join_keys=[key], value_type=ValueType.STRING, description=text)
        for (name, key), text in zip(
            JOIN_KEY.items(),
            ("Who interacts", "What is recommended", "All items together: the one row `all`"),
            strict=True,
        )
    }
    assert list(entities) == [USER, ITEM, CATALOGUE]  # noqa: S101 - order of the texts

    def view(
        name: str, description: str, fields: list[Field], ttl: timedelta, **tags: str
    ) -> FeatureView:
        table = FileSource(
            name=f"{name}_source",
            path=str(sources / source_pattern(name)),
            timestamp_field=EVENT_TIMESTAMP,
        )
        return FeatureView(
            name=name,
            entities=[entities[VIEW_ENTITY[name]]],
            schema=[Field(name=JOIN_KEY[VIEW_ENTITY[name]], dtype=String), *fields],
            source=PushSource(name=PUSH_SOURCE[name], batch_source=table)
            if name in PUSH_SOURCE
            else table,
            ttl=ttl,
            online=True,
            owner=OWNER,
            description=description,
            tags={"domain": "recommendations", **tags},
        )

    events = [
        Field(name="item_ids", dtype=Array(String)),
        Field(name="timestamps", dtype=Array(Int64), description="Unix seconds"),
        Field(name="event_types", dtype=Array(String), description="empty: none"),
        Field(name="event_values", dtype=Array(Float64), description="NaN: none"),
    ]
    first_seen = Field(name=FIRST_SEEN, dtype=Int64, description="First event, Unix seconds")
    views = {
        USER_PROFILE: view(
            USER_PROFILE,
            "What is known of a user besides events; valid from the first event on",
            [first_seen, *_fields(schema.users)],
            NEVER,
        ),
        USER_HISTORY: view(
            USER_HISTORY,
            "The newest events of a user in the pipeline's tables, oldest first; visible one second"
            " after the last",
            events,
            timedelta(seconds=options.history_ttl_seconds),
            **{HISTORY_LENGTH_TAG: str(options.history_length)},
        ),
        ITEM_METADATA: view(
            ITEM_METADATA,
            "What is known of an item besides events",
            [first_seen, *_fields(item_fields(schema))],
            NEVER,
        ),
        ITEM_POPULARITY: view(
            ITEM_POPULARITY,
            "Events of an item in the window before a period's start; a row where that changes",
            [Field(name="count", dtype=Int64)],
            # A count is in force until the next one; whether it is recent, the catalogue's rows
            # tell, which come with every period.
            NEVER,
        ),
        CATALOGUE_POPULARITY: view(
            CATALOGUE_POPULARITY,
            "Events of all items in the window before a period's start; a row for every period",
            [
                Field(name="total", dtype=Int64),
                Field(name="smoothing", dtype=Float64, description="pseudo-count of every item"),
                Field(name="num_items", dtype=Int64, description="size of the catalogue"),
            ],
            timedelta(seconds=options.popularity_ttl_seconds),
        ),
        TREND_SNAPSHOT: view(
            TREND_SNAPSHOT,
            "log q of the most popular items at one moment and the floor of all others",
            [
                Field(name="item_ids", dtype=Array(String), description="log_q descending"),
                Field(name="log_q", dtype=Array(Float64)),
                Field(name="floor", dtype=Float64, description="log q of each item not listed"),
                Field(name="as_of", dtype=Int64, description="Unix seconds"),
                Field(name="window_seconds", dtype=Int64),
                Field(name="num_items", dtype=Int64),
            ],
            # An old snapshot beats none: serving labels answers that use one.
            NEVER,
        ),
        USER_LIVE: view(
            USER_LIVE,
            "All that the event log says of a user, written by its followers: newest events,"
            " fields, deletion",
            [
                *events,
                Field(name="fields", dtype=String, description="JSON; over those of the profile"),
                Field(
                    name="deleted_at",
                    dtype=Int64,
                    description="Unix seconds; the profile and earlier events count no more",
                ),
                Field(
                    name="generation",
                    dtype=Int64,
                    description="of the last time that all rows were written when this one was",
                ),
            ],
            NEVER,
        ),
        LIVE_CHECKPOINT: view(
            LIVE_CHECKPOINT,
            "How far this store has followed the event log",
            [
                Field(name="log_id", dtype=String),
                Field(name="seq", dtype=Int64),
                Field(name="generation", dtype=Int64, description="older rows count no more"),
            ],
            NEVER,
        ),
    }

    on_demand = {
        ITEM_TREND: OnDemandFeatureView(
            name=ITEM_TREND,
            sources=[views[ITEM_POPULARITY], views[CATALOGUE_POPULARITY]],
            schema=[Field(name="log_q", dtype=Float64)],
            mode="pandas",
            udf=cast(FunctionType, item_log_q),
            udf_string=inspect.getsource(item_log_q),
            owner=OWNER,
            description="log share of an item among all items' events, smoothed",
            tags={"domain": "recommendations"},
        )
    }

    features: dict[str, FeatureView | OnDemandFeatureView] = {**views, **on_demand}

    def service(name: str, description: str, *names: str) -> FeatureService:
        return FeatureService(
            name=name,
            features=[features[n] for n in names],
            owner=OWNER,
            description=description,
            tags={"domain": "recommendations"},
        )

    services = {
        SERVING_USER: service(
            SERVING_USER,
            "A user's profile, history and what has happened since, for a request",
            USER_PROFILE,
            USER_HISTORY,
            USER_LIVE,
        ),
        SERVING_USER_V1: service(
            SERVING_USER_V1, "A user at the end of the last run", USER_PROFILE, USER_HISTORY
        ),
        SERVING_TREND: service(SERVING_TREND, "The trend snapshot in force", TREND_SNAPSHOT),
        # History is left out: it holds one row per user, training builds its own sequences.
        TRAINING: service(
            TRAINING,
            "Point-in-time features of (user, item, moment), read by feature_repo.historical",
            USER_PROFILE,
            ITEM_METADATA,
            ITEM_POPULARITY,
            CATALOGUE_POPULARITY,
            ITEM_TREND,
        ),
    }
    return Definitions(entities, views, on_demand, services)


def _fields(fields: dict[str, FieldKind]) -> list[Field]:
    return [
        Field(
            name=name,
            dtype=_TYPE[fields[field]],
            tags={FIELD_TAG: field, KIND_TAG: fields[field].value},
        )
        for field, name in feature_names(fields).items()
    ]
