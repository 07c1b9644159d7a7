"""Exponential moving average of the weights, also of tables of which a step changes a few rows.

A row that no step touched stays what it was, so the average over a stretch of steps is known in one
go: ema ← w + d^k·(ema − w). A row is brought up to date when it is next touched, and all rows when
the average is read; no step passes over a table.

Shapes: M rows of a table, R rows touched.
"""

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
        """`kept` is the copy; `tables` are the network's parameters whose gradients are sparse."""
        self.decay, self.steps = decay, 0
        by_rows = {id(table) for table in tables}
        pairs = list(zip(network.parameters(), kept.parameters(), strict=True))
        dense = [(w.detach(), ema.detach()) for w, ema in pairs if id(w) not in by_rows]
        self.weights, self.averages = [w for w, _ in dense], [ema for _, ema in dense]
        self.tables = [(w, ema.detach()) for w, ema in pairs if id(w) in by_rows]
        # Rows that a step is about to change, brought up to date.
        self._touched: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        # How many steps each row's average holds.
        self.held = [
            torch.zeros(len(w), dtype=torch.int32, device=w.device) for w, _ in self.tables
        ]

    @torch.no_grad()
    def catch_up(self) -> None:
        """Before the optimiser's step: what the rows about to change have been until now."""
        for (w, ema), held_M in zip(self.tables, self.held, strict=True):
            if w.grad is not None:
                row_R = w.grad.indices()[0]
                old, held_R = ema.index_select(0, row_R), held_M.index_select(0, row_R)
                self._fresh(w.index_select(0, row_R), old, held_R)
                self._touched.append((w, ema, held_M, row_R, old))

    @torch.no_grad()
    def update(self) -> None:
        """After the optimiser's step: take the new weights in."""
        share = 1.0 - self.decay if self.steps else 1.0
        self.steps += 1
        if share == 1.0:
            torch._foreach_copy_(self.averages, self.weights)
        else:
            torch._foreach_lerp_(self.averages, self.weights, share)
        for w, ema, held_M, row_R, fresh in self._touched:
            ema.index_copy_(0, row_R, fresh.lerp_(w.index_select(0, row_R), share))
            held_M.index_fill_(0, row_R, self.steps)
        self._touched = []

    @torch.no_grad()
    def finish(self) -> None:
        """Bring every row up to date, so that the copy is the average."""
        for (w, ema), held_M in zip(self.tables, self.held, strict=True):
            for part in (slice(s, s + CHUNK_ROWS) for s in range(0, len(w), CHUNK_ROWS)):
                self._fresh(w[part], ema[part], held_M[part])
            held_M.fill_(self.steps)

    def _fresh(self, w: Tensor, ema: Tensor, held_R: Tensor) -> None:
        """Take the steps not yet held, in which w was what it is, into the average.

        Before its first step the average is the weights themselves: nothing decays.
        """
        kept_R = torch.pow(self.decay, (self.steps - held_R).double()).to(w.dtype)
        kept_R = torch.where(held_R > 0, kept_R, 0.0 if self.steps else 1.0)
        kept = kept_R.view(-1, *[1] * (w.dim() - 1))
        ema.sub_(w).mul_(kept).add_(w)
