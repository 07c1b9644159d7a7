"""Training losses (§3). Pure functions; shapes N positions, M items, S sampled negatives.

Every `weight_N` turns a mean over positions into Σ w·loss / Σ w: weight 2 counts an event twice.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_cross_entropy(
    phi_NM: Tensor,
    target_N: Tensor,
    trend_NM: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Mean of −log p(a | h, t), p ∝ exp(φ + β·log q(t)) (eq. 3 and 5)."""
    logits_NM = phi_NM if trend_NM is None else phi_NM + trend_NM
    if weight_N is None:
        return F.cross_entropy(logits_NM, target_N)
    return _mean(F.cross_entropy(logits_NM, target_N, reduction="none"), weight_N)


def sampled_softmax(
    phi_target_N: Tensor,
    phi_negative_NS: Tensor,
    log_expected_count_target_N: Tensor,
    log_expected_count_negative_S: Tensor,
    target_N: Tensor,
    negative_S: Tensor,
    trend_target_N: Tensor | None = None,
    trend_negative_NS: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """`softmax_cross_entropy` estimated from a few sampled items (§3.1).

    −log of the target's share among itself and the negatives, after every item's score (φ, plus
    the trend, which belongs to the model) is lowered by the log of how often the item is expected
    among the negatives. The paper's log q is this up to a constant while S is small.

    Why the target is corrected as well. Let Q_j be the chance of item j to be a negative,
    independently for each item (`AliasSampler.negatives`), C the set compared: negatives and
    target. Were y the target, C would come up with probability p_y·Π_{j∈C, j≠y} Q_j·Π_{j∉C}
    (1 − Q_j) ∝ p_y/Q_y. So the share above, at φ = log p + const, is the true probability that y
    is the target given C: the expected loss is lowest at the dense loss's solution (3) for any
    sampler and any S. As S grows Q → 1 and loss and gradient become the dense ones, exactly so
    once every item is a negative with log Q = 0.

    Correcting the negatives only (a target's correction of 0) estimates the dense normaliser
    without bias, but not its log: with few negatives the items that q has rarely and this user
    likes often are hardly ever negatives, and end up far too high.

    Args:
        log_expected_count_target_N, log_expected_count_negative_S: log Q of the targets and of the
            negatives, both from `AliasSampler.log_expected_count`.
        negative_S: distinct items, shared by all positions and drawn without a look at the targets.
            Where a negative is the position's target it is left out.
        trend_target_N, trend_negative_NS: β·log q(t) of the same items (5).
    """
    logit_N = _corrected(phi_target_N, trend_target_N, log_expected_count_target_N)
    logit_NS = _corrected(phi_negative_NS, trend_negative_NS, log_expected_count_negative_S)
    return _mean(_sampled_nll(logit_N, logit_NS, target_N, negative_S), weight_N)


def one_against_all(
    phi_NM: Tensor,
    target_N: Tensor,
    reward_N: Tensor,
    trend_NM: Tensor | None = None,
    weight_N: Tensor | None = None,
    *,
    literal: bool = False,
) -> Tensor:
    """Rewards r ∈ [0, 1] instead of clicks: mean of log Σ_j e^φ_j − r·φ_a, held in place (§3.3).

    The paper's loss falls by (1 − r)·c when all scores fall by c, and has no minimum: biases run
    away although no ranking or probability notices. Therefore (1 − r)·mean_j φ_j is subtracted. The
    gradient becomes the paper's gradient minus its mean over the items, softmax(φ) − r·δ_a −
    (1 − r)/M: what moves one score against another is unchanged. The loss is now the cross entropy
    against "item a with probability r, any item otherwise", bounded by 0, and equal to
    `softmax_cross_entropy` at r = 1.

    What it learns: where item j has the share p_j of the events and mean reward r_j, the minimum is
    softmax_j = p_j·r_j + (1 − r̄)/M, with r̄ = Σ p_j·r_j. An event lowers its item's score where
    r + (1 − r)/M is below the item's present probability, and raises it otherwise. Items that are
    shown and never rewarded end level with those never shown, not below, unless a trend holds the
    exposure: then φ_j is log((p_j·r_j + (1 − r̄)/M) / q_j), lower the more j was shown.

    Args:
        reward_N: r of each event.
        trend_NM: β·log q(t), part of the scores φ above.
        literal: the paper's formula, without what holds it in place.
    """
    logits_NM = phi_NM if trend_NM is None else phi_NM + trend_NM
    target_logit_N = logits_NM.gather(1, target_N[:, None])[:, 0]
    loss_N = logits_NM.logsumexp(dim=1) - reward_N * target_logit_N
    if not literal:
        loss_N = loss_N - (1.0 - reward_N) * logits_NM.mean(dim=1)
    return _mean(loss_N, weight_N)


def sampled_one_against_all(
    phi_target_N: Tensor,
    phi_negative_NS: Tensor,
    log_expected_count_target_N: Tensor,
    log_expected_count_negative_S: Tensor,
    target_N: Tensor,
    negative_S: Tensor,
    reward_N: Tensor,
    num_items: int,
    trend_target_N: Tensor | None = None,
    trend_negative_NS: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """`one_against_all` estimated from the same negatives as `sampled_softmax` (§3.1, §3.3).

    Its target is item a with probability r, else any of M items u; each case is a sampled softmax.
    The mean over u is taken over the negatives themselves, each counting 1/(M·Q_u): given that u
    was drawn, the other negatives are what they would be for a target u. So the expected loss is
    lowest where the dense one is, and equals it when every item is a negative with log Q = 0.
    """
    logit_N = _corrected(phi_target_N, trend_target_N, log_expected_count_target_N)
    logit_NS = _corrected(phi_negative_NS, trend_negative_NS, log_expected_count_negative_S)
    click_N = _sampled_nll(logit_N, logit_NS, target_N, negative_S)
    share_S = torch.exp(-log_expected_count_negative_S - math.log(num_items))
    any_item_N = -(logit_NS.log_softmax(dim=1) @ share_S)
    return _mean(reward_N * click_N + (1.0 - reward_N) * any_item_N, weight_N)


def shown_softmax(
    phi_N: Tensor, phi_R: Tensor, place_R: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """Mean of −log p(a | h, list): the chosen item against what else was on the list (§3.3).

    A page that is shown without an action should make its items "more negative than similar quality
    alternatives"; `one_against_all` names no item at r = 0 and cannot. Here a softmax runs over
    the list alone, so that what was passed over falls below what was chosen from beside it, and
    items that were not shown feel nothing. 0 where there is no list.

    Args:
        phi_N: φ of the chosen items.
        phi_R: φ of the items passed over, R in all.
        place_R: int64, of which of the N positions each is.
    """
    top_N = phi_N.detach().scatter_reduce(0, place_R, phi_R.detach(), "amax")
    beside_N = torch.zeros_like(phi_N).index_add(0, place_R, torch.exp(phi_R - top_N[place_R]))
    loss_N = top_N - phi_N + torch.log(torch.exp(phi_N - top_N) + beside_N)
    return _mean(loss_N, weight_N)


def rating_regression(
    value_N: Tensor, predicted_N: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """Mean squared error over the events that have a value (NaN: none); 0 when no event has."""
    known_N = ~value_N.isnan()
    # The NaN goes before any arithmetic: masked afterwards it would still spoil gradients.
    error_N = predicted_N - torch.where(known_N, value_N, predicted_N.detach())
    weight_N = known_N if weight_N is None else weight_N * known_N
    return _mean(error_N.square(), weight_N.to(error_N.dtype))


def _corrected(phi: Tensor, trend: Tensor | None, log_expected_count: Tensor) -> Tensor:
    """The sampler's doing is subtracted, the trend is part of the model and added."""
    return phi - log_expected_count if trend is None else phi + trend - log_expected_count


def _sampled_nll(logit_N: Tensor, logit_NS: Tensor, target_N: Tensor, negative_S: Tensor) -> Tensor:
    """−log share of the target among itself and the negatives that are not it `[N]`."""
    logit_NS = logit_NS.masked_fill(target_N[:, None] == negative_S, -torch.inf)
    return torch.cat([logit_N[:, None], logit_NS], dim=1).logsumexp(dim=1) - logit_N


def _mean(loss_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """Σ w·loss / Σ w; 0 when all weights are."""
    if weight_N is None:
        return loss_N.mean()
    total = weight_N.sum()
    return (weight_N * loss_N).sum() / torch.where(total > 0, total, torch.ones_like(total))
