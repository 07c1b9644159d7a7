"""How much an item is chosen, as far as its fields say: one number per value of a field.

For new items this is all that tells a likely success from a likely failure. An MLP learns the
popularity of the items it is trained on by heart, and guesses badly for others; a ridge regression
does not (docs/results.md, cold items). So the bias of eq. 2 is linear in the fields, and training
begins at that regression.

Shapes: R rows, M items, V values of all fields together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.fields import MISSING, FieldBags, FieldEmbedding, FieldEncoding

RIDGE = 1.0  # items about which nothing is known, for each value
STEPS = 200  # of conjugate gradients at most
TOLERANCE = 1e-6  # of the residual, relative to the right-hand side


class FieldBias(nn.Module):
    """b(f_j): the sum of a number per field value, and of one for all: `[R]`."""

    def __init__(self, encodings: Sequence[FieldEncoding]) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(encodings, 1)
        for table in self.embedding.tables:
            nn.init.zeros_(table.get_parameter("weight"))
        self.intercept = nn.Parameter(torch.zeros(1))

    def forward(self, bags: FieldBags) -> Tensor:
        b_R: Tensor = self.embedding(bags).sum(dim=1) + self.intercept
        return b_R

    @torch.no_grad()
    def start_at(self, bags: FieldBags, b_M: Tensor, known_M: Tensor) -> None:
        """Fit to the biases of the items with interactions.

        Minimises Σ_j (b(f_j) − b_j)² + RIDGE·Σ_v β_v² over the known items, by conjugate gradients:
        the V × V matrix of the normal equations is never made. A missing value says nothing.

        Args:
            bags: fields of all items.
            b_M: what to fit to, float `[M]`.
            known_M: bool, of which items.
        """
        if not bool(known_M.any()):
            return
        tables = [table.get_parameter("weight") for table in self.embedding.tables]
        sizes = [len(table) for table in tables]
        known = known_M.double()
        mean = (b_M * known).sum() / known.sum()
        target_M = (b_M.double() - mean) * known
        rows = [torch.repeat_interleave(offset.diff()) for offset in bags.offset]
        weights = [w * (t != MISSING) for t, w in zip(bags.token, bags.weight, strict=True)]

        def values(beta_V: Tensor) -> Tensor:
            """X·β `[M]`; the last β is every item's."""
            out_M = known * beta_V[-1]
            for part, token, weight, row in zip(
                beta_V[:-1].split(sizes), bags.token, weights, rows, strict=True
            ):
                out_M.index_add_(0, row, part[token] * weight * known[row])
            return out_M

        def gathered(value_M: Tensor) -> Tensor:
            """Xᵀ·value `[V + 1]`."""
            parts = [
                value_M.new_zeros(size).index_add_(0, token, value_M[row] * weight * known[row])
                for size, token, weight, row in zip(sizes, bags.token, weights, rows, strict=True)
            ]
            return torch.cat([*parts, (value_M * known).sum()[None]])

        right_V = gathered(target_M)
        beta_V = torch.zeros_like(right_V)
        residual_V, direction_V = right_V.clone(), right_V.clone()
        square = residual_V.dot(residual_V)
        enough = TOLERANCE**2 * square
        for _ in range(STEPS):
            if square <= enough:
                break
            image_V = gathered(values(direction_V)) + RIDGE * direction_V
            step = square / direction_V.dot(image_V)
            beta_V += step * direction_V
            residual_V -= step * image_V
            before, square = square, residual_V.dot(residual_V)
            direction_V = residual_V + (square / before) * direction_V
        for table, part in zip(tables, beta_V[:-1].split(sizes), strict=True):
            table.copy_(part[:, None])
        self.intercept.fill_(float(beta_V[-1] + mean))
