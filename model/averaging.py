"""Exponential moving average of the weights, also of tables of which a step changes a few rows.

A row that no step touched stays what it was, so the average over a stretch of steps is known in one
go: ema ← w + d^k·(ema − w). A row is brought up to date when it is next touched, and all rows when
the average is read; no step passes over a table.

Shapes: M rows of a table, R rows touched.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHUNK_ROWS = 2**16  # brought up to date at once


class WeightAverage:
    """Averages of a network's parameters, kept in a copy of the network.

    The first step is copied and every later one taken in by (1 − decay), as by
    `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)`.
    """

    def __init__(
        self, network: nn.Module, kept: nn.Module, decay: float, tables: Sequence[Tensor] = ()
    ) -> None:
        """`kept` is a copy that nothing has changed yet; `tables` are the network's parameters
        whose gradients are sparse."""
        self.decay, self.steps = decay, 0
        by_rows = {id(table) for table in tables}
        pairs = list(zip(network.parameters(), kept.parameters(), strict=True))
        dense = [(w.detach(), ema.detach()) for w, ema in pairs if id(w) not in by_rows]
        self.weights, self.averages = [w for w, _ in dense], [ema for _, ema in dense]
        self.tables = [(w, ema.detach()) for w, ema in pairs if id(w) in by_rows]
        # How many steps each row's average holds.
        self.held = [
            torch.zeros(len(w), dtype=torch.int32, device=w.device) for w, _ in self.tables
        ]

    @torch.no_grad()
    def take_rows(self, w: Tensor, row_R: Tensor, old_R: Tensor, new_R: Tensor) -> None:
        """Before `update`: some rows of a table have changed in this step.

        Args:
            w: the table.
            row_R: int64, distinct.
            old_R, new_R: the rows before the step, and after.
        """
        ema, held_M = next(
            (ema, held_M)
            for (own, ema), held_M in zip(self.tables, self.held, strict=True)
            if own is w
        )
        share = self._share()
        kept_R = self._kept(held_M.index_select(0, row_R), old_R.dim()).mul_(1.0 - share)
        beyond_R = ema.index_select(0, row_R).sub_(old_R)
        ema.index_copy_(0, row_R, old_R.lerp(new_R, share).addcmul_(beyond_R, kept_R))
        held_M.index_fill_(0, row_R, self.steps + 1)

    @torch.no_grad()
    def update(self) -> None:
        """After the optimisers' step: take the new weights in."""
        share = self._share()
        self.steps += 1
        if share == 1.0:
            torch._foreach_copy_(self.averages, self.weights)
        else:
            torch._foreach_lerp_(self.averages, self.weights, share)

    @torch.no_grad()
    def finish(self) -> None:
        """Bring every row up to date, so that the copy is the average."""
        for (w, ema), held_M in zip(self.tables, self.held, strict=True):
            for part in (slice(s, s + CHUNK_ROWS) for s in range(0, len(w), CHUNK_ROWS)):
                kept_R = self._kept(held_M[part], w.dim())
                ema[part] = torch.addcmul(w[part], ema[part] - w[part], kept_R)
            held_M.fill_(self.steps)

    def _share(self) -> float:
        """Of the next step's weights in the average."""
        return 1.0 - self.decay if self.steps else 1.0

    def _kept(self, held_R: Tensor, dim: int) -> Tensor:
        """d^k of rows with so many steps in their averages, to be multiplied with rows.

        A row without any has never changed: its average is the weights themselves and stays so.
        """
        kept_R = (self.steps - held_R).mul(math.log(self.decay)).exp_()
        return kept_R[:, None] if dim > 1 else kept_R
