"""Item side (eq. 2): what an item is known by (its id) and what it is like (its fields).

Decoder: w̃_j = (1 − λ)·w_j + λ·w(f_j), b̃_j = (1 − λ)·b_j + λ·b(f_j), so that
φ̃_j = w̃_j·h + b̃_j. λ ~ U[0, 1] in training keeps both parts able to stand alone (§2.3), one λ for
every position (`model.objective`): with one for a whole step, each step would descend another
model. At inference λ is per item, 1 for items without interactions.

Shapes: M items, R rows asked for, N positions, D embedding.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from model.field_bias import FieldBias
from model.fields import FieldBags, FieldEmbedding, FieldEncoding
from model.rows import StepRows, lookup


class FieldTower(nn.Module):
    """Field-aware MLP: an embedding per field, then the mix → `[R, D]`."""

    def __init__(
        self, encodings: Sequence[FieldEncoding], size: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(encodings, hidden // 4)
        self.mix = nn.Sequential(
            nn.Dropout(0.5 * dropout),
            nn.Linear(self.embedding.output_size, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        self.vector = nn.Linear(hidden, size)

    def forward(self, bags: FieldBags) -> Tensor:
        w_RD: Tensor = self.vector(self.mix(self.embedding(bags)))
        return w_RD


def mixed_queries(query_ND: Tensor, lambda_N: Tensor) -> Tensor:
    """Queries for the vectors of `Items.sides`, each under a λ of its own: `[N, 2D + 1]`."""
    lambda_N1 = lambda_N[:, None]
    return torch.cat([(1.0 - lambda_N1) * query_ND, lambda_N1 * query_ND, lambda_N1], dim=1)


class Items(nn.Module):
    """Item vectors and biases for the encoder's input and the decoder's output.

    The id embedding is tied unless asked otherwise: one table `[M + 1, D]` serves both sides; row
    M stands for "no previous event". Item fields are added to the input vector by a tower of
    their own.
    """

    def __init__(
        self,
        num_items: int,
        size: int,
        encodings: Sequence[FieldEncoding],
        bags: FieldBags,
        dropout: float,
        *,
        tied: bool = True,
        read_ids: bool = True,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.read_ids = read_ids
        self.rows: StepRows | None = None  # what a step on sampled items reads
        self.embedding = nn.Embedding(num_items + 1, size)
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        self.untied: nn.Embedding | None = None
        if not tied:
            self.untied = nn.Embedding(num_items, size)
            nn.init.normal_(self.untied.weight, std=size**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.bags = bags
        # λ of each item at inference: 1 (fields only) until training says otherwise.
        self.lambda_M: Tensor
        self.register_buffer("lambda_M", torch.ones(num_items))
        # Items that training did not have (`model.extension`), and what their biases get besides.
        self.new_M: Tensor
        self.register_buffer("new_M", torch.zeros(num_items, dtype=torch.bool), persistent=False)
        self.new_bias: Tensor
        self.register_buffer("new_bias", torch.zeros(()))
        self.output_tower: FieldTower | None = None
        self.field_bias: FieldBias | None = None
        self.input_tower: FieldTower | None = None
        if encodings:
            self.output_tower = FieldTower(encodings, size, 2 * size, dropout)
            self.field_bias = FieldBias(encodings)
            self.input_tower = FieldTower(encodings, size, 2 * size, dropout)
        self._folded_inputs: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Items":
        """What `to` and its like call: the fields' bags go where the weights go."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bags = self.bags.on(self.bias.device)
        return self

    @property
    def output_embedding(self) -> nn.Embedding:
        """The ids' vectors on the output side."""
        return self.embedding if self.untied is None else self.untied

    def align(self, known_M: Tensor) -> None:
        """Put ids and fields of the known items in the same place on average.

        A vector added to every item's changes all affinities alike, and no softmax notices: where
        the ids' vectors stand against the fields' is left to chance. It matters as soon as
        items differ in λ, known ones beside new ones. This moves the fields' vectors and
        biases so that both have the same mean; a new item then starts as an average one that its
        fields alone tell apart. Affinities under one λ for all keep their differences.

        Args:
            known_M: bool, the items with interactions.
        """
        if self.output_tower is None or self.field_bias is None or not bool(known_M.any()):
            return
        known_M = known_M.to(self.bias.device)
        training, tower = self.training, self.output_tower
        self.eval()
        with torch.no_grad():
            field_w_MD, field_b_M = tower(self.bags), self.field_bias(self.bags)
            id_w_MD = self.output_embedding.weight[: self.num_items]
            tower.vector.bias.add_((id_w_MD - field_w_MD)[known_M].mean(dim=0))
            self.field_bias.intercept.add_((self.bias - field_b_M)[known_M].mean())
        self.train(training)

    def fold(self) -> None:
        """Compute every item's input vector once, for inference with fixed weights."""
        with torch.no_grad():
            self._folded_inputs = self.inputs(torch.arange(self.num_items + 1))

    def train(self, mode: bool = True) -> "Items":
        """Weights will change: forget what was folded."""
        self._folded_inputs = None
        return super().train(mode)

    def inputs(self, item_N: Tensor) -> Tensor:
        """Encoder input `[N, D]` of each previous item (M = none)."""
        if self._folded_inputs is not None:
            return self._folded_inputs[item_N]
        e_ND = self._lookup(
            self.embedding.weight,
            item_N if self.read_ids else torch.full_like(item_N, self.num_items),
        )
        if self.input_tower is None:
            return e_ND
        row_R, row_N = item_N.unique(return_inverse=True)
        known_R = row_R < self.num_items
        fields_RD = self.input_tower(self.bags.rows(row_R.clamp(max=self.num_items - 1)))
        return e_ND + (fields_RD * known_R[:, None])[row_N]

    def _lookup(self, table: Tensor, index_N: Tensor) -> Tensor:
        return (lookup if self.rows is None else self.rows.lookup)(table, index_N)

    def outputs(
        self, lambda_mix: Tensor | float | None = None, rows_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixed vectors `[R, D]` and biases `[R]`: all that inference needs of the items.

        Args:
            lambda_mix: λ, a scalar or one per row; None: each item's own.
            rows_R: catalogue positions; None: every item, R = M.
        """
        w_RD, b_R = self._mixed(lambda_mix, rows_R)
        if self.training:
            return w_RD, b_R
        new_R = self.new_M if rows_R is None else self.new_M[rows_R]
        return w_RD, b_R + self.new_bias * new_R

    def _mixed(
        self, lambda_mix: Tensor | float | None, rows_R: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        w_RD, b_R = self._by_id(rows_R)
        by_fields = self._by_fields(rows_R)
        if by_fields is None:
            return w_RD, b_R
        if lambda_mix is None:
            lambda_mix = self.lambda_M if rows_R is None else self.lambda_M[rows_R]
        mix = torch.as_tensor(lambda_mix, dtype=w_RD.dtype)
        mix_R1 = mix[:, None] if mix.dim() else mix
        return torch.lerp(w_RD, by_fields[0], mix_R1), torch.lerp(b_R, by_fields[1], mix)

    def sides(self, rows_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both sides of the mix, for training, where every position has a λ of its own.

        One product of `mixed_queries` (1 − λ)·h ⊕ λ·h ⊕ λ with w_j ⊕ w(f_j) ⊕ (b(f_j) − b_j), and
        b_j added, is φ̃_j. Without fields these are the ids' vectors, for the queries as they are.

        Returns:
            Vectors `[R, 2D + 1]` and biases `[R]`.
        """
        w_RD, b_R = self._by_id(rows_R)
        by_fields = self._by_fields(rows_R)
        if by_fields is None:
            return w_RD, b_R
        return torch.cat([w_RD, by_fields[0], (by_fields[1] - b_R)[:, None]], dim=1), b_R

    def _by_id(self, rows_R: Tensor | None) -> tuple[Tensor, Tensor]:
        """w_j and b_j."""
        weight = self.output_embedding.weight
        if rows_R is None:
            return weight[: self.num_items], self.bias
        return self._lookup(weight, rows_R), self._lookup(self.bias, rows_R)

    def _by_fields(self, rows_R: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """w(f_j) and b(f_j), in the dtype of the ids'; None where items have no fields."""
        if self.output_tower is None or self.field_bias is None:
            return None
        bags = self.bags if rows_R is None else self.bags.rows(rows_R)
        w_RD: Tensor = self.output_tower(bags)
        b_R: Tensor = self.field_bias(bags)
        return w_RD.to(self.bias.dtype), b_R.to(self.bias.dtype)
