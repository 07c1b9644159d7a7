"""Dense softmax loss over the catalogue without ever holding N × M scores.

A chunk of positions is scored, turned into its gradient and added up while it is still in the
processor's cache; the backward pass only scales what is there. Same value and gradients as
`model.losses.softmax_cross_entropy` and `one_against_all` on the full scores.

Shapes: N positions, C positions of a chunk, M items, D embedding, P trend periods, R recent items.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.transitions import Transitions

CHUNK_CELLS = 2**17  # scores held at once: 512 KiB


@dataclass(frozen=True)
class DenseTargets:
    """What the scores are compared with, and what is added to them; nothing here has a gradient."""

    target_N: Tensor
    weight_N: Tensor
    reward_N: Tensor | None = None  # None: every event has reward 1
    log_q_PM: Tensor | None = None
    period_N: Tensor | None = None  # row of log_q_PM
    transitions: Transitions | None = None
    row_NR: Tensor | None = None  # rows of the transition counts, −1 where there is none
    alpha_R: Tensor | None = None
    inverse_p_M: Tensor | None = None


class _DenseLoss(Function):
    """(query, w, b, β, γ, κ) → Σ weight·loss / Σ weight."""

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        w_MD: Tensor,
        b_M: Tensor,
        beta: Tensor,
        gamma: Tensor,
        kappa: Tensor,
        given: DenseTargets,
    ) -> Tensor:
        num_items = len(w_MD)
        grads = [torch.zeros_like(t) for t in (query_ND, w_MD, b_M, beta, gamma, kappa)]
        grad_query, grad_w, grad_b, grad_beta, grad_gamma, grad_kappa = grads
        total_weight = given.weight_N.sum()
        share_N = given.weight_N / torch.where(total_weight > 0, total_weight, 1.0)
        loss = query_ND.new_zeros(())
        rows = max(1, CHUNK_CELLS // num_items)
        for start in range(0, len(query_ND), rows):
            part = slice(start, start + rows)
            query_CD, target_C1 = query_ND[part], given.target_N[part, None]
            share_C1 = share_N[part, None]
            logit_CM = torch.addmm(b_M, query_CD, w_MD.t())
            lift_CM = bonus_CM = log_q_CM = None
            if given.transitions is not None:
                lift_CM = given.transitions.scatter(given.row_NR[part], given.alpha_R)  # type: ignore[index, arg-type]
                lift_CM = lift_CM.mul_(given.inverse_p_M)  # type: ignore[arg-type]
                bonus_CM = torch.log1p(kappa * lift_CM)
                logit_CM.addcmul_(bonus_CM, gamma)
            if given.log_q_PM is not None:
                log_q_CM = given.log_q_PM[given.period_N[part]]  # type: ignore[index]
                logit_CM.addcmul_(log_q_CM, beta)
            log_z_C1 = logit_CM.logsumexp(dim=1, keepdim=True)
            hit_C1 = logit_CM.gather(1, target_C1)
            if given.reward_N is None:
                loss += (share_C1 * (log_z_C1 - hit_C1)).sum()
                grad_CM = logit_CM.sub_(log_z_C1).exp_()
                grad_CM.scatter_add_(1, target_C1, torch.full_like(hit_C1, -1.0))
            else:
                reward_C1 = given.reward_N[part, None]
                mean_C1 = logit_CM.mean(dim=1, keepdim=True)
                loss_C1 = log_z_C1 - reward_C1 * hit_C1 - (1.0 - reward_C1) * mean_C1
                loss += (share_C1 * loss_C1).sum()
                grad_CM = logit_CM.sub_(log_z_C1).exp_().sub_((1.0 - reward_C1) / num_items)
                grad_CM.scatter_add_(1, target_C1, -reward_C1)
            grad_CM.mul_(share_C1)
            torch.mm(grad_CM, w_MD, out=grad_query[part])
            grad_w.addmm_(grad_CM.t(), query_CD)
            grad_b.add_(grad_CM.sum(dim=0))
            if bonus_CM is not None and lift_CM is not None:
                grad_gamma += torch.dot(grad_CM.view(-1), bonus_CM.view(-1))
                slope_CM = lift_CM.div_(torch.addcmul(torch.ones_like(kappa), lift_CM, kappa))
                grad_kappa += gamma * torch.dot(grad_CM.view(-1), slope_CM.view(-1))
            if log_q_CM is not None:
                grad_beta += torch.dot(grad_CM.view(-1), log_q_CM.view(-1))
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * own for own in ctx.saved_tensors), None)


def dense_loss(
    query_ND: Tensor,
    w_MD: Tensor,
    b_M: Tensor,
    given: DenseTargets,
    *,
    beta: Tensor | None = None,
    gamma: Tensor | None = None,
    kappa: Tensor | None = None,
) -> Tensor:
    """Weighted mean of −log p(a | h, t) over scores φ̃ + γ·log(1 + κ·lift) + β·log q (eq. 2, 3, 5).

    With rewards the loss is that of `model.losses.one_against_all`. Differentiable in everything
    but `given`.
    """
    zero = query_ND.new_zeros(())
    coefficients = [zero if c is None else c for c in (beta, gamma, kappa)]
    loss: Tensor = _DenseLoss.apply(  # type: ignore[no-untyped-call]
        query_ND, w_MD, b_M, *coefficients, given
    )
    return loss
