"""Guess the kind of every field from its values; each guess can be overridden."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from components.ingest.reader import quote_name, quote_text
from components.tables import LIST_DELIMITER
from model.errors import InputError
from model.schema import FieldKind

FEW_VALUES = 32  # whole numbers with no more values than this are codes, not quantities
MANY_CATEGORIES = 10_000  # more values than this hardly ever repeat often enough to be learned
NUMERIC_SHARE = 0.95  # of the values that must read as numbers
UNIQUE_SHARE = 0.5  # distinct / rows above which a column names rows instead of grouping them
ROW_NUMBER_SHARE = 0.95  # whole numbers that differ in this share of the rows name the row
EXACT_ROWS = 1_000_000  # distinct values are counted up to here, estimated above (flat memory)
TEXT_WORDS = 3.0  # words per value from which a mostly unique column is free text
LIST_SHARE = 0.1  # of the values that must hold the delimiter

_CODE_NAME = re.compile(r"(^|_)(id|code|zip|zipcode|postcode|postal_code|phone)$|[a-z]Id$")
_NUMBER_TYPE = re.compile(r"^(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL)")


@dataclass(frozen=True)
class FieldGuess:
    """A kind, or None (the column is left out), and why."""

    kind: FieldKind | None
    why: str


@dataclass(frozen=True)
class _Profile:
    """What one pass over a column finds; shares are of the filled values."""

    filled: int
    distinct: int
    numeric: float
    fractional: float
    leading_zero: float
    delimited: float
    dates: float
    links: float
    words: float

    @property
    def unique(self) -> bool:
        return self.distinct > FEW_VALUES and self.distinct > UNIQUE_SHARE * self.filled


def infer_fields(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    columns: Mapping[str, str],
    overrides: Mapping[str, FieldKind],
    section: str,
    rows: int,
) -> dict[str, FieldGuess]:
    """Guess the kind of each of `columns` (name → DuckDB type) of a Parquet file.

    Args:
        overrides: kinds the caller has set; they are not questioned.
        section: `users`, `items` or `context`, named in messages.

    Raises:
        InputError: an override names a column that does not exist.
    """
    if unknown := sorted(set(overrides) - set(columns)):
        raise InputError(
            f"ingest.fields.{section}.{unknown[0]}: no such column"
            f" (columns: {', '.join(columns) or 'none'})"
        )
    return {
        name: FieldGuess(overrides[name], "as set")
        if name in overrides
        else _guess(connection, path, name, column_type, rows)
        for name, column_type in columns.items()
    }


def _guess(
    connection: duckdb.DuckDBPyConnection, path: Path, name: str, column_type: str, rows: int
) -> FieldGuess:
    if column_type.endswith("[]"):
        return FieldGuess(FieldKind.MULTI_CATEGORICAL, "a list")
    if column_type == "BOOLEAN":
        return FieldGuess(FieldKind.CATEGORICAL, "true or false")
    if column_type.startswith(("DATE", "TIME")):
        return FieldGuess(None, "a date or time")
    if not (column_type == "VARCHAR" or _NUMBER_TYPE.match(column_type)):
        return FieldGuess(None, f"values of type {column_type} are not read")
    profile = _profile(connection, path, name, rows)
    if profile.filled == 0:
        return FieldGuess(None, "empty")
    if profile.distinct == 1:
        return FieldGuess(None, "the same value everywhere")
    if (
        profile.delimited >= LIST_SHARE
        and profile.links < LIST_SHARE
        and _parts_repeat(connection, path, name)
    ):
        return FieldGuess(FieldKind.MULTI_CATEGORICAL, f"split at {LIST_DELIMITER!r}")
    if (
        profile.numeric >= NUMERIC_SHARE
        and profile.fractional == 0
        and profile.distinct > max(FEW_VALUES, ROW_NUMBER_SHARE * profile.filled)
    ):
        return FieldGuess(None, "whole numbers that hardly repeat, like row numbers")
    is_code = bool(_CODE_NAME.search(name)) or profile.leading_zero > 0
    if (
        profile.numeric >= NUMERIC_SHARE
        and not is_code
        and (profile.distinct > FEW_VALUES or profile.fractional > 0)
    ):
        return FieldGuess(FieldKind.NUMERIC, f"{profile.distinct:,} different numbers")
    if profile.numeric < NUMERIC_SHARE and profile.dates >= NUMERIC_SHARE:
        return FieldGuess(None, "a date or time")
    if profile.unique:
        if profile.links >= UNIQUE_SHARE:
            return FieldGuess(None, "links")
        if profile.words >= TEXT_WORDS:
            return FieldGuess(FieldKind.TEXT, f"{profile.words:.1f} words a value")
        return FieldGuess(
            None, f"hardly repeats ({profile.distinct:,} values in {profile.filled:,} rows)"
        )
    if profile.distinct > MANY_CATEGORIES:
        return FieldGuess(None, f"too many values ({profile.distinct:,})")
    return FieldGuess(FieldKind.CATEGORICAL, f"{profile.distinct:,} values")


def _profile(connection: duckdb.DuckDBPyConnection, path: Path, name: str, rows: int) -> _Profile:
    text = f"CAST({quote_name(name)} AS VARCHAR)"
    distinct = "count(DISTINCT v)" if rows <= EXACT_ROWS else "approx_count_distinct(v)"
    row = connection.execute(
        f"""
        SELECT count(v),
               CASE WHEN min(v) = max(v) THEN 1 ELSE greatest(2, {distinct}) END,
               avg(CAST(n IS NOT NULL AS INT)),
               avg(CAST(n IS NOT NULL AND n <> floor(n) AS INT)),
               avg(CAST(regexp_matches(v, '^0[0-9]') AS INT)),
               avg(CAST(contains(v, {quote_text(LIST_DELIMITER)}) AS INT)),
               avg(CAST(TRY_CAST(v AS TIMESTAMP) IS NOT NULL AS INT)),
               avg(CAST(regexp_matches(v, '^https?://') AS INT)),
               avg(1 + length(v) - length(replace(v, ' ', '')))
        FROM (SELECT nullif(trim({text}), '') AS v, TRY_CAST(v AS DOUBLE) AS n
              FROM {quote_text(str(path))})
        WHERE v IS NOT NULL
        """  # noqa: S608 - names and paths are quoted
    ).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    return _Profile(*(value or 0 for value in row))


def _parts_repeat(connection: duckdb.DuckDBPyConnection, path: Path, name: str) -> bool:
    """Whether the parts between delimiters are drawn from a common vocabulary."""
    row = connection.execute(
        f"""
        SELECT count(p), approx_count_distinct(p) FROM (
            SELECT trim(unnest(string_split(
                CAST({quote_name(name)} AS VARCHAR), {quote_text(LIST_DELIMITER)}))) AS p
            FROM {quote_text(str(path))})
        """  # noqa: S608 - names and paths are quoted
    ).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    return row[1] <= max(FEW_VALUES, UNIQUE_SHARE * row[0])
