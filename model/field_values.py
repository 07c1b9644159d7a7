"""Which items have one of some values in a field: what filters ask.

Shapes: M items, V distinct values, F values of all items (several per item where the field holds
several).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.schema import FieldKind


def _number(value: Any) -> float:
    return float(value) + 0.0  # of two zeros one


class FieldValues:
    """One field of all items, each distinct value kept once.

    A question costs one look at every distinct value and one at every item, however many values it
    names: they come from requests.
    """

    def __init__(self, column_M: Sequence[Any], kind: FieldKind) -> None:
        """
        Args:
            column_M: as in the catalogue; None: missing.
        """
        self.num_items = len(column_M)
        self.numeric = kind is FieldKind.NUMERIC
        self._item_F: NDArray[np.int64] | None = None
        values_F = column_M
        if kind is FieldKind.MULTI_CATEGORICAL:
            count_M = np.fromiter((0 if v is None else len(v) for v in column_M), np.int64)
            self._item_F = np.repeat(np.arange(self.num_items), count_M)
            values_F = [value for v in column_M if v is not None for value in v]
        read = _number if self.numeric else str
        values_F = [None if v is None else read(v) for v in values_F]
        self._type = pa.float64() if self.numeric else pa.string()
        encoded = pa.array(values_F, self._type).dictionary_encode()
        self._value_V = encoded.dictionary
        missing = len(self._value_V)
        self._code_F = encoded.indices.fill_null(missing).to_numpy(zero_copy_only=False)

    def matching(self, values: Iterable[Any]) -> NDArray[np.bool_]:
        """Items that have one of the values `[M]`.

        Args:
            values: numbers of a numeric field, else texts.
        """
        wanted = [v + 0.0 if self.numeric else v for v in values if v == v]  # not NaN
        found_V = pc.is_in(self._value_V, value_set=pa.array(wanted, self._type))
        hit_V = found_V.to_numpy(zero_copy_only=False)
        hit_F: NDArray[np.bool_] = np.append(hit_V, False)[self._code_F]
        if self._item_F is None:
            return hit_F
        hit_M = np.zeros(self.num_items, dtype=np.bool_)
        hit_M[self._item_F[hit_F]] = True
        return hit_M


@dataclass(frozen=True)
class StackedFieldValues:
    """The same of a catalogue some of whose items are new or changed: only those are read anew."""

    of_bundle: FieldValues
    of_changed: FieldValues
    row_M: NDArray[np.int64]  # of each item, among the bundle's and then the changed ones

    @property
    def numeric(self) -> bool:
        """Whether the values are numbers."""
        return self.of_bundle.numeric

    def matching(self, values: Iterable[Any]) -> NDArray[np.bool_]:
        """Items that have one of the values `[M]`; see `FieldValues`."""
        values = list(values)
        parts = [self.of_bundle.matching(values), self.of_changed.matching(values)]
        hit_M: NDArray[np.bool_] = np.concatenate(parts)[self.row_M]
        return hit_M
