"""Tables of which a step reads a few rows: gradients, optimiser and averages of those rows alone.

A catalogue of a million items has tables of which a training step reads some thousand rows. Their
gradients are sparse, and whatever follows (clipping, the optimiser, the moving average of the
weights) works on these rows in place; no pass over the table, no copy of it.

Shapes: M rows of a table, D their size, R rows with a gradient.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StepRows:
    """The rows of some tables that a step meets, in small tables of their own while it lasts.

    Between `open` and `close`, `lookup` reads a table's rows from its small copy, whose gradient is
    dense and as small; `close` makes it the table's own sparse gradient, every row once.
    """

    def __init__(self) -> None:
        self._open: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # table, its rows, the copy
        self._places: list[tuple[Tensor, Tensor]] = []  # of indices known or asked for before
        self.common_R = torch.empty(0, dtype=torch.int64)  # the rows that all tables have

    def __deepcopy__(self, memo: dict[int, object]) -> "StepRows":
        """A copied network has tables of its own, of which nothing is taken out."""
        return type(self)()

    def open(self, tables: Iterable[nn.Parameter], met: Sequence[Tensor]) -> None:
        """Take rows out.

        Args:
            met: int64, what will be looked up, repeats allowed; `lookup` finds these very tensors
                without a search. Rows beyond the end of a table are not its own.
        """
        self._row_R, place = torch.cat(list(met)).unique(return_inverse=True)
        self._places = list(zip(met, place.split([len(index_N) for index_N in met]), strict=True))
        self.common_R = self._row_R
        for table in tables:
            own_R = self._row_R
            if len(own_R) and int(own_R[-1]) >= len(table):
                own_R = own_R[: int(torch.searchsorted(own_R, len(table)))]
            if len(own_R) < len(self.common_R):
                self.common_R = own_R
            copy = table.detach().index_select(0, own_R).requires_grad_()
            self._open.append((table, own_R, copy))

    def lookup(self, table: Tensor, index_N: Tensor) -> Tensor:
        """Rows of a table, or entries of a vector: `[N, …]`.

        Raises:
            ValueError: an index is not among the rows taken out.
        """
        for own, _, copy in self._open:
            if own is table:
                if index_N is self.common_R:
                    return copy if len(copy) == len(index_N) else copy[: len(index_N)]
                place_N = self.place(index_N)
                return F.embedding(place_N, copy) if copy.dim() == 2 else copy[place_N]
        return lookup(table, index_N)

    def place(self, index_N: Tensor) -> Tensor:
        """Where rows stand among those taken out.

        Raises:
            ValueError: one of them is not there.
        """
        for asked_N, place_N in self._places:
            if asked_N is index_N:
                return place_N
        place_N = torch.searchsorted(self._row_R, index_N)
        found_N = self._row_R.index_select(0, place_N.clamp(max=len(self._row_R) - 1)) == index_N
        if not bool(found_N.all()):
            raise ValueError("a step looks up rows of a table that it has not opened")
        self._places.append((index_N, place_N))
        return place_N

    def close(self) -> None:
        """Give every table the gradient of its rows, and forget them."""
        for table, row_R, copy in self._open:
            if copy.grad is not None:
                table.grad = torch.sparse_coo_tensor(
                    row_R[None], copy.grad, table.shape, check_invariants=False, is_coalesced=True
                )
        self._open, self._places = [], []


def lookup(table: Tensor, index_N: Tensor) -> Tensor:
    """Rows of a table, or entries of a vector: `[N, …]`; the gradient is the whole table's."""
    return F.embedding(index_N, table) if table.dim() == 2 else table[index_N]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients so that their common norm is `max_norm` at most.

    Rows of sparse gradients are summed first, so that the norm is the dense gradient's.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if norm.device.type != "cpu" or float(factor) != 1.0:  # asking a GPU would be waiting for it
        torch._foreach_mul_(values, factor)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state per row, for parameters with sparse gradients.

    s_r ← s_r + mean_d g_rd², w_r ← w_r − lr · g_r / (√s_r + ε) for the rows r that have a gradient;
    no other row is read or written. Decay of weights acts when a row is touched.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
        after: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    ) -> None:
        """`after` is called with each table, its rows that have changed, what they were and are."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
        self._after = after
        for group in self.param_groups:
            for table in group["params"]:
                self.state[table]["sum"] = table.new_zeros(len(table))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient, which must be coalesced (`clip_gradients`)."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                row_R, grad_R = table.grad.indices()[0], table.grad.values()
                old_R = table.index_select(0, row_R)
                if group["weight_decay"]:
                    grad_R = grad_R.add(old_R, alpha=group["weight_decay"])
                square_R = grad_R.square()
                if grad_R.dim() > 1:
                    square_R = square_R.mean(dim=1)
                sum_M = self.state[table]["sum"]
                sum_R = sum_M.index_select(0, row_R).add_(square_R)
                sum_M.index_copy_(0, row_R, sum_R)
                rate_R = sum_R.sqrt_().add_(group["eps"]).reciprocal_().mul_(-group["lr"])
                rate_R = rate_R[:, None] if grad_R.dim() > 1 else rate_R
                new_R = torch.addcmul(old_R, grad_R, rate_R)
                table.index_copy_(0, row_R, new_R)
                if self._after is not None:
                    self._after(table, row_R, old_R, new_R)
