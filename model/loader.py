"""What an epoch reads, part after part: the next one is made ready while the network trains.

A log that fits into one part is read once and kept. Of a larger one, only two parts are in memory:
every epoch deals the users out to parts anew, and reads a part's events from wherever the log's
columns are (`Histories`: in memory, or in files).

Shapes: E events, U users.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.sequences import Histories
from model.ties import shuffled_ties

R = TypeVar("R")


@dataclass(frozen=True)
class Part(Generic[R]):
    """Some users' events, ready for training."""

    log: Histories
    read: R  # what `Loader.read` made of them
    rng: np.random.Generator  # for the order of its batches


class Loader(Generic[R]):
    """Cuts a log into parts of about `part_events` events of whole users.

    `waited`: seconds that the caller has spent waiting for parts so far.
    """

    def __init__(
        self,
        log: Histories,
        read: Callable[[Histories, NDArray[np.int64]], R],
        *,
        part_events: int,
        shuffle_ties: bool,
    ) -> None:
        """`read` gets a part's events and which users of the log they are of."""
        self._log, self._read = log, read
        self._part_events, self._shuffle_ties = part_events, shuffle_ties
        self.waited = 0.0
        self._everyone = np.arange(len(log))
        self._whole: R | None = None
        if log.num_events <= part_events:
            self._whole = read(log, self._everyone)

    def parts(self, rng: np.random.Generator, first: int = 0) -> Iterator[tuple[int, Part[R]]]:
        """The parts of one epoch with their numbers, from `first` on.

        Args:
            rng: decides about the parts and the order in them; equal ones give equal parts.
        """
        if self._whole is not None:
            if not first:
                yield 0, self._one_part(self._whole, rng)
            return
        seeds = np.random.SeedSequence(int(rng.integers(2**63)))
        order_U = rng.permutation(len(self._log))
        length_U = np.diff(self._log.offset_U1)[order_U]
        part_U = (np.cumsum(length_U) - length_U) // self._part_events
        starts = np.flatnonzero(np.diff(part_U, prepend=-1))
        users = np.split(order_U, starts[1:])
        part_seeds = seeds.spawn(len(users))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as ahead:
            waiting = None
            for number in range(first, len(users)):
                started = time.perf_counter()
                part = (
                    self._part(users[number], part_seeds[number])
                    if waiting is None
                    else waiting.result()
                )
                self.waited += time.perf_counter() - started
                waiting = None
                if number + 1 < len(users):
                    waiting = ahead.submit(self._part, users[number + 1], part_seeds[number + 1])
                yield number, part
                del part  # before the next one but one is made

    def _one_part(self, whole: R, rng: np.random.Generator) -> Part[R]:
        if not self._shuffle_ties:
            return Part(self._log, whole, rng)
        started = time.perf_counter()
        log = self._log.reordered(shuffled_ties(self._log, rng))
        part = Part(log, self._read(log, self._everyone), rng)
        self.waited += time.perf_counter() - started
        return part

    def _part(self, user_U: NDArray[np.int64], seed: np.random.SeedSequence) -> Part[R]:
        user_U, rng = np.sort(user_U), np.random.default_rng(seed)  # sorted: read front to back
        log = self._log.subset(user_U)
        if self._shuffle_ties:
            log = log.reordered(shuffled_ties(log, rng))
        return Part(log, self._read(log, user_U), rng)


def sample_users(log: Histories, num_events: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Users at random, ascending, who have about `num_events` events together; or all users."""
    if log.num_events <= num_events:
        return np.arange(len(log))
    order_U = rng.permutation(len(log))
    total_U = np.cumsum(np.diff(log.offset_U1)[order_U])
    return np.sort(order_U[: int(np.searchsorted(total_U, num_events)) + 1])


def sample_of(log: Histories, num_events: int, rng: np.random.Generator) -> Histories:
    """The log of `sample_users`; the log itself if it has fewer events.

    What is fitted to a log (vocabularies, knots, gaps) does not need all of a large one.
    """
    users = sample_users(log, num_events, rng)
    return log if len(users) == len(log) else log.subset(users)
