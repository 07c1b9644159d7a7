"""Release: a published candidate is tried beside the champion, then promoted, then checked.

What survives a kill at any moment, and what the next attempt makes of it:

    on the cluster   the canary's mark              the canary is ended, and the trial begun anew
    in the store     champion.json, `checking`      the check goes on; it is not promoted again
                     releases/<version>/<run>.json  `released` and `rolled_back` are final for the
                                                    run: told again, not done again

What no attempt comes back to, `components.deploy.settle` takes back.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx

from components.deploy.kserve import Canary, Mark, NotOursError, Served
from components.deploy.watch import FailedError, ReleaseSettings, ask, http_client, watch
from model.errors import ConflictError, HrnnError, RolledBackError, UnavailableError
from model.store import ModelStore, Release

# To leave in order after SIGTERM, where it is left so much: under Kubeflow's launcher the container
# is gone within a second (docs/operations.md), so the live traffic comes first.
STOP_SECONDS = 20.0
RELEASED, ROLLED_BACK, TRYING = "released", "rolled_back", "trying"
GIVEN_UP = "given_up"  # the run ended before the release did (`components.deploy.settle`)


class _Stop(BaseException):
    """SIGTERM: the pod is being taken away, or the run was cancelled."""


@dataclass
class Releaser:
    """Releases one version in one run."""

    store: ModelStore
    version: str
    run_id: str
    service: Served  # what the users reach
    canary: Canary | None  # None: no trial beside the champion, the service itself is watched
    settings: ReleaseSettings
    why: str = ""  # it is released although the gate refused it; recorded
    model_name: str = "hrnn-meta"
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    client: httpx.Client = field(default_factory=http_client)

    def release(self, model_dir: str, *, replaces: str | None) -> None:
        """Begin the canary, wait until it is ready, watch it, promote, see the service follow.

        Whatever fails, the canary is ended; after the promotion, the champion of before is put
        back. A first version has no champion to be tried beside: the service, which waits for a
        model, is watched after the promotion.

        Args:
            model_dir: address of the candidate's bundle.
            replaces: the champion that the candidate was compared with.

        Raises:
            RolledBackError: says what was not as it should be, now or in an earlier attempt.
            ConflictError: another run deployed meanwhile, or is trying a canary.
            UnavailableError: the cluster, the store or Prometheus does not answer; this release
                may be attempted again.
        """
        with _stopped_in_order():
            self._release(model_dir, replaces)

    def _release(self, model_dir: str, replaces: str | None) -> None:
        told = self.store.release(self.version, self.run_id)
        if self.canary is not None:
            try:
                self._end_leftover(self.canary)
            except NotOursError:
                if told is None or told.state in (TRYING, GIVEN_UP):
                    raise
        if told is not None and told.state == ROLLED_BACK:
            self._told_again(told)
        if told is not None and told.state == RELEASED:
            print(f"{self.version} was released by this run at {told.at}")
            return
        champion, checking = self.store.champion(), self.run_id or "unnamed"
        if champion is None or champion.version != self.version:
            tried = self.canary is not None and champion is not None
            if tried:
                assert self.canary is not None  # noqa: S101 - for the type checker
                self._try(self.canary, model_dir)
            self.store.promote(self.version, replaces=replaces, reason="deploy", checking=checking)
            print(f"champion is {self.version}, to be checked", flush=True)
        elif (
            champion.checking is not None
            and self.store.take_over(self.version, checking).checking is not None
        ):  # also one that another run, which trained the same version, did not come to end
            print(f"{self.version} is the champion, and its check goes on", flush=True)
            tried = False
        else:
            self.store.record(self.version, self.run_id, RELEASED, "it was the champion")
            return
        self._check(watched=not tried)
        self.store.confirm(self.version)
        self.store.record(self.version, self.run_id, RELEASED, self.why)

    # Beside the champion

    def _try(self, canary: Canary, model_dir: str) -> None:
        patience = 2 * self.settings.ready_seconds + self.settings.watch_seconds + 60
        mark = Mark(self.run_id, self.version, time.time() + patience)
        self.store.record(self.version, self.run_id, TRYING)
        try:
            canary.begin(model_dir, mark)
            print(f"canary of {self.version} begun", flush=True)
            self._wait(canary.problem, "it did not become ready as a canary")
            self._watch(canary)
        except FailedError as error:
            with contextlib.suppress(HrnnError):  # what cannot be done now is tried again below
                canary.end(self.run_id)  # the live traffic first
            self.store.record(self.version, self.run_id, ROLLED_BACK, str(error))
            self._end(canary, str(error))
            raise RolledBackError(
                f"{self.version} was rolled back: {error}; {self._state('still')}"
            ) from None
        except BaseException as error:
            hurry = not isinstance(error, Exception)
            self._end(canary, str(error) or "interrupted", STOP_SECONDS if hurry else None)
            raise
        self._end(canary, "the trial ended well")

    def _end(self, canary: Canary, why: str, seconds: float | None = None) -> None:
        """End the canary; the reason why is not lost when that fails."""
        limit = self.settings.ready_seconds if seconds is None else seconds
        try:
            self._wait(lambda: canary.end(self.run_id), "it is not gone", limit)
        except NotOursError:
            return  # ours was taken away, and another run's is there
        except HrnnError as error:
            raise UnavailableError(
                f"{why}; the canary of {self.version} cannot be taken away entirely: {error}. It "
                "gets no live traffic if Kubernetes could be told so; the next attempt or "
                "`hrnn models canary --end` goes on with it"
            ) from None

    def _end_leftover(self, canary: Canary) -> None:
        """End what a run that was killed left behind.

        Raises:
            NotOursError: that run may be alive.
        """
        try:
            self._wait(lambda: canary.end(self.run_id), "")
        except FailedError as error:
            raise UnavailableError(
                f"an earlier run's canary cannot be taken away entirely{error}; nothing was begun"
            ) from None

    # As the champion

    def _check(self, *, watched: bool) -> None:
        """See the service answer with the new champion; else put the old one back."""
        try:
            self._wait(self.service.problem, "the service did not become ready with it")
            self._wait(self._follows, "the service did not take it")
            if watched:
                self._watch(self.service)
        except FailedError as error:
            # First the record: whoever finds it goes on with putting the old one back.
            self.store.record(self.version, self.run_id, ROLLED_BACK, str(error))
            self._put_back(str(error))
            raise RolledBackError(
                f"{self.version} was rolled back: {error}; {self._state('again')}"
            ) from None
        except ConflictError:
            raise
        except BaseException as error:
            # Nobody knows whether it is good. A later attempt starts from the trial again.
            self._put_back(str(error))
            raise

    def _follows(self) -> str:
        champion = self.store.champion()
        if champion is None or champion.version != self.version:
            raise ConflictError(
                f"{champion.version if champion else 'nothing'} was made the champion while "
                f"{self.version} was being checked; nothing was rolled back"
            )
        answer = ask(self.client, self.service.url(), self.model_name)
        served = answer if isinstance(answer, str) else answer[0]
        return "" if served == self.version else f"it answers: {served}"

    def _put_back(self, why: str) -> None:
        try:
            champion = self.store.champion()
            if champion is not None and champion.version == self.version:
                self.store.rollback(replaces=self.version)
                print(self._state("again"), flush=True)
        except HrnnError as error:
            raise UnavailableError(
                f"{why}; {self.version} could not be rolled back: {error}. The next attempt goes "
                "on with it; by hand: `hrnn models rollback`"
            ) from None

    def _told_again(self, told: Release) -> None:
        champion = self.store.champion()
        if champion is not None and champion.version == self.version and champion.checking:
            self._put_back(told.reason)  # killed between the record and the pointer
        raise RolledBackError(
            f"{self.version} was rolled back by this run at {told.at}: {told.reason}; it is not "
            f"tried again ({self._state('still')}). `hrnn models promote {self.version}` makes it "
            "the champion all the same"
        )

    def _state(self, when: str) -> str:
        champion = self.store.champion()
        if champion is None:
            return "there is no champion, as before it"
        return f"the champion is {when} {champion.version}"

    def _watch(self, served: Served) -> None:
        how = self.model_name, self.settings, self.sleep, self.clock
        watch(served, self.version, self.client, *how)

    def _wait(self, problem: Callable[[], str], failure: str, limit: float | None = None) -> None:
        """Raises FailedError when there is still a problem after `limit` seconds.

        A cluster or store that does not answer for a moment is asked again until then.
        """
        seconds = self.settings.ready_seconds if limit is None else limit
        deadline = self.clock() + seconds
        while True:
            try:
                reason = problem()
            except UnavailableError as error:
                if self.clock() > deadline:
                    raise
                reason = str(error)
            if not reason:
                return
            if self.clock() > deadline:
                raise FailedError(f"{failure} within {seconds:.0f} s ({reason})")
            self.sleep(min(self.settings.poll_seconds, max(0.01, seconds / 10)))


def take_away(canary: Canary, seconds: float) -> None:
    """End a canary by hand, whosever it is.

    Raises:
        UnavailableError: it is not gone within that time; repeating it goes on.
    """
    deadline = time.monotonic() + seconds
    while waiting := canary.end("", force=True):
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"the canary is not gone within {seconds:.0f} s ({waiting}); it gets no live "
                "traffic, and the same command goes on with it"
            )
        time.sleep(0.2)


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM interrupts, once: what follows it is the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Stop("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stop:
        raise UnavailableError(
            "stopped by SIGTERM: what had been begun was taken back, the release can be attempted "
            "again"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
