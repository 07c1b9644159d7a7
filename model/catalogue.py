"""The items a model knows: ids, their order, titles and fields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.schema import Schema


@dataclass(frozen=True)
class Catalogue:
    """M items in a fixed order; `fields` maps a field's name to M values (None = missing)."""

    item_ids: tuple[str, ...]
    fields: dict[str, list[Any]] = field(default_factory=dict)
    title_field: str | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each item id."""
        return {item: j for j, item in enumerate(self.item_ids)}

    def __len__(self) -> int:
        return len(self.item_ids)

    def encode(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Positions of known ids, −1 for unknown ones."""
        return np.fromiter(map(self.index.get, item_ids, repeat(-1)), np.int64, len(item_ids))

    def known_fields(self, item_id: str) -> dict[str, Any] | None:
        """The fields of an item that are not missing; None: there is no such item."""
        j = self.index.get(item_id)
        if j is None:
            return None
        return {n: values[j] for n, values in self.fields.items() if values[j] is not None}

    def subset(self, positions: NDArray[np.int64]) -> Self:
        """The items at these positions, in the given order."""
        return type(self)(
            item_ids=tuple(self.item_ids[j] for j in positions),
            fields={n: [values[j] for j in positions] for n, values in self.fields.items()},
            title_field=self.title_field,
        )

    @property
    def titles(self) -> dict[str, str]:
        """item_id → title, for items that have one."""
        if self.title_field is None:
            return {}
        return {
            i: str(t)
            for i, t in zip(self.item_ids, self.fields[self.title_field], strict=True)
            if t is not None
        }

    @classmethod
    def from_tables(cls, clean_dir: Path, schema: Schema) -> Self:
        """Every item of items.parquet and interactions.parquet, sorted by id."""
        ids = set(
            pq.read_table(clean_dir / "interactions.parquet", columns=["item_id"])
            .column("item_id")
            .unique()
            .to_pylist()
        )
        names = [*schema.items]
        if schema.item_title and schema.item_title not in names:
            names.append(schema.item_title)
        items_path = clean_dir / "items.parquet"
        rows: dict[str, int] = {}
        columns: dict[str, list[Any]] = {n: [] for n in names}
        if items_path.exists():
            table = pq.read_table(items_path)
            rows = {i: r for r, i in enumerate(table.column("item_id").to_pylist())}
            columns = {n: table.column(n).to_pylist() for n in names}
        item_ids = tuple(sorted(ids | rows.keys()))
        fields = {
            n: [values[rows[i]] if i in rows else None for i in item_ids]
            for n, values in columns.items()
        }
        return cls(item_ids=item_ids, fields=fields, title_field=schema.item_title)

    def save(self, path: Path) -> None:
        """Write `items.parquet` of a bundle."""
        table = {"item_id": pa.array(self.item_ids, pa.string())}
        table |= {name: pa.array(values) for name, values in self.fields.items()}
        pq.write_table(pa.table(table), path, compression="zstd")

    @classmethod
    def load(cls, path: Path, title_field: str | None) -> Self:
        """Inverse of `save`."""
        table = pq.read_table(path)
        return cls(
            item_ids=tuple(table.column("item_id").to_pylist()),
            fields={n: table.column(n).to_pylist() for n in table.column_names if n != "item_id"},
            title_field=title_field,
        )
