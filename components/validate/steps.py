"""Validate: tables as ingested → typed, checked, sorted tables; bad rows go to quarantine.

Exact duplicates (same user, item, second, type, but no shared event id) stay: two plays of one
song in a second are indistinguishable from a log written twice. They are counted in the report.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
from ibis.backends import BaseBackend
from pydantic import Field

from components.engines import EngineName, open_engine, read_numbered, write_parquet
from components.tables import (
    ID_COLUMN,
    INTERACTIONS,
    ITEMS,
    TABLES,
    USERS,
    malformed_path,
    table_path,
)
from components.validate import checks
from components.validate.checks import MICROS, REASON, ROW, Reason, TimeRules
from components.validate.report import render
from components.validate.statistics import describe_log
from components.validate.timestamps import Unit, as_number, detect_unit, is_calendar
from model.errors import InputError
from model.schema import FieldKind, Schema
from model.settings import SettingsBase

__all__ = ["ValidateSettings", "run"]

DAY = 86_400
EARLIEST_PLAUSIBLE = 3 * 365 * DAY  # a log that ends before 1973 is probably not Unix seconds


class ValidateSettings(SettingsBase):
    """When a row is bad, and when too little is left to train on."""

    max_bad_share: float = Field(0.05, ge=0, le=1)  # of the interactions; above it the run stops
    max_events_per_user: int = Field(1_000_000, ge=1)  # more: a bot, all its events are quarantined
    min_users: int = Field(10, ge=1)
    min_items: int = Field(2, ge=1)
    min_events: int = Field(20, ge=1)
    now: int | None = None  # Unix seconds; None: the clock. A day later is the future
    timestamp_unit: Unit | None = None  # of numeric timestamps; None: by magnitude
    memory_limit: str = "2GB"  # of the engine; beyond it spills to disk
    engine: EngineName = "duckdb"
    spark_master: str = "local[*]"


def run(
    tables: Path,
    clean: Path,
    quarantine: Path,
    data_report: Path,
    *,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write clean tables, quarantine, `report.json` (in both) and the HTML data report.

    Everything is written before a run stops, so that a person can look.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: wrong settings, too many bad rows, or too little left to train on.
    """
    config = ValidateSettings.parse(dict(settings or {}), "validate")
    schema = Schema.load(tables / "schema.json")
    source = json.loads((tables / "source.json").read_text())
    for folder in (clean, quarantine):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="validate-", dir=clean.parent) as scratch:
        backend = open_engine(
            config.engine, Path(scratch), config.memory_limit, config.spark_master
        )
        try:
            report = _Validation(backend, tables, clean, quarantine, Path(scratch), config).run(
                schema
            )
        finally:
            backend.disconnect()
    report = {"source": {k: source.get(k) for k in ("name", "uri", "rows")}, **report}
    report["schema"] = schema.model_dump(mode="json")
    report["left_out"] = source.get("left_out", {})
    report["problem"] = _problem(report, config, quarantine)
    schema.save(clean / "schema.json")
    shutil.copyfile(tables / "source.json", clean / "source.json")
    for folder in (clean, quarantine):
        (folder / "report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
    data_report.parent.mkdir(parents=True, exist_ok=True)
    data_report.write_text(render(report))
    _print_summary(report)
    if report["problem"]:
        raise InputError(report["problem"])
    return report


class _Validation:
    """One run over a tables directory; the engine's connection and folders are shared."""

    def __init__(
        self,
        backend: BaseBackend,
        tables: Path,
        clean: Path,
        quarantine: Path,
        scratch: Path,
        config: ValidateSettings,
    ) -> None:
        self.backend = backend
        self.tables = tables
        self.clean = clean
        self.quarantine = quarantine
        self.scratch = scratch
        self.config = config
        self.latest = (int(time.time()) if config.now is None else config.now) + DAY

    def run(self, schema: Schema) -> dict[str, Any]:
        bad: dict[str, Any] = {}
        nulled: dict[str, int] = {}
        bad[INTERACTIONS], timestamps = self._interactions(schema, nulled)
        kept = {
            USERS: schema.users,
            # The title travels with the fields even when the model does not read it.
            ITEMS: {
                **({schema.item_title: FieldKind.TEXT} if schema.item_title else {}),
                **schema.items,
            },
        }
        for table, fields in kept.items():
            if table_path(self.tables, table).exists():
                bad[table] = self._entities(table, fields, nulled)
        log = describe_log(self.backend, self._read(table_path(self.clean, INTERACTIONS)))
        return {
            "rows": bad,
            "timestamps": timestamps,
            "set_to_null": nulled,
            "log": log,
            "coverage": self._coverage(),
            "top_items": self._top_items(schema),
            "warnings": self._warnings(log),
        }

    def _read(self, path: Path) -> ir.Table:
        return self.backend.read_parquet(str(path))

    def _read_raw(self, table: str) -> ir.Table:
        return read_numbered(self.backend, table_path(self.tables, table), ROW)

    def _write(self, expression: ir.Table, path: Path) -> ir.Table:
        write_parquet(self.backend, expression, path)
        return self._read(path)

    def _interactions(
        self, schema: Schema, nulled: dict[str, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        raw = self._read_raw(INTERACTIONS)
        unit, how = self._unit(raw.timestamp)
        rules = TimeRules(unit=unit, latest=self.latest)
        checked = self._write(
            checks.type_interactions(raw, schema.context, rules), self.scratch / "checked.parquet"
        )
        self._count_nulled(raw, schema.context, "context", nulled)
        bad = checked.filter(checked[REASON].notnull()).select(ROW, REASON)
        if "event_id" in checked.columns:
            bad = bad.union(checks.duplicate_events(checked))
        bad = self._write(bad, self.scratch / "bad.parquet")
        remaining = checked.anti_join(bad.select(ROW), ROW)
        bots = checks.bot_events(remaining, self.config.max_events_per_user)
        bad = self._write(bad.union(bots), self.scratch / "bad_and_bots.parquet")
        good = checked.anti_join(bad.select(ROW), ROW)
        # Equal seconds keep the order of the finer clock, then of the source.
        good = good.order_by("user_id", "timestamp", MICROS, ROW).drop(ROW, MICROS, REASON)
        self._write(good, table_path(self.clean, INTERACTIONS))
        return self._quarantine(INTERACTIONS, raw, bad), how

    def _unit(self, column: ir.Value) -> tuple[Unit, dict[str, Any]]:
        """Unit of a time column and, for the report, how it was read."""
        if is_calendar(column):
            return Unit.MICROSECONDS, {"format": "calendar", "unit": None}
        number = as_number(column)
        row = self.backend.to_pyarrow(
            number.as_table().aggregate(numbers=number.count(), median=number.abs().approx_median())
        ).to_pylist()[0]
        if not row["numbers"]:
            return Unit.SECONDS, {"format": "ISO-8601", "unit": None}
        unit = self.config.timestamp_unit or detect_unit(row["median"])
        detected = "set" if self.config.timestamp_unit else "detected"
        return unit, {"format": "Unix time", "unit": unit.label, "by": detected}

    def _entities(
        self, table: str, fields: Mapping[str, FieldKind], nulled: dict[str, int]
    ) -> dict[str, Any]:
        key = ID_COLUMN[table]
        raw = self._read_raw(table)
        rules = None
        if table == ITEMS and "created_at" in raw.columns and "created_at" not in fields:
            rules = TimeRules(unit=self._unit(raw.created_at)[0], latest=self.latest)
        checked = self._write(
            checks.type_entities(raw, key, fields, rules), self.scratch / f"{table}.parquet"
        )
        self._count_nulled(raw, fields, table, nulled)
        if rules is not None:
            unread = self._count(checked.filter(checked.created_at.isnull()))
            unread -= self._count(raw.filter(~checks.filled(raw.created_at)))
            if unread:
                nulled[f"{table}.created_at"] = unread
        good = checked.filter(checked[REASON].isnull()).order_by(key).drop(ROW, REASON)
        self._write(good, table_path(self.clean, table))
        return self._quarantine(table, raw, checked.select(ROW, REASON).drop_null(REASON))

    def _count_nulled(
        self, raw: ir.Table, fields: Mapping[str, FieldKind], section: str, nulled: dict[str, int]
    ) -> None:
        counts = checks.unreadable(raw, fields)
        if counts:
            row = self.backend.to_pyarrow(raw.aggregate(**counts)).to_pylist()[0]
            nulled |= {f"{section}.{name}": n for name, n in row.items() if n}

    def _quarantine(self, table: str, raw: ir.Table, bad: ir.Table) -> dict[str, Any]:
        """Write the raw rows as strings with `reason` and `row`; returns the counts."""
        total = self._count(raw)
        rows = raw.join(bad, ROW)
        # A column of the user's own called `reason` or `row` keeps its value under `reason_`.
        columns: dict[str, ir.Value] = {
            (f"{name}_" if name in ("reason", "row", "raw_line") else name): rows[name].cast(
                "string"
            )
            for name in raw.columns
            if name != ROW
        }
        out = rows.select(
            **columns,
            raw_line=ibis.null("string"),
            reason=rows[REASON],
            row=rows[ROW].cast("int64"),
        )
        malformed = malformed_path(self.tables, table)
        if malformed.exists():
            lines = self._read(malformed)
            nothing = {name: ibis.null("string") for name in columns}
            lines = lines.select(
                **nothing,
                raw_line=lines.raw_line,
                reason=ibis.literal(Reason.MALFORMED_ROW.value),
                row=lines.row.cast("int64"),
            )
            total += self._count(lines)
            out = out.union(lines)
        target = table_path(self.quarantine, table)
        written = self._write(out.order_by("row", "reason"), target)
        counts = written.group_by("reason").agg(n=written.count())
        reasons = {r["reason"]: r["n"] for r in self.backend.to_pyarrow(counts).to_pylist()}
        if table != INTERACTIONS and not reasons:
            target.unlink()
        quarantined = sum(reasons.values())
        return {
            "in": total,
            "clean": total - quarantined,
            "quarantined": quarantined,
            "share": quarantined / total if total else 0.0,
            "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        }

    def _count(self, table: ir.Table) -> int:
        return int(self.backend.to_pyarrow(table.count()).as_py())

    def _coverage(self) -> dict[str, Any]:
        """Users and items of the log that the side tables do not describe, and the reverse."""
        events = self._read(table_path(self.clean, INTERACTIONS))
        coverage = {}
        for table, key in ID_COLUMN.items():
            path = table_path(self.clean, table)
            if not path.exists():
                continue
            listed, seen = self._read(path).select(key), events.select(key).distinct()
            coverage[table] = {
                "in_log_only": self._count(seen.anti_join(listed, key)),
                "in_table_only": self._count(listed.anti_join(seen, key)),
            }
        return coverage

    def _top_items(self, schema: Schema) -> list[dict[str, Any]]:
        """The ten items with most events, by title where there is one."""
        events = self._read(table_path(self.clean, INTERACTIONS))
        top = events.group_by("item_id").agg(events=events.count())
        top = top.order_by(ibis.desc("events"), "item_id").limit(10)
        items_path = table_path(self.clean, ITEMS)
        if schema.item_title and items_path.exists():
            items = self._read(items_path)
            titles = items.select("item_id", title=items[schema.item_title])
            top = top.left_join(titles, "item_id").select("item_id", "title", "events")
        else:
            top = top.mutate(title=ibis.null("string"))
        top = top.order_by(ibis.desc("events"), "item_id")
        return self.backend.to_pyarrow(top).to_pylist()

    def _warnings(self, log: Mapping[str, Any]) -> list[str]:
        """Things that are not errors but that a person should know."""
        warnings: list[str] = []
        if not log["events"]:
            return warnings
        if log["last"] < EARLIEST_PLAUSIBLE:
            warnings.append(
                "the last event is before 1973: is the timestamp column really Unix time?"
            )
        if log["gaps"]["zero_share"] > 0.5:
            warnings.append(
                f"{log['gaps']['zero_share']:.0%} of events carry the same second as the user's"
                " previous one: time between events says little, order is taken from the source"
            )
        if log["events"] < 2 * log["users"]:
            warnings.append(
                "most users have a single event: there is little sequence to learn from"
            )
        return warnings


def _problem(report: Mapping[str, Any], config: ValidateSettings, quarantine: Path) -> str | None:
    """Why the run has to stop, or None."""
    rows, log = report["rows"][INTERACTIONS], report["log"]
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in rows["reasons"].items())
    look = f"the rows and reasons are in {quarantine}"
    if rows["clean"] == 0:
        return f"no interaction is left after checking ({reasons}); {look}"
    if rows["share"] > config.max_bad_share:
        elsewhere = (
            "; where another column says who it was, a session say, name it with"
            " --set ingest.columns.user_id=NAME"
        )
        return (
            f"{rows['quarantined']:,} of {rows['in']:,} interactions ({rows['share']:.1%}) are bad:"
            f" {reasons}; {look}; fix them, or accept more with"
            f" --set validate.max_bad_share={_round_up(rows['share'])}"
            + elsewhere
            * (max(rows["reasons"], key=rows["reasons"].get) == Reason.NULL_USER)
        )
    for name in ("users", "items", "events"):
        least = getattr(config, f"min_{name}")
        if log[name] < least:
            return (
                f"only {log[name]:,} {name} are left for training, at least {least:,} are needed"
                f" (quarantined: {reasons or 'none'}; {look}); give more data, or lower the limit"
                f" with --set validate.min_{name}={log[name]}"
            )
    return None


def _round_up(share: float) -> float:
    return min(1.0, int(share * 100 + 1) / 100)


def _print_summary(report: Mapping[str, Any]) -> None:
    for table in TABLES:
        if rows := report["rows"].get(table):
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in rows["reasons"].items())
            print(
                f"{table}: {rows['clean']:,} of {rows['in']:,} rows are clean"
                + (f"; quarantined: {reasons}" if reasons else "")
            )
    if unit := report["timestamps"].get("unit"):
        print(f"timestamps: Unix time in {unit} ({report['timestamps']['by']})")
    for name, count in report["set_to_null"].items():
        print(f"{name}: {count:,} unreadable values set to null")
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    if shift := report["log"].get("shift"):
        print(shift["advice"])
