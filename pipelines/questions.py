"""Command-line words for the parts of a request to the service."""

from collections.abc import Sequence
from typing import Any

from model.errors import InputError


def items(given: Sequence[str] | None) -> list[str] | None:
    """Ids separated by commas, over repeated options."""
    if not given:
        return None
    return [item for text in given for item in text.split(",") if item]


def history(given: Sequence[str] | None, before: float) -> list[dict[str, Any]] | None:
    """Events from ITEM or ITEM@TIME (Unix seconds).

    Those without a time are a minute apart, the last one a minute before `before` (Unix seconds).
    """
    if given is None:
        return None
    events = []
    for ago, text in zip(range(len(given), 0, -1), given, strict=True):
        item, at, when = text.rpartition("@")
        try:
            timestamp = float(when) if at else None
        except ValueError:
            timestamp = None
        if timestamp is None:
            item, timestamp = text, before - 60.0 * ago
        if not item:
            raise InputError(f"--history {text!r}: give ITEM or ITEM@TIME")
        events.append({"item_id": item, "timestamp": timestamp})
    return events


def fields(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """Field values from NAME=VALUE; a number where it reads as one."""
    values: dict[str, Any] = {}
    for name, text in _pairs(option, given):
        try:
            values[name] = int(text)
        except ValueError:
            try:
                values[name] = float(text)
            except ValueError:
                values[name] = text
    return values


def item_filter(where: Sequence[str] | None) -> dict[str, Any] | None:
    """A filter from NAME=VALUE; several values of one name are alternatives."""
    wanted: dict[str, list[str]] = {}
    for name, text in _pairs("--where", where):
        wanted.setdefault(name, []).append(text)
    return {"where": wanted} if wanted else None


def _pairs(option: str, given: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in given or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"{option} {text!r}: give NAME=VALUE")
        pairs.append((name, value))
    return pairs
