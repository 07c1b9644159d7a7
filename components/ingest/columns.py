"""Which source column is which canonical column: explicit mapping first, then common names."""

import re
from collections.abc import Mapping, Sequence

from components.tables import INTERACTIONS, ITEMS, REQUIRED_COLUMNS, USERS
from model.errors import InputError

_USER = ["user_id", "user", "uid", "customer_id", "customer", "visitor_id", "visitor", "client_id"]
_USER += ["member_id", "member", "account_id", "person_id", "reader_id", "viewer_id", "profile_id"]
_USER += ["reviewer_id", "reviewer"]
_ITEM = ["item_id", "item", "iid", "movie_id", "movie", "product_id", "product", "article_id"]
_ITEM += ["article", "news_id", "sku", "asin", "isbn", "song_id", "track_id", "book_id", "video_id"]
_ITEM += ["content_id", "document_id", "doc_id", "listing_id", "goods_id", "game_id", "recipe_id"]
# What may as well be a field of something else is taken where there is nothing better.
_PLACE = ["venue_id", "poi_id", "business_id", "stock_code", "artist_id", "place_id", "location_id"]

# Names by priority, spelt without case and punctuation when compared: `userId` = `USER_ID`.
RECOGNISED: dict[str, dict[str, list[str]]] = {
    INTERACTIONS: {
        # A log that knows only sessions treats each session as a user.
        "user_id": [*_USER, "session_id", "session"],
        "item_id": [*_ITEM, *_PLACE],
        "timestamp": [
            *("timestamp", "ts", "time", "event_time", "event_timestamp", "datetime", "date_time"),
            *("unix_time", "unix_timestamp", "epoch", "event_date", "rated_at", "clicked_at"),
            *("occurred_at", "impression_time", "created_at", "unix_review_time", "utc_timestamp"),
            *("utc_time", "check_in_time", "visit_time", "purchase_time", "invoice_date"),
            *("order_date", "purchase_date", "review_date", "date_taken", "date", "t"),
        ],
        "event_id": ["event_id", "interaction_id", "event_uuid"],
        "event_type": ["event_type", "event", "event_name", "behavior", "behaviour", "action"],
        "event_value": ["event_value", "rating", "score", "stars", "overall", "value"],
        "impression": ["impression", "impressions", "impression_list", "shown_items", "slate"],
    },
    USERS: {"user_id": [*_USER, "id"]},
    ITEMS: {
        "item_id": [*_ITEM, "id", *_PLACE],
        "created_at": [
            *("created_at", "published_at", "publish_time", "published_time", "published"),
            *("release_date", "added_at", "date_added"),
        ],
    },
}
TITLES = ["item_title", "title", "movie_title", "product_title", "name", "item_name"]
TITLES += ["movie_name", "product_name", "headline"]
MAPPING_SETTING = {INTERACTIONS: "columns", USERS: "user_columns", ITEMS: "item_columns"}


def normalise(name: str) -> str:
    """A column name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def recognise(
    table: str, present: Sequence[str], mapping: Mapping[str, str], path: str
) -> dict[str, str]:
    """Canonical name → source column, in canonical order.

    Args:
        present: the source's columns, ignored ones left out.
        mapping: the caller's own choices; they win over recognition.
        path: named in messages.

    Raises:
        InputError: unknown or duplicated mapping, a required column is missing.
    """
    known = RECOGNISED[table]
    setting = f"ingest.{MAPPING_SETTING[table]}"
    if unknown := sorted(set(mapping) - set(known)):
        raise InputError(
            f"{setting}.{unknown[0]}: the {table} table has no such column"
            f" (known: {', '.join(known)})"
        )
    for canonical, source in mapping.items():
        if source not in present:
            raise InputError(
                f"{setting}.{canonical}={source}: {path} has no column {source!r}"
                f" (columns: {', '.join(present)})"
            )
        if others := [c for c, s in mapping.items() if s == source and c != canonical]:
            raise InputError(
                f"{setting}: column {source!r} is mapped to both {canonical} and {others[0]};"
                " map each source column once"
            )
    taken = set(mapping.values())
    chosen = {}
    for canonical, names in known.items():
        if canonical in mapping:
            chosen[canonical] = mapping[canonical]
            continue
        free = [c for c in present if c not in taken]
        for name in names:
            matches = [c for c in free if normalise(c) == normalise(name)]
            if len(matches) > 1:
                raise InputError(
                    f"{path}: columns {' and '.join(map(repr, matches))} could both be"
                    f" {canonical}; choose one with --set {setting}.{canonical}=NAME"
                )
            if matches:
                chosen[canonical] = matches[0]
                taken.add(matches[0])
                break
    if missing := [c for c in REQUIRED_COLUMNS[table] if c not in chosen]:
        hints = " ".join(f"--set {setting}.{c}=NAME" for c in missing)
        raise InputError(
            f"{path}: no column found for {', '.join(missing)} among"
            f" {', '.join(present) or 'no columns'}; say which with {hints}"
            " (the first line of a CSV file must hold the column names)"
        )
    return chosen


def title_column(present: Sequence[str]) -> str | None:
    """The items column that holds a human-readable title."""
    for name in TITLES:
        for column in present:
            if normalise(column) == normalise(name):
                return column
    return None
