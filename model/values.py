"""Predicting the value (rating) an item would get: the head of Table 4.

v̂_j = z_j·U·h + u·h + c_j, in standardised units. What makes it work is the feedback the encoder
reads: how a user rated what came before.

Shapes: N positions, M items, H hidden, V latent.
"""

from torch import Tensor, nn

LATENT = 16


class ValueHead(nn.Module):
    """Predicted value of given items in given states."""

    def __init__(self, num_items: int, hidden: int) -> None:
        super().__init__()
        self.item = nn.Embedding(num_items, LATENT)
        self.bias = nn.Embedding(num_items, 1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.user = nn.Linear(hidden, LATENT + 1)

    def forward(self, h_NH: Tensor, item_N: Tensor) -> Tensor:
        """Predicted standardised value of item_n in state h_n: `[N]`."""
        u_NV, u_N = self.user(h_NH).tensor_split([LATENT], dim=1)
        return (u_NV * self.item(item_N)).sum(dim=1) + u_N[:, 0] + self.bias(item_N)[:, 0]
