"""Names and options of the feature views, free of Feast so that steps can import them quickly."""

import re
import zlib
from collections.abc import Mapping

from pydantic import Field

from model.errors import InputError
from model.schema import FieldKind, Schema
from model.settings import SettingsBase
from model.trends import TrendSettings

PROJECT = "hrnn"
USER, ITEM, CATALOGUE = "user", "item", "catalogue"  # entities
JOIN_KEY = {USER: "user_id", ITEM: "item_id", CATALOGUE: "catalogue_id"}
CATALOGUE_ID = "all"  # the one row of the catalogue

USER_PROFILE, USER_HISTORY = "user_profile", "user_history"
ITEM_METADATA, ITEM_POPULARITY = "item_metadata", "item_popularity"
CATALOGUE_POPULARITY, TREND_SNAPSHOT = "catalogue_popularity", "trend_snapshot"
USER_LIVE, LIVE_CHECKPOINT = "user_live", "live_checkpoint"
ITEM_TREND = "item_trend"  # on demand, from the two popularity views
VIEW_ENTITY = {
    USER_PROFILE: USER,
    USER_HISTORY: USER,
    ITEM_METADATA: ITEM,
    ITEM_POPULARITY: ITEM,
    CATALOGUE_POPULARITY: CATALOGUE,
    TREND_SNAPSHOT: CATALOGUE,
    USER_LIVE: USER,
    LIVE_CHECKPOINT: CATALOGUE,
}
# Written from the event log by its followers; all others are materialised from the pipeline's
# tables. No view has both for writers, so neither can undo what the other wrote.
LIVE_VIEWS = frozenset({USER_LIVE, LIVE_CHECKPOINT})
MATERIALISED = tuple(view for view in VIEW_ENTITY if view not in LIVE_VIEWS)

# Views that others may push rows into with Feast's own `push`: whole rows of a profile or an item,
# in force until the next run. Histories have none: a pushed one would lack what others wrote, and
# what is live is a function of the event log alone.
PUSH_SOURCE = {USER_PROFILE: "user_profile_push", ITEM_METADATA: "item_metadata_push"}

# Sources of several files: each refresh of the trends adds one.
GROWING = frozenset({ITEM_POPULARITY, CATALOGUE_POPULARITY})
REFRESH_PREFIX = "refresh-"  # of those files

SERVING_USER, SERVING_TREND, TRAINING = "serving_user_v2", "serving_trend_v1", "training_v2"
SERVING_USER_V1 = "serving_user_v1"  # without what is live

EVENT_TIMESTAMP = "event_timestamp"
FIRST_SEEN = "first_seen"  # of users and items: Unix seconds, never null
FIELD_TAG, KIND_TAG = "field", "kind"  # tags of a Feast field: the user's name for it, its kind
HISTORY_LENGTH_TAG = "history_length"

# Names the views, the joins of the offline store or Feast itself already use.
_RESERVED = frozenset(
    {*JOIN_KEY.values(), *VIEW_ENTITY, EVENT_TIMESTAMP, FIRST_SEEN, "created", "rn"}
    | {"entity_row_id", "event_expire_timestamp", "__log_date"}
    | {"count", "total", "smoothing", "num_items", "log_q"}
)


class ViewOptions(SettingsBase):
    """What the views need to know besides the schema. Durations in seconds, 0 = for ever.

    Age is measured against the log's own time (the as_of of the trend snapshot, or the newest event
    seen since), never against the clock, so that a log of 1998 works as it did then.
    """

    history_length: int = Field(100, ge=1)
    # A user silent for longer is served without a history.
    history_ttl_seconds: int = Field(3650 * 86_400, ge=0)
    # How long counts answer after the moment they were made for.
    popularity_ttl_seconds: int = Field(0, ge=0)
    # How the pipeline counted the trend; a refresh goes on in the same way. Without a window: not
    # counted yet.
    trend: TrendSettings = TrendSettings()
    trend_top_items: int = Field(10_000, ge=1)  # listed in a snapshot; all others share its floor


def source_name(view: str) -> str:
    """File inside `sources/` that the pipeline writes for a view."""
    return f"{view}/history.parquet" if view in GROWING else f"{view}.parquet"


def source_pattern(view: str) -> str:
    """File or files inside `sources/` that a view is read from."""
    return f"{view}/*.parquet" if view in GROWING else source_name(view)


def feature_names(fields: Mapping[str, FieldKind]) -> dict[str, str]:
    """Feature name of every field: its own where Feast can take it, an escaped one otherwise.

    Raises:
        InputError: two names differ only in case, which neither DuckDB nor SQL can tell apart.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for field in fields:
        lowered = field.lower()
        plain = (
            re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", field)
            and lowered not in _RESERVED
            # Feast's point-in-time join drops columns with these endings, and "__" splits names.
            and not lowered.endswith(("_y", "_yyyy"))
            and "__" not in field
        )
        if lowered in taken:
            raise InputError(
                f"fields {taken[lowered]!r} and {field!r} differ only in upper and lower case;"
                " rename one of them"
            )
        taken[lowered] = field
        slug = re.sub(r"[^a-z0-9]+", "_", lowered).strip("_")
        names[field] = field if plain else f"field_{slug}_{zlib.crc32(field.encode()):08x}"
    return names


def item_fields(schema: Schema) -> dict[str, FieldKind]:
    """Item fields with the title, which travels along even when the model does not read it."""
    title = {schema.item_title: FieldKind.TEXT} if schema.item_title else {}
    return {**title, **schema.items}
