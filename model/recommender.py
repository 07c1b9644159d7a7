"""Inference: a loaded bundle answering queries.

Shapes: B queries, N packed positions, M items (catalogue order: ids ascending), D embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model import bundle as bundles
from model.errors import InputError
from model.hrnn import encode_batches
from model.inputs import Positions
from model.network import Encoded
from model.query import Event, ItemFilter, Query, Recommendation
from model.schema import FieldKind
from model.sequences import Histories
from model.trends import TrendSnapshot


@dataclass(frozen=True)
class _Encoded:
    """Where each of B queries stands, and what the network makes of it."""

    positions: Positions
    event_B: torch.Tensor
    encoded: Encoded


class Recommender:
    """Scores every item for a query and ranks; safe to share between threads (read-only)."""

    max_history = 200  # newest known events of a history that are encoded

    def __init__(self, bundle: bundles.Bundle) -> None:
        self._bundle = bundle
        self._network = bundle.model.network
        self._catalogue = bundle.catalogue
        self._network.items.fold()
        w_MD, b_M = self._network.items.outputs()
        self._w_MD, self._b_M = w_MD.detach().contiguous(), b_M.detach()
        self._masks: dict[tuple[str, str], NDArray[np.bool_]] = {}
        self.version: str = bundle.manifest.model_version
        self.item_ids: tuple[str, ...] = bundle.catalogue.item_ids
        self.item_titles: dict[str, str] = bundle.catalogue.titles
        self.beta = float(self._network.beta.detach())
        self.trend: TrendSnapshot = bundle.trend

    @classmethod
    def load(cls, path: Path | str) -> "Recommender":
        """Load a bundle folder, digests verified.

        Raises:
            BundleError: missing, corrupt, foreign or unsupported.
        """
        return cls(bundles.load(Path(path)))

    def knows(self, item_id: str) -> bool:
        """Whether the catalogue holds the item."""
        return item_id in self._catalogue.index

    def check(self, query: Query) -> None:
        """See that the model can read a query's fields; unknown ones are not read.

        Raises:
            InputError: names the field whose value does not fit its kind.
        """
        encodings = self._bundle.model.encodings
        for section, fields, values in (
            ("user", encodings.user_fields, query.user),
            ("context", encodings.context_fields, query.context),
        ):
            for field in fields:
                value = values.get(field.name)
                if value is None:
                    continue
                try:
                    field.tokenise(value)
                except (TypeError, ValueError):
                    raise InputError(
                        f"{section}.{field.name}: expected {field.kind.value}, "
                        f"got {type(value).__name__}"
                    ) from None

    def affinities(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        """φ̃ `[B, M]`: affinity of every item, without trend, filters not applied."""
        if not queries:
            return np.empty((0, len(self.item_ids)), dtype=np.float32)
        with torch.inference_mode():
            state = self._encode(queries)
            prior_BM = self._bundle.model.prior(state.positions, state.event_B)
            phi_BM: NDArray[np.float32] = self._network.affinities(
                state.encoded.query_ND, self._w_MD, self._b_M, prior_BM
            ).numpy()
        return phi_BM

    @property
    def rates(self) -> bool:
        """Whether the model predicts event values: it was trained on a log that has them."""
        return self._network.values is not None

    def rate(
        self, queries: Sequence[Query], items: Sequence[Sequence[str]]
    ) -> list[list[tuple[str, float]]]:
        """Predicted event value (a rating, say) of each query's own items, in the order given.

        Unknown items are left out.

        Raises:
            InputError: the model was trained on a log without differing values.
        """
        if not self.rates:
            raise InputError(
                "this model predicts no values: its training log had none, or they did not differ"
            )
        if not queries:
            return []
        known = [[i for i in ids if self.knows(i)] for ids in items]
        query_C = np.repeat(np.arange(len(queries)), [len(ids) for ids in known])
        item_C = torch.tensor([j for ids in known for j in self._positions(ids)], dtype=torch.int64)
        with torch.inference_mode():
            state = self._encode(queries)
            rows = torch.from_numpy(query_C)
            value_C = self._network.predict_values(
                state.positions, state.event_B[rows], state.encoded.rows(rows), item_C
            )
        predicted = self._bundle.model.encodings.unstandardise(value_C.double().numpy())
        pairs = zip((i for ids in known for i in ids), predicted.tolist(), strict=True)
        return [[next(pairs) for _ in ids] for ids in known]

    def _encode(self, queries: Sequence[Query]) -> "_Encoded":
        """Each query's position after its newest event."""
        encodings = self._bundle.model.encodings
        known = [self._known_events(q.history) for q in queries]
        length_B = np.array([len(events) + 1 for events in known])
        offset_B1 = np.r_[0, np.cumsum(length_B)]
        # The request stands where the next event would; what was chosen (item 0) is not read.
        item_E = np.zeros(offset_B1[-1], dtype=np.int64)
        timestamp_E = np.empty(offset_B1[-1], dtype=np.int64)
        value_E = np.full(offset_B1[-1], np.nan)
        event_type_E = np.full(offset_B1[-1], None, dtype=object)
        context = {
            field.name: np.full(offset_B1[-1], None, dtype=object)
            for field in encodings.context_fields
        }
        for start, end, query, events in zip(
            offset_B1[:-1], offset_B1[1:], queries, known, strict=True
        ):
            past = slice(start, end - 1)
            item_E[past] = self._catalogue.encode([e.item_id for e in events])
            timestamp_E[past] = [int(e.timestamp) for e in events]
            value_E[past] = [np.nan if e.value is None else e.value for e in events]
            event_type_E[past] = [e.event_type for e in events]
            timestamp_E[end - 1] = int(query.timestamp)
            for name, column in context.items():
                column[end - 1] = query.context.get(name)
        histories = Histories(
            user_ids=tuple(map(str, range(len(queries)))),
            item_E=item_E,
            timestamp_E=timestamp_E,
            offset_U1=offset_B1,
            user_fields={
                field.name: [query.user.get(field.name) for query in queries]
                for field in encodings.user_fields
            },
            event_type_E=event_type_E,
            value_E=value_E,
            context_fields=context,
        )
        positions = self._network.positions(histories, None)
        ((batch, encoded),) = encode_batches(
            self._network,
            positions,
            histories,
            bptt=int(length_B.max()),
            batch_events=len(item_E),
        )
        order_B = np.argsort(histories.user_E[batch.event_N[batch.last_S]])
        last_B = batch.last_S[order_B]
        return _Encoded(
            positions=positions,
            event_B=torch.from_numpy(batch.event_N[last_B]),
            encoded=encoded.rows(torch.from_numpy(last_B)),
        )

    def _known_events(self, history: Sequence[Event]) -> list[Event]:
        known = [e for e in history if e.item_id in self._catalogue.index]
        known.sort(key=lambda e: e.timestamp)
        return known[-self.max_history :]

    def allowed(self, query: Query) -> NDArray[np.bool_]:
        """Items `[M]` that pass the query's filter and, with `exclude_seen`, are not in history.

        Raises:
            InputError: a filter names an item field that does not exist.
        """
        allowed_M = np.ones(len(self.item_ids), dtype=np.bool_)
        item_filter: ItemFilter = query.filter
        if item_filter.include is not None:
            allowed_M[:] = False
            allowed_M[self._positions(item_filter.include)] = True
        if item_filter.exclude:
            allowed_M[self._positions(item_filter.exclude)] = False
        for name, values in item_filter.where.items():
            any_M = np.zeros(len(self.item_ids), dtype=np.bool_)
            for value in values:
                any_M |= self._mask(name, value)
            allowed_M &= any_M
        if query.exclude_seen:
            allowed_M[self._positions([e.item_id for e in query.history])] = False
        return allowed_M

    def _positions(self, item_ids: Sequence[str] | frozenset[str]) -> list[int]:
        index = self._catalogue.index
        return [index[i] for i in item_ids if i in index]

    def _mask(self, name: str, value: str) -> NDArray[np.bool_]:
        """Items whose field has this value; kept, as filters repeat."""
        if name not in self._catalogue.fields:
            known = ", ".join(self._catalogue.fields) or "none"
            raise InputError(f"filter.where: items have no field {name!r} (fields: {known})")
        kind = self._bundle.schema.items.get(name, FieldKind.CATEGORICAL)
        key = (name, value)
        if key not in self._masks:
            column = self._catalogue.fields[name]
            if kind is FieldKind.MULTI_CATEGORICAL:
                matches = (v is not None and value in v for v in column)
            elif kind is FieldKind.NUMERIC:
                number = _number(name, value)
                matches = (v is not None and v == number for v in column)
            else:
                matches = (v is not None and str(v) == value for v in column)
            mask_M = np.fromiter(matches, np.bool_, len(self.item_ids))
            if len(self._masks) >= 4096:  # bounded: values come from requests
                self._masks.clear()
            self._masks[key] = mask_M
        return self._masks[key]

    def recommend(
        self,
        queries: Sequence[Query],
        k: int,
        trend: TrendSnapshot | None = None,
        trend_weight: float = 1.0,
    ) -> list[list[Recommendation]]:
        """Top k of φ̃ + trend_weight·β·log q by brute force; the reference for serving.

        Sorted by score descending, ties by item id; fewer than k where fewer are allowed.

        Args:
            trend: snapshot to add; None means the bundle's own.
        """
        phi_BM = self.affinities(queries)
        trend_M = self._trend_scores(trend, trend_weight)
        return [
            self._top(phi_M, trend_M, np.flatnonzero(self.allowed(query)), k)
            for query, phi_M in zip(queries, phi_BM, strict=True)
        ]

    def rank(
        self,
        queries: Sequence[Query],
        items: Sequence[Sequence[str]],
        trend: TrendSnapshot | None = None,
        trend_weight: float = 1.0,
    ) -> list[list[Recommendation]]:
        """Order each query's own list of items; unknown items are left out."""
        phi_BM = self.affinities(queries)
        trend_M = self._trend_scores(trend, trend_weight)
        return [
            self._top(phi_M, trend_M, np.array(sorted(set(self._positions(ids))), int), len(ids))
            for phi_M, ids in zip(phi_BM, items, strict=True)
        ]

    def _trend_scores(self, trend: TrendSnapshot | None, weight: float) -> NDArray[np.float64]:
        return weight * self.beta * (trend or self.trend).dense(self.item_ids)

    def _top(
        self,
        phi_M: NDArray[np.float32],
        trend_M: NDArray[np.float64],
        candidate_C: NDArray[np.int64],
        k: int,
    ) -> list[Recommendation]:
        affinity_C = phi_M[candidate_C].astype(np.float64)
        score_C = affinity_C + trend_M[candidate_C]
        # Candidates ascend by item id, so a stable sort breaks ties by id.
        order = np.argsort(-score_C, kind="stable")[:k]
        return [
            Recommendation(
                item_id=self.item_ids[candidate_C[c]],
                score=float(score_C[c]),
                affinity=float(affinity_C[c]),
                trend=float(trend_M[candidate_C[c]]),
            )
            for c in order
        ]

    @property
    def fields(self) -> Mapping[str, FieldKind]:
        """Item fields a filter can name."""
        return {
            n: self._bundle.schema.items.get(n, FieldKind.CATEGORICAL)
            for n in self._catalogue.fields
        }


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"filter.where: {name} is numeric, {value!r} is not a number") from None
