"""What the model reads at every position (Figure 2): previous item and feedback, time, fields.

Training, evaluation and serving all come through `Positions.of`, so they cannot disagree.
Shapes: E events (positions), U users, N positions of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.catalogue import Catalogue
from model.context import infer_session_gap, time_bucket
from model.evaluation import later_events
from model.fields import FieldBags, FieldEncoding, fit_encoding
from model.repeats import SeenItems, next_same
from model.schema import FieldKind, Schema
from model.sequences import Histories
from model.settings import SettingsBase
from model.trend_table import TrendTable
from model.values import running_tastes

MAX_DEVIATIONS = 1e4  # of a value; in a log of n events none is further than √n from the mean


class InputEncodings(SettingsBase):
    """How raw values become inputs; fitted on the training data, kept in the bundle."""

    num_items: int
    session_gap: int  # seconds without an event that start a session
    item_fields: tuple[FieldEncoding, ...] = ()
    user_fields: tuple[FieldEncoding, ...] = ()
    context_fields: tuple[FieldEncoding, ...] = ()
    event_type: FieldEncoding | None = None  # None: the log has fewer than two types
    value_mean: float | None = None  # None: the log's values do not differ, or it has none
    value_std: float = 1.0

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
        event_type = None
        if train.event_type_E is not None:
            fitted = fit_encoding("event_type", FieldKind.CATEGORICAL, train.event_type_E)
            event_type = fitted if len(fitted.vocabulary) > 1 else None
        values = np.empty(0) if train.value_E is None else train.value_E[~np.isnan(train.value_E)]
        differ = len(values) > 1 and float(values.std()) > 0.0
        return cls(
            num_items=len(catalogue),
            session_gap=session_gap or infer_session_gap(gaps),
            item_fields=_fit_fields(schema.items, catalogue.fields),
            user_fields=_fit_fields(schema.users, train.user_fields),
            context_fields=_fit_fields(schema.context, train.context_fields),
            event_type=event_type,
            value_mean=float(values.mean()) if differ else None,
            value_std=float(values.std()) if differ else 1.0,
        )

    def standardise(self, value_E: NDArray[np.float64] | None, num_events: int) -> Tensor:
        """Values with mean 0 and deviation 1 on the training data, NaN where missing: `[E]`."""
        if value_E is None or self.value_mean is None:
            return torch.full((num_events,), torch.nan)
        reach = MAX_DEVIATIONS * self.value_std  # requests may hold any number
        value_E = np.clip(value_E, self.value_mean - reach, self.value_mean + reach)
        return torch.from_numpy((value_E - self.value_mean) / self.value_std).float()

    def unstandardise(self, value_E: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inverse of `standardise`, for predictions."""
        return (self.value_mean or 0.0) + self.value_std * value_E


def _fit_fields(
    kinds: Mapping[str, FieldKind], columns: Mapping[str, Sequence[Any] | NDArray[np.object_]]
) -> tuple[FieldEncoding, ...]:
    return tuple(
        fit_encoding(name, kind, columns[name]) for name, kind in kinds.items() if name in columns
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
    previous_type: Tensor  # token of the previous event's type, 0 where there is none
    previous_value: Tensor  # standardised, NaN where there is none
    bucket: Tensor
    session_start: Tensor
    target: Tensor
    value: Tensor  # of the target event, standardised, NaN where missing
    taste: Tensor | None  # `[E, W]`, what the user's values so far say (`model.values`)
    user: Tensor  # row of `user_bags`
    first_event: Tensor  # where the user's history begins
    next_same: Tensor  # the user's next event with the same item, E where there is none
    user_bags: FieldBags  # one row per user
    context_bags: FieldBags  # one row per position: the request that led to the target event
    trend_row: Tensor | None

    @classmethod
    def of(
        cls,
        histories: Histories,
        encodings: InputEncodings,
        trend: TrendTable | None,
        tastes: tuple[Tensor, Tensor] | None = None,
    ) -> Self:
        """Read the histories.

        Args:
            trend: the table whose rows `trend_row` names.
            tastes: `mean_M` and `taste_MY` of the value head; None: values are not predicted.
        """
        first_E = np.zeros(histories.num_events, dtype=bool)
        length_U = np.diff(histories.offset_U1)
        first_E[histories.offset_U1[:-1][length_U > 0]] = True
        delta_E = np.diff(histories.timestamp_E, prepend=0)
        previous_E = np.where(first_E, encodings.num_items, np.roll(histories.item_E, 1))
        value = encodings.standardise(histories.value_E, histories.num_events)
        first = torch.from_numpy(first_E)
        first_event = torch.from_numpy(np.repeat(histories.offset_U1[:-1], length_U))
        item = torch.from_numpy(histories.item_E)
        return cls(
            previous_item=torch.from_numpy(previous_E),
            previous_type=_event_types(histories, encodings).roll(1).masked_fill(first, 0),
            previous_value=value.roll(1).masked_fill(first, torch.nan),
            bucket=torch.from_numpy(time_bucket(delta_E, ~first_E)),
            session_start=torch.from_numpy(first_E | (delta_E > encodings.session_gap)),
            target=item,
            value=value,
            taste=None
            if tastes is None
            else running_tastes(item, value, histories.offset_U1, *tastes),
            user=torch.from_numpy(histories.user_E),
            first_event=first_event,
            next_same=torch.from_numpy(next_same(histories)),
            user_bags=FieldBags.encode(
                encodings.user_fields, histories.user_fields, len(histories)
            ),
            context_bags=FieldBags.encode(
                encodings.context_fields, histories.context_fields, histories.num_events
            ),
            trend_row=None
            if trend is None
            else torch.from_numpy(trend.row_of(histories.timestamp_E)),
        )

    def recent_items(self, event_N: Tensor, num: int) -> Tensor:
        """The last `num` items before each position, newest first; −1 where there is none."""
        at_NR = event_N[:, None] - torch.arange(1, num + 1)
        exists_NR = at_NR >= self.first_event[event_N][:, None]
        return torch.where(exists_NR, self.target[at_NR.clamp(min=0)], -1)

    def seen_items(self, event_N: Tensor) -> SeenItems:
        """The distinct items before each position."""
        return SeenItems.of(event_N, self.first_event, self.next_same, self.target)


def _event_types(histories: Histories, encodings: InputEncodings) -> Tensor:
    """Token of every event's type `[E]`, 0 where missing, unknown or not read."""
    if encodings.event_type is None or histories.event_type_E is None:
        return torch.zeros(histories.num_events, dtype=torch.int64)
    types, code_E = np.unique(histories.event_type_E.astype(str), return_inverse=True)
    token = {name: t for t, name in enumerate(encodings.event_type.vocabulary, start=1)}
    return torch.tensor([token.get(name, 0) for name in types], dtype=torch.int64)[code_E]
