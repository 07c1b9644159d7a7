"""HRNN-meta: a GRU over past items, control and user fields, scoring every item (Figure 3).

Shapes: N packed positions, S segments (users), M items, D embedding, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from model.context import ControlInput
from model.fields import FieldBags, FieldEmbedding
from model.inputs import InputEncodings, Positions
from model.items import Items
from model.settings import SettingsBase


class NetworkSettings(SettingsBase):
    """Sizes and regularisation of the network, and which inputs it reads (for ablations)."""

    embedding: int = 64  # D, size of an item vector
    hidden: int = 128  # H, size of the state
    control: int = 16  # size of the time-delta embedding
    user_embedding: int = 8  # size per user field
    dropout: float = 0.4  # on item inputs, on the state before the query, in the item towers
    user_dropout: float = 0.2
    time_input: bool = True
    user_fields: bool = True
    item_fields: bool = True


class HRNNMeta(nn.Module):
    """Affinities φ̃_j = w̃_j·query(h) + b̃_j (eq. 1 and 2).

    The trend enters as β·log q(t) with β = exp(log_beta) learned (§3.2), added outside.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        encodings: InputEncodings,
        item_bags: FieldBags,
        with_trend: bool,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_items = encodings.num_items
        size = settings.embedding
        self.items = Items(
            encodings.num_items,
            size,
            encodings.item_fields if settings.item_fields else (),
            item_bags,
            settings.dropout,
        )
        self.control = ControlInput(settings.control) if settings.time_input else None
        user_fields = encodings.user_fields if settings.user_fields else ()
        self.user = FieldEmbedding(user_fields, settings.user_embedding) if user_fields else None
        inputs = size
        inputs += settings.control + 1 if self.control is not None else 0
        inputs += self.user.output_size if self.user is not None else 0
        self.encoder = nn.GRU(inputs, settings.hidden)
        self.begin_state = nn.Parameter(torch.zeros(settings.hidden))
        self.query = nn.Linear(settings.hidden, size)
        self.dropout = nn.Dropout(settings.dropout)
        self.user_dropout = nn.Dropout(settings.user_dropout)
        self.log_beta = nn.Parameter(torch.zeros(())) if with_trend else None

    @property
    def beta(self) -> Tensor:
        """β ≥ 0, the weight of log q(t); 0 without trend decomposition."""
        return self.begin_state.new_zeros(()) if self.log_beta is None else self.log_beta.exp()

    def inputs(self, positions: Positions, event_N: Tensor) -> Tensor:
        """Encoder input of each of the chosen positions."""
        parts = [self.dropout(self.items.inputs(positions.previous_item[event_N]))]
        if self.control is not None:
            parts.append(self.control(positions.bucket[event_N], positions.session_start[event_N]))
        if self.user is not None:
            users, row_N = positions.user[event_N].unique(return_inverse=True)
            parts.append(self.user_dropout(self.user(positions.user_bags.rows(users)))[row_N])
        return torch.cat(parts, dim=1)

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
        return self.query(self.dropout(out.data)), h_1SH[0]


def scores(query_ND: Tensor, w_MD: Tensor, b_M: Tensor) -> Tensor:
    """Affinities φ̃ `[N, M]`, without the trend."""
    return torch.addmm(b_M, query_ND, w_MD.T)
