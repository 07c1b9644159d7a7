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
# Of pairs of interactions with one item (or value) that agree, where others do less often.
AGREEING, OTHERS_AGREEING, AGREEING_GROUPS = 0.99, 0.9, 10

_CODE_NAME = re.compile(r"(^|_)(id|code|zip|zipcode|postcode|postal_code|phone)$|[a-z]Id$")
_NUMBER_TYPE = re.compile(r"^(U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL)")


@dataclass(frozen=True)
class FieldGuess:
    """A kind, or None (the column is left out), and why."""

    kind: FieldKind | None
    why: str
    whole: bool = False  # numbers without fractions


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
    guesses = {
        name: FieldGuess(overrides[name], "as set")
        if name in overrides
        else _guess(connection, path, name, column_type, rows)
        for name, column_type in columns.items()
    }
    if section == "context":
        for name in guesses.keys() - overrides.keys():
            guesses[name] = _unknown_in_advance(connection, path, name, guesses[name])
    return guesses


def _unknown_in_advance(
    connection: duckdb.DuckDBPyConnection, path: Path, name: str, guess: FieldGuess
) -> FieldGuess:
    """The same guess, but for a column that gives the item away or names one user's session.

    Reading the category of the item that was chosen, a model would be praised for what it can
    never be told when it is asked. And what is known of a session is of no use in the next one.
    """
    if guess.kind in (None, FieldKind.MULTI_CATEGORICAL):
        return guess
    if _decides(connection, path, "item_id", name):
        return FieldGuess(None, "the same at every event of an item, so a field of --items")
    # A number may tell something of its user, unless that one has several.
    if _decides(connection, path, name, "user_id") and (
        guess.kind is FieldKind.CATEGORICAL
        or (guess.whole and not _decides(connection, path, "user_id", name))
    ):
        return FieldGuess(None, "each value is one user's, like the number of a session or order")
    return guess


def _decides(connection: duckdb.DuckDBPyConnection, path: Path, of: str, name: str) -> bool:
    """Whether rows with the same value of one column have the same value of another.

    Pairs of rows are counted. Where any two rows mostly agree it says nothing, and neither does it
    where few values come twice.
    """
    row = connection.execute(
        f"""
        WITH cells AS (
            SELECT g, v, count(*)::DOUBLE AS c FROM (
                SELECT {quote_name(of)} AS g,
                       nullif(trim(CAST({quote_name(name)} AS VARCHAR)), '') AS v
                FROM {quote_text(str(path))})
            WHERE g IS NOT NULL AND v IS NOT NULL GROUP BY g, v),
        groups AS (SELECT sum(c) AS n FROM cells GROUP BY g HAVING sum(c) > 1),
        others AS (SELECT sum(c) AS n FROM cells GROUP BY v)
        SELECT (SELECT count(*) FROM groups),
               (SELECT sum(c * (c - 1)) FROM cells) / (SELECT sum(n * (n - 1)) FROM groups),
               (SELECT sum(n * n) / (sum(n) * sum(n)) FROM others)
        """  # noqa: S608 - names and paths are quoted
    ).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always returns a row
    groups, agreeing, others_agreeing = row
    return bool(
        groups >= AGREEING_GROUPS and agreeing >= AGREEING and others_agreeing <= OTHERS_AGREEING
    )


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
        why = f"{profile.distinct:,} different numbers"
        return FieldGuess(FieldKind.NUMERIC, why, whole=profile.fractional == 0)
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
