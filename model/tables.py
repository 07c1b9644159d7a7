"""Clean tables, as the validate step writes them, in the model's terms."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from model.catalogue import Catalogue
from model.inputs import UserFields
from model.schema import Schema
from model.sequences import Histories


@dataclass(frozen=True)
class Log:
    """A catalogue and everybody's histories with the fields of users and requests."""

    schema: Schema
    catalogue: Catalogue
    histories: Histories

    @classmethod
    def read(
        cls,
        clean: Path,
        schema: Schema | None = None,
        catalogue: Catalogue | None = None,
        *,
        shown: int = 0,
    ) -> Self:
        """Read a `clean/` directory.

        Args:
            schema, catalogue: those of a bundle; None: the tables' own.
            shown: as in `Histories.from_table`.
        """
        schema = schema or Schema.load(clean / "schema.json")
        catalogue = catalogue or Catalogue.from_tables(clean, schema)
        histories = Histories.from_table(
            clean / "interactions.parquet", catalogue, context=tuple(schema.context), shown=shown
        )
        return cls(schema, catalogue, UserFields.read(clean, schema).attach(histories))
