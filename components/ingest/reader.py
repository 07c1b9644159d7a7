"""Open a CSV or Parquet file with DuckDB: streamed, every CSV value as text."""

import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import duckdb

from model.errors import InputError

EXTENSIONS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
_HEADER_LIMIT = 1_000_000  # characters
_UTF8 = "save it as UTF-8 (for example: iconv -f LATIN1 -t UTF-8 IN > OUT)"


@dataclass(frozen=True)
class SourceTable:
    """A file that can be selected from; `columns` maps names to DuckDB types, in file order."""

    path: Path
    relation: str  # SQL that goes after FROM
    columns: dict[str, str]
    is_text: bool


def quote_name(name: str) -> str:
    """SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def open_table(connection: duckdb.DuckDBPyConnection, path: Path) -> SourceTable:
    """Look at a file's columns without reading its rows.

    Raises:
        InputError: missing, a directory, wrong extension, corrupt, not UTF-8, no header.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory; give one file ({', '.join(EXTENSIONS)})")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.name.lower().endswith(EXTENSIONS):
        raise InputError(
            f"{path}: unknown kind of file; give one that ends in {', '.join(EXTENSIONS)}"
        )
    if path.name.lower().endswith(".parquet"):
        return _open_parquet(connection, path)
    return _open_csv(path)


def _open_parquet(connection: duckdb.DuckDBPyConnection, path: Path) -> SourceTable:
    relation = f"read_parquet({quote_text(str(path))}, binary_as_string = true)"
    with reading(path):
        described = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()  # noqa: S608
    return SourceTable(path, relation, {row[0]: row[1] for row in described}, is_text=False)


def _open_csv(path: Path) -> SourceTable:
    try:
        if path.suffix.lower() == ".gz":
            _check_gzip(path)
        with open_text(path) as lines:
            first = lines.readline(_HEADER_LIMIT)
            delimiter = "\t" if ".tsv" in path.suffixes else _delimiter(first)
            # A quoted column name may hold a line break, so the reader gets the rest as well.
            header = next(csv.reader(_chain(first, lines), delimiter=delimiter), [])
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; {_UTF8}") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if "\x00" in first:
        raise InputError(f"{path} is not UTF-8 text (UTF-16 or binary?); {_UTF8}")
    if not any(name.strip() for name in header):
        raise InputError(f"{path} is empty; its first line must hold the column names")
    names = [name.strip() or f"unnamed_{i}" for i, name in enumerate(header, 1)]
    folded = [name.lower() for name in names]
    if twice := [n for n in names if folded.count(n.lower()) > 1]:
        raise InputError(f"{path}: column {twice[0]!r} appears twice in the header; rename one")
    columns = ", ".join(f"{quote_text(name)}: 'VARCHAR'" for name in names)
    # Nothing is sniffed: the same file gives the same table whatever its first rows hold.
    # Lines that do not fit the header are collected by DuckDB in `reject_errors`.
    relation = (
        f"read_csv({quote_text(str(path))}, auto_detect = false, header = true,"
        f" delim = {quote_text(delimiter)}, quote = '\"', escape = '\"',"
        f" columns = {{{columns}}}, store_rejects = true, rejects_limit = 0)"
    )
    return SourceTable(path, relation, dict.fromkeys(names, "VARCHAR"), is_text=True)


def _check_gzip(path: Path) -> None:
    """Read to the end: DuckDB takes a truncated gzip file for a short one."""
    with gzip.open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def open_text(path: Path) -> IO[str]:
    """Open plain or gzipped UTF-8 text."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _chain(first: str, rest: IO[str]) -> Iterator[str]:
    yield first
    yield from rest


def _delimiter(header: str) -> str:
    """The separator that splits the header into most columns."""
    unquoted = "".join(header.split('"')[::2])
    return max(",;\t|", key=unquoted.count)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn DuckDB's complaints about a file into one sentence."""
    try:
        yield
    except duckdb.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} cannot be read (damaged or not what it says): {reason}") from None


def copy_to_parquet(
    connection: duckdb.DuckDBPyConnection,
    source: SourceTable,
    selection: str,
    target: Path,
    malformed: Path,
) -> tuple[int, int]:
    """Stream `selection` of a source to Parquet in file order.

    Lines that do not fit the header go to `malformed` (written only when there are some).

    Returns:
        Rows written, malformed lines.

    Raises:
        InputError: damaged file, or text that is not UTF-8.
    """
    with reading(source.path):
        connection.execute(
            f"COPY (SELECT {selection} FROM {source.relation})"  # noqa: S608 - quoted names
            f" TO {quote_text(str(target))} (FORMAT parquet, COMPRESSION zstd)"
        )
    rows = _scalar(connection, f"SELECT count(*) FROM {quote_text(str(target))}")  # noqa: S608
    if not source.is_text:
        return rows, 0
    encoding = connection.execute(
        "SELECT line FROM reject_errors WHERE error_type = 'INVALID ENCODING' ORDER BY line"
    ).fetchone()
    if encoding:
        raise InputError(f"{source.path}: line {encoding[0]} is not UTF-8 text; {_UTF8}")
    # `line` counts the header as 1; a line with several problems is listed once.
    grouped = (
        "SELECT CAST(line AS BIGINT) - 1 AS row, trim(any_value(csv_line), chr(10) || chr(13))"
        " AS raw_line, any_value(error_message) AS problem FROM reject_errors GROUP BY line"
    )
    count = _scalar(connection, f"SELECT count(*) FROM ({grouped})")  # noqa: S608
    if count:
        connection.execute(
            f"COPY ({grouped} ORDER BY row) TO {quote_text(str(malformed))}"
            " (FORMAT parquet, COMPRESSION zstd)"
        )
    return rows, count


def _scalar(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
