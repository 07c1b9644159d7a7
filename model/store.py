"""The model store: versions of bundles, and which of them is the champion.

    ROOT/
      champion.json                  which version serves, and those that served before it
      versions/<version>/            a bundle (`model.bundle`), complete once its manifest is there
      lineage/<version>.json         where the version comes from; outlives the bundle
      releases/<version>/<run>.json  what became of the version when that run released it

ROOT is a folder or any address that fsspec knows (s3://bucket/prefix, gs://…, memory://…). One
small object, `champion.json`, holds both pointers and is replaced whole, so that a reader sees the
state before a change or the one after, never half of it.

Writers do not overwrite each other's changes unseen. A change of the champion states which
champion it replaces and fails with `ConflictError` when that is no longer the one: on folders under
a lock, on S3 by a conditional write (If-Match), on other object stores by comparing just before the
write, which leaves a gap of milliseconds. A write whose answer was lost is looked up before it is
repeated, so that no change is made twice.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec
import fsspec.asyn
from fsspec import AbstractFileSystem

from model import manifest as manifests
from model.errors import BundleError, ConflictError, InputError, UnavailableError

CHAMPION, VERSIONS, LINEAGE, LOCK = "champion.json", "versions", "lineage", ".lock"
RELEASES = "releases"
UNREADABLE = "unreadable"  # state of a release whose record was edited by hand or cut off
HISTORY = 10  # champions of before that are remembered
LOCK_SECONDS = 60.0
# An upload that was begun and never finished is cleared away after this time.
CHAMPION_STANDS = "the champion is what `hrnn models list` says"  # after it was moved
ABANDONED_SECONDS = 24 * 3600.0
CHUNK = 2**20
# Deadlines of every call: the driver's own would let an unreachable store hang for minutes. s3fs
# tries again beside botocore, so that a frozen store fails a call after 2 · 2 · 20 s.
S3_ATTEMPTS = 2
# A write waits for "100 Continue", which the driver's deadlines do not cover.
WRITE_SECONDS, BYTES_PER_SECOND = 90.0, 2**20
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"mode": "standard", "max_attempts": 2},
    }
}
# Raised by the drivers of object stores besides OSError.
DRIVERS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "asyncio"}
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
NO_CHAMPION: dict[str, Any] = {
    "version": None,
    "path": None,
    "previous": None,
    "reason": "rollback",
    "earlier": [],
    "checking": None,
}


class _RecordError(UnavailableError):
    """A small record was edited by hand or cut off; the file is named."""


@dataclass(frozen=True)
class Champion:
    """Contents of `champion.json`; `path` is relative to the store's root."""

    version: str
    path: str
    previous: str | None  # where a rollback leads
    changed_at: str  # ISO 8601, UTC
    reason: str  # deploy, promote or rollback
    earlier: tuple[str, ...] = ()  # champions before `previous`, newest first
    checking: str | None = None  # the run that has yet to see the service answer with it

    @property
    def since(self) -> datetime | None:
        """`changed_at`, UTC where it names no zone; None where somebody edited it."""
        try:
            when = datetime.fromisoformat(self.changed_at)
        except (ValueError, TypeError):
            return None
        return when if when.tzinfo else when.replace(tzinfo=UTC)

    @property
    def history(self) -> tuple[str, ...]:
        """Champions of before, newest first; none that was rolled back."""
        return () if self.previous is None else (self.previous, *self.earlier)


@dataclass(frozen=True)
class Release:
    """What became of a version when a run, or a person, released it."""

    version: str
    run_id: str
    state: str  # trying (as a canary), released, rolled_back, given_up (its run ended first)
    reason: str
    at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from. Digests are SHA-256 in hexadecimal."""

    data_digest: str = ""  # of the clean tables it was trained and measured on
    code_digest: str = ""
    run_id: str = ""
    parent: str | None = None  # the champion it was compared with, None for a first model
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)
    override: str | None = None  # why it was deployed although the gate refused it


@dataclass(frozen=True)
class Version:
    """A bundle in the store."""

    version: str
    created: str
    bytes: int
    role: str  # champion, previous or ""
    lineage: Lineage | None  # None: it was put there by other means, or cannot be read
    problem: str = ""  # why this code cannot use it, or its lineage
    releases: tuple[Release, ...] = ()  # newest first
    checking: str | None = None  # the run that is checking it as the champion

    @property
    def state(self) -> str:
        """What the last release came to: "", checking, or a state of `Release`."""
        if self.checking is not None:
            return "checking"
        return self.releases[0].state if self.releases else ""


class ModelStore:
    """One store. Methods read the store anew: nothing is remembered between calls.

    All of them raise `UnavailableError` when the store cannot be read or written.
    """

    def __init__(self, uri: str, *, clock: Callable[[], datetime] | None = None) -> None:
        """Args: uri: a folder, or an address with a scheme that fsspec knows.

        Raises:
            InputError: the scheme is unknown, or its driver is not installed.
        """
        self.uri = uri
        self._now = clock or (lambda: datetime.now(UTC))
        self._files = files_at(uri, "model store")

    # Reading

    def champion(self) -> Champion | None:
        """The champion, None when nothing was deployed yet."""
        return self._read_champion()[0]

    def versions(self) -> list[Version]:
        """Every complete bundle, newest first."""
        champion = self.champion()
        with self._errors("listed"):
            names = self._files.list(VERSIONS)
        present = []
        for name in names:
            if not _VERSION.fullmatch(name):
                continue
            try:
                found = self._version(name, champion)
            except BundleError as error:  # of an older release, say: listed, but not usable
                found = Version(name, "", 0, _role(name, champion), None, str(error))
            if found is not None:
                present.append(found)
        return sorted(present, key=lambda v: (v.created, v.version), reverse=True)

    def version(self, version: str) -> Version:
        """One version.

        Raises:
            InputError: the store does not hold it.
        """
        found = self._version(_checked(version), self.champion())
        if found is None:
            raise InputError(
                f"the model store {self.uri} holds no version {version!r}; "
                "`hrnn models list` shows what it holds"
            )
        return found

    def fetch(self, version: str, folder: Path) -> Path:
        """A verified bundle on this machine.

        Args:
            folder: gets a copy, `folder/<version>`, unless it is there already. A store that is
                a folder is read in place and needs no copy.

        Raises:
            InputError: the store does not hold the version.
            BundleError: the store's bundle is damaged.
        """
        manifest = self._manifest(_checked(version))
        if manifest is None:
            raise InputError(f"the model store {self.uri} holds no version {version!r}")
        if (own := self._files.local(f"{VERSIONS}/{version}")) is not None:
            manifests.verify(own)
            return own
        target = folder / version
        if target.exists():
            try:
                manifests.verify(target)
            except BundleError:
                shutil.rmtree(target)  # a damaged copy; the store has the whole one
            else:
                return target
        with self._errors("read"), _beside(target) as work:
            for name in (*manifest.files, manifests.MANIFEST):
                self._files.download(f"{VERSIONS}/{version}/{name}", work / name)
            manifests.verify(work)
            _rename(work, target)
        return target

    # Writing

    def publish(self, bundle: Path, lineage: Lineage) -> str:
        """Add a bundle and return its version; the champion stays. Repeating it changes nothing.

        What was uploaded is read back and compared with the digests before the version counts as
        there.

        Raises:
            BundleError: the bundle, or the copy in the store, is damaged.
        """
        manifest = manifests.verify(bundle)
        version = _checked(manifest.model_version)
        with self._errors("written"):
            if self._manifest(version) is None:
                self._files.upload(bundle, manifest, f"{VERSIONS}/{version}")
            elif self._manifest(version) != manifest:
                raise BundleError(
                    f"the model store {self.uri} holds another bundle as version {version}"
                )
            self._check_digests(version, manifest)
            if self._files.read(f"{LINEAGE}/{version}.json") is None:
                self._files.write(f"{LINEAGE}/{version}.json", _json(asdict(lineage)))
        return version

    def promote(
        self,
        version: str,
        *,
        replaces: str | None = "",
        reason: str = "promote",
        checking: str | None = None,
    ) -> Champion:
        """Make a version the champion; the champion so far becomes `previous`.

        Repeating it changes nothing. A champion that was still being checked does not become
        `previous`: nobody knows yet whether it is one to go back to.

        Args:
            replaces: the champion that the caller means to replace (None: there is none yet);
                left out: whichever it is.
            checking: the run that has yet to see the service answer with it, and then calls
                `confirm` or `rollback`; left out: the version is taken to be good. It takes over
                a check that another run began.

        Raises:
            InputError: the store does not hold the version.
            BundleError: its bundle is damaged.
            ConflictError: another champion was set meanwhile; nothing is changed.
        """
        self._check_whole(_checked(version))

        def change(now: Champion | None) -> Champion:
            if now is not None and now.version == version:
                if now.checking is None or checking == now.checking:
                    return now
                if checking is None:
                    return replace(now, checking=None, reason=reason)
                return self._taken_over(now, checking)
            if replaces != "" and replaces != (now.version if now else None):
                raise ConflictError(
                    f"the champion of {self.uri} is {now.version if now else 'gone'}, not "
                    f"{replaces or 'unset'} as when this change was prepared: another run "
                    "deployed meanwhile. Nothing was changed; run again to compare with it"
                )
            good = () if now is None or now.checking is not None else (now.version,)
            history = [*good, *(now.history if now else ())]
            before = [v for v in history if v != version]
            return self._pointer(version, before, reason, checking)

        champion = self._change_champion(change)
        assert champion is not None  # noqa: S101 - `change` never gives None
        return champion

    def take_over(self, version: str, checking: str) -> Champion:
        """Go on with the check of a champion in this run. Repeating it changes nothing.

        Returns the champion; one whose check has ended meanwhile stays as it is.

        Raises:
            ConflictError: another version is the champion by now.
        """

        def change(now: Champion | None) -> Champion:
            now = self._still(version, now)
            return now if now.checking in (None, checking) else self._taken_over(now, checking)

        champion = self._change_champion(change)
        assert champion is not None  # noqa: S101 - `change` never gives None
        return champion

    def confirm(self, version: str) -> Champion:
        """The check of a champion ended well. Repeating it changes nothing.

        Raises:
            ConflictError: another version is the champion by now.
        """

        def change(now: Champion | None) -> Champion:
            return replace(self._still(version, now), checking=None)

        champion = self._change_champion(change)
        assert champion is not None  # noqa: S101 - `change` never gives None
        return champion

    def rollback(self, *, replaces: str = "") -> Champion | None:
        """Make the champion of before the champion again; again: the one before that.

        A first champion that is still being checked leaves a store without a champion (None).
        Doing the same rollback at once from two places, or again because an answer was lost,
        goes back by one.

        Args:
            replaces: the champion to go back from; left out: whichever it is.

        Raises:
            InputError: there is no previous version, or its bundle is no longer there.
            BundleError: the previous bundle is damaged.
            ConflictError: another version is the champion by now; nothing is changed.
        """
        decided: list[tuple[str, str | None]] = []  # (from, to), by the first look

        def change(now: Champion | None) -> Champion | None:
            name = now.version if now else None
            if decided and name == decided[0][1]:
                return now  # somebody else has just done it
            expected = decided[0][0] if decided else replaces
            if expected and name != expected:
                raise ConflictError(
                    f"the champion of {self.uri} is {name or 'gone'}, not {expected}: nothing was "
                    "rolled back"
                )
            if now is None or (now.previous is None and now.checking is None):
                raise InputError(f"the model store {self.uri} has no previous model to go back to")
            decided.append((now.version, now.previous))
            if now.previous is None:
                return None
            if self._manifest(now.previous) is None:
                raise InputError(
                    f"the previous model {now.previous} is no longer in {self.uri}; "
                    "`hrnn models promote VERSION` takes any other"
                )
            self._check_whole(now.previous)
            before = [v for v in now.earlier if self._holds(v)]
            return self._pointer(now.previous, before, "rollback", None)

        return self._change_champion(change)

    def retain(self, keep: int) -> list[str]:
        """Remove all but the newest `keep` bundles; the champion and the one before always stay.

        Lineage and release records stay. Returns the removed versions.
        """
        if keep < 1:
            raise InputError(f"keep at least one version, not {keep}")
        removed = []
        for old in self.versions()[keep:]:
            place = f"{VERSIONS}/{old.version}"
            with self._errors("written", CHAMPION_STANDS), self._files.exclusive():
                manifest = self._files.read(f"{place}/{manifests.MANIFEST}")
                if manifest is None or self._in_use(old.version):
                    continue
                # Whoever promotes it now on a store without a lock is seen at the second look,
                # or sees that the manifest is gone and takes his change back.
                self._files.remove_file(f"{place}/{manifests.MANIFEST}")
                if self._in_use(old.version):
                    self._files.write(f"{place}/{manifests.MANIFEST}", manifest[0])
                    continue
                self._files.remove(place)
            removed.append(old.version)
        with self._errors("written", CHAMPION_STANDS):
            self._files.clear_abandoned(VERSIONS, ABANDONED_SECONDS)
        return removed

    # Releases

    def record(self, version: str, run_id: str, state: str, reason: str = "") -> Release:
        """Remember what became of a version in a run, in place of what was remembered so far."""
        release = Release(version, run_id, state, reason, self._moment())
        with self._errors("written", CHAMPION_STANDS):
            self._files.write(_release_path(version, run_id), _json(asdict(release)))
        return release

    def release(self, version: str, run_id: str) -> Release | None:
        """What became of a version in a run, None if it has not come to that."""
        return self._release(_release_path(version, run_id))

    def releases(self, version: str) -> tuple[Release, ...]:
        """All that is remembered of a version, newest first."""
        folder = f"{RELEASES}/{_checked(version)}"
        with self._errors("listed"):
            names = self._files.list(folder)
        found = []
        for name in names:
            if not name.endswith(".json"):
                continue
            try:
                found.append(self._release(f"{folder}/{name}"))
            except _RecordError as error:  # the others are worth no less for it
                run_id = name.removesuffix(".json")
                found.append(Release(version, run_id, UNREADABLE, str(error), ""))
        return tuple(sorted(filter(None, found), key=lambda r: r.at, reverse=True))

    def _release(self, path: str) -> Release | None:
        with self._errors("read"):
            stored = self._files.read(path)
        if stored is None:
            return None
        try:
            release = Release(**json.loads(stored[0]))
            if not all(isinstance(value, str) for value in asdict(release).values()):
                raise TypeError("not all of it is text")
            return release
        except (ValueError, TypeError) as error:
            raise _RecordError(
                f"{self.uri}/{path} is not a release record ({error}): delete it"
            ) from None

    # Inner parts

    def _moment(self) -> str:
        return self._now().isoformat(timespec="seconds")

    def _still(self, version: str, now: Champion | None) -> Champion:
        """The champion, if it is still the one that is being checked."""
        if now is None or now.version != version:
            raise ConflictError(
                f"{now.version if now else 'nothing'} became the champion of {self.uri} while "
                f"{version} was being checked; nothing was changed"
            )
        return now

    def _taken_over(self, now: Champion, checking: str) -> Champion:
        # Its time begins anew: `changed_at` says whether the run that checks must be over.
        return replace(now, checking=checking, changed_at=self._moment())

    def _pointer(
        self, version: str, before: Sequence[str], reason: str, checking: str | None
    ) -> Champion:
        return Champion(
            version=version,
            path=f"{VERSIONS}/{version}",
            previous=before[0] if before else None,
            changed_at=self._moment(),
            reason=reason,
            earlier=tuple(before[1:HISTORY]),
            checking=checking,
        )

    def _read_champion(self) -> tuple[Champion | None, str | None]:
        """The record and the tag of its state, for a conditional write."""
        with self._errors("read"):
            stored = self._files.read(CHAMPION)
        if stored is None:
            return None, None
        content, tag = stored
        try:
            raw = json.loads(content)
            if raw["version"] is None:  # a first champion that was rolled back
                return None, tag
            champion = Champion(
                version=_checked(raw["version"]),
                path=raw["path"],
                previous=raw["previous"],
                changed_at=raw.get("changed_at", ""),
                reason=raw.get("reason", ""),
                earlier=tuple(map(_checked, raw.get("earlier", []))),
                checking=raw.get("checking"),
            )
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise UnavailableError(
                f"{self.uri}/{CHAMPION} cannot be used ({error!r}): it was edited by hand or cut"
                " off; delete it, then `hrnn models promote VERSION`"
            ) from None
        return champion, tag

    def _change_champion(
        self, change: Callable[[Champion | None], Champion | None]
    ) -> Champion | None:
        """Read, decide, write on condition that nothing happened in between; else once more."""
        tried: list[Champion | None] = []
        for _ in range(10):
            with self._errors("written"), self._files.exclusive():
                now, tag = self._read_champion()
                if now in tried:
                    return now  # our own write, whose answer was lost
                new = change(now)
                if new == now:
                    return new
                tried.append(new)
                written = self._write_champion(new, tag)
            if written:
                # On an object store retention may have removed it between check and write.
                if new is not None and self._manifest(new.version) is None:
                    self._take_back(new, now)
                    raise BundleError(
                        f"{new.version} was removed by the retention of another run while it was "
                        "being promoted; the champion is unchanged"
                    )
                return new
        raise ConflictError(f"the champion of {self.uri} changes all the time; try again")

    def _take_back(self, new: Champion, before: Champion | None) -> None:
        def change(now: Champion | None) -> Champion | None:
            return before if now == new else now

        self._change_champion(change)

    def _write_champion(self, new: Champion | None, tag: str | None) -> bool:
        record = asdict(new) if new else NO_CHAMPION | {"changed_at": self._moment()}
        try:
            with self._errors("written"):
                return self._files.write_if(CHAMPION, _json(record), tag)
        except UnavailableError as error:
            # It may have been written all the same: a lost answer, a folder that was not synced.
            try:
                found = self._read_champion()[0]
            except UnavailableError:
                raise UnavailableError(
                    f"the model store {self.uri} stopped answering while its champion was being "
                    f"changed to {new.version if new else 'none'}: `hrnn models show` tells "
                    "whether it was"
                ) from error
            if found == new:
                return True
            raise

    def _in_use(self, version: str) -> bool:
        champion = self.champion()
        return champion is not None and version in (champion.version, champion.previous)

    def _holds(self, version: str) -> bool:
        try:
            return self._manifest(version) is not None
        except BundleError:
            return False

    def _check_whole(self, version: str) -> None:
        manifest = self._manifest(version)
        if manifest is None:
            raise InputError(f"the model store {self.uri} holds no version {version!r}")
        self._check_digests(version, manifest)

    def _version(self, version: str, champion: Champion | None) -> Version | None:
        manifest = self._manifest(version)
        if manifest is None:
            return None
        with self._errors("read"):
            stored = self._files.read(f"{LINEAGE}/{version}.json")
            size = self._files.size(f"{VERSIONS}/{version}")
        if size is None:
            return None
        lineage, problem = None, ""
        if stored is not None:
            try:
                lineage = Lineage(**json.loads(stored[0]))
                for name in ("parameters", "metrics", "verdict"):
                    if not isinstance(getattr(lineage, name), Mapping):
                        raise TypeError(f"{name} is not an object")
            except (ValueError, TypeError) as error:
                lineage = None
                problem = f"{self.uri}/{LINEAGE}/{version}.json is not a lineage record ({error})"
        return Version(
            version,
            manifest.created,
            size,
            _role(version, champion),
            lineage,
            problem,
            releases=self.releases(version),
            checking=champion.checking if champion and champion.version == version else None,
        )

    def _manifest(self, version: str) -> manifests.Manifest | None:
        """The manifest of a version; None while it is not (completely) there."""
        with self._errors("read"):
            stored = self._files.read(f"{VERSIONS}/{version}/{manifests.MANIFEST}")
        if stored is None:
            return None
        return manifests.parse_manifest(stored[0], f"{self.uri}/{VERSIONS}/{version}")

    def _check_digests(self, version: str, manifest: manifests.Manifest) -> None:
        for name, digest in manifest.files.items():
            with self._errors("read"):
                found = self._files.digest(f"{VERSIONS}/{version}/{name}")
            if found != digest:
                state = "is missing" if found is None else "does not match its digest"
                raise BundleError(f"{self.uri}/{VERSIONS}/{version}/{name} {state}")

    def _errors(
        self, done: str, champion: str = "the champion is unchanged"
    ) -> contextlib.AbstractContextManager[None]:
        return said_in_one_sentence(
            lambda reason: f"the model store {self.uri} cannot be {done} ({reason}); {champion}"
        )


@contextlib.contextmanager
def said_in_one_sentence(sentence: Callable[[str], str]) -> Iterator[None]:
    """Whatever a file system or its driver raises becomes one sentence, made of the reason.

    Raises:
        UnavailableError: instead of what a driver raised.
    """
    try:
        yield
    except Exception as error:
        driver = type(error).__module__.split(".")[0] in DRIVERS
        if not isinstance(error, OSError) and not driver:
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnavailableError(sentence(reason)) from error


def driver_options(address: str) -> dict[str, Any]:
    """What fsspec is told for an address: deadlines, and nothing remembered."""
    # Listings are asked anew each time: other machines write too.
    options = {} if "://" not in address else {"use_listings_cache": False}
    return options | S3_OPTIONS if address.startswith(("s3://", "s3a://")) else options


def files_at(address: str, what: str) -> "Files":
    """The files below a folder or an address; nothing is asked or written yet.

    Args:
        what: is there, for messages.

    Raises:
        InputError: the scheme is unknown, or its driver is not installed.
    """
    try:
        fs, root = fsspec.url_to_fs(address, **driver_options(address))
    except (ValueError, ImportError) as error:
        raise InputError(f"{what} {address}: {error}") from None
    if hasattr(fs, "retries"):
        fs.retries = S3_ATTEMPTS
    return _Folder(Path(root)) if "file" in _protocols(fs) else _Objects(fs, root.rstrip("/"))


class Files(Protocol):
    """A place for files that appear whole. Paths are relative to the root."""

    def read(self, path: str) -> tuple[bytes, str] | None:
        """Contents and a tag that changes with them; None if there is no such file."""
        ...

    def write(self, path: str, content: bytes) -> None: ...
    def put(self, source: Path, path: str) -> None: ...  # a copy of a file of this machine
    def has(self, path: str) -> bool: ...
    def find(self, pattern: str) -> list[str]: ...  # paths

    def write_if(self, path: str, content: bytes, tag: str | None) -> bool:
        """Write if the file still has this tag (None: still does not exist)."""
        ...

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Held while the champion is read and written."""
        ...

    def list(self, path: str) -> list[str]: ...
    def size(self, path: str) -> int | None: ...  # of what is below; None: nothing (any more)
    def digest(self, path: str) -> str | None: ...
    def upload(self, bundle: Path, manifest: manifests.Manifest, path: str) -> None: ...
    def download(self, path: str, target: Path) -> None: ...
    def local(self, path: str) -> Path | None: ...
    def remove_file(self, path: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def clear_abandoned(self, path: str, seconds: float) -> None: ...


class _Folder:
    """A folder: everything by rename, changes of the champion under a lock of the kernel, which
    is free again when its holder dies."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> tuple[bytes, str] | None:
        try:
            return (self.root / path).read_bytes(), ""
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def put(self, source: Path, path: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        # Perhaps from another file system: copied beside its place first, then renamed.
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        beside = Path(name)
        try:
            os.close(descriptor)
            shutil.copyfile(source, beside)
            beside.chmod(0o644)
            _sync(beside)
            beside.replace(target)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync(target.parent)

    def has(self, path: str) -> bool:
        return (self.root / path).exists()

    def find(self, pattern: str) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in self.root.glob(pattern)]

    def write_if(self, path: str, content: bytes, tag: str | None) -> bool:
        self.write(path, content)  # under the lock nobody else writes
        return True

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("a") as lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UnavailableError(
                            f"{self.root / LOCK} is held by another process for more than "
                            f"{LOCK_SECONDS:.0f} s; the champion is unchanged"
                        ) from None
                    time.sleep(0.02)
            yield

    def list(self, path: str) -> list[str]:
        try:
            return sorted(p.name for p in (self.root / path).iterdir())
        except FileNotFoundError:
            return []

    def size(self, path: str) -> int | None:
        sizes = []
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            for file in (self.root / path).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sizes.append(file.stat().st_size)
        return sum(sizes) if sizes else None

    def digest(self, path: str) -> str | None:
        try:
            with (self.root / path).open("rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def upload(self, bundle: Path, manifest: manifests.Manifest, path: str) -> None:
        with _beside(self.root / path) as work:
            for name in (*manifest.files, manifests.MANIFEST):
                shutil.copyfile(bundle / name, work / name)
                _sync(work / name)
            manifests.verify(work)
            with self.exclusive():
                _rename(work, self.root / path)
        _sync((self.root / path).parent)

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(self.root / path, target)

    def local(self, path: str) -> Path | None:
        return self.root / path

    def remove_file(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / path)

    def clear_abandoned(self, path: str, seconds: float) -> None:
        begun = (self.root / path).glob(".*-incoming-*")
        half = (
            f for f in (self.root / path).glob("[!.]*") if not (f / manifests.MANIFEST).exists()
        )
        for work in (*begun, *half):  # uploads and removals that were killed
            with contextlib.suppress(FileNotFoundError):
                if work.stat().st_mtime < time.time() - seconds:
                    shutil.rmtree(work, ignore_errors=True)


class _Objects:
    """An object store: no rename and no lock, but every object is written whole."""

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        self.fs, self.root = fs, root
        self.conditional = "s3" in _protocols(fs)

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def read(self, path: str) -> tuple[bytes, str] | None:
        self.fs.invalidate_cache()
        try:
            if not self.conditional:
                content: bytes = self.fs.cat_file(self._at(path))
                return content, hashlib.sha256(content).hexdigest()
            # Content and tag of one and the same state come with one answer.
            return fsspec.asyn.sync(self.fs.loop, self._read_s3, self._at(path))
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise OSError(f"there is no bucket {self.root.partition('/')[0]}") from error
            return None

    async def _read_s3(self, path: str) -> tuple[bytes, str]:
        bucket, key, _ = self.fs.split_path(path)
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"]

    def write(self, path: str, content: bytes) -> None:
        self._send("pipe_file", self._at(path), content, size=len(content))

    def put(self, source: Path, path: str) -> None:
        size = source.stat().st_size
        self._send("put_file", str(source), self._at(path), size=size)

    def has(self, path: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self._at(path)))

    def find(self, pattern: str) -> list[str]:
        self.fs.invalidate_cache()
        return [str(path).removeprefix(f"{self.root}/") for path in self.fs.glob(self._at(pattern))]

    def _send(self, call: str, *arguments: Any, size: int, **keywords: Any) -> None:
        """A call that writes `size` bytes, with a deadline where the driver is asynchronous."""
        if not self.fs.async_impl:
            getattr(self.fs, call)(*arguments, **keywords)
            return
        seconds = WRITE_SECONDS + size / BYTES_PER_SECOND

        async def within() -> None:
            await asyncio.wait_for(getattr(self.fs, f"_{call}")(*arguments, **keywords), seconds)

        try:
            fsspec.asyn.sync(self.fs.loop, within)
        except TimeoutError:
            raise OSError(f"no answer within {seconds:.0f} s") from None

    def write_if(self, path: str, content: bytes, tag: str | None) -> bool:
        if not self.conditional:
            now = self.read(path)
            if (now[1] if now else None) != tag:
                return False
            self.write(path, content)
            return True
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self._send("pipe_file", self._at(path), content, size=len(content), **condition)
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def list(self, path: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self._at(path), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def size(self, path: str) -> int | None:
        sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            sizes = self.fs.du(self._at(path), total=False)
        return int(sum(sizes.values())) if sizes else None

    def digest(self, path: str) -> str | None:
        hasher = hashlib.sha256()
        try:
            with self.fs.open(self._at(path), "rb", block_size=8 * CHUNK) as f:
                while block := f.read(CHUNK):
                    hasher.update(block)
        except FileNotFoundError:
            return None
        return hasher.hexdigest()

    def upload(self, bundle: Path, manifest: manifests.Manifest, path: str) -> None:
        # The manifest last: without it the version does not exist.
        for name in (*manifest.files, manifests.MANIFEST):
            self.put(bundle / name, f"{path}/{name}")

    def download(self, path: str, target: Path) -> None:
        self.fs.get_file(self._at(path), str(target))

    def local(self, path: str) -> Path | None:
        return None

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._at(path))

    def remove(self, path: str) -> None:
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self._at(path), recursive=True)

    def clear_abandoned(self, path: str, seconds: float) -> None:
        """Nothing: an upload begun again writes the same keys, and a bucket's life-cycle rules
        remove parts that were never completed."""


def _protocols(fs: AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _code(error: OSError) -> str:
    """What S3 calls the error, "" if it did not come from S3."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"]["Code"]) if isinstance(response, dict) else ""


def _role(version: str, champion: Champion | None) -> str:
    if champion is None:
        return ""
    roles = {champion.previous: "previous", champion.version: "champion"}
    return roles.get(version, "")


def is_version(name: object) -> bool:
    """Whether this may be the name of a version."""
    return isinstance(name, str) and bool(_VERSION.fullmatch(name)) and ".." not in name


def _checked(version: str) -> str:
    if not is_version(version):
        raise InputError(f"{version!r} is not the name of a version")
    return version


def _release_path(version: str, run_id: str) -> str:
    """A run's name is the pipeline system's: one that is no file name is replaced by its digest."""
    plain = _VERSION.fullmatch(run_id) and ".." not in run_id
    name = run_id if plain else hashlib.sha256(run_id.encode()).hexdigest()[:32]
    return f"{RELEASES}/{_checked(version)}/{name}.json"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A work folder next to `target`, gone afterwards if it was not renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-incoming-", dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename(work: Path, target: Path) -> None:
    """Put a finished folder in place; whoever was first wins."""
    work.chmod(0o755)
    try:
        work.rename(target)
    except OSError:
        if not target.exists():
            raise
        if not (target / manifests.MANIFEST).exists():  # half of one that was being removed
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
        manifests.verify(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
