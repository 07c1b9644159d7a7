"""Settling a run that is over: what it left half done is taken back, nothing is promoted.

A release that is killed leaves marks (`components.deploy.release`). Its retry goes on with them; a
run without a retry, or whose retries are used up, is settled by its exit handler, or by hand.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from components.deploy.kserve import Canary, Mark, NotOursError
from components.deploy.release import GIVEN_UP, RELEASED, TRYING
from components.deploy.steps import DeploySettings, on_cluster
from components.deploy.watch import RELEASE_SECONDS
from model.errors import ConflictError, HrnnError, InputError, UnavailableError
from model.store import Champion, ModelStore

POLL_SECONDS = 1.0


@dataclass
class Settled:
    """What was done, and what could not be."""

    done: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def part(self) -> Iterator[None]:
        """A part of the work: what fails here keeps no other part from being done."""
        try:
            yield
        except HrnnError as error:
            self.problems.append(str(error))


def run(
    model_store: str,
    deploy: Mapping[str, Any],
    run_id: str,
    *,
    seconds: float,
) -> Settled:
    """`settle` for the store and the settings that a run was given.

    Raises:
        InputError: the settings are wrong, or the store's address is.
    """
    chosen = DeploySettings.parse(dict(deploy), "deploy")

    def canary() -> Canary | None:
        found = on_cluster(chosen)
        return found[1] if found else None

    return settle(ModelStore(model_store), run_id, canary, seconds=seconds)


def settle(
    store: ModelStore,
    run_id: str,
    canary: Callable[[], Canary | None],
    *,
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Settled:
    """Take back what a run that is over left half done. Repeating it changes nothing.

    A champion that the run had not finished checking is rolled back; its canary is ended (one of
    another run only when that has no time left); versions it was trying are given up. A verdict
    that the run came to stays. What does not answer is asked again until the time is up.

    Args:
        canary: makes the canary of the cluster, None where it is not known.
        seconds: within which all that has to be done.
    """
    settled = Settled()
    served = _CanaryAway(canary, run_id, settled)
    pending = [_ChampionBack(store, run_id, settled).step, served.step]
    deadline, through = clock() + seconds, True
    while True:
        late, waiting = clock() > deadline, []
        for step in list(pending):
            try:
                reason = step()
            except UnavailableError as error:
                reason = str(error)
            except HrnnError as error:  # it keeps the other part from nothing
                settled.problems.append(str(error))
                pending.remove(step)
                through = False
                continue
            if reason:
                waiting.append(reason)
            else:
                pending.remove(step)
        if not pending or late:
            break
        sleep(POLL_SECONDS)
    settled.problems += [f"not done within {seconds:.0f} s: {reason}" for reason in waiting]
    if through and not pending:  # else a later attempt has to see that it is still being tried
        with settled.part():
            _records(store, run_id, served.known, settled)
    return settled


def overdue(champion: Champion, now: datetime) -> bool:
    """Whether the run that was checking this champion must be over: its pod would be stopped."""
    if champion.checking is None:
        return False
    since = champion.since
    # Somebody edited it: nobody waits for it.
    return since is None or now - since > timedelta(seconds=RELEASE_SECONDS)


@dataclass
class _ChampionBack:
    """A champion that the run had not finished checking is rolled back."""

    store: ModelStore
    run_id: str
    settled: Settled
    bad: Champion | None = None  # that was found

    def step(self) -> str:
        """What is waited for, "" at the end."""
        champion = self.store.champion()
        if champion is not None and champion.checking == self.run_id:
            self.bad = champion
            try:
                champion = self.store.rollback(replaces=champion.version)
            except ConflictError as error:  # somebody else settled it, or promoted another
                if self.store.champion() == self.bad:
                    return str(error)
                return ""
        elif self.bad is None or (champion and champion.version == self.bad.version):
            return ""
        # Also after an attempt whose answer was lost.
        self.settled.done.append(
            f"{self.bad.version} was the champion and its check did not end: "
            + (
                f"the champion is again {champion.version}"
                if champion
                else "there is no champion, as before it"
            )
        )
        return ""


@dataclass
class _CanaryAway:
    """The run's canary is ended."""

    make: Callable[[], Canary | None]
    run_id: str
    settled: Settled
    canary: Canary | None = None
    known: bool = True  # whether there is a place where a canary may be
    mark: Mark | None = None
    began: bool = False

    def step(self) -> str:
        """What is waited for, "" at the end."""
        if self.canary is None:
            self.canary = self.make()
            if self.canary is None:
                self.known = False
                return ""
        if not self.began:
            self.mark = self.canary.mark() or self.mark
        try:
            waiting = self.canary.end(self.run_id)
        except NotOursError:
            return ""  # that run may be alive, and ends it itself
        if waiting:
            self.began = True
            return f"the canary is not gone ({waiting}); `hrnn models canary --end` goes on with it"
        if self.began or self.mark is not None:
            of = f" of {self.mark.version}" if self.mark else ""
            self.settled.done.append(f"the canary{of} was taken away")
        return ""


def _records(store: ModelStore, run_id: str, known: bool, settled: Settled) -> None:
    champion = store.champion()
    for version in store.versions():
        with settled.part():
            _record(store, run_id, version.version, champion, known, settled)


def _record(
    store: ModelStore,
    run_id: str,
    version: str,
    champion: Champion | None,
    known: bool,
    settled: Settled,
) -> None:
    told = store.release(version, run_id)
    if told is None or told.state != TRYING:
        return
    if not known:
        raise InputError(
            f"a canary of {version} may be serving, and was not looked at: name its "
            f"InferenceService (`hrnn models settle {run_id} --service …`). Until then the "
            "version counts as being tried"
        )
    if champion is not None and champion.version == version and champion.checking is None:
        # It was killed between the end of the check and this record.
        store.record(version, run_id, RELEASED, told.reason)
        settled.done.append(f"{version} had been released")
    elif champion is None or champion.version != version or champion.checking != run_id:
        store.record(version, run_id, GIVEN_UP, "the run ended before the release did")
        settled.done.append(f"the release of {version} was given up")
