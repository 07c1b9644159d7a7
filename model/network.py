"""HRNN: a GRU over past items and control inputs, scoring every item (§2.1, §2.2).

Shapes: N packed positions, S segments (users), M items, D embedding, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from model.context import ControlInput
from model.settings import SettingsBase


class NetworkSettings(SettingsBase):
    """Sizes and regularisation of the network."""

    embedding: int = 64  # D, size of an item vector
    hidden: int = 128  # H, size of the state
    control: int = 16  # size of the time-delta embedding
    dropout: float = 0.4  # on item inputs and on the query
    time_input: bool = True  # control inputs on; off = a plain GRU (ablation)


class HRNN(nn.Module):
    """Scores φ_j = w_j·query(h) + b_j (eq. 1), input and output embeddings tied.

    The trend enters as β·log q(t) with β = exp(log_beta) learned (§3.2), added outside.
    """

    def __init__(self, settings: NetworkSettings, num_items: int, with_trend: bool) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = num_items
        size = settings.embedding
        # Row M stands for "no previous event".
        self.item_embedding = nn.Embedding(num_items + 1, size)
        nn.init.normal_(self.item_embedding.weight, std=size**-0.5)
        self.control = ControlInput(settings.control) if settings.time_input else None
        inputs = size + (settings.control + 1 if settings.time_input else 0)
        self.encoder = nn.GRU(inputs, settings.hidden)
        self.begin_state = nn.Parameter(torch.zeros(settings.hidden))
        self.query = nn.Linear(settings.hidden, size)
        self.item_bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(settings.dropout)
        self.log_beta = nn.Parameter(torch.zeros(())) if with_trend else None

    @property
    def beta(self) -> Tensor:
        """β ≥ 0, the weight of log q(t); 0 without trend decomposition."""
        return self.item_bias.new_zeros(()) if self.log_beta is None else self.log_beta.exp()

    def inputs(self, previous_item_N: Tensor, bucket_N: Tensor, session_start_N: Tensor) -> Tensor:
        """Encoder input of each position; `previous_item` is M where there is none."""
        x_NI = self.dropout(self.item_embedding(previous_item_N))
        if self.control is None:
            return x_NI
        return torch.cat([x_NI, self.control(bucket_N, session_start_N)], dim=1)

    def initial_state(self, segments: int) -> Tensor:
        """Learned begin state `[S, H]` of users without history."""
        return self.begin_state.expand(segments, -1)

    def encode(self, x_NI: Tensor, batch_size_T: Tensor, h0_SH: Tensor) -> tuple[Tensor, Tensor]:
        """Run the encoder over packed positions.

        Returns:
            query_ND: what is multiplied with item vectors, one row per position.
            h_SH: state after each segment's last position.
        """
        packed = PackedSequence(x_NI, batch_size_T)
        out, h_1SH = self.encoder(packed, h0_SH[None].contiguous())
        return self.dropout(self.query(out.data)), h_1SH[0]

    def folded(self) -> tuple[Tensor, Tensor]:
        """One vector `[M, D]` and one bias `[M]` per item: all that inference needs."""
        return self.item_embedding.weight[: self.num_items], self.item_bias

    def scores(self, query_ND: Tensor) -> Tensor:
        """Affinities φ `[N, M]`, without the trend."""
        w_MD, b_M = self.folded()
        return torch.addmm(b_M, query_ND, w_MD.T)
