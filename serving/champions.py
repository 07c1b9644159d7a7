"""Which model to serve: one bundle, or the champion of a model store, followed as it changes."""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from model.errors import BundleError, HrnnError, UnavailableError
from model.manifest import MANIFEST
from model.store import Champion, ModelStore
from serving import metrics
from serving.process import log_failure

log = logging.getLogger("hrnn.serving")

RETRY_SECONDS = 60.0  # until a refused champion is looked at again: somebody may have mended it


class Versioned(Protocol):
    """A loaded model."""

    @property
    def version(self) -> str: ...


M = TypeVar("M", bound=Versioned)


class Champions(Generic[M]):
    """Loads the model to serve, and looks for another one later; blocking, for one thread.

    What cannot be used is refused with a line in the log and a count; the model in use stays.
    """

    def __init__(
        self, where: str, load: Callable[[Path], M], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            where: a bundle, which never changes, or a model store: a folder or an address that
                fsspec knows.
            load: verifies, loads and warms up a bundle.

        Raises:
            InputError: the address is of an unknown kind.
        """
        self._where = where
        self._load = load
        self._clock = clock
        self._store: ModelStore | None = None
        if "://" in where or not (Path(where) / MANIFEST).exists():
            self._store = ModelStore(where)
        self._copies: tempfile.TemporaryDirectory[str] | None = None  # of a store elsewhere
        self._refused = ""
        self._refused_at = 0.0
        self._readable = True

    def first(self) -> M:
        """The model to start with.

        Raises:
            BundleError: there is none, or it cannot be used.
            UnavailableError: the store cannot be read.
        """
        if self._store is None:
            return self._load(Path(self._where))
        model = self._load_version(self._champion(self._store), self._store)
        metrics.MODEL_IS_CHAMPION.set(1)
        return model

    def next(self, in_use: str, ready: Callable[[M], M] = lambda model: model) -> M | None:
        """The model to use instead of version `in_use`; None: go on with that one.

        Args:
            ready: does what the model needs before its use; one for which it fails is refused.
        """
        if self._store is None:
            return None
        champion = ""
        try:
            champion = self._champion(self._store)
            if champion == in_use:
                model = None
                self._refused = ""
            elif champion == self._refused and self._clock() - self._refused_at < RETRY_SECONDS:
                return None
            else:
                model = ready(self._load_version(champion, self._store))
                metrics.MODEL_REFRESHES.labels("swapped").inc()
            metrics.MODEL_IS_CHAMPION.set(1)
        except Exception as error:
            reason = str(error) if isinstance(error, HrnnError) else type(error).__name__
            if not champion or isinstance(error, UnavailableError):
                metrics.MODEL_REFRESHES.labels("unreadable").inc()
                if self._readable:  # once, not every few seconds
                    log.error("no new model, %s stays in use: %s", in_use, reason)
                self._readable = False
            else:
                metrics.MODEL_REFRESHES.labels("refused").inc()
                metrics.MODEL_IS_CHAMPION.set(0)
                self._refused, self._refused_at = champion, self._clock()
                log.error("champion %s is refused, %s stays in use: %s", champion, in_use, reason)
                if not isinstance(error, HrnnError):
                    log_failure(error)
            return None
        if not self._readable:
            log.info("the model store is readable again")
            self._readable = True
        return model

    def close(self) -> None:
        """Remove the copies of a store elsewhere."""
        if self._copies is not None:
            with contextlib.suppress(OSError):
                self._copies.cleanup()

    def _champion(self, store: ModelStore) -> str:
        champion = store.champion()
        if champion is None:
            metrics.CHAMPION_UNCHECKED.set(0)  # a first one may have been rolled back
            raise BundleError(
                f"{self._where} holds no model: neither {MANIFEST} (a bundle) nor champion.json "
                "(a model store); train one with `hrnn run`"
            )
        metrics.CHAMPION_UNCHECKED.set(_since(champion) if champion.checking else 0)
        return champion.version

    def _load_version(self, version: str, store: ModelStore) -> M:
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="hrnn-models-")
        folder = Path(self._copies.name)
        try:
            model = self._load(store.fetch(version, folder))
        finally:
            for copy in folder.iterdir():  # what is loaded needs no files
                shutil.rmtree(copy, ignore_errors=True)
        if model.version != version:
            raise BundleError(
                f"{self._where}: the bundle under the name {version} says that it is "
                f"{model.version}"
            )
        return model


def _since(champion: Champion) -> float:
    """Unix seconds; long ago where somebody edited it."""
    return champion.since.timestamp() if champion.since else 1.0
