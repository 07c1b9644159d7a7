"""Field kinds of users, items and request context; `schema.json` on disk."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from model.settings import SettingsBase

# Characters of a user's, an item's or an event's id: what validate, the collector and requests
# take. As UTF-8 it fits into an index of any database.
MAX_ID = 512
# Unix seconds of 9999-12-31; milliseconds of any recent year are above.
MAX_TIMESTAMP = 253_402_300_799


class FieldKind(StrEnum):
    """How a field's values are read by the model."""

    CATEGORICAL = "categorical"  # one string per entity
    MULTI_CATEGORICAL = "multi_categorical"  # list of strings per entity
    NUMERIC = "numeric"  # float64 per entity
    TEXT = "text"  # free text, bag of words


def fits(kind: FieldKind, value: Any) -> bool:
    """Whether a value out of JSON, not null, can be one of a field of this kind."""
    if kind is FieldKind.MULTI_CATEGORICAL:
        return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return kind is not FieldKind.NUMERIC or not isinstance(value, str)


class Schema(SettingsBase):
    """The fields of each table, in column order. Ids, timestamps and events are not fields.

    `item_title` names the item field that holds a human-readable title, if there is one; a title
    is for showing and is listed in `items` only when the model should read it.
    """

    users: dict[str, FieldKind] = {}
    items: dict[str, FieldKind] = {}
    context: dict[str, FieldKind] = {}
    item_title: str | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Schema":
        return cls.parse(json.loads(path.read_text()), where=path.name)
