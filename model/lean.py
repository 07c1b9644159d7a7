"""Reading one history with a trained GRU, without what batches and gradients need.

The same numbers as `model.network` (to rounding) from NumPy on one user's events: inputs of all
positions come from one matrix product and look-ups in tables that are folded once (embedding
times its part of W_i), then one matrix-vector product per step. σ(x) = (1 + tanh(x / 2)) / 2, and
the halves are folded into the weights too.

The states of histories read lately are kept. Position k reads event k − 1 and the time of event
k, so the state *before* the last event is consumed depends on the past alone and not on the
request: it is kept under a digest of exactly what was read. A history that has grown is read on
from there; one whose past has changed (a late event, the oldest one dropped) has another digest
and is read from its beginning.

Shapes: L events of one history, H hidden, G = 3·H gates (r, z, n), D embedding.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.context import time_bucket
from model.encoders import GRUEncoder
from model.fields import FieldBags
from model.inputs import MAX_DEVIATIONS
from model.network import HRNNMeta
from model.query import Event, Query

Float32 = NDArray[np.float32]

LOOK_BACK = 8  # events that may have come since a state was kept


@dataclass(frozen=True)
class Read:
    """Where a query stands: the vector scores are made with, and the items read, oldest first."""

    x_D: Float32
    item_L: NDArray[np.int64]
    steps: int  # of the recurrence that were run


class LeanGRU:
    """A network with a GRU encoder, folded for reading one history at a time; thread-safe."""

    def __init__(self, network: HRNNMeta, index: Mapping[str, int], kept_states: int) -> None:
        """
        Args:
            index: catalogue position of each item id.
            kept_states: states kept, one row of H numbers each; the least recently used goes.

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
        # σ(x) = (1 + tanh(x/2)) / 2; r ⊙ g = tanh(·) ⊙ g/2 + g/2 with g = W_n h + b_n.
        half_G = np.full(3 * hidden, 0.5, dtype=np.float32)
        self._weight_GH = np.ascontiguousarray(weight_GH * half_G[:, None])
        self._bias_h_n_H = bias_h_G[2 * hidden :] * np.float32(0.5)
        half_G[2 * hidden :] = 1.0
        weight_IG = np.ascontiguousarray((weight_GI * half_G[:, None]).T)
        bias_G = bias_i_G * half_G
        bias_G[: 2 * hidden] += 0.5 * bias_h_G[: 2 * hidden]
        self._hidden, self._bias_G = hidden, bias_G.astype(np.float32)
        parts = iter(np.split(weight_IG, np.cumsum(self._sizes())[:-1]))
        with torch.no_grad():
            self._item_MD = network.items.inputs(torch.arange(network.num_items + 1)).numpy()
            self._item_DG = next(parts)
            if network.control is not None:
                self._bucket_KG = network.control.delta_embedding.weight.numpy() @ next(parts)
                self._session_G = next(parts)[0]
            if network.feedback is not None:
                if network.feedback.type_embedding is not None:
                    self._type_KG = network.feedback.type_embedding.weight.numpy() @ next(parts)
                if network.feedback.with_value:
                    self._value_2G = next(parts)
            if network.user is not None:
                self._user_UG = next(parts)
        event_type = self._encodings.event_type
        names = () if event_type is None else event_type.vocabulary
        self._type_token: dict[str | None, int] = {n: t for t, n in enumerate(names, start=1)}
        self._begin_H = network.encoder.begin_state.detach().numpy()
        self._query_DH = network.query.weight.detach().numpy()
        self._query_D = network.query.bias.detach().numpy()
        self._states: OrderedDict[bytes, Float32] = OrderedDict()
        self._kept_states = kept_states
        self._lock = threading.Lock()

    def _sizes(self) -> list[int]:
        """Widths of the parts of the encoder's input, in the network's order."""
        network = self._network
        sizes = [network.settings.embedding]
        if network.control is not None:
            sizes += [network.settings.control, 1]
        if network.feedback is not None:
            if network.feedback.type_embedding is not None:
                sizes.append(network.feedback.TYPE_SIZE)
            if network.feedback.with_value:
                sizes.append(2)
        if network.user is not None:
            sizes.append(network.user.output_size)
        return sizes

    def read(self, query: Query, events: Sequence[Event]) -> Read:
        """The query's vector.

        Args:
            events: those of its history that the catalogue knows, in order of time.
        """
        item_L = np.array([self._index[e.item_id] for e in events], dtype=np.int64)
        # Times of the events, then of the request: position k is asked for at time k.
        time_K = np.array([*(int(e.timestamp) for e in events), int(query.timestamp)])
        token = self._type_token
        type_L = np.array([token.get(e.event_type, 0) for e in events], dtype=np.int64)
        value_L = np.array([np.nan if e.value is None else e.value for e in events], dtype=float)
        user_G = self._user(query)
        first, h_H = self._known_state(item_L, time_K, type_L, value_L, user_G)
        gate_KG = self._inputs(first, item_L, time_K, type_L, value_L)
        gate_KG += self._bias_G if user_G is None else self._bias_G + user_G
        # The last position is the request's; the state before it is worth keeping.
        h_H = self._steps(gate_KG[:-1], h_H)
        self._keep(len(item_L), h_H, item_L, time_K, type_L, value_L, user_G)
        h_H = self._steps(gate_KG[-1:], h_H)
        return Read(self._query(query, h_H), item_L, len(gate_KG))

    def _user(self, query: Query) -> Float32 | None:
        """What the user's fields add to the gates of every position; None: nothing is read."""
        if self._network.user is None:
            return None
        fields = self._encodings.user_fields
        with torch.inference_mode():
            bags = FieldBags.encode(fields, {f.name: [query.user.get(f.name)] for f in fields}, 1)
            user_1U: Float32 = self._network.user(bags).numpy()
        return (user_1U @ self._user_UG)[0]

    def _inputs(
        self,
        first: int,
        item_L: NDArray[np.int64],
        time_K: NDArray[np.int64],
        type_L: NDArray[np.int64],
        value_L: NDArray[np.float64],
    ) -> Float32:
        """W_i·x of positions first … L, without bias and user: float32 `[L + 1 − first, G]`."""
        network = self._network
        # Position k reads event k − 1; the first one has none.
        previous_K = np.append(np.int64(network.num_items), item_L)[first:]
        # Torch's product keeps to the threads it was given; NumPy's BLAS takes every core, and
        # waits for all of them when they are busy.
        item_KD = torch.from_numpy(self._item_MD.take(previous_K, axis=0))
        gate_KG: Float32 = torch.mm(item_KD, torch.from_numpy(self._item_DG)).numpy()
        has_previous_K = np.arange(first, len(time_K)) > 0
        if network.control is not None:
            delta_K = np.diff(time_K, prepend=0)[first:]
            gate_KG += self._bucket_KG[time_bucket(delta_K, has_previous_K)]
            starts_K = ~has_previous_K | (delta_K > self._encodings.session_gap)
            gate_KG[starts_K] += self._session_G
        if network.feedback is not None:
            if network.feedback.type_embedding is not None:
                gate_KG += self._type_KG[np.append(np.int64(0), type_L)[first:]]
            if network.feedback.with_value:
                mean, std = self._encodings.value_mean or 0.0, self._encodings.value_std
                z_L = np.clip((value_L - mean) / std, -MAX_DEVIATIONS, MAX_DEVIATIONS)
                z_K = np.append(np.nan, z_L)[first:].astype(np.float32)
                known_K = ~np.isnan(z_K)
                gate_KG += np.nan_to_num(z_K)[:, None] * self._value_2G[0]
                gate_KG[known_K] += self._value_2G[1]
        return gate_KG

    def _steps(self, gate_KG: Float32, h_H: Float32) -> Float32:
        """Run the recurrence over some positions; `h_H` is left as it is."""
        hidden = self._hidden
        h_H = h_H.copy()
        recurrent_G = np.empty(3 * hidden, dtype=np.float32)
        recurrent_rz, g_H = recurrent_G[: 2 * hidden], recurrent_G[2 * hidden :]
        rz = np.empty(2 * hidden, dtype=np.float32)
        r_H, z_H = rz[:hidden], rz[hidden:]
        n_H = np.empty(hidden, dtype=np.float32)
        half = np.float32(0.5)
        for gate_rz, gate_n in zip(gate_KG[:, : 2 * hidden], gate_KG[:, 2 * hidden :], strict=True):
            np.dot(self._weight_GH, h_H, out=recurrent_G)
            np.add(gate_rz, recurrent_rz, out=rz)
            np.tanh(rz, out=rz)
            np.add(g_H, self._bias_h_n_H, out=g_H)
            np.multiply(r_H, g_H, out=n_H)
            np.add(n_H, g_H, out=n_H)
            np.add(n_H, gate_n, out=n_H)
            np.tanh(n_H, out=n_H)
            # h' = n + z ⊙ (h − n) with z = (1 + tanh) / 2
            np.subtract(h_H, n_H, out=h_H)
            np.multiply(h_H, half, out=h_H)
            np.multiply(z_H, h_H, out=z_H)
            np.add(h_H, z_H, out=h_H)
            np.add(h_H, n_H, out=h_H)
        return h_H

    def _query(self, query: Query, h_H: Float32) -> Float32:
        network = self._network
        if network.context is not None:
            fields = self._encodings.context_fields
            with torch.inference_mode():
                values = {f.name: [query.context.get(f.name)] for f in fields}
                bags = FieldBags.encode(fields, values, 1)
                h_H = network.context(torch.from_numpy(h_H)[None], bags)[0].numpy()
        return self._query_DH @ h_H + self._query_D

    def _digest(
        self,
        length: int,
        item_L: NDArray[np.int64],
        time_K: NDArray[np.int64],
        type_L: NDArray[np.int64],
        value_L: NDArray[np.float64],
        user_G: Float32 | None,
    ) -> bytes:
        """Of all that positions 0 … length − 1 read: times so far, but not the last event."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(length.to_bytes(8, "little"))
        before = max(length - 1, 0)
        for array in (time_K[:length], item_L[:before], type_L[:before], value_L[:before]):
            digest.update(array.tobytes())
        if user_G is not None:
            digest.update(user_G.tobytes())
        return digest.digest()

    def _known_state(
        self,
        item_L: NDArray[np.int64],
        time_K: NDArray[np.int64],
        type_L: NDArray[np.int64],
        value_L: NDArray[np.float64],
        user_G: Float32 | None,
    ) -> tuple[int, Float32]:
        """The first position not read yet, and the state there."""
        if self._kept_states:
            for length in range(len(item_L), max(len(item_L) - LOOK_BACK, 0), -1):
                key = self._digest(length, item_L, time_K, type_L, value_L, user_G)
                with self._lock:
                    state = self._states.get(key)
                    if state is not None:
                        self._states.move_to_end(key)
                        return length, state
        return 0, self._begin_H

    def _keep(
        self,
        length: int,
        h_H: Float32,
        item_L: NDArray[np.int64],
        time_K: NDArray[np.int64],
        type_L: NDArray[np.int64],
        value_L: NDArray[np.float64],
        user_G: Float32 | None,
    ) -> None:
        if not self._kept_states or length == 0:
            return
        key = self._digest(length, item_L, time_K, type_L, value_L, user_G)
        with self._lock:
            self._states[key] = h_H
            self._states.move_to_end(key)
            while len(self._states) > self._kept_states:
                self._states.popitem(last=False)
