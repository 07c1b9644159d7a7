"""Entities, views and services, built from the schema of the data."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, FeastType, Float64, Int64, String

from model.errors import InputError
from model.schema import FieldKind, Schema

CATALOGUE_ID = "all"  # the one row of the catalogue entity
TIMESTAMP = "event_timestamp"
OWNER = "hrnn-meta"

USER = Entity(
    name="user",
    join_keys=["user_id"],
    value_type=ValueType.STRING,
    description="Somebody whose events are in the log.",
)
ITEM = Entity(
    name="item",
    join_keys=["item_id"],
    value_type=ValueType.STRING,
    description="Something that can be recommended.",
)
CATALOGUE = Entity(
    name="catalogue",
    join_keys=["catalogue_id"],
    value_type=ValueType.STRING,
    description="All items together; one row.",
)

_TYPES: dict[FieldKind, FeastType] = {
    FieldKind.CATEGORICAL: String,
    FieldKind.TEXT: String,
    FieldKind.MULTI_CATEGORICAL: Array(String),
    FieldKind.NUMERIC: Float64,
}
_RESERVED = {TIMESTAMP, "user_id", "item_id", "events"}


@dataclass(frozen=True)
class Definitions:
    """Everything that `apply` registers; `views` by name."""

    entities: list[Entity]
    views: dict[str, FeatureView]
    services: list[FeatureService]

    @property
    def objects(self) -> list[Any]:
        return [*self.entities, *self.views.values(), *self.services]


def build(schema: Schema, sources: Path) -> Definitions:
    """Definitions for a dataset.

    Args:
        sources: folder with one Parquet file per view, written by the features step.

    Raises:
        InputError: a field has a name that features cannot have.
    """
    for table, fields in (("users", schema.users), ("items", schema.items)):
        for name in fields:
            if name in _RESERVED or "__" in name:
                raise InputError(
                    f"{table} field {name!r}: this name is taken by the feature store; rename the "
                    "column or leave it out with --set ingest.ignore"
                )

    def view(name: str, entity: Entity, fields: dict[str, FeastType], about: str) -> FeatureView:
        return FeatureView(
            name=name,
            entities=[entity],
            # 0 = no limit. Age is judged against the log's own time by the reader: Feast compares
            # with the wall clock offline and not at all online.
            ttl=timedelta(0),
            schema=[Field(name=n, dtype=t) for n, t in fields.items()],
            source=FileSource(
                name=f"{name}_source",
                path=str(sources / f"{name}.parquet"),
                timestamp_field=TIMESTAMP,
            ),
            description=about,
            owner=OWNER,
        )

    views = [
        view(
            "user_profile",
            USER,
            {"events": Int64, **{n: _TYPES[k] for n, k in schema.users.items()}},
            "Fields of a user, and how many events the log holds of them.",
        ),
        view(
            "user_history",
            USER,
            {
                "item_ids": Array(String),
                "timestamps": Array(Int64),
                "event_types": Array(String),
                "event_values": Array(Float64),
            },
            "Newest events of a user, oldest first; '' and NaN where type or value is missing.",
        ),
        view(
            "item_metadata",
            ITEM,
            {n: _TYPES[k] for n, k in schema.items.items()} or {"events": Int64},
            "Fields of an item.",
        ),
        view(
            "item_popularity",
            ITEM,
            {"count": Int64},
            "Events of an item inside the trend window, one row per period in which it changed.",
        ),
        view(
            "catalogue_popularity",
            CATALOGUE,
            {"total": Int64},
            "Events of all items inside the trend window, one row per period.",
        ),
        view(
            "trend_snapshot",
            CATALOGUE,
            {
                "item_ids": Array(String),
                "log_q": Array(Float64),
                "floor": Float64,
                "as_of": Int64,
                "window_seconds": Int64,
                "num_items": Int64,
            },
            "log q of the most popular items at one moment, and the floor of all others.",
        ),
    ]
    by_name = {v.name: v for v in views}
    services = [
        FeatureService(
            name="serving_user_v1",
            features=[by_name["user_profile"], by_name["user_history"]],
            description="What the transformer reads of a user.",
            owner=OWNER,
        ),
        FeatureService(
            name="serving_trend_v1",
            features=[by_name["trend_snapshot"]],
            description="What the transformer reads of the catalogue.",
            owner=OWNER,
        ),
        FeatureService(
            name="training_v1",
            features=[
                by_name["user_profile"],
                by_name["item_metadata"],
                by_name["item_popularity"],
                by_name["catalogue_popularity"],
            ],
            description="Point-in-time features of (user, item, moment) rows.",
            owner=OWNER,
        ),
    ]
    return Definitions([USER, ITEM, CATALOGUE], by_name, services)
