"""Reading one history with a trained GRU, without what batches and gradients need.

The same numbers as `model.network` (to rounding) from NumPy on one user's events: inputs of all
positions come from one matrix product, then one matrix-vector product per step.
σ(x) = 1 / (1 + exp(−x)), and the minus is folded into the weights of r and z.

The states of histories read lately are kept. Position k reads event k − 1 and the time of event
k, so the state *before* the last event is consumed depends on the past alone and not on the
request: it is kept under a digest of exactly what was read. A history that has grown is read on
from there; one whose past has changed (a late event) has another digest and is read from its
beginning. A long history's beginning is not its oldest event (`model.states.beginning`), so that it
can be read on from although it loses that one with each new one. What is no state, the profile and
the counts of transitions and repeats, is of the whole history.

Shapes: B queries, N open positions of all of them, L events of one history, H hidden, G = 3·H
gates (r, z, n), D embedding.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.context import time_bucket
from model.encoders import GRUEncoder
from model.fields import FieldBags
from model.inputs import MAX_DEVIATIONS
from model.network import HRNNMeta
from model.profile import FoldedProfile
from model.query import Event, History, Query
from model.states import States, beginning

Float32 = NDArray[np.float32]

LOCKSTEP = 4  # histories from which one step for all is faster than each by itself
LOOK_BACK = 8  # events that may have come since a state was kept


@dataclass(frozen=True)
class Read:
    """Where a query stands: the vector scores are made with, and the items read, oldest first."""

    x_D: Float32
    item_L: NDArray[np.int64]
    steps: int  # of the recurrence that were run


class LeanGRU:
    """A network with a GRU encoder, folded for reading one history at a time; thread-safe."""

    def __init__(
        self,
        network: HRNNMeta,
        index: Mapping[str, int],
        states: States,
        key_M: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            index: catalogue position of each item id.
            states: of histories read lately; may be shared by networks that differ only in items.
            key_M: what stands for an item in the digest of a history, the same number in all that
                share states as long as the item's input is the same; None: its position.

        Raises:
            TypeError: the encoder is another one.
        """
        if not isinstance(network.encoder, GRUEncoder):
            raise TypeError("not a GRU")
        self._network, self._index = network, index
        self._encodings = network.encodings
        hidden = network.settings.hidden
        weight_GI, weight_GH, bias_i_G, bias_h_G = (
            p.detach().numpy() for p in network.encoder.gru.parameters()
        )
        sign_G = np.ones(3 * hidden, dtype=np.float32)
        sign_G[: 2 * hidden] = -1.0
        weight_IG = np.ascontiguousarray((weight_GI * sign_G[:, None]).T)
        # Biases of h go with those of the inputs, but for that of n, which r multiplies.
        bias_G = bias_i_G * sign_G
        bias_G[: 2 * hidden] -= bias_h_G[: 2 * hidden]
        self._hidden = hidden
        with torch.no_grad():
            self._item_MD = network.items.inputs(torch.arange(network.num_items + 1)).numpy()
        if network.user is not None:  # the last part
            weight_IG, self._user_UG = np.split(weight_IG, [-network.user.output_size])
        if network.control is not None:
            self._bucket_KC = network.control.delta_embedding.weight.detach().numpy()
        if network.feedback is not None and network.feedback.type_embedding is not None:
            self._type_KC = network.feedback.type_embedding.weight.detach().numpy()
        # The last input is 1.
        self._input_IG = torch.from_numpy(np.vstack([weight_IG, bias_G]).astype(np.float32))
        event_type = self._encodings.event_type
        names = () if event_type is None else event_type.vocabulary
        self._type_token: dict[str | None, int] = {n: t for t, n in enumerate(names, start=1)}
        self._begin_H = network.encoder.begin_state.detach().numpy()
        # A row for each number of h, and one for the bias of n. (A vector times this is faster
        # than its transpose times the vector.)
        self._weight_PG = np.zeros((hidden + 1, 3 * hidden), dtype=np.float32)
        self._weight_PG[:hidden] = (weight_GH * sign_G[:, None]).T
        self._weight_PG[hidden, 2 * hidden :] = bias_h_G[2 * hidden :]
        self._query_HD = network.query.weight.detach().T.contiguous()
        self._query_D = network.query.bias.detach().numpy()
        self._profile: FoldedProfile | None = None
        if network.profile is not None:
            self._profile = FoldedProfile(network.profile, network.items.bags)
        self.states = states
        self._user_fields = tuple(f.name for f in self._encodings.user_fields)
        self._key_M = np.arange(len(index)) if key_M is None else key_M

    def read(self, query: Query, events: Sequence[Event]) -> Read:
        """The vector of one query; see `read_all`."""
        history = History.of(events)
        known_L = np.array([self._index[i] for i in history.item_ids], dtype=np.int64)
        return self.read_all([query], [(history, known_L)])[0]

    def read_all(
        self,
        queries: Sequence[Query],
        known: Sequence[tuple[History, NDArray[np.int64]]],
        asked_at: Sequence[float] | None = None,
    ) -> list[Read]:
        """The vectors of B queries; what they have in common is computed for all at once.

        Args:
            known: of each query the events that the catalogue knows, in order of time, and the
                positions of their items there.
            asked_at: monotonic seconds at which another model was asked; None: this one is.
        """
        user_BG = self._users(queries)
        pasts = [self._past(query, *one) for query, one in zip(queries, known, strict=True)]
        gate_NG = self._inputs(pasts)
        steps_B = np.array([past.steps for past in pasts])
        first_B = np.cumsum(steps_B) - steps_B
        if user_BG is not None:
            gate_NG += np.repeat(user_BG, steps_B, axis=0)
        # The last position is the request's; the state before it is worth keeping.
        h_BH = self._states_before_last(gate_NG, first_B, steps_B, pasts)
        for b, (query, past) in enumerate(zip(queries, pasts, strict=True)):
            if past.key is not None:
                at = None if asked_at is None else asked_at[b]
                self.states.keep(past.key, h_BH[b], query, self._user_fields, past.found, at)
        last_BG = gate_NG[first_B + steps_B - 1]
        x_BD = self._queries(queries, self._step(last_BG, h_BH))
        if self._profile is not None:
            x_BD += self._profile([item_L for _, item_L in known])
        return [
            Read(x_D, item_L, past.steps)
            for x_D, (_, item_L), past in zip(x_BD, known, pasts, strict=True)
        ]

    def _past(
        self,
        query: Query,
        history: History,
        item_L: NDArray[np.int64],
    ) -> "_Past":
        """What a query's positions read, and from where on they are to be read."""
        key_L = self._key_M[item_L]
        first = beginning(history.time_L, key_L)
        if first:
            history, item_L, key_L = history[first:], item_L[first:], key_L[first:]
        length = len(item_L)
        # Times of the events, then of the request: position k is asked for at time k.
        time_K = np.empty(length + 1, dtype=np.int64)
        time_K[:-1], time_K[-1] = history.time_L, query.timestamp
        type_L = np.zeros(length, dtype=np.int64)
        if history.event_types is not None:
            token = self._type_token
            type_L = np.array([token.get(t, 0) for t in history.event_types], dtype=np.int64)
        value_L = history.value_L
        if value_L is None:
            value_L = np.full(length, np.nan)
        user = b""
        if self._network.user is not None:
            fields = self._encodings.user_fields
            user = repr([query.user.get(f.name) for f in fields]).encode()
        past = _Past(item_L, key_L, time_K, type_L, value_L, user, self._begin_H)
        if self.states.limit and length:
            for first in range(length, max(length - LOOK_BACK, 0), -1):
                key = past.digest(first)
                if first == length:
                    past.key = key
                state = self.states.get(key)
                if state is not None:
                    past.first, past.h_H, past.found = first, state, key
                    break
        return past

    def _users(self, queries: Sequence[Query]) -> Float32 | None:
        """What users' fields add to the gates of every position `[B, G]`; None: nothing is read."""
        if self._network.user is None:
            return None
        fields = self._encodings.user_fields
        values = {f.name: [query.user.get(f.name) for query in queries] for f in fields}
        with torch.inference_mode():
            bags = FieldBags.encode(fields, values, len(queries))
            user_BU: Float32 = self._network.user(bags).numpy()
        return user_BU @ self._user_UG

    def _inputs(self, pasts: Sequence["_Past"]) -> Float32:
        """W_i·x + b of all queries' open positions, without the user: float32 `[N, G]`."""
        network = self._network
        # Position k reads event k − 1; the first one has none.
        none = np.array([network.num_items])
        previous_N = np.concatenate([p.previous(p.item_L, none) for p in pasts])
        # In the order in which the network puts its inputs side by side.
        inputs: list[NDArray[Any]] = [self._item_MD.take(previous_N, axis=0)]
        if network.control is not None:
            has_previous_N = np.concatenate([p.has_previous() for p in pasts])
            delta_N = np.concatenate([p.deltas() for p in pasts])
            inputs.append(self._bucket_KC.take(time_bucket(delta_N, has_previous_N), axis=0))
            starts_N = ~has_previous_N | (delta_N > self._encodings.session_gap)
            inputs.append(starts_N[:, None].astype(np.float32))
        if network.feedback is not None:
            if network.feedback.type_embedding is not None:
                zero = np.zeros(1, dtype=np.int64)
                type_N = np.concatenate([p.previous(p.type_L, zero) for p in pasts])
                inputs.append(self._type_KC.take(type_N, axis=0))
            if network.feedback.with_value:
                nothing = np.array([np.nan])
                value_N = np.concatenate([p.previous(p.value_L, nothing) for p in pasts])
                mean, std = self._encodings.value_mean or 0.0, self._encodings.value_std
                z_N = (value_N - mean) / std
                known_N = z_N == z_N
                z_N[~known_N] = 0.0
                z_N = np.minimum(np.maximum(z_N, -MAX_DEVIATIONS), MAX_DEVIATIONS)
                inputs += [z_N[:, None], known_N[:, None]]
        inputs.append(np.ones((len(previous_N), 1), dtype=np.float32))
        x_NI = np.concatenate(inputs, axis=1, dtype=np.float32)
        # Torch's product keeps to the threads it was given; NumPy's BLAS takes every core, and
        # waits for all of them when they are busy.
        gate_NG: Float32 = torch.mm(torch.from_numpy(x_NI), self._input_IG).numpy()
        return gate_NG

    def _steps(self, gate_KG: Float32, h_H: Float32) -> Float32:
        """Run the recurrence over some positions; `h_H` is left as it is."""
        hidden = self._hidden
        state = np.ones(hidden + 1, dtype=np.float32)  # the last 1 adds the bias
        state[:hidden] = h_H
        h_H = state[:hidden]
        recurrent_G = np.empty(3 * hidden, dtype=np.float32)
        rz, g_H = recurrent_G[: 2 * hidden], recurrent_G[2 * hidden :]
        r_H, z_H = rz[:hidden], rz[hidden:]  # their reciprocals
        n_H = np.empty(hidden, dtype=np.float32)
        one = np.ones(2 * hidden, dtype=np.float32)  # a scalar costs a conversion each time
        weight_PG = self._weight_PG
        dot, exp, tanh = np.dot, np.exp, np.tanh
        add, subtract, divide = np.add, np.subtract, np.divide
        # A call costs as much as its arithmetic: as few as can be, `out` given by position.
        with np.errstate(over="ignore"):  # what is divided by infinity is 0, as it should be
            for gate_rz, gate_n in zip(
                gate_KG[:, : 2 * hidden], gate_KG[:, 2 * hidden :], strict=True
            ):
                dot(state, weight_PG, recurrent_G)
                add(rz, gate_rz, rz)
                exp(rz, rz)
                add(rz, one, rz)
                divide(g_H, r_H, n_H)
                add(n_H, gate_n, n_H)
                tanh(n_H, n_H)
                # h' = n + z ⊙ (h − n)
                subtract(h_H, n_H, h_H)
                divide(h_H, z_H, h_H)
                add(h_H, n_H, h_H)
        return h_H.copy()

    def _states_before_last(
        self,
        gate_NG: Float32,
        first_B: NDArray[np.int64],
        steps_B: NDArray[np.int64],
        pasts: Sequence["_Past"],
    ) -> Float32:
        """Run the recurrence over all open positions but the last of each query: `[B, H]`."""
        h_BH = np.stack([past.h_H for past in pasts])
        order_B = np.argsort(-steps_B, kind="stable")
        order_B = order_B[steps_B[order_B] > 1]
        if len(order_B) < LOCKSTEP:
            for b in order_B:
                gate_KG = gate_NG[first_B[b] : first_B[b] + steps_B[b] - 1]
                h_BH[b] = self._steps(gate_KG, h_BH[b])
            return h_BH
        # Those that have the most to read first, so that whoever is done is at the end.
        sorted_BH, left_B = h_BH[order_B], steps_B[order_B] - 1
        start_B = first_B[order_B]
        count = len(order_B)
        for step in range(int(left_B[0])):
            while left_B[count - 1] <= step:
                count -= 1
            sorted_BH[:count] = self._step(gate_NG[start_B[:count] + step], sorted_BH[:count])
        h_BH[order_B] = sorted_BH
        return h_BH

    def _step(self, gate_BG: Float32, h_BH: Float32) -> Float32:
        """One step of the recurrence for B queries."""
        hidden = self._hidden
        weight_HG, bias_H = self._weight_PG[:hidden], self._weight_PG[hidden, 2 * hidden :]
        product_BG = torch.mm(torch.from_numpy(h_BH), torch.from_numpy(weight_HG)).numpy()
        with np.errstate(over="ignore"):
            rz_BG = np.exp(gate_BG[:, : 2 * hidden] + product_BG[:, : 2 * hidden])
        rz_BG += np.float32(1.0)
        r_BH, z_BH = rz_BG[:, :hidden], rz_BG[:, hidden:]  # their reciprocals
        n_BH = np.tanh(gate_BG[:, 2 * hidden :] + (product_BG[:, 2 * hidden :] + bias_H) / r_BH)
        result: Float32 = n_BH + (h_BH - n_BH) / z_BH
        return result

    def _queries(self, queries: Sequence[Query], h_BH: Float32) -> Float32:
        """What scores are made with: `[B, D]`."""
        network = self._network
        if network.context is not None:
            fields = self._encodings.context_fields
            values = {f.name: [query.context.get(f.name) for query in queries] for f in fields}
            with torch.inference_mode():
                bags = FieldBags.encode(fields, values, len(queries))
                h_BH = network.context(torch.from_numpy(h_BH), bags).numpy()
        x_BD: Float32 = torch.mm(torch.from_numpy(h_BH), self._query_HD).numpy()
        return x_BD + self._query_D


@dataclass(slots=True)
class _Past:
    """What the positions 0 … L of one query read; those before `first` are in `h_H`."""

    item_L: NDArray[np.int64]
    key_L: NDArray[np.int64]  # what stands for the items in digests
    time_K: NDArray[np.int64]
    type_L: NDArray[np.int64]
    value_L: NDArray[np.float64]
    user: bytes  # fields
    h_H: Float32
    first: int = 0
    key: bytes | None = None  # under which the state before the last position is kept
    found: bytes | None = None  # under which `h_H` was

    @property
    def steps(self) -> int:
        """Positions that are still to be read."""
        return len(self.time_K) - self.first

    def previous(self, column_L: NDArray[Any], none: NDArray[Any]) -> NDArray[Any]:
        """The value of the event before each open position; `none` before the first."""
        if self.first:
            return column_L[self.first - 1 :]
        return np.concatenate([none, column_L])

    def has_previous(self) -> NDArray[np.bool_]:
        has_K = np.ones(self.steps, dtype=np.bool_)
        has_K[0] = self.first > 0
        return has_K

    def deltas(self) -> NDArray[np.int64]:
        """Seconds between the event before each open position and its own moment."""
        if self.first:
            return self.time_K[self.first :] - self.time_K[self.first - 1 : -1]
        return np.diff(self.time_K, prepend=0)

    def digest(self, length: int) -> bytes:
        """Of all that positions 0 … length − 1 read: times so far, but not the last event."""
        digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=16)
        before = max(length - 1, 0)
        digest.update(self.time_K[:length].tobytes())
        for array in (self.key_L, self.type_L, self.value_L):
            digest.update(array[:before].tobytes())
        digest.update(self.user)
        return digest.digest()
