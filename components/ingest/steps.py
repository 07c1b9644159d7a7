"""Ingest: a named dataset or the user's files → tables with canonical column names."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
from pydantic import Field

from components.ingest import event_log
from components.ingest.columns import MAPPING_SETTING, normalise, recognise, title_column
from components.ingest.datasets import find, obtain
from components.ingest.download import to_local
from components.ingest.reader import (
    SourceTable,
    copy_to_parquet,
    open_table,
    quote_name,
    sha256,
)
from components.ingest.schema_inference import FieldGuess, infer_fields
from components.retries import patiently
from components.tables import (
    ID_COLUMN,
    INTERACTIONS,
    ITEMS,
    TABLES,
    USERS,
    connect,
    malformed_path,
    table_path,
)
from model.errors import InputError
from model.schema import FieldKind, Schema
from model.settings import SettingsBase

__all__ = ["IngestSettings", "run"]

_SECTION = {INTERACTIONS: "context", USERS: "users", ITEMS: "items"}


class IngestSettings(SettingsBase):
    """How the source's columns are read; the defaults recognise common names."""

    columns: dict[str, str] = {}  # canonical: source, of the interactions
    user_columns: dict[str, str] = {}
    item_columns: dict[str, str] = {}
    fields: dict[str, dict[str, FieldKind]] = {}  # {users|items|context: {field: kind}}
    ignore: list[str] = []  # source columns of any table that are left out
    memory_limit: str = "2GB"  # of DuckDB; beyond it spills to disk
    retries: int = Field(3, ge=0)  # when the source cannot be reached
    retry_seconds: float = Field(5.0, gt=0.0)  # before the first; each further wait is thrice that


@dataclass
class _Ingested:
    """One table's outcome; `chosen` maps canonical names to source columns."""

    rows: int
    malformed: int
    chosen: dict[str, str]
    guesses: dict[str, FieldGuess]
    left_out: dict[str, str] = field(default_factory=dict)
    title: str | None = None

    @property
    def fields(self) -> dict[str, FieldKind]:
        return {name: g.kind for name, g in self.guesses.items() if g.kind is not None}


def run(
    tables: Path,
    *,
    dataset: str = "",
    interactions: str = "",
    users: str = "",
    items: str = "",
    cache: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the tables directory and return what `source.json` holds.

    Args:
        dataset: a name from `datasets.DATASETS`, or empty when files are given.
        interactions, users, items: paths or fsspec URIs; the last two may be empty. As
            interactions also an event log (`sqlite:///PATH`, `postgresql://…`, or `event-log`:
            the one in HRNN_EVENT_LOG), whose users and items are taken unless others are given.
        cache: where named datasets are kept between runs.

    A source that cannot be reached is asked again (`retries`); wrong input is refused at once.

    Raises:
        InputError: wrong settings, files or columns.
        UnavailableError: the source could not be reached.
    """
    config = IngestSettings.parse(dict(settings or {}), "ingest")
    if unknown := sorted(set(config.fields) - set(_SECTION.values())):
        raise InputError(
            f"ingest.fields.{unknown[0]}: no such section (known: users, items, context)"
        )
    given = {INTERACTIONS: interactions, USERS: users, ITEMS: items}
    _check_sources(dataset, given)
    return patiently(
        lambda: _attempt(tables, dataset, given, cache, config),
        retries=config.retries,
        wait_seconds=config.retry_seconds,
    )


def _attempt(
    tables: Path,
    dataset: str,
    given: Mapping[str, str],
    cache: Path | None,
    config: IngestSettings,
) -> dict[str, Any]:
    interactions = given[INTERACTIONS]
    shutil.rmtree(tables, ignore_errors=True)  # nothing of an earlier attempt may stay
    tables.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=tables.parent) as name:
        scratch = Path(name)
        uri, kinds = interactions, config.fields
        if dataset:
            folder, uri = obtain(dataset, cache or scratch / "datasets")
            paths = {t: p for t in TABLES if (p := table_path(folder, t)).exists()}
            known = find(dataset).fields
            kinds = {s: {**known.get(s, {}), **kinds.get(s, {})} for s in {*known, *kinds}}
            kinds = {
                s: {n: k for n, k in f.items() if n not in config.ignore} for s, f in kinds.items()
            }
        elif (url := event_log.address(interactions)) is not None:
            paths = event_log.export(url, scratch / "log", config.memory_limit)
            uri = event_log.CONFIGURED  # the address may hold a password
            sides = {t: text for t, text in given.items() if text and t != INTERACTIONS}
            paths |= {t: to_local(text, scratch / t) for t, text in sides.items()}
        else:
            paths = {t: to_local(text, scratch / t) for t, text in given.items() if text}
        _check_ignored(paths, config, scratch)
        done = {
            table: _ingest_table(table, path, tables, config, kinds, scratch)
            for table, path in paths.items()
        }
        if uri != event_log.CONFIGURED and (url := os.environ.get(event_log.VARIABLE)):
            removed = event_log.forget_deleted(url, tables, config.memory_limit)
            for table, (rows, lines) in removed.items():
                done[table].rows -= rows
                done[table].malformed -= lines
            if done[INTERACTIONS].rows == 0:
                raise InputError("all users of the interactions were deleted on request")
            if USERS in done and done[USERS].rows == 0:
                del done[USERS]
        digests = {table: sha256(path) for table, path in paths.items()}
    schema = Schema(
        users=done[USERS].fields if USERS in done else {},
        items=done[ITEMS].fields if ITEMS in done else {},
        context=done[INTERACTIONS].fields,
        item_title=done[ITEMS].title if ITEMS in done else None,
    )
    schema.save(tables / "schema.json")
    source = {
        "name": dataset or (uri if uri == event_log.CONFIGURED else Path(interactions).name),
        "uri": uri,
        "rows": {t: d.rows + d.malformed for t, d in done.items()},
        "sha256": digests,
        "columns": {t: d.chosen for t, d in done.items()},
        "left_out": {t: d.left_out for t, d in done.items()},
    }
    (tables / "source.json").write_text(json.dumps(source, indent=2, ensure_ascii=False) + "\n")
    for table, outcome in done.items():
        print(_describe(table, outcome))
    if schema.context:
        print(
            "Context fields must be known at the moment a recommendation is asked for; leave others"
            " out with --set ingest.ignore='[\"NAME\"]'."
        )
    return source


def _check_sources(dataset: str, given: Mapping[str, str]) -> None:
    if dataset:
        find(dataset)
        if files := [text for text in given.values() if text]:
            raise InputError(
                f"both the dataset {dataset!r} and the file {files[0]} are given; choose one"
            )
    elif not given[INTERACTIONS]:
        raise InputError(
            "no data is given: name a dataset (for example movielens-100k) or a CSV or Parquet"
            " file of interactions"
        )


def _check_ignored(paths: Mapping[str, Path], config: IngestSettings, scratch: Path) -> None:
    """A misspelt column in `ignore` would silently stay a field."""
    if not config.ignore:
        return
    with duckdb.connect() as connection:
        present = {c for path in paths.values() for c in open_table(connection, path).columns}
    if unknown := [c for c in config.ignore if c not in present]:
        raise InputError(
            f"ingest.ignore: no table has a column {unknown[0]!r} (columns:"
            f" {', '.join(sorted(present))})"
        )


def _ingest_table(
    table: str,
    path: Path,
    tables: Path,
    config: IngestSettings,
    kinds: Mapping[str, Mapping[str, FieldKind]],
    scratch: Path,
) -> _Ingested:
    # A connection per table: DuckDB lists malformed lines per connection.
    connection = connect(scratch, config.memory_limit).con
    try:
        source = open_table(connection, path)
        present = [c for c in source.columns if c not in config.ignore]
        chosen = recognise(table, present, _mapping(table, config, present), str(path))
        left_out = dict.fromkeys((c for c in source.columns if c in config.ignore), "ignored")
        rename = {source_name: canonical for canonical, source_name in chosen.items()}
        extra = []
        for column in present:
            if column in rename:
                continue
            if normalise(column) in {normalise(c) for c in chosen}:
                left_out[column] = f"its name is taken by {chosen_from(chosen, column)!r}"
            elif column.startswith("unnamed_") and source.is_text:
                left_out[column] = "it has no name"
            else:
                extra.append(column)
        selection = [_select(source, column, rename[column]) for column in rename]
        selection += [quote_name(column) for column in extra]
        target = table_path(tables, table)
        rows, malformed = copy_to_parquet(
            connection, source, ", ".join(selection), target, malformed_path(tables, table)
        )
        if rows == 0:
            raise InputError(f"{path} has no {'readable ' if malformed else ''}rows")
        title = title_column(extra) if table == ITEMS else None
        overrides = kinds.get(_SECTION[table], {})
        types = {c: source.columns[c] for c in extra}
        if title and title not in overrides:
            # A title is for showing; the model reads it only when told to.
            del types[title]
        guesses = infer_fields(connection, target, types, overrides, _SECTION[table], rows)
    finally:
        connection.close()
    left_out |= {name: guess.why for name, guess in guesses.items() if guess.kind is None}
    return _Ingested(rows, malformed, chosen, guesses, left_out, title)


def chosen_from(chosen: Mapping[str, str], column: str) -> str:
    """The source column that took a canonical name another column also bears."""
    return next(s for c, s in chosen.items() if normalise(c) == normalise(column))


def _mapping(table: str, config: IngestSettings, present: Sequence[str]) -> dict[str, str]:
    """The caller's mapping for a table.

    The id's name in the interactions counts for the side tables too, where they have it.
    """
    mapping = dict(getattr(config, MAPPING_SETTING[table]))
    key = ID_COLUMN.get(table)
    if key and key not in mapping and config.columns.get(key) in present:
        mapping[key] = config.columns[key]
    return mapping


def _select(source: SourceTable, column: str, canonical: str) -> str:
    """SQL that renames a column; ids become text, everything else is left alone."""
    name, alias = quote_name(column), quote_name(canonical)
    column_type = source.columns[column]
    if canonical not in ("user_id", "item_id", "event_id") or column_type == "VARCHAR":
        return f"{name} AS {alias}"
    text = f"CAST({name} AS VARCHAR)"
    if column_type in ("DOUBLE", "FLOAT"):
        # pandas turns an integer column with a gap into floats: 12.0 is the id "12".
        whole = f"CAST(TRY_CAST({name} AS BIGINT) AS VARCHAR)"
        text = (
            f"CASE WHEN isfinite({name}) AND {name} = floor({name}) THEN coalesce({whole}, {text})"
            f" WHEN isnan({name}) THEN NULL ELSE {text} END"
        )
    return f"{text} AS {alias}"


def _describe(table: str, outcome: _Ingested) -> str:
    """The inferred schema as a small table."""
    lines = [f"{table}: {outcome.rows:,} rows"]
    if outcome.malformed:
        lines[0] += f" and {outcome.malformed:,} malformed lines"
    rows = [(c, "", f"from {s}" if s != c else "") for c, s in outcome.chosen.items()]
    rows += [(n, g.kind.value, g.why) for n, g in outcome.guesses.items() if g.kind is not None]
    rows += [(name, "left out", why) for name, why in outcome.left_out.items()]
    if outcome.title:
        rows.append((outcome.title, "title", "shown with recommendations"))
    width = max(len(name) for name, _, _ in rows)
    lines += [f"  {name:<{width}}  {kind:<17}  {why}".rstrip() for name, kind, why in rows]
    return "\n".join(lines)
