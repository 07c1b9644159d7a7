"""Another try where something cannot be reached; never where the input is at fault.

On a cluster the pod of a step can be started again, but a pod cannot say that its error was the
user's: Kubeflow would start it again for a wrong column too. So steps that refuse input ask their
sources again by themselves.
"""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from model.errors import UnavailableError

T = TypeVar("T")


def patiently(work: Callable[[], T], *, retries: int, wait_seconds: float) -> T:
    """The result of `work`, done again from its beginning while it raises `UnavailableError`.

    Args:
        retries: after the first attempt; 0: none.
        wait_seconds: before the first retry; each further wait is three times the one before.

    Raises:
        UnavailableError: of the last attempt.
        Exception: anything else that `work` raises, at once.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        print(f"{error}; again in {state.upcoming_sleep:.0f} s", flush=True)

    return Retrying(
        retry=retry_if_exception_type(UnavailableError),
        stop=stop_after_attempt(retries + 1),
        wait=wait_exponential(multiplier=wait_seconds, exp_base=3),
        before_sleep=tell,
        reraise=True,
    )(work)
