"""Tables of which a step reads a few rows: gradients, optimiser and averages of those rows alone.

A catalogue of a million items has tables of which a training step reads some thousand rows. Their
gradients are sparse, and whatever follows (clipping, the optimiser, the moving average of the
weights) works on these rows in place; no pass over the table, no copy of it.

Shapes: M rows of a table, D their size, R rows with a gradient.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _SparseLookup(Function):
    """weight[index], with a sparse gradient; `F.embedding` has one for matrices only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.shape = weight.shape
        return weight.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        return _sparse(index_N, grad, ctx.shape), None


def _sparse(index_R: Tensor, value: Tensor, shape: Sequence[int], distinct: bool = False) -> Tensor:
    return torch.sparse_coo_tensor(
        index_R[None], value, tuple(shape), check_invariants=False, is_coalesced=distinct or None
    )


def lookup(weight: Tensor, index_N: Tensor, *, sparse: bool) -> Tensor:
    """Rows of a table, or entries of a vector: `[N, …]`; the gradient is sparse if asked for."""
    if sparse:
        return _SparseLookup.apply(weight, index_N)  # type: ignore[no-untyped-call]
    return F.embedding(index_N, weight) if weight.dim() == 2 else weight[index_N]


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
    torch._foreach_mul_(values, factor)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state per row, for parameters with sparse gradients.

    s_r ← s_r + mean_d g_rd², w_r ← w_r − lr · g_r / (√s_r + ε) for the rows r that have a gradient;
    no other row is read or written. Decay of weights acts when a row is touched.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float = 0.0, eps: float = 1e-10
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "eps": eps})
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
                if group["weight_decay"]:
                    grad_R = grad_R + group["weight_decay"] * table.index_select(0, row_R)
                square_R = grad_R.square()
                if grad_R.dim() > 1:
                    square_R = square_R.mean(dim=1)
                sum_M = self.state[table]["sum"]
                sum_R = sum_M.index_select(0, row_R).add_(square_R)
                sum_M.index_copy_(0, row_R, sum_R)
                rate_R = group["lr"] / (sum_R.sqrt() + group["eps"])
                step_R = grad_R * (rate_R[:, None] if grad_R.dim() > 1 else rate_R)
                row = table.index_select(0, row_R).sub_(step_R)
                table.index_copy_(0, row_R, row)
