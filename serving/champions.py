"""Which model to serve: a bundle, or the champion of a model store, followed as it changes."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from model.errors import BundleError, HrnnError
from serving import metrics

log = logging.getLogger("hrnn.serving")

MANIFEST, CHAMPION = "manifest.json", "champion.json"
RETRY_SECONDS = 60.0  # until a refused champion is looked at again: somebody may have mended it


def bundle_path(path: Path) -> Path:
    """The bundle to serve: `path` itself, or the champion of a model store.

    Raises:
        BundleError: there is neither, or champion.json cannot be used.
    """
    if (path / MANIFEST).exists():
        return path
    champion = path / CHAMPION
    try:
        relative = json.loads(champion.read_text())["path"]
        target = (path / relative).resolve()
    except FileNotFoundError:
        raise BundleError(
            f"{path} holds no model: neither {MANIFEST} (a bundle) nor {CHAMPION} (a model store); "
            "train one with `hrnn run`"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BundleError(f"{champion} does not name a bundle: {error!r}") from None
    if not target.is_relative_to(path.resolve()):
        raise BundleError(f"{champion} names a bundle outside of the model store: {relative}")
    return target


class Versioned(Protocol):
    """A loaded model."""

    @property
    def version(self) -> str: ...


M = TypeVar("M", bound=Versioned)


class Champions(Generic[M]):
    """Looks for another model than the one in use; blocking, for one thread.

    What cannot be used is refused with a line in the log and a count, and never twice in
    `RETRY_SECONDS`; the model in use stays.
    """

    def __init__(
        self, path: Path, load: Callable[[Path], M], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            path: a bundle (which never changes) or a model store.
            load: verifies, loads and warms up a bundle.
        """
        self._path = path
        self._load = load
        self._clock = clock
        self._refused: Path | None = None
        self._refused_at = 0.0
        self._readable = True

    def next(self, in_use: str) -> M | None:
        """The model to use instead of version `in_use`; None: go on with that one."""
        try:
            target = bundle_path(self._path)
        except BundleError as error:
            metrics.MODEL_REFRESHES.labels("unreadable").inc()
            if self._readable:  # once, not every few seconds
                log.error("the model store cannot be read, %s stays in use: %s", in_use, error)
            self._readable = False
            return None
        if not self._readable:
            log.info("the model store is readable again")
            self._readable = True
        if target == self._refused and self._clock() - self._refused_at < RETRY_SECONDS:
            return None
        try:
            return self._load_other(target, in_use)
        except Exception as error:
            reason = str(error) if isinstance(error, HrnnError) else type(error).__name__
            log.error(
                "the champion %s is refused, %s stays in use: %s", target.name, in_use, reason
            )
            metrics.MODEL_REFRESHES.labels("refused").inc()
            metrics.MODEL_IS_CHAMPION.set(0)
            self._refused, self._refused_at = target, self._clock()
            return None

    def _load_other(self, target: Path, in_use: str) -> M | None:
        if _version(target) == in_use:
            self._refused = None
            metrics.MODEL_IS_CHAMPION.set(1)
            return None
        model = self._load(target)
        metrics.MODEL_REFRESHES.labels("swapped").inc()
        metrics.MODEL_IS_CHAMPION.set(1)
        return model


def _version(bundle: Path) -> str:
    """The model version that a manifest claims; nothing is verified."""
    try:
        return str(json.loads((bundle / MANIFEST).read_text())["model_version"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BundleError(f"{bundle / MANIFEST} cannot be read: {error!r}") from None
