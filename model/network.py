"""HRNN-meta: an encoder over past items, feedback, time and fields, scoring every item (Figure 3).

Shapes: N packed positions, S segments (users), M items, D embedding, H hidden, R recent items.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.context import ContextGate, ControlInput, FeedbackInput
from model.encoders import EncoderKind, build_encoder
from model.fields import FieldBags, FieldEmbedding
from model.inputs import InputEncodings, Positions
from model.items import Items
from model.profile import FieldProfile
from model.repeats import RepeatPrior, SeenItems
from model.rows import StepRows
from model.sequences import Histories
from model.settings import SettingsBase
from model.transitions import TransitionPrior
from model.trend_table import TrendTable
from model.values import ValueHead


class NetworkSettings(SettingsBase):
    """Sizes and regularisation of the network, and which inputs it reads (for ablations)."""

    encoder: EncoderKind = EncoderKind.GRU
    embedding: int = 64  # D, size of an item vector
    hidden: int = 128  # H, size of the state
    control: int = 16  # size of the time-delta embedding
    user_embedding: int = 8  # size per user field
    context_embedding: int = 8  # size per request-context field
    dropout: float = 0.4  # on item inputs, on the state before the query
    fields_dropout: float = 0.6  # in what is made of item fields; half of it where they are read
    user_dropout: float = 0.2
    item_ids: bool = True  # the previous item's own embedding as input, beside its fields
    time_input: bool = True
    feedback: bool = True
    user_fields: bool = True
    item_fields: bool = True
    profile: bool = True  # the average of the fields of the items so far, beside the state
    request_context: bool = True
    transitions: bool = True  # the short path from recent items to the next one
    repeats: bool = True  # whether an item comes again, by how long ago it was chosen
    tied: bool = True  # one item embedding for input and output
    ratings: bool = True  # predict event values too, where the log has them


@dataclass(frozen=True)
class Encoded:
    """What the network makes of some positions."""

    query_ND: Tensor  # multiplied with item vectors
    hidden_NH: Tensor  # read by the value head
    state_SK: Tensor  # after each segment's last position
    seen: SeenItems | None  # the items before each position, where the network asks for them

    def rows(self, row_B: Tensor) -> "Encoded":
        """Some of the positions, repeats allowed; the state is the segments' still."""
        return Encoded(self.query_ND[row_B], self.hidden_NH[row_B], self.state_SK, None)


class HRNNMeta(nn.Module):
    """Affinities φ̃_j = w̃_j·query(h) + b̃_j (eq. 1 and 2), plus the transition prior.

    The trend enters as β·log q(t) with β = exp(log_beta) learned (§3.2), added outside; see
    `beta_at` for catalogues that grew since training.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        encodings: InputEncodings,
        item_bags: FieldBags,
        with_trend: bool,
    ) -> None:
        super().__init__()
        self.settings, self.encodings = settings, encodings
        self.num_items = encodings.num_items
        size, hidden = settings.embedding, settings.hidden
        self.items = Items(
            encodings.num_items,
            size,
            encodings.item_fields if settings.item_fields else (),
            item_bags,
            settings.fields_dropout,
            tied=settings.tied,
            read_ids=settings.item_ids,
        )
        inputs = size
        self.control = ControlInput(settings.control) if settings.time_input else None
        inputs += 0 if self.control is None else self.control.output_size
        self.feedback = _feedback_input(encodings) if settings.feedback else None
        inputs += 0 if self.feedback is None else self.feedback.output_size
        user_fields = encodings.user_fields if settings.user_fields else ()
        self.user = FieldEmbedding(user_fields, settings.user_embedding) if user_fields else None
        inputs += 0 if self.user is None else self.user.output_size
        self.encoder = build_encoder(settings.encoder, inputs, hidden, settings.dropout)
        context = encodings.context_fields if settings.request_context else ()
        self.context = ContextGate(context, settings.context_embedding, hidden) if context else None
        self.query = nn.Linear(hidden, size)
        self.profile: FieldProfile | None = None
        if settings.profile and settings.item_fields and encodings.item_fields:
            self.profile = FieldProfile(encodings.item_fields, size, settings.user_dropout)
        self.dropout = nn.Dropout(settings.dropout)
        self.user_dropout = nn.Dropout(settings.user_dropout)
        self.prior = TransitionPrior(encodings.num_items) if settings.transitions else None
        self.repeats = RepeatPrior() if settings.repeats else None
        rated = settings.ratings and encodings.value_mean is not None
        self.values = ValueHead(encodings.num_items, hidden, settings.dropout) if rated else None
        self.log_beta = nn.Parameter(torch.zeros(())) if with_trend else None
        # What β grows by where new items have `new_share` of q(t) or more; see `model.new_items`.
        self.new_beta: Tensor
        self.new_share: Tensor
        self.register_buffer("new_beta", torch.zeros(()))
        self.register_buffer("new_share", torch.ones(()))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.query.weight.device

    @property
    def beta(self) -> Tensor:
        """β ≥ 0, the weight of log q(t); 0 without trend decomposition."""
        return self.query.bias.new_zeros(()) if self.log_beta is None else self.log_beta.exp()

    def start_trend(self, beta: float) -> None:
        """Let β begin here; above 0."""
        if self.log_beta is not None:
            self.log_beta.data.fill_(math.log(beta))

    def beta_at(self, new_share_N: Tensor) -> Tensor:
        """β where items that training did not have hold these shares of q(t): `[N]`."""
        return self.beta + self.new_beta * (new_share_N / self.new_share).clamp(max=1.0)

    def describe_beta(self) -> str:
        """β for people: as learned, and where the catalogue grew."""
        learned = f"{float(self.beta.detach()):.3f}"
        if self.log_beta is None or not float(self.new_beta):
            return learned
        grown = float(self.beta.detach() + self.new_beta)
        return f"{learned} ({grown:.3f} once new items have {float(self.new_share):.0%} of q)"

    def row_tables(self) -> list[nn.Parameter]:
        """The parameters with a row per item, of which a step on sampled items reads a few."""
        modules = [self.items.embedding, self.items.untied]
        if self.values is not None:
            modules += [self.values.item, self.values.bias]
        return [self.items.bias, *(m.get_parameter("weight") for m in modules if m is not None)]

    def use_rows(self, rows: StepRows) -> None:
        """From now on `row_tables` are read through `rows`."""
        self.items.rows = rows
        if self.values is not None:
            self.values.rows = rows

    def positions(self, histories: Histories, trend: TrendTable | None) -> Positions:
        """What this network reads at every position of some histories: in the host's memory."""
        tastes = None
        if self.values is not None:
            tastes = self.values.mean_M.cpu(), self.values.taste_MY.cpu()
        return Positions.of(histories, self.encodings, trend, tastes)

    def predict_values(
        self, positions: Positions, event_N: Tensor, encoded: Encoded, item_N: Tensor
    ) -> Tensor:
        """Standardised value that each item would get at its position: `[N]`.

        Raises:
            ValueError: the training log had no differing values.
        """
        return self.value_parts(positions, event_N, encoded, item_N).sum(dim=1)

    def value_parts(
        self, positions: Positions, event_N: Tensor, encoded: Encoded, item_N: Tensor
    ) -> Tensor:
        """The same by what says it, `[N, 1 + P]`; see `model.values`.

        Raises:
            ValueError: the training log had no differing values.
        """
        if self.values is None or positions.taste is None:
            raise ValueError("this model was trained on a log without differing values")
        taste_NW = positions.taste[event_N]
        if not self.settings.feedback:
            taste_NW = torch.zeros_like(taste_NW)
        return self.values(encoded.hidden_NH, taste_NW, item_N)

    def inputs(
        self, positions: Positions, event_N: Tensor, previous_N: Tensor | None = None
    ) -> Tensor:
        """Encoder input of each of the chosen positions."""
        if previous_N is None:
            previous_N = positions.previous_item[event_N]
        parts = [self.dropout(self.items.inputs(previous_N))]
        if self.control is not None:
            parts.append(self.control(positions.bucket[event_N], positions.session_start[event_N]))
        if self.feedback is not None:
            parts.append(
                self.feedback(positions.previous_type[event_N], positions.previous_value[event_N])
            )
        if self.user is not None:
            users, row_N = positions.user[event_N].unique(return_inverse=True)
            parts.append(self.user_dropout(self.user(positions.user_bags.rows(users)))[row_N])
        return torch.cat(parts, dim=1)

    def initial_state(self, segments: int) -> Tensor:
        """Begin state `[S, K]` of users without history."""
        return self.encoder.initial_state(segments)

    def encode(
        self,
        positions: Positions,
        event_N: Tensor,
        batch_size_T: Tensor,
        state_SK: Tensor,
        previous_N: Tensor | None = None,
    ) -> Encoded:
        """Run the encoder over packed positions; `previous_N`: their previous items, if read."""
        h_NH, state_SK = self.encoder(
            self.inputs(positions, event_N, previous_N),
            batch_size_T,
            positions.session_start[event_N],
            state_SK,
        )
        read_NH = self.dropout(h_NH)
        if self.context is not None:
            read_NH = self.context(read_NH, positions.context_bags.rows(event_N))
        query_ND = self.query(read_NH)
        seen = None
        if self.repeats is not None or self.profile is not None:
            seen = positions.seen_items(event_N)
        if self.profile is not None and seen is not None:
            query_ND = query_ND + self.profile(self.items.bags, seen)
        return Encoded(query_ND, h_NH, state_SK, seen)

    def affinities(
        self, query_ND: Tensor, w_MD: Tensor, b_M: Tensor, prior_NM: Tensor | None
    ) -> Tensor:
        """φ̃ `[N, M]`, without the trend."""
        phi_NM = torch.addmm(b_M, query_ND, w_MD.T)
        return phi_NM if prior_NM is None else phi_NM + prior_NM


def _feedback_input(encodings: InputEncodings) -> FeedbackInput | None:
    """The input for the feedback that the log holds; None when it holds none."""
    num_types = 0 if encodings.event_type is None else encodings.event_type.num_tokens
    with_value = encodings.value_mean is not None
    return FeedbackInput(num_types, with_value) if num_types or with_value else None
