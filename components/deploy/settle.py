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

from components.deploy.kserve import Canary, NotOursError
from components.deploy.release import GIVEN_UP, RELEASED, TRYING
from components.deploy.steps import DeploySettings, on_cluster
from components.deploy.watch import RELEASE_SECONDS
from model.errors import ConflictError, HrnnError, UnavailableError
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
    that the run came to stays.

    Args:
        canary: makes the canary of the cluster, None where there is none.
        seconds: within which the canary has to be gone.
    """
    settled = Settled()
    with settled.part():
        _champion_back(store, run_id, settled)
    gone = False
    with settled.part():
        served = canary()
        if served is not None:
            _canary_away(served, run_id, seconds, sleep, clock, settled)
        gone = True
    if gone:  # else a later attempt has to see that the version is still being tried
        with settled.part():
            _records(store, run_id, settled)
    return settled


def overdue(champion: Champion, now: datetime) -> bool:
    """Whether the run that was checking this champion must be over: its pod would be stopped."""
    if champion.checking is None:
        return False
    try:
        since = datetime.fromisoformat(champion.changed_at)
    except ValueError:  # somebody edited it: nobody waits for it
        return True
    return now - since > timedelta(seconds=RELEASE_SECONDS)


def _champion_back(store: ModelStore, run_id: str, settled: Settled) -> None:
    champion = store.champion()
    if champion is None or champion.checking is None or champion.checking != run_id:
        return
    try:
        now = store.rollback(replaces=champion.version)
    except ConflictError:  # somebody else settled it, or promoted another
        return
    settled.done.append(
        f"{champion.version} was the champion and its check did not end: "
        + (f"the champion is again {now.version}" if now else "there is no champion, as before it")
    )


def _canary_away(
    canary: Canary,
    run_id: str,
    seconds: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float],
    settled: Settled,
) -> None:
    mark, deadline = canary.mark(), clock() + seconds
    began = False
    while True:
        try:
            waiting = canary.end(run_id)
        except NotOursError:
            return  # that run may be alive, and ends it itself
        except UnavailableError as error:
            waiting = str(error)
        if not waiting:
            break
        began = True
        if clock() > deadline:
            raise UnavailableError(
                f"the canary is not gone within {seconds:.0f} s ({waiting}); `hrnn models canary "
                "--end` goes on with it"
            )
        sleep(POLL_SECONDS)
    if began:
        settled.done.append(f"the canary{f' of {mark.version}' if mark else ''} was taken away")


def _records(store: ModelStore, run_id: str, settled: Settled) -> None:
    champion = store.champion()
    for version in store.versions():
        told = store.release(version.version, run_id)
        if told is None or told.state != TRYING:
            continue
        if champion is not None and champion.version == version.version:
            # It was killed between the end of the check and this record.
            store.record(version.version, run_id, RELEASED, told.reason)
            settled.done.append(f"{version.version} had been released")
        else:
            why = "the run ended before the release did"
            store.record(version.version, run_id, GIVEN_UP, why)
            settled.done.append(f"the release of {version.version} was given up")
