"""Timestamps in any common shape → microseconds since 1970 (UTC), as Ibis expressions.

Understood: integer or fractional Unix time in seconds, milliseconds, microseconds or nanoseconds
(one unit per column, told apart by magnitude), ISO-8601 text (no zone means UTC), and Parquet
dates and timestamps with or without a zone.
"""

import sys
from enum import StrEnum

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

SECOND = 1_000_000  # microseconds
_ISO_DATE = r"^\s*\d{4}[-/]\d{1,2}[-/]\d{1,2}"  # keeps words such as 'infinity' and 'now' out
# 10^15 seconds lie far beyond any calendar; larger numbers would overflow int64 microseconds.
_LARGEST = 9e12 * SECOND


class Unit(StrEnum):
    """What one step of a numeric timestamp column means."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"

    @property
    def microseconds(self) -> float:
        return {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}[self.value]

    @property
    def label(self) -> str:
        return {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}[
            self.value
        ]


def as_number(column: ir.Value) -> ir.FloatingValue:
    """A column as finite float64; null where it is none."""
    number = column.try_cast("float64")
    # NaN is above every number, in DuckDB and in Spark.
    finite = number.abs() <= sys.float_info.max
    return finite.ifelse(number, ibis.null("float64"))


def detect_unit(median: float | None) -> Unit:
    """Unit of a numeric column from its median magnitude.

    10^11 s is the year 5138 and 10^11 ms is March 1973, so the ranges of real logs are disjoint.
    """
    if median is None or abs(median) < 1e11:
        return Unit.SECONDS
    if abs(median) < 1e14:
        return Unit.MILLISECONDS
    return Unit.MICROSECONDS if abs(median) < 1e17 else Unit.NANOSECONDS


def is_calendar(column: ir.Value) -> bool:
    """Whether a column holds dates or timestamps rather than numbers or text."""
    return isinstance(column.type(), dt.Timestamp | dt.Date)


def microseconds(column: ir.Value, unit: Unit) -> ir.IntegerValue:
    """Microseconds since 1970, null where the value is not a moment.

    Args:
        unit: of the numeric values.
    """
    if is_calendar(column):
        return _from_calendar(column.cast("timestamp"))
    number = as_number(column)
    scaled = number * unit.microseconds
    from_number = (scaled.abs() <= _LARGEST).ifelse(
        scaled.round().cast("int64"), (scaled > 0).ifelse(int(_LARGEST), -int(_LARGEST))
    )
    if not isinstance(column.type(), dt.String):
        return number.notnull().ifelse(from_number, ibis.null("int64"))
    text = column.re_search(_ISO_DATE).ifelse(column, ibis.null("string"))
    # Through the type with a zone: the other one would drop an offset such as +02:00.
    from_text = _from_calendar(text.try_cast("timestamp('UTC')").cast("timestamp"))
    return number.notnull().ifelse(from_number, from_text)


@ibis.udf.scalar.builtin
def epoch_us(moment: dt.timestamp) -> dt.int64:
    """Microseconds since 1970: DuckDB's function; `engines` teaches Spark the same one."""


def _from_calendar(moment: ir.TimestampValue) -> ir.IntegerValue:
    return epoch_us(moment)
