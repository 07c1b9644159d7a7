"""Intervals for metrics: bootstrap over users, since cases of one user are not independent.

Shapes: N cases, U users, X figures (metrics, models, slices), R resamplings.

A resampling draws U users with replacement; all cases of a user come with it. It needs nothing of
a user but the sums over the user's cases, and many figures share the same draws, so that
differences between models are taken case by case.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its interval (percentiles of the resamplings)."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison(Interval):
    """The figure of one model against another's on the same cases.

    `excludes_zero`: the interval leaves out no difference at all (a ratio: leaves out one), that
    is, the data tell the models apart.
    """

    excludes_zero: bool


@dataclass(frozen=True)
class UserSums:
    """Per user: the sum of a figure over the user's cases `[U, X]`, and their number `[U, X]`."""

    sum_UX: NDArray[np.float64]
    count_UX: NDArray[np.float64]

    @classmethod
    def of(
        cls, columns: Iterable[NDArray[np.float64]], user_N: NDArray[np.int64], num_users: int
    ) -> "UserSums":
        """Add up figures given case by case, X columns `[N]`.

        Args:
            columns: NaN where a case does not belong to a figure (another slice).
            user_N: the user of every case, 0 ≤ user < num_users.
        """
        sum_XU, count_XU = [], []
        for value_N in columns:
            own_N = ~np.isnan(value_N)
            sum_XU.append(np.bincount(user_N[own_N], value_N[own_N], minlength=num_users))
            count_XU.append(np.bincount(user_N[own_N], minlength=num_users))
        return cls(np.stack(sum_XU, axis=1), np.stack(count_XU, axis=1).astype(np.float64))

    @property
    def mean_X(self) -> NDArray[np.float64]:
        """The means over all cases; NaN without any."""
        return _ratio(self.sum_UX.sum(axis=0), self.count_UX.sum(axis=0))

    def resampled(self, samples: int = 1000, seed: int = 0) -> NDArray[np.float64]:
        """The means in each of `samples` resamplings: `[R, X]`; NaN where no case was drawn."""
        # Users without cases would change no mean, only leave more resamplings without any case.
        used_U = self.count_UX.any(axis=1)
        both_UY = np.concatenate([self.sum_UX, self.count_UX], axis=1)[used_U]
        num_users, num_figures = len(both_UY), self.sum_UX.shape[1]
        rng = np.random.default_rng(seed)
        total_RY = np.zeros((samples, 2 * num_figures))
        rows = max(1, WEIGHT_CELLS // max(num_users, 1))  # resamplings weighted at once
        for start in range(0, samples if num_users else 0, rows):
            total_rY = total_RY[start : start + rows]
            weight_rU = np.empty((len(total_rY), num_users))
            for weight_U in weight_rU:
                # Counting U uniform draws is the multinomial, faster than drawing U binomials.
                drawn_U = rng.integers(num_users, size=num_users)
                weight_U[:] = np.bincount(drawn_U, minlength=num_users)
            total_rY[:] = weight_rU @ both_UY
        return _ratio(total_RY[:, :num_figures], total_RY[:, num_figures:])


WEIGHT_CELLS = 2**22  # weights held at once: 32 MiB


def _ratio(sum_: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(count > 0, sum_ / np.where(count > 0, count, 1.0), np.nan)


def identity(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean itself; for PPL of −log p use `np.exp`, for RMSE of squared errors `np.sqrt`."""
    return value


def intervals(
    sums: UserSums,
    transform: Transform = identity,
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> list[Interval]:
    """The transformed mean of every figure with its interval; NaN for figures without cases."""
    return intervals_of(sums.mean_X, sums.resampled(samples, seed), transform, level)


def intervals_of(
    mean_X: NDArray[np.float64],
    mean_RX: NDArray[np.float64],
    transform: Transform = identity,
    level: float = 0.95,
) -> list[Interval]:
    """The same from resamplings that were drawn before."""
    value_X = transform(mean_X)
    low_X, high_X = _bounds(transform(mean_RX), level)
    return [
        Interval(float(v), float(lo), float(hi))
        for v, lo, hi in zip(value_X, low_X, high_X, strict=True)
    ]


def comparisons_of(
    difference_X: NDArray[np.float64],
    difference_RX: NDArray[np.float64],
    transform: Transform = identity,
    level: float = 0.95,
) -> list[Comparison]:
    """Comparisons from differences of means and of their resamplings (shared draws).

    With `np.exp` they are ratios, of which 1 says that there is no difference.
    """
    nothing = float(transform(np.zeros(1))[0])
    return [
        Comparison(i.value, i.low, i.high, i.low > nothing or i.high < nothing)
        for i in intervals_of(difference_X, difference_RX, transform, level)
    ]


def paired_difference(
    value_N: NDArray[np.float64],
    other_N: NDArray[np.float64],
    user_N: NDArray[np.int64],
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """mean(value) − mean(other) over the same cases, draws shared."""
    return _difference(value_N, other_N, user_N, identity, level, samples, seed)


def paired_ratio(
    value_N: NDArray[np.float64],
    other_N: NDArray[np.float64],
    user_N: NDArray[np.int64],
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """exp(mean(value) − mean(other)): of −log p, the ratio of two models' PPL."""
    return _difference(value_N, other_N, user_N, np.exp, level, samples, seed)


def _difference(
    value_N: NDArray[np.float64],
    other_N: NDArray[np.float64],
    user_N: NDArray[np.int64],
    transform: Transform,
    level: float,
    samples: int,
    seed: int,
) -> Comparison:
    num_users = int(user_N.max()) + 1 if len(user_N) else 0
    sums = UserSums.of([value_N - other_N], user_N, num_users)
    [comparison] = comparisons_of(sums.mean_X, sums.resampled(samples, seed), transform, level)
    return comparison


def _bounds(
    figure_RX: NDArray[np.float64], level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    tail = (1.0 - level) / 2.0
    low_X = np.full(figure_RX.shape[1], np.nan)
    high_X = low_X.copy()
    some_X = ~np.isnan(figure_RX).all(axis=0)
    if some_X.any():
        low_X[some_X], high_X[some_X] = np.nanquantile(
            figure_RX[:, some_X], [tail, 1.0 - tail], axis=0
        )
    return low_X, high_X
