"""The data report: one self-contained HTML page (no scripts, no network)."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from components.tables import TABLES
from components.validate.checks import Reason
from components.validate.plots import draw_all, shorten
from components.validate.statistics import spell_seconds
from model.schema import MAX_ID

EXPLAIN = {
    Reason.MALFORMED_ROW: "the line does not have the header's number of columns",
    Reason.NULL_USER: "no user id",
    Reason.NULL_ITEM: "no item id",
    Reason.LONG_ID: f"an id of more than {MAX_ID} characters: servers take none",
    Reason.BAD_TIMESTAMP: "the timestamp is missing or not a time",
    Reason.NEGATIVE_TIMESTAMP: "before 1970",
    Reason.FUTURE_TIMESTAMP: "more than a day after now",
    Reason.BAD_VALUE: "the event value is not a number",
    Reason.DUPLICATE_EVENT_ID: "an earlier event has the same id",
    Reason.DUPLICATE_USER: "a later row describes the same user",
    Reason.DUPLICATE_ITEM: "a later row describes the same item",
    Reason.BOT_USER: "the user has more events than a person makes",
}


def render(report: Mapping[str, Any]) -> str:
    """HTML of a report as written to `report.json`."""
    # Names and values come from the user's files: everything but our own SVG is escaped.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "count": lambda n: f"{n:,}",
        "short": shorten,
        "share": _share,
        "day": lambda t: f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M}",
        "span": spell_seconds,
    }
    template = environment.from_string(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    )
    log = report["log"]
    return template.render(
        r=report,
        log=log,
        figures=draw_all(log) if log["events"] else {},
        tables=[t for t in TABLES if t in report["rows"]],
        explain=EXPLAIN,
    )


def _share(value: float) -> str:
    """Shares that are small but not zero never read as 0%."""
    if 0 < value < 0.0005:
        return "< 0.1%"
    return f"{value:.1%}"
