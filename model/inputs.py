"""What the encoder reads at every position: previous item, time, user fields (Figure 2).

Training, evaluation and serving all come through `Positions.of`, so they cannot disagree.
Shapes: E events (positions), U users, N positions of a batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from model.catalogue import Catalogue
from model.context import infer_session_gap, time_bucket
from model.evaluation import later_events
from model.fields import FieldBags, FieldEncoding, fit_encoding
from model.schema import Schema
from model.sequences import Histories
from model.settings import SettingsBase
from model.trends import TrendTable


class InputEncodings(SettingsBase):
    """How raw values become inputs; fitted on the training data, kept in the bundle."""

    num_items: int
    session_gap: int  # seconds without an event that start a session
    item_fields: tuple[FieldEncoding, ...] = ()
    user_fields: tuple[FieldEncoding, ...] = ()

    @classmethod
    def fit(
        cls,
        train: Histories,
        catalogue: Catalogue,
        schema: Schema,
        session_gap: int | None = None,
    ) -> Self:
        """Vocabularies, knots and the session gap (None: inferred) of the training users."""
        gaps = np.diff(train.timestamp_E, prepend=0)[later_events(train)]
        return cls(
            num_items=len(catalogue),
            session_gap=session_gap or infer_session_gap(gaps),
            item_fields=tuple(
                fit_encoding(name, kind, catalogue.fields[name])
                for name, kind in schema.items.items()
                if name in catalogue.fields
            ),
            user_fields=tuple(
                fit_encoding(name, kind, train.user_fields[name])
                for name, kind in schema.users.items()
                if name in train.user_fields
            ),
        )


@dataclass(frozen=True)
class UserFields:
    """The users table: field values by user id."""

    row: dict[str, int]
    columns: dict[str, list[Any]]

    @classmethod
    def read(cls, clean: Path, schema: Schema) -> Self:
        """Read `users.parquet` of clean tables; empty when there is none."""
        path = clean / "users.parquet"
        if not path.exists() or not schema.users:
            return cls({}, {})
        table = pq.read_table(path, columns=["user_id", *schema.users])
        ids = table.column("user_id").to_pylist()
        columns = {name: table.column(name).to_pylist() for name in schema.users}
        return cls({user: r for r, user in enumerate(ids)}, columns)

    def attach(self, histories: Histories) -> Histories:
        """The histories with their users' fields; None for users the table lacks."""
        rows = [self.row.get(user) for user in histories.user_ids]
        return histories.with_user_fields(
            {
                name: [None if r is None else values[r] for r in rows]
                for name, values in self.columns.items()
            }
        )


@dataclass(frozen=True)
class Positions:
    """Model inputs of every position of some histories, as tensors `[E]`."""

    previous_item: Tensor  # catalogue position, M where a history begins
    bucket: Tensor
    session_start: Tensor
    target: Tensor
    user: Tensor  # row of `user_bags`
    user_bags: FieldBags  # one row per user
    trend_row: Tensor | None

    @classmethod
    def of(cls, histories: Histories, encodings: InputEncodings, trend: TrendTable | None) -> Self:
        first_E = np.zeros(histories.num_events, dtype=bool)
        first_E[histories.offset_U1[:-1]] = True
        delta_E = np.diff(histories.timestamp_E, prepend=0)
        previous_E = np.where(first_E, encodings.num_items, np.roll(histories.item_E, 1))
        length_U = np.diff(histories.offset_U1)
        return cls(
            previous_item=torch.from_numpy(previous_E),
            bucket=torch.from_numpy(time_bucket(delta_E, ~first_E)),
            session_start=torch.from_numpy(first_E | (delta_E > encodings.session_gap)),
            target=torch.from_numpy(histories.item_E),
            user=torch.from_numpy(np.repeat(np.arange(len(histories)), length_U)),
            user_bags=FieldBags.encode(
                encodings.user_fields, histories.user_fields, len(histories)
            ),
            trend_row=None
            if trend is None
            else torch.from_numpy(trend.row_of(histories.timestamp_E)),
        )
