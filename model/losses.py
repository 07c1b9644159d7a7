"""Training losses. Pure functions; shapes N positions, M items."""

import torch.nn.functional as F
from torch import Tensor


def softmax_cross_entropy(
    phi_NM: Tensor, target_N: Tensor, trend_NM: Tensor | None = None
) -> Tensor:
    """Mean of −log p(a | h, t), p ∝ exp(φ + β·log q(t)) (eq. 3 and 5)."""
    logits_NM = phi_NM if trend_NM is None else phi_NM + trend_NM
    return F.cross_entropy(logits_NM, target_N)
