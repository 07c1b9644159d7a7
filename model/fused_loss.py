"""Softmax losses that hold a chunk of scores at a time: over the catalogue, or over negatives.

A chunk of positions is scored, turned into its gradient and added up while it is still in the
processor's cache; the backward pass only scales what is there. Same values and gradients as
`model.losses` on the full scores. In bfloat16 the matrix products and the softmax run in half
precision; biases enter as two bfloat16 summands, and what is added up over chunks is float32.

Shapes: N positions, C positions of a chunk, M items, S columns (all items, or the negatives),
R vectors, D embedding, Z cells that transition counts lift, or of items seen before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.lifts import Lifts
from model.repeats import SeenItems

# Scores held at once: few enough for the processor's cache, but rows enough for the columns'
# vectors to be read seldom, in memory that the allocator keeps for the next (`keep_freed_memory`).
CHUNK_BYTES, MOST_BYTES = 2**22, 24 * 2**20
CHUNK_ROWS, LEAST_ROWS = 512, 64  # matrix products of fewer rows are slow
LANES = 16  # numbers a vector instruction takes: products of other widths waste some of them
# Negatives are padded to a multiple of this: a library that makes its matrix products to measure
# (oneDNN, for bfloat16) would otherwise make new ones for every batch.
WIDTHS = 64
NOTHING = -1e30  # a score of which a softmax leaves nothing; a sum with 0 · ∞ would be no number
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Targets:
    """What the scores are compared with, and what is added to them; nothing here has a gradient."""

    column_N: Tensor  # where the target stands among the columns; sampled: −1 where it does not
    weight_N: Tensor
    place_N: Tensor | None = None  # sampled: which of the vectors is the target's
    place_S: Tensor | None = None  # sampled: which of the vectors are the columns', all distinct
    reward_N: Tensor | None = None  # None: every event has reward 1
    any_item_S: Tensor | None = None  # rewards, sampled: what a negative counts in a mean over M
    log_q: Callable[[slice], Tensor] | None = None  # log q(t) of some positions' columns: [C, S]
    lifts: Lifts | None = None
    seen: SeenItems | None = None  # its items are columns
    dtype: torch.dtype = torch.float32


class _FusedLoss(Function):
    """(query, w, b, rest of the targets' scores or none, β, γ, κ, ρ) → mean loss.

    With `hit_N` the target is a column of its own, the last, and the softmax runs over it and the
    S others; where it is among those too, it is left out there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        w_RD: Tensor,
        b_S: Tensor,
        hit_N: Tensor | None,
        beta: Tensor,
        gamma: Tensor,
        kappa: Tensor,
        rho: Tensor,
        given: Targets,
    ) -> Tensor:
        total_weight = given.weight_N.sum()
        share_N = given.weight_N / torch.where(total_weight > 0, total_weight, 1.0)
        w_SD = w_RD
        place_N, place_S = given.place_N, given.place_S
        if hit_N is not None:
            assert place_N is not None and place_S is not None  # noqa: S101 - set together
            own_ND, w_SD = w_RD.index_select(0, place_N), w_RD.index_select(0, place_S)
            hit_N = torch.linalg.vecdot(query_ND, own_ND).add_(hit_N)
        half = given.dtype != torch.float32
        if half and len(b_S):  # a common offset means nothing, and costs the scores their digits
            offset = b_S.mean()
            b_S, hit_N = b_S - offset, None if hit_N is None else hit_N - offset
        columns = width = len(w_SD)
        if hit_N is not None:  # the target's column, filled in after the product, and more after it
            width = _multiple(columns + 2, WIDTHS)
        product: _Product | _WideProduct
        if half or w_SD.shape[1] % LANES:
            product = _WideProduct(query_ND, w_SD, b_S, width, share_N, given.dtype)
        else:
            product = _Product(query_ND, w_SD, b_S, width, share_N)
        grad_hit = None if hit_N is None else torch.empty_like(hit_N)
        grad_beta, grad_gamma, grad_kappa = torch.zeros(3, device=query_ND.device).unbind()
        grad_rho = torch.zeros_like(rho)
        loss = query_ND.new_zeros(())
        rows = _chunk_rows(len(query_ND), width, given.dtype.itemsize)
        score_CS = torch.empty(rows, width, dtype=given.dtype, device=query_ND.device)
        first_C = torch.arange(0, rows * width, width, device=query_ND.device)  # cells of column 0
        for start in range(0, len(query_ND), rows):
            part = slice(start, start + rows)
            share_C = share_N[part]
            logit_CS = product.scores(part, score_CS[: len(share_C)])
            cell_C = first_C[: len(share_C)] + given.column_N[part]  # the targets'
            log_q_CS = lifted = None
            if given.lifts is not None:
                lifted = given.lifts.cells(part, width)
                _add_bonus(logit_CS, lifted, gamma, kappa)
            if given.log_q is not None:
                log_q_CS = given.log_q(part)
                logit_CS[:, :columns] += beta * log_q_CS
            seen = cell_Z = None
            if given.seen is not None:
                seen = given.seen.rows(start, start + len(logit_CS))
                cell_Z = seen.cells(width)
                bonus_Z = rho.index_select(0, seen.bucket_Z).to(logit_CS.dtype)
                logit_CS.view(-1).index_add_(0, cell_Z, bonus_Z)
            any_CS = any_loss_C = None
            if given.reward_N is not None and given.any_item_S is not None:
                any_CS, any_loss_C = _any_item(logit_CS[:, :columns], given.any_item_S)
            flat = logit_CS.view(-1)
            if hit_N is not None:
                # Left out where it is among the others. Column −1, where it is not, is the last one
                # of the row before, of the last row for the first: empty.
                flat.index_fill_(0, cell_C.remainder_(len(flat)), -torch.inf)
                logit_CS[:, columns] = hit_N[part]
                cell_C = first_C[: len(share_C)] + columns
            margin_C = None
            if given.reward_N is not None and any_CS is None:
                hit_C = flat.index_select(0, cell_C).float()
                margin_C = hit_C - logit_CS.mean(dim=1, dtype=torch.float32)
            grad_CS = torch.softmax(logit_CS, dim=1, out=logit_CS)
            share_of_target_C = flat.index_select(0, cell_C)
            loss_C = share_of_target_C.float().clamp(min=TINY).log_().neg_()
            if given.reward_N is None:
                flat.index_copy_(0, cell_C, share_of_target_C - 1.0)
            else:
                reward_C = given.reward_N[part]
                if any_CS is not None and any_loss_C is not None:
                    flat.index_copy_(0, cell_C, share_of_target_C - 1.0)
                    grad_CS.mul_(reward_C[:, None])
                    grad_CS[:, :columns] += (1.0 - reward_C)[:, None] * any_CS
                    loss_C = reward_C * loss_C + (1.0 - reward_C) * any_loss_C
                else:
                    assert margin_C is not None  # noqa: S101 - set above
                    loss_C = loss_C + (1.0 - reward_C) * margin_C
                    grad_CS.sub_(((1.0 - reward_C) / columns)[:, None])
                    lowered_C = flat.index_select(0, cell_C) - reward_C
                    flat.index_copy_(0, cell_C, lowered_C.to(flat.dtype))
            loss += torch.dot(share_C, loss_C)
            product.backward(grad_CS, part)
            if grad_hit is not None:
                grad_hit[part] = share_C * grad_CS[:, columns]
            if lifted is not None:
                slopes = _bonus_gradient(grad_CS, share_C, lifted, gamma, kappa)
                grad_gamma += slopes[0]
                grad_kappa += slopes[1]
            if seen is not None and cell_Z is not None:
                grad_Z = grad_CS.view(-1).index_select(0, cell_Z).float()
                grad_Z *= share_C.repeat_interleave(seen.offset_N1.diff())
                grad_rho.index_add_(0, seen.bucket_Z, grad_Z)
            if log_q_CS is not None:
                grad_beta += torch.dot(share_C, (grad_CS[:, :columns] * log_q_CS).sum(dim=1))
        grad_query, grad_w, grad_b = product.gradients(columns)
        if grad_hit is not None:
            assert place_N is not None and place_S is not None  # noqa: S101 - as above
            grad_w_S, grad_w = grad_w, torch.zeros_like(w_RD)
            grad_w.index_add_(0, place_S, grad_w_S)
            grad_query.addcmul_(own_ND, grad_hit[:, None])
            grad_w.index_add_(0, place_N, query_ND * grad_hit[:, None])
        grads = (grad_query, grad_w, grad_b, grad_hit)
        ctx.save_for_backward(*grads, grad_beta, grad_gamma, grad_kappa, grad_rho)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if grad.device.type == "cpu" and float(grad) == 1.0:  # nothing is added to the loss
            return *saved, None
        return *(None if own is None else grad * own for own in saved), None


def _multiple(number: int, of: int) -> int:
    """The next multiple."""
    return -(-number // of) * of


def _chunk_rows(positions: int, width: int, itemsize: int) -> int:
    """As many as a chunk may hold, all chunks alike: a remainder of a few rows would be slow."""
    row = width * itemsize
    most = max(CHUNK_BYTES // row, min(CHUNK_ROWS, MOST_BYTES // row), LEAST_ROWS)
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


class _Product:
    """Scores q·w + b of chunks of queries, and their gradients added up.

    Columns beyond those of w have scores of which nothing is left in a softmax.
    """

    def __init__(
        self, query_ND: Tensor, w_SD: Tensor, b_S: Tensor, width: int, share_N: Tensor
    ) -> None:
        if width > len(w_SD):
            w_SD = F.pad(w_SD, (0, 0, 0, width - len(w_SD)))
            b_S = F.pad(b_S, (0, width - len(b_S)), value=NOTHING)
        self.query_ND, self.w_SD, self.b_S, self.share_N = query_ND, w_SD, b_S, share_N
        self.weighted_ND = query_ND * share_N[:, None]
        self.grad_query, self.grad_w = torch.empty_like(query_ND), torch.zeros_like(w_SD)
        self.grad_b = torch.zeros_like(b_S)

    def scores(self, part: slice, out_CS: Tensor) -> Tensor:
        return torch.addmm(self.b_S, self.query_ND[part], self.w_SD.t(), out=out_CS)

    def backward(self, grad_CS: Tensor, part: slice) -> None:
        """Take in the gradient of a chunk's scores, which its positions' shares weight."""
        self.grad_w.addmm_(grad_CS.t(), self.weighted_ND[part])
        self.grad_b.addmv_(grad_CS.t(), self.share_N[part])
        torch.mm(grad_CS, self.w_SD, out=self.grad_query[part])

    def gradients(self, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries, and of w and b of the first columns."""
        grad_query = self.grad_query.mul_(self.share_N[:, None])
        return grad_query, self.grad_w[:columns], self.grad_b[:columns]


class _WideProduct:
    """The same on vectors filled up to whole lanes; b enters through some of the columns there.

    In half precision b is two of them, the second what the first has lost by rounding.
    """

    def __init__(
        self,
        query_ND: Tensor,
        w_SD: Tensor,
        b_S: Tensor,
        width: int,
        share_N: Tensor,
        dtype: torch.dtype,
    ) -> None:
        columns, self.size, self.share_N = *w_SD.shape, share_N
        biases = 1 if dtype == torch.float32 else 2
        lanes = _multiple(self.size + biases, LANES)
        self.wide_SK = w_SD.new_zeros(width, lanes, dtype=dtype)
        self.wide_SK[:columns, : self.size] = w_SD
        self.wide_SK[:columns, self.size] = b_S
        if biases == 2:
            self.wide_SK[:columns, self.size + 1] = b_S - self.wide_SK[:columns, self.size]
        if width > columns:
            self.wide_SK[columns:, self.size] = NOTHING
        # What makes the queries' gradient needs b's columns only to be whole lanes.
        self.back_SK = self.wide_SK
        if not self.size % LANES:
            self.back_SK = self.wide_SK[:, : self.size].contiguous()

        def widened(query_ND: Tensor, one: Tensor | float) -> Tensor:
            query_NK = query_ND.new_zeros(len(query_ND), lanes, dtype=dtype)
            query_NK[:, : self.size] = query_ND
            query_NK[:, self.size : self.size + biases] = one
            return query_NK

        self.query_NK = self.weighted_NK = widened(query_ND, 1.0)
        # The shares sum to 1 over the batch: scaled up they are far from the smallest numbers.
        least, most = share_N.aminmax()
        self.scale = most.clamp(min=TINY)
        if query_ND.is_cuda or float(least) != float(most):  # asking a GPU would be waiting for it
            scaled_N1 = (share_N / self.scale)[:, None]
            self.weighted_NK = widened(query_ND * scaled_N1, scaled_N1)
        self.grad_query = query_ND.new_empty(len(query_ND), self.back_SK.shape[1], dtype=dtype)
        self.grad_SK = torch.zeros_like(self.wide_SK, dtype=torch.float32)

    def scores(self, part: slice, out_CS: Tensor) -> Tensor:
        return torch.mm(self.query_NK[part], self.wide_SK.t(), out=out_CS)

    def backward(self, grad_CS: Tensor, part: slice) -> None:
        if grad_CS.dtype == torch.float32:
            self.grad_SK.addmm_(grad_CS.t(), self.weighted_NK[part])
        else:
            self.grad_SK.add_(grad_CS.t() @ self.weighted_NK[part])
        torch.mm(grad_CS, self.back_SK, out=self.grad_query[part])

    def gradients(self, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        grad_SK = self.grad_SK[:columns].mul_(self.scale)
        grad_query = self.grad_query[:, : self.size] * self.share_N[:, None]
        return grad_query, grad_SK[:, : self.size], grad_SK[:, self.size]


def _any_item(logit_CS: Tensor, any_item_S: Tensor) -> tuple[Tensor, Tensor]:
    """−Σ_s any_s·log softmax(logit)_s of every row, gradient `[C, S]` and value `[C]`."""
    log_p_CS = logit_CS.float().log_softmax(dim=1)
    return log_p_CS.exp().mul_(any_item_S.sum()).sub_(any_item_S), -(log_p_CS @ any_item_S)


Lifted = tuple[Tensor, Tensor, Tensor]  # cell, lift of the cell, this entry's share of it `[Z]`


def _add_bonus(logit_CS: Tensor, lifted: Lifted, gamma: Tensor, kappa: Tensor) -> None:
    """Adds γ·log(1 + κ·lift); a cell named twice gets it once."""
    cell_Z, lift_Z, _ = lifted
    flat = logit_CS.view(-1)
    bonus_Z = torch.log1p(kappa * lift_Z).mul_(gamma)
    flat.index_copy_(0, cell_Z, bonus_Z.add_(flat.index_select(0, cell_Z)).to(flat.dtype))


def _bonus_gradient(
    grad_CS: Tensor, share_C: Tensor, lifted: Lifted, gamma: Tensor, kappa: Tensor
) -> tuple[Tensor, Tensor]:
    """Of γ and κ."""
    cell_Z, lift_Z, part_Z = lifted
    weight_Z = part_Z * share_C.repeat_interleave(len(cell_Z) // len(share_C))
    grad_Z = grad_CS.view(-1).index_select(0, cell_Z).float().mul_(weight_Z)
    scaled_Z = kappa * lift_Z
    slope_Z = lift_Z / (1.0 + scaled_Z)
    return torch.dot(grad_Z, torch.log1p(scaled_Z)), gamma * torch.dot(grad_Z, slope_Z)


def fused_loss(
    query_ND: Tensor,
    w_RD: Tensor,
    b_S: Tensor,
    given: Targets,
    *,
    hit_N: Tensor | None = None,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    kappa: Tensor | None = None,
    rho: Tensor | None = None,
) -> Tensor:
    """Weighted mean of −log p(a | h, t) (eq. 2, 3, 5).

    Scores are φ̃ + γ·log(1 + κ·lift) + β·log q, and ρ more for items seen before. With rewards
    the loss is that of `model.losses.one_against_all`. Differentiable in everything but `given`.

    Args:
        w_RD, b_S: vectors and biases of all items; sampled: vectors of the negatives and the
            targets, which `given.place_S` and `given.place_N` find, and biases of the negatives,
            the log of their expected count taken off.
        hit_N: sampled: what the targets' scores are beside the product of query and vector.
    """
    zero = b_S.new_zeros(())
    coefficients = [zero if c is None else c for c in (beta, gamma, kappa, rho)]
    tensors = (query_ND, w_RD, b_S, hit_N)
    parts = [None if tensor is None else tensor.float() for tensor in tensors]
    with torch.autocast(query_ND.device.type, enabled=False):  # `given.dtype` says what is half
        loss: Tensor = _FusedLoss.apply(*parts, *coefficients, given)  # type: ignore[no-untyped-call]
    return loss
