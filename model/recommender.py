"""Inference: a loaded bundle answering queries.

Shapes: B queries, N packed positions, M items (catalogue order: ids ascending), D embedding,
C best items, A items asked for besides, T items of a list.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from model import bundle as bundles
from model.approximate import Measured
from model.encoders import GRUEncoder
from model.errors import InputError
from model.extension import with_items
from model.field_values import FieldValues, StackedFieldValues
from model.hrnn import encode_batches
from model.inputs import Positions
from model.lean import LeanGRU
from model.network import Encoded
from model.query import Event, FieldValue, History, ItemFilter, Query, Recommendation
from model.retrieval import Allowed, Ask, Listed, Retrieval, Scores
from model.schema import FieldKind, fits
from model.sequences import Histories
from model.states import Recent, States, beginning
from model.transitions import summed
from model.trends import TrendSnapshot

Extra = NDArray[np.float64]

PROBES = 256  # queries that an approximate search is measured with

_NO_ITEMS: NDArray[np.int64] = np.empty(0, dtype=np.int64)
_NO_SCORES: NDArray[np.float32] = np.empty(0, dtype=np.float32)

Fields = Mapping[str, FieldValue]
Keys = Mapping[str, int]


@dataclass(frozen=True)
class _Encoded:
    """Where each of B queries stands, and what the network makes of it."""

    positions: Positions
    event_B: torch.Tensor
    encoded: Encoded


@dataclass(frozen=True)
class Retrieved:
    """Affinities φ̃ of the best allowed items, descending, ties by item id, and of items asked for.

    `exhausted`: the best are all that is allowed. `affinity_A` is of the items asked for,
    `affinity_T` of the list asked for; NaN where one is unknown or not allowed. The `extra` arrays,
    if anything was to be added, say what is in the affinities beside them.
    """

    item_ids: list[str]
    affinity_C: Scores
    affinity_A: Scores
    affinity_T: Scores
    exhausted: bool
    extra_C: Extra | None = None
    extra_A: Extra | None = None
    extra_T: Extra | None = None


class Recommender:
    """Scores every item for a query and ranks; safe to share between threads (read-only)."""

    max_history = 200  # newest known events of a history that are encoded
    kept_states = 50_000  # of histories read lately, one row of hidden numbers each

    def __init__(
        self, bundle: bundles.Bundle, *, of: "Recommender | None" = None, keys: Keys | None = None
    ) -> None:
        """
        Args:
            of: whose model this is, with other items; its states of histories are shared.
            keys: of items that are not as in the bundle, in the digest of a history.
        """
        self._bundle = bundle
        self._least_recall: float | None = None  # of an approximate search that pays
        self.recall = 1.0  # measured, of the search in use
        self._origin: bundles.Bundle = bundle if of is None else of._origin  # as trained
        self._network = bundle.model.network
        self._catalogue = bundle.catalogue
        self._network.items.fold()
        w_MD, b_M = self._network.items.outputs()
        self._w_MD, self._b_M = w_MD.detach().contiguous(), b_M.detach()
        self._lean: LeanGRU | None = None  # other encoders are read as batches
        self._key_M = np.arange(len(self._catalogue))
        if isinstance(self._network.encoder, GRUEncoder):
            index = bundle.catalogue.index
            states = States(self.kept_states)
            if of is not None and of._lean is not None:
                states = of._lean.states
                of_origin = self._origin.catalogue.index
                found = (
                    (keys or {}).get(i, of_origin.get(i, -1)) for i in self._catalogue.item_ids
                )
                self._key_M = np.fromiter(found, np.int64, len(self._catalogue))
            self._lean = LeanGRU(self._network, index, states, self._key_M)
        self._changed = list(keys or ())
        self._bundle_values: dict[str, FieldValues] = {} if of is None else of._bundle_values
        self._field_values: dict[str, FieldValues | StackedFieldValues] = {}
        self.version: str = bundle.manifest.model_version
        self.item_ids: tuple[str, ...] = bundle.catalogue.item_ids
        self.item_titles: dict[str, str] = bundle.catalogue.titles
        self.beta = float(self._network.beta.detach())  # where no item is new
        self.trend: TrendSnapshot = bundle.trend

    @classmethod
    def load(cls, path: Path | str) -> "Recommender":
        """Load a bundle folder, digests verified.

        Raises:
            BundleError: missing, corrupt, foreign or unsupported.
        """
        return cls(bundles.load(Path(path)))

    def readable(
        self, items: Mapping[str, Mapping[str, FieldValue]]
    ) -> tuple[dict[str, Fields], int]:
        """Those of some items that are not as in the bundle, with the fields that it has.

        Returns:
            Items by id, and the number of values left out because they do not fit their kind.
        """
        catalogue, kinds = self._origin.catalogue, dict(self.fields)
        if catalogue.title_field is not None:
            kinds[catalogue.title_field] = FieldKind.TEXT
        found: dict[str, Fields] = {}
        unfit = 0
        for item, given in items.items():
            values = {name: v for name in kinds if (v := given.get(name)) is not None}
            fitting = {name: v for name, v in values.items() if fits(kinds[name], v)}
            unfit += len(values) - len(fitting)
            if fitting != catalogue.known_fields(item):
                found[item] = fitting
        return found, unfit

    def with_items(self, items: Mapping[str, Fields]) -> "Recommender":
        """The bundle's model and items, and some new or changed ones (see `readable`) besides.

        Needs no training: the fields of a new item say where it stands.
        """
        origin = self._origin
        model, catalogue = with_items(origin.model, origin.catalogue, items)
        keys = {item: _key(item, fields) for item, fields in items.items()}
        bundle = replace(origin, model=model, catalogue=catalogue)
        extended = Recommender(bundle, of=self, keys=keys)
        if self._least_recall is not None:
            extended.approximate(self._least_recall, like=self)
        return extended

    def knows(self, item_id: str) -> bool:
        """Whether the catalogue holds the item."""
        return item_id in self._catalogue.index

    def unknown(self, item_ids: Sequence[str]) -> int:
        """How many of some items the catalogue does not hold."""
        return len(item_ids) - sum(map(self._catalogue.index.__contains__, item_ids))

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

    @cached_property
    def retrieval(self) -> Retrieval:
        """The item vectors, ready to be searched."""
        return Retrieval(self._w_MD.numpy(), self._b_M.numpy())

    @cached_property
    def _id_M(self) -> NDArray[np.object_]:
        ids = np.empty(len(self.item_ids), dtype=object)
        ids[:] = self.item_ids
        return ids

    def approximate(self, recall: float, like: "Recommender | None" = None) -> Measured:
        """Search an approximate index from now on where that is faster; see `Retrieval`.

        Args:
            like: a recommender of nearly the same items that does so, to save time.

        Raises:
            InputError: faiss is not installed.
        """
        near = None if like is None else like.retrieval
        measured = self.retrieval.approximate(recall, self._probes(), near)
        if measured.pays:
            self._least_recall, self.recall = recall, measured.recall
        return measured

    def _probes(self) -> NDArray[np.float32]:
        """Queries of users with up to 20 events, the more of an item the more it is in trend."""
        rng = np.random.default_rng(0)
        weight_M = np.exp(self.trend.dense(self.item_ids))
        drawn = rng.choice(len(self.item_ids), (PROBES, 20), p=weight_M / weight_M.sum())
        queries = [
            Query(
                [Event(self.item_ids[j], 3600.0 * k) for k, j in enumerate(row[: 1 + b % 20])],
                3600.0 * 20,
            )
            for b, row in enumerate(drawn.tolist())
        ]
        nothing = [self._unrestricted] * PROBES
        asks = self.asks(queries, nothing, [0] * PROBES, [None] * PROBES)
        return np.stack([ask.x_D for ask in asks])

    def asks(
        self,
        queries: Sequence[Query],
        restrictions: Sequence[Allowed],
        top_n: Sequence[int],
        extras: Sequence[NDArray[np.float64] | None],
    ) -> list[Ask]:
        """Encode queries into what `retrieve` looks for.

        Args:
            restrictions: of `restriction`, one per query.
            top_n: how many of the best items.
            extras: what to add to every item's affinity `[M]`; None: nothing.
        """
        if not queries:
            return []
        with torch.inference_mode():
            if self._lean is not None:
                reads = self._lean.read_all(queries, [self._known(q.history) for q in queries])
                x_BD = [read.x_D for read in reads]
                bonuses = self._bonuses([read.item_L for read in reads])
            else:
                state = self._encode(queries)
                x_BD = list(state.encoded.query_ND.numpy())
                item_E = state.positions.target.numpy()
                first_B = state.positions.first_event[state.event_B].tolist()
                end_B = state.event_B.tolist()
                bonuses = self._bonuses(
                    [item_E[first:end] for first, end in zip(first_B, end_B, strict=True)]
                )
        return [
            Ask(x_D, n, allowed, *bonus, extra_M)
            for x_D, n, allowed, bonus, extra_M in zip(
                x_BD, top_n, restrictions, bonuses, extras, strict=True
            )
        ]

    def recent(self) -> list[Recent]:
        """Histories that were read last, newest first; none where states are not kept."""
        return [] if self._lean is None else self._lean.states.recent()

    def forget_old(self) -> None:
        """Forget histories that were read long ago; see `model.states`."""
        if self._lean is not None:
            self._lean.states.forget_old()

    def read_ahead(self, recent: Sequence[Recent]) -> None:
        """Keep the states of histories that another model has read, newest first.

        Those of users with fields that this one cannot read are left out.
        """
        if self._lean is None:
            return
        readable = []
        for one in recent:
            try:
                self.check(one.query)
            except InputError:  # another model's fields were of other kinds: nothing to gain
                continue
            readable.append(one)
        if readable:
            queries = [one.query for one in readable]
            known = [self._known(query.history) for query in queries]
            self._lean.read_all(queries, known, [one.at for one in readable])

    def listed(self, item_ids: Sequence[str]) -> Listed:
        """Prepare a list of items that many queries ask for; unknown ones are allowed."""
        return self.retrieval.listed(self._catalogue.encode(item_ids))

    def retrieve(
        self,
        asks: Sequence[Ask],
        items: Sequence[Sequence[str]],
        lists: Sequence[Listed | None],
    ) -> list[Retrieved]:
        """For each query its best items by affinity, and the affinities of some more.

        What `affinities` and sorting give, without scoring every item.

        Args:
            items: which others.
            lists: of `listed`; None: no list.
        """
        if not asks:
            return []
        by_list: dict[int, list[int]] = {}
        for b, one in enumerate(lists):
            if one is not None:
                by_list.setdefault(id(one), []).append(b)
        score_BT: list[Scores] = [_NO_SCORES] * len(asks)
        for members in by_list.values():
            some = [asks[b] for b in members]
            listed = lists[members[0]]
            assert listed is not None  # noqa: S101 - grouped above
            for b, score_T in zip(members, self.retrieval.score_listed(some, listed), strict=True):
                score_BT[b] = score_T
        answers = []
        found = self.retrieval.top(asks)
        for b, (ask, best, more) in enumerate(zip(asks, found, items, strict=True)):
            item_A, score_A = _NO_ITEMS, cast(Scores, _NO_SCORES)
            if more:
                item_A = self._catalogue.encode(more)
                unknown_A = item_A < 0
                item_A = np.maximum(item_A, 0)
                unknown_A |= ~ask.allowed.passes(item_A)
                score_A = self.retrieval.score(ask, item_A)
                score_A[unknown_A] = np.nan
            extras: list[Extra | None] = [None] * 3
            if ask.extra_M is not None:
                one = lists[b]
                item_T = _NO_ITEMS if one is None else one.row_T
                extras = [ask.extra_M[rows] for rows in (best.item_C, item_A, item_T)]
            ids = self._id_M[best.item_C].tolist()
            answers.append(
                Retrieved(ids, best.score_C, score_A, score_BT[b], best.exhausted, *extras)
            )
        return answers

    def _bonuses(
        self, histories: Sequence[NDArray[np.int64]]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """What transition counts and repeats add to which items (ascending), for B queries.

        Args:
            histories: each one's items, oldest first.
        """
        network, transitions = self._network, self._bundle.model.transitions
        num_items, keys, values = len(self.item_ids), [_NO_ITEMS], [np.empty(0)]
        if network.prior is not None and transitions is not None:
            recent_BR = np.full((len(histories), network.prior.recent), -1, dtype=np.int64)
            for row_R, item_L in zip(recent_BR, histories, strict=True):
                newest = item_L[: -len(row_R) - 1 : -1]
                row_R[: len(newest)] = newest
            key_S, value_S = network.prior.sparse(transitions, recent_BR)
            keys.append(key_S)
            values.append(value_S)
        if network.repeats is not None:
            key_S, rho_S = network.repeats.sparse(histories, num_items)
            keys.append(key_S)
            values.append(rho_S.astype(np.float64))
        key_S, value_S = summed(np.concatenate(keys), np.concatenate(values))
        bonus_S = value_S.astype(np.float32)
        end_B = np.searchsorted(key_S, np.arange(len(histories) + 1) * num_items).tolist()
        return [
            (key_S[start:end] - b * num_items, bonus_S[start:end])
            for b, (start, end) in enumerate(pairwise(end_B))
        ]

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
        known = [self._known(q.history) for q in queries]
        length_B = np.array([len(events) + 1 for events, _ in known])
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
        for start, end, query, (events, item_L) in zip(
            offset_B1[:-1], offset_B1[1:], queries, known, strict=True
        ):
            past = slice(start, end - 1)
            item_E[past] = item_L
            timestamp_E[past] = events.time_L
            if events.value_L is not None:
                value_E[past] = events.value_L
            if events.event_types is not None:
                event_type_E[past] = events.event_types
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
        first_B = np.zeros(len(queries), dtype=np.int64)
        if isinstance(self._network.encoder, GRUEncoder):
            first_B += [beginning(events.time_L, self._key_M[item_L]) for events, item_L in known]
        parts, read = self._read_from(histories, positions, offset_B1[:-1] + first_B)
        ((batch, encoded),) = encode_batches(
            self._network, read, parts, bptt=int(length_B.max()), batch_events=len(item_E)
        )
        last_B = batch.last_S[np.argsort(batch.event_N[batch.last_S])]
        last_B = last_B[np.isin(batch.event_N[last_B], offset_B1[1:] - 1)]
        return _Encoded(
            positions=positions,
            event_B=torch.from_numpy(batch.event_N[last_B]),
            encoded=encoded.rows(torch.from_numpy(last_B)),
        )

    def _read_from(
        self, histories: Histories, positions: Positions, first_B: NDArray[np.int64]
    ) -> tuple[Histories, Positions]:
        """Have the encoder begin each history at one of its events.

        Returns:
            The histories, those that do not begin there cut in two, and `positions` whose inputs
            of the encoder know nothing of what is before the cut.
        """
        offset_U1 = np.union1d(histories.offset_U1, first_B)
        if len(offset_U1) == len(histories.offset_U1):
            return histories, positions
        user_U = np.searchsorted(histories.offset_U1, offset_U1[:-1], side="right") - 1
        parts = replace(
            histories,
            user_ids=tuple(map(str, range(len(user_U)))),
            offset_U1=offset_U1,
            user_fields={
                name: [values[u] for u in user_U] for name, values in histories.user_fields.items()
            },
        )
        cut = self._network.positions(parts, None)
        names = ("previous_item", "previous_type", "previous_value", "bucket", "session_start")
        return parts, replace(positions, **{name: getattr(cut, name) for name in names})

    def _known(self, events: Sequence[Event]) -> tuple[History, NDArray[np.int64]]:
        """The newest events of items that the catalogue holds, and these items' positions."""
        history = History.of(events).sorted()
        item_L = self._catalogue.encode(history.item_ids)
        if len(item_L) and item_L.min() < 0:
            known_L = np.flatnonzero(item_L >= 0)
            history, item_L = history.take(known_L), item_L[known_L]
        return history[-self.max_history :], item_L[-self.max_history :]

    def allowed(self, query: Query) -> NDArray[np.bool_]:
        """Items `[M]` that pass the query's filter and, with `exclude_seen`, are not in history.

        Raises:
            InputError: a filter names an item field that does not exist.
        """
        return self.restriction(query).dense()

    def restriction(self, query: Query) -> Allowed:
        """The same without a truth value for every item, where none is needed.

        Raises:
            InputError: a filter names an item field that does not exist.
        """
        item_filter: ItemFilter = query.filter
        if not (query.exclude_seen or item_filter.restricts):
            return self._unrestricted
        include, mask = None, None
        if item_filter.include is not None:
            include = np.unique(np.array(self._positions(item_filter.include), dtype=np.int64))
        for name, values in item_filter.where.items():
            any_M = self._having(name, values)
            mask = any_M if mask is None else mask & any_M
        exclude = self._positions(item_filter.exclude)
        if query.exclude_seen:
            exclude += self._positions(History.of(query.history).item_ids)
        return Allowed(
            len(self.item_ids), include, np.unique(np.array(exclude, dtype=np.int64)), mask
        )

    @cached_property
    def _unrestricted(self) -> Allowed:
        return Allowed(len(self.item_ids))

    def passing(self, restriction: Allowed, items: Sequence[str]) -> list[str]:
        """Those of some items that exist and are allowed."""
        position_C = self._catalogue.encode(items)
        position_C = position_C[position_C >= 0]
        return self._id_M[position_C[restriction.passes(position_C)]].tolist()

    def _positions(self, item_ids: Sequence[str] | frozenset[str]) -> list[int]:
        index = self._catalogue.index
        return [index[i] for i in item_ids if i in index]

    def prepare_filters(self) -> None:
        """Have every field ready to be asked for, before a request waits for it."""
        for name in self._catalogue.fields:
            if name != self._catalogue.title_field:  # large, and hardly ever asked for
                self._values_of(name)

    def _values_of(self, name: str) -> FieldValues | StackedFieldValues:
        found = self._field_values.get(name)
        if found is None:
            kind = self._bundle.schema.items.get(name, FieldKind.CATEGORICAL)
            if name not in self._bundle_values:
                column = self._origin.catalogue.fields[name]
                self._bundle_values[name] = FieldValues(column, kind)
            found = self._bundle_values[name]
            if self._changed:
                index, column = self._catalogue.index, self._catalogue.fields[name]
                changed = FieldValues([column[index[item]] for item in self._changed], kind)
                found = StackedFieldValues(found, changed, self._stacked_M)
            self._field_values[name] = found
        return found

    @cached_property
    def _stacked_M(self) -> NDArray[np.int64]:
        """Where each item stands among the bundle's and then the changed ones."""
        index = self._origin.catalogue.index
        place = {item: len(index) + c for c, item in enumerate(self._changed)}
        rows = (index[i] if (c := place.get(i)) is None else c for i in self.item_ids)
        return np.fromiter(rows, np.int64, len(self.item_ids))

    def _having(self, name: str, values: Iterable[str]) -> NDArray[np.bool_]:
        """Items `[M]` whose field has one of these values."""
        if name not in self._catalogue.fields:
            known = ", ".join(self._catalogue.fields) or "none"
            raise InputError(f"filter.where: items have no field {name!r:.80} (fields: {known})")
        field = self._values_of(name)
        return field.matching([_number(name, v) for v in values] if field.numeric else values)

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

    def beta_under(
        self, item_ids: Sequence[str], log_q_T: NDArray[np.float64], floor: float
    ) -> float:
        """β while log q(t) is this, `floor` for all other items: it grows with the share of q(t)
        that items have which training did not (`model.new_items`).
        """
        new_M = self._network.items.new_M.numpy()
        num_new = int(np.count_nonzero(new_M))
        if not num_new:
            return self.beta
        position_T = self._catalogue.encode(item_ids)
        new_T = (position_T >= 0) & new_M[position_T]
        listed = float(np.exp(log_q_T[new_T]).sum())
        share = listed + (num_new - int(np.count_nonzero(new_T))) * np.exp(floor)
        with torch.inference_mode():
            return float(self._network.beta_at(torch.tensor(share)))

    def _trend_scores(self, trend: TrendSnapshot | None, weight: float) -> NDArray[np.float64]:
        trend = trend or self.trend
        beta = self.beta_under(trend.item_ids, trend.log_q, trend.floor)
        return weight * beta * trend.dense(self.item_ids)

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


def _key(item: str, fields: Fields) -> int:
    """A number for an item with these fields, beyond all positions."""
    text = json.dumps([item, sorted(fields.items())])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 2**62 + 2**62


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(
            f"filter.where: {name} is numeric, {value!r:.80} is not a number"
        ) from None
