"""Typing and checking of tables as Ibis expressions; bad rows get a reason instead of vanishing.

Private columns start with two underscores: `__row` (position in the source, first row 1),
`__micros` (full-precision time), `__reason` (null for good rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from components.tables import LIST_DELIMITER
from components.validate.timestamps import SECOND, Unit, as_number, microseconds
from model.schema import MAX_ID, FieldKind

SEPARATOR = "\x1f"
NOBODY = ("NA", "N/A", "<NA>", "NAN", "NULL", "NONE", "UNDEFINED", "\\N")  # in capitals
ROW, MICROS, REASON = "__row", "__micros", "__reason"


class Reason(StrEnum):
    """Why a row is in quarantine; the first that applies, in this order."""

    MALFORMED_ROW = "malformed_row"  # a line that does not fit the header
    NULL_USER = "null_user"
    NULL_ITEM = "null_item"
    LONG_ID = "long_id"  # of more than model.schema.MAX_ID characters
    BAD_TIMESTAMP = "bad_timestamp"
    NEGATIVE_TIMESTAMP = "negative_timestamp"
    FUTURE_TIMESTAMP = "future_timestamp"
    BAD_VALUE = "bad_value"
    DUPLICATE_EVENT_ID = "duplicate_event_id"
    DUPLICATE_USER = "duplicate_user"
    DUPLICATE_ITEM = "duplicate_item"
    BOT_USER = "bot_user"


NULL_ID = {"user_id": Reason.NULL_USER, "item_id": Reason.NULL_ITEM}
DUPLICATE_ID = {"user_id": Reason.DUPLICATE_USER, "item_id": Reason.DUPLICATE_ITEM}


@dataclass(frozen=True)
class TimeRules:
    """How to read the timestamp column; `latest` in Unix seconds."""

    unit: Unit
    latest: int


def filled(column: ir.Value) -> ir.BooleanValue:
    """Whether a value is there: not null and, for text, not blank."""
    if isinstance(column.type(), dt.String):
        return column.notnull() & (column.strip() != "")
    return column.notnull()


def named(user_id: ir.Value) -> ir.BooleanValue:
    """Whether an interaction's user is there.

    A shop's guests all bear the word with which its export says that there is no user; taken for
    an id it would make them one user, who does most of what is done.
    """
    if not isinstance(user_id.type(), dt.String):
        return filled(user_id)
    return filled(user_id) & user_id.strip().upper().notin(NOBODY)


def too_long(column: ir.Value) -> ir.BooleanValue:
    """Whether an id has more characters than servers and the event log take."""
    return column.cast("string").length() > MAX_ID


def text(column: ir.Value) -> ir.StringValue:
    """A column as text, blanks as null; whole floats lose their '.0' (3.0 is the category 3)."""
    if isinstance(column.type(), dt.Floating):
        number = as_number(column)
        whole = (number == number.floor()) & (number.abs() < 2**53)
        column = whole.ifelse(number.cast("int64").cast("string"), number.cast("string"))
    elif isinstance(column.type(), dt.Boolean):
        column = ibis.cases((column, "true"), (~column, "false"), else_=ibis.null("string"))
    column = column.cast("string")
    return filled(column).ifelse(column, ibis.null("string"))


def text_list(column: ir.Value) -> ir.ArrayValue:
    """A column as a list of trimmed texts; text is split at the list delimiter."""
    if isinstance(column.type(), dt.Array):
        return _trimmed(column.cast("array<string>"))
    return _split(text(column).replace(LIST_DELIMITER, SEPARATOR))


def shown_items(column: ir.Value) -> ir.ArrayValue:
    """An impression as a list of ids; text is split at the list delimiter or at white space."""
    if isinstance(column.type(), dt.Array):
        return column.cast("array<string>")
    listed = text(column)
    # Ids may hold blanks where delimiters stand between them.
    return _split(
        listed.contains(LIST_DELIMITER).ifelse(
            listed.replace(LIST_DELIMITER, SEPARATOR), listed.re_replace(r"\s+", SEPARATOR)
        )
    )


def _split(listed: ir.StringValue) -> ir.ArrayValue:
    # By a character that means nothing in a regular expression, which Spark splits by.
    return _trimmed(listed.split(SEPARATOR))


def _trimmed(parts: ir.ArrayValue) -> ir.ArrayValue:
    return parts.map(lambda part: part.strip()).filter(lambda part: part != "")


def typed(column: ir.Value, kind: FieldKind) -> ir.Value:
    """A field with the type its kind has in clean tables; unreadable numbers become null."""
    if kind is FieldKind.NUMERIC:
        return as_number(column)
    if kind is FieldKind.MULTI_CATEGORICAL:
        return text_list(column)
    return text(column)


def unreadable(raw: ir.Table, fields: Mapping[str, FieldKind]) -> dict[str, ir.IntegerScalar]:
    """Per numeric field, how many filled values are not numbers."""
    return {
        name: (filled(raw[name]) & as_number(raw[name]).isnull()).sum()
        for name, kind in fields.items()
        if kind is FieldKind.NUMERIC
    }


def type_interactions(
    raw: ir.Table, context: Mapping[str, FieldKind], rules: TimeRules
) -> ir.Table:
    """Typed columns plus `__row`, `__micros` and the first per-row `__reason`."""
    micros = microseconds(raw.timestamp, rules.unit)
    columns: dict[str, ir.Value] = {
        "user_id": raw.user_id,
        "item_id": raw.item_id,
        "timestamp": (micros / SECOND).floor().cast("int64"),
    }
    long = too_long(raw.user_id) | too_long(raw.item_id)
    if "event_id" in raw.columns:
        long |= too_long(raw.event_id).fill_null(False)
    reasons = [
        (~named(raw.user_id), Reason.NULL_USER),
        (~filled(raw.item_id), Reason.NULL_ITEM),
        (long, Reason.LONG_ID),
        (micros.isnull(), Reason.BAD_TIMESTAMP),
        (micros < 0, Reason.NEGATIVE_TIMESTAMP),
        (micros > rules.latest * SECOND, Reason.FUTURE_TIMESTAMP),
    ]
    for name in ("event_id", "event_type"):
        if name in raw.columns:
            columns[name] = text(raw[name])
    if "event_value" in raw.columns:
        columns["event_value"] = as_number(raw.event_value)
        reasons.append(
            (filled(raw.event_value) & columns["event_value"].isnull(), Reason.BAD_VALUE)
        )
    if "impression" in raw.columns:
        columns["impression"] = shown_items(raw.impression)
    columns |= {name: typed(raw[name], kind) for name, kind in context.items()}
    columns |= {ROW: raw[ROW], MICROS: micros, REASON: first_reason(reasons)}
    return raw.select(**columns)


def first_reason(reasons: list[tuple[ir.BooleanValue, Reason]]) -> ir.StringValue:
    """The first condition that holds, or null."""
    branches = [(condition, reason.value) for condition, reason in reasons]
    return ibis.cases(*branches, else_=ibis.null("string"))


def duplicate_events(checked: ir.Table) -> ir.Table:
    """Rows (`__row`, `__reason`) whose event id an earlier good row already has."""
    good = checked.filter(checked[REASON].isnull() & checked.event_id.notnull())
    # The id may also hide in quarantined rows; those do not count as its first use.
    first = good.group_by("event_id").agg(__first=good[ROW].min())
    later = good.join(first, "event_id").filter(lambda t: t[ROW] > t["__first"])
    return later.select(ROW, **{REASON: ibis.literal(Reason.DUPLICATE_EVENT_ID.value)})


def bot_events(checked: ir.Table, max_events_per_user: int) -> ir.Table:
    """All good rows (`__row`, `__reason`) of users with more events than a person makes."""
    good = checked.filter(checked[REASON].isnull())
    bots = good.group_by("user_id").agg(__events=good.count())
    bots = bots.filter(bots["__events"] > max_events_per_user).select("user_id")
    return good.semi_join(bots, "user_id").select(
        ROW, **{REASON: ibis.literal(Reason.BOT_USER.value)}
    )


def type_entities(
    raw: ir.Table, key: str, fields: Mapping[str, FieldKind], rules: TimeRules | None
) -> ir.Table:
    """Typed users or items plus `__row` and `__reason`; of several rows with one id the last stays.

    Args:
        fields: the columns to keep.
        rules: how to read `created_at`, if the table has it; unreadable values become null.
    """
    columns: dict[str, ir.Value] = {key: raw[key]}
    if rules is not None:
        columns["created_at"] = (
            (microseconds(raw.created_at, rules.unit) / SECOND).floor().cast("int64")
        )
    columns |= {name: typed(raw[name], kind) for name, kind in fields.items()}
    last = raw[ROW] == raw[ROW].max().over(ibis.window(group_by=raw[key]))
    reasons = [
        (~filled(raw[key]), NULL_ID[key]),
        (too_long(raw[key]), Reason.LONG_ID),
        (~last, DUPLICATE_ID[key]),
    ]
    columns |= {ROW: raw[ROW], REASON: first_reason(reasons)}
    return raw.select(**columns)
