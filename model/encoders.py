"""Encoders: from a user's inputs to the state h_k, behind one interface (§2.1, §2.2).

Positions come packed as in `torch.nn.utils.rnn.PackedSequence`: first every segment's first
position (longest segment first), then the second ones, … All that an encoder remembers is one
row of numbers per segment, so that a state can be cut, carried across BPTT chunks, kept for a
user and advanced by one event, whatever the encoder is. Stepping equals encoding at once.

Shapes: N packed positions, S segments, T steps, I input, H hidden, K numbers of state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from model import gru


class EncoderKind(StrEnum):
    """The encoders that exist."""

    GRU = "gru"
    LSTM = "lstm"
    TRANSFORMER = "transformer"  # causal, sliding window
    HGRU = "hgru"  # two levels (Quadrana et al. 2017), the paper's baseline
    MULTI_HOT = "multi_hot"  # h = Σ of past items, order forgotten but for a decay
    LAST_ITEM = "last_item"  # no memory: what Table 1 calls a model without sequence


class Encoder(nn.Module, ABC):
    """Packed inputs and a state in, one h per position and the state after them out."""

    begin_state: Tensor  # [K], of users without history

    @abstractmethod
    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns h `[N, H]` and the state `[S, K]` after each segment's last position."""

    def initial_state(self, segments: int) -> Tensor:
        """The begin state `[S, K]`."""
        return self.begin_state.expand(segments, -1)


class GRUEncoder(Encoder):
    """Gated recurrent unit, the paper's default; K = H, the begin state is learned."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden)  # holds the weights; run as it is on a GPU only
        self.begin_state = nn.Parameter(torch.zeros(hidden))

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        if x_NI.is_cuda:  # one fused kernel
            packed = PackedSequence(x_NI, batch_size_T)
            out, h_1SH = self.gru(packed, state_SK[None].contiguous())
            return out.data, h_1SH[0]
        weight_GI, weight_GH, bias_i_G, bias_h_G = self.gru.parameters()
        i_NG = F.linear(x_NI, weight_GI, bias_i_G)
        dtype = i_NG.dtype  # bfloat16 under autocast
        if dtype != weight_GH.dtype:
            i_NG, state_SK = i_NG.to(weight_GH.dtype), state_SK.to(weight_GH.dtype)
        with torch.autocast("cpu", enabled=False):
            return gru.scan(i_NG, state_SK, weight_GH, bias_h_G, batch_size_T, dtype)


class LSTMEncoder(Encoder):
    """Long short-term memory; K = 2·H: h ⊕ c."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden)
        self.begin_state = nn.Parameter(torch.zeros(2 * hidden))

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        h_SH, c_SH = state_SK.chunk(2, dim=1)
        packed = PackedSequence(x_NI, batch_size_T)
        out, (h_1SH, c_1SH) = self.lstm(packed, (h_SH[None].contiguous(), c_SH[None].contiguous()))
        return out.data, torch.cat([h_1SH[0], c_1SH[0]], dim=1)


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _step_through(
    step: Step, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a cell step by step; `step(x, session_start, state)` gives (h, new state)."""
    outputs, finished, first = [], [], 0
    for b in batch_size_T.tolist():
        if b < len(state_SK):  # segments end from the last one on
            finished.append(state_SK[b:])
            state_SK = state_SK[:b]
        rows = slice(first, first + b)
        h_SH, state_SK = step(x_NI[rows], session_start_N[rows], state_SK)
        outputs.append(h_SH)
        first += b
    return torch.cat(outputs), torch.cat([state_SK, *reversed(finished)])


class HGRUEncoder(Encoder):
    """Two-level GRU: one runs inside sessions, one over sessions; K = 2·H.

    When a session starts, the session-level GRU reads the last state inside the session before
    and gives the new one its first state. The intra-session GRU is then re-run on the last item
    from there, which is the paper's change (§2.2): the first item of a session is predicted with
    what the session level has just learned.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.within = nn.GRUCell(inputs, hidden)
        self.across = nn.GRUCell(hidden, hidden)
        self.start = nn.Linear(hidden, hidden)
        self.begin_state = nn.Parameter(torch.zeros(2 * hidden))

    def _step(
        self, x_SI: Tensor, session_start_S: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        h_SH, s_SH = state_SK.chunk(2, dim=1)
        new_S1 = session_start_S[:, None]
        s_SH = torch.where(new_S1, self.across(h_SH, s_SH), s_SH)
        h_SH = torch.where(new_S1, torch.tanh(self.start(s_SH)), h_SH)
        h_SH = self.within(x_SI, h_SH)
        return h_SH, torch.cat([h_SH, s_SH], dim=1)

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _step_through(self._step, x_NI, batch_size_T, session_start_N, state_SK)


class MultiHotEncoder(Encoder):
    """h = tanh(W·s + U·x), s = γ·s + x: a decayed multi-hot of the past (§2.1), embedded; K = I.

    γ is learned; the sum is divided by the root of its own weight so that long histories do not
    saturate.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(3.0))  # γ = sigmoid(3) = .95 to begin with
        self.past = nn.Linear(inputs, hidden)
        self.now = nn.Linear(inputs, hidden, bias=False)
        # One number more than I: the weight of the sum, Σ γ^i.
        self.begin_state: Tensor
        self.register_buffer("begin_state", torch.zeros(inputs + 1))

    def _step(
        self, x_SI: Tensor, session_start_S: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        state_SK = state_SK * torch.sigmoid(self.decay) + F.pad(x_SI, (0, 1), value=1.0)
        mean_SI = state_SK[:, :-1] / state_SK[:, -1:].sqrt()
        return torch.tanh(self.past(mean_SI) + self.now(x_SI)), state_SK

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _step_through(self._step, x_NI, batch_size_T, session_start_N, state_SK)


class LastItemEncoder(Encoder):
    """h = tanh(W·x): only the position's own input; K = 1, unused."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.now = nn.Linear(inputs, hidden)
        self.begin_state: Tensor
        self.register_buffer("begin_state", torch.zeros(1))

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.now(x_NI)), state_SK


class TransformerEncoder(Encoder):
    """Causal Transformer over a sliding window (pre-norm, learned relative positions).

    Position k attends to itself and the `window` − 1 positions before it. The state holds each
    layer's last window − 1 inputs and how many of them are real: K = L·(window − 1)·H + 1.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        *,
        layers: int = 2,
        heads: int = 4,
        window: int = 50,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.heads, self.hidden = window, heads, hidden
        self.embed = nn.Linear(inputs, hidden)
        self.layers = nn.ModuleList(
            _AttentionLayer(hidden, heads, window, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.begin_state: Tensor
        self.register_buffer("begin_state", torch.zeros(layers * (window - 1) * hidden + 1))

    def forward(
        self, x_NI: Tensor, batch_size_T: Tensor, session_start_N: Tensor, state_SK: Tensor
    ) -> tuple[Tensor, Tensor]:
        segments, past = len(state_SK), self.window - 1
        steps, batch_size_T = len(batch_size_T), batch_size_T.to(x_NI.device)
        step_N = torch.repeat_interleave(torch.arange(steps), batch_size_T)
        first_T = batch_size_T.cumsum(0) - batch_size_T
        segment_N = torch.arange(len(x_NI)) - first_T[step_N]
        length_S = torch.bincount(segment_N, minlength=segments)
        known_S = state_SK[:, -1].long()
        memory_LSPH = state_SK[:, :-1].reshape(segments, len(self.layers), past, self.hidden)
        memory_LSPH = memory_LSPH.transpose(0, 1)
        x_STH = x_NI.new_zeros(segments, steps, self.hidden)
        x_STH[segment_N, step_N] = self.embed(x_NI).to(x_STH.dtype)
        # Key column c stands `past` before query column c; only real positions of the window count.
        distance_TC = torch.arange(steps)[:, None] + past - torch.arange(past + steps)[None, :]
        inside_TC = (distance_TC >= 0) & (distance_TC < self.window)
        real_SC = torch.arange(past + steps) >= (past - known_S)[:, None]
        allowed_STC = inside_TC & real_SC[:, None, :]
        newest_SP = length_S[:, None] + torch.arange(past)  # columns of the last `past` keys
        memories = []
        for layer, memory_SPH in zip(self.layers, memory_LSPH, strict=True):
            keys_SCH = torch.cat([memory_SPH, x_STH], dim=1)
            memories.append(
                keys_SCH.gather(1, newest_SP[:, :, None].expand(-1, -1, self.hidden)).flatten(1)
            )
            x_STH = layer(x_STH, keys_SCH, distance_TC, allowed_STC)
        known_S1 = (known_S + length_S).clamp(max=past)[:, None].to(x_NI.dtype)
        return self.norm(x_STH[segment_N, step_N]), torch.cat([*memories, known_S1], dim=1)


class _AttentionLayer(nn.Module):
    """Multi-head attention with a learned bias per head and distance, then a feed-forward."""

    def __init__(self, hidden: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout_rate = heads, dropout
        self.norm_in, self.norm_mid = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.position = nn.Parameter(torch.zeros(heads, window))
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_STH: Tensor, keys_SCH: Tensor, distance_TC: Tensor, allowed_STC: Tensor
    ) -> Tensor:
        q = self._split(self.query(self.norm_in(x_STH)))
        k, v = map(self._split, self.key_value(self.norm_in(keys_SCH)).chunk(2, dim=2))
        last = self.position.shape[1] - 1
        bias_ATC = self.position[:, distance_TC.clamp(0, last)]
        bias_SATC = bias_ATC.masked_fill(~allowed_STC[:, None], float("-inf"))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias_SATC, dropout_p=self.dropout_rate if self.training else 0.0
        )
        x_STH = x_STH + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x_STH + self.dropout(self.feed_forward(self.norm_mid(x_STH)))

    def _split(self, x_SCH: Tensor) -> Tensor:
        """`[S, C, H]` → `[S, heads, C, H / heads]`."""
        return x_SCH.unflatten(2, (self.heads, -1)).transpose(1, 2)


def build_encoder(kind: EncoderKind, inputs: int, hidden: int, dropout: float) -> Encoder:
    """The encoder of this kind; `dropout` acts inside the Transformer only."""
    if kind is EncoderKind.TRANSFORMER:
        return TransformerEncoder(inputs, hidden, dropout=dropout)
    simple: dict[EncoderKind, Callable[[int, int], Encoder]] = {
        EncoderKind.GRU: GRUEncoder,
        EncoderKind.LSTM: LSTMEncoder,
        EncoderKind.HGRU: HGRUEncoder,
        EncoderKind.MULTI_HOT: MultiHotEncoder,
        EncoderKind.LAST_ITEM: LastItemEncoder,
    }
    return simple[kind](inputs, hidden)
