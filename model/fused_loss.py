"""Softmax losses that hold a chunk of scores at a time: over the catalogue, or over negatives.

A chunk of positions is scored, turned into its gradient and added up while it is still in the
processor's cache; the backward pass only scales what is there. Same values and gradients as
`model.losses` on the full scores. In bfloat16 the matrix products and the softmax run in half
precision; biases enter as two bfloat16 summands, and what is added up over chunks is float32.

Shapes: N positions, C positions of a chunk, M items, S columns (all items, or the negatives),
D embedding, Z cells that transition counts lift, or of items seen before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.lifts import Lifts
from model.repeats import SeenItems

CHUNK_CELLS = 2**22  # scores held at once: 16 MiB in float32, half of that in bfloat16
CHUNK_ROWS = 64  # at least: matrix products of fewer rows are slow
PADDING = 8  # columns that carry the bias in bfloat16
# Negatives are padded to a multiple of this: a library that makes its matrix products to measure
# (oneDNN, for bfloat16) would otherwise make new ones for every batch.
WIDTHS = 64


@dataclass(frozen=True)
class Targets:
    """What the scores are compared with, and what is added to them; nothing here has a gradient."""

    column_N: Tensor  # where the target stands among the columns; sampled: −1 where it does not
    weight_N: Tensor
    place_N: Tensor | None = None  # sampled: the row of the target among the targets' vectors
    reward_N: Tensor | None = None  # None: every event has reward 1
    any_item_S: Tensor | None = None  # rewards, sampled: what a negative counts in a mean over M
    log_q: Callable[[slice], Tensor] | None = None  # log q(t) of some positions' columns: [C, S]
    lifts: Lifts | None = None
    seen: SeenItems | None = None  # its items are columns
    dtype: torch.dtype = torch.float32


class _FusedLoss(Function):
    """(query, w, b, w and rest of the targets' scores or none, β, γ, κ, ρ) → mean loss.

    With `hit_N` the target is a column of its own, the last, and the softmax runs over it and the
    S others; where it is among those too, it is left out there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        w_SD: Tensor,
        b_S: Tensor,
        w_RD: Tensor | None,
        hit_N: Tensor | None,
        beta: Tensor,
        gamma: Tensor,
        kappa: Tensor,
        rho: Tensor,
        given: Targets,
    ) -> Tensor:
        total_weight = given.weight_N.sum()
        share_N = given.weight_N / torch.where(total_weight > 0, total_weight, 1.0)
        sampled = hit_N is not None
        own_ND = grad_w_R = None
        place_N = given.place_N
        if hit_N is not None and w_RD is not None and place_N is not None:
            own_ND, grad_w_R = w_RD.index_select(0, place_N), torch.zeros_like(w_RD)
            hit_N = torch.linalg.vecdot(query_ND, own_ND).add_(hit_N)
        size = w_SD.shape[1]
        half = given.dtype != torch.float32
        if half and len(b_S):  # a common offset means nothing, and costs the scores their digits
            offset = b_S.mean()
            b_S, hit_N = b_S - offset, None if hit_N is None else hit_N - offset
        columns = len(w_SD)
        if sampled:  # the target's column, filled in after the product, and empty ones after it
            width = -(-(columns + 1) // WIDTHS) * WIDTHS
            w_SD = torch.cat([w_SD, w_SD.new_zeros(width - columns, size)])
            b_S = torch.cat([b_S, b_S.new_zeros(width - columns)])
        product = _HalfProduct(w_SD, b_S, given.dtype) if half else _Product(w_SD, b_S)
        grad_query = torch.empty_like(query_ND)
        grad_hit = None if hit_N is None else torch.empty_like(hit_N)
        grad_beta, grad_gamma, grad_kappa = torch.zeros(3, device=query_ND.device).unbind()
        grad_rho = torch.zeros_like(rho)
        loss = query_ND.new_zeros(())
        rows = _chunk_rows(len(query_ND), len(w_SD))
        for start in range(0, len(query_ND), rows):
            part = slice(start, start + rows)
            share_C = share_N[part]
            logit_CS = product.scores(query_ND[part])
            column_C = given.column_N[part]
            log_q_CS = lifted = None
            if given.lifts is not None:
                lifted = given.lifts.cells(part, logit_CS.shape[1])
                _add_bonus(logit_CS, lifted, gamma, kappa)
            if given.log_q is not None:
                log_q_CS = given.log_q(part)
                logit_CS[:, :columns] += beta * log_q_CS
            seen = cell_Z = None
            if given.seen is not None:
                seen = given.seen.rows(start, start + len(logit_CS))
                cell_Z = seen.cells(logit_CS.shape[1])
                bonus_Z = rho.index_select(0, seen.bucket_Z).to(logit_CS.dtype)
                logit_CS.view(-1).index_add_(0, cell_Z, bonus_Z)
            any_CS = any_loss_C = None
            if given.reward_N is not None and given.any_item_S is not None:
                any_CS, any_loss_C = _any_item(logit_CS[:, :columns], given.any_item_S)
            if hit_N is not None:
                _mask(logit_CS, column_C)
                logit_CS[:, columns] = hit_N[part]
                logit_CS[:, columns + 1 :] = -torch.inf
                column_C = torch.full_like(column_C, columns)
            row_C = torch.arange(len(logit_CS), device=column_C.device)
            cell_C = row_C.mul_(logit_CS.shape[1]).add_(column_C)  # the targets'
            hit_C = logit_CS.view(-1).index_select(0, cell_C).float()
            mean_C = None
            if given.reward_N is not None and any_CS is None:
                mean_C = logit_CS.mean(dim=1, dtype=torch.float32)
            grad_CS = torch.softmax(logit_CS, dim=1)
            tiny = torch.finfo(torch.float32).tiny
            flat = grad_CS.view(-1)
            share_of_target_C = flat.index_select(0, cell_C)
            loss_C = -share_of_target_C.float().clamp(min=tiny).log()
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
                    assert mean_C is not None  # noqa: S101 - set above
                    loss_C = loss_C + (1.0 - reward_C) * (hit_C - mean_C)
                    grad_CS.sub_(((1.0 - reward_C) / columns)[:, None])
                    lowered_C = flat.index_select(0, cell_C) - reward_C
                    flat.index_copy_(0, cell_C, lowered_C.to(flat.dtype))
            loss += torch.dot(share_C, loss_C)
            grad_query[part] = product.backward(grad_CS, query_ND[part], share_C)
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
        grad_w, grad_b = product.grad_w[:columns], product.grad_b[:columns]
        if own_ND is not None and grad_hit is not None:
            assert grad_w_R is not None and place_N is not None  # noqa: S101 - set together
            grad_query.addcmul_(own_ND, grad_hit[:, None])
            grad_w_R.index_add_(0, place_N, query_ND * grad_hit[:, None])
        grads = (grad_query, grad_w, grad_b, grad_w_R, grad_hit)
        ctx.save_for_backward(*grads, grad_beta, grad_gamma, grad_kappa, grad_rho)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return *(None if own is None else grad * own for own in saved), None


def _chunk_rows(positions: int, width: int) -> int:
    """As many as a chunk may hold, all chunks alike: a remainder of a few rows would be slow."""
    most = max(CHUNK_ROWS, CHUNK_CELLS // width)
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


class _Product:
    """Scores q·w + b of chunks of queries, and their gradients added up."""

    def __init__(self, w_SD: Tensor, b_S: Tensor) -> None:
        self.w_SD, self.b_S = w_SD, b_S
        self.grad_w, self.grad_b = torch.zeros_like(w_SD), torch.zeros_like(b_S)

    def scores(self, query_CD: Tensor) -> Tensor:
        return torch.addmm(self.b_S, query_CD, self.w_SD.t())

    def backward(self, grad_CS: Tensor, query_CD: Tensor, share_C: Tensor) -> Tensor:
        """The gradient of the queries; that of w and b is added to what there is."""
        self.grad_w.addmm_(grad_CS.t(), query_CD * share_C[:, None])
        self.grad_b.addmv_(grad_CS.t(), share_C)
        return (grad_CS @ self.w_SD).mul_(share_C[:, None])


class _HalfProduct(_Product):
    """The same with half-precision products; b enters through columns of its own, unrounded."""

    def __init__(self, w_SD: Tensor, b_S: Tensor, dtype: torch.dtype) -> None:
        super().__init__(w_SD, b_S)
        self.dtype = dtype
        self.half_SD = w_SD.to(dtype)
        coarse_S = b_S.to(dtype)
        b_S2 = torch.stack([coarse_S, (b_S - coarse_S).to(dtype)], dim=1)
        self.wide_SK = torch.cat([self.half_SD, b_S2, b_S2.new_zeros(len(b_S), PADDING - 2)], dim=1)

    def scores(self, query_CD: Tensor) -> Tensor:
        ones_C2 = torch.ones(len(query_CD), 2, dtype=self.dtype, device=query_CD.device)
        rest = ones_C2.new_zeros(len(query_CD), PADDING - 2)
        return torch.cat([query_CD.to(self.dtype), ones_C2, rest], dim=1) @ self.wide_SK.t()

    def backward(self, grad_CS: Tensor, query_CD: Tensor, share_C: Tensor) -> Tensor:
        size = query_CD.shape[1]
        # The shares sum to 1 over the batch: scaled up they are far from the smallest numbers.
        scale = share_C.max().clamp(min=torch.finfo(torch.float32).tiny)
        share_C1 = (share_C / scale)[:, None]
        wide_CK = torch.cat([query_CD * share_C1, share_C1.expand(-1, PADDING)], dim=1)
        grad_SK = grad_CS.t() @ wide_CK.to(self.dtype)
        self.grad_w.add_(grad_SK[:, :size] * scale)
        self.grad_b.add_(grad_SK[:, size] * scale)
        return (grad_CS @ self.half_SD).float() * share_C[:, None]


def _mask(logit_CS: Tensor, column_C: Tensor) -> None:
    """Leave the target out where it is among the negatives (column −1: it is not)."""
    row_H = (column_C >= 0).nonzero()[:, 0]
    cell_H = row_H * logit_CS.shape[1] + column_C.index_select(0, row_H)
    logit_CS.view(-1).index_fill_(0, cell_H, -torch.inf)


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
    w_SD: Tensor,
    b_S: Tensor,
    given: Targets,
    *,
    w_RD: Tensor | None = None,
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
        w_SD, b_S: vectors and biases of all items; sampled: of the negatives, the log of their
            expected count taken off the biases.
        w_RD: sampled: vectors of the targets, whose is which says `given.place_N`. None: dense.
        hit_N: sampled: what the targets' scores are beside the product of query and vector.
    """
    zero = b_S.new_zeros(())
    coefficients = [zero if c is None else c for c in (beta, gamma, kappa, rho)]
    tensors = (query_ND, w_SD, b_S, w_RD, hit_N)
    parts = [None if tensor is None else tensor.float() for tensor in tensors]
    with torch.autocast(query_ND.device.type, enabled=False):  # `given.dtype` says what is half
        loss: Tensor = _FusedLoss.apply(*parts, *coefficients, given)  # type: ignore[no-untyped-call]
    return loss
