"""The model store: versions of bundles, and which of them is the champion.

    ROOT/
      champion.json              which version serves, and the one before it
      versions/<version>/        a bundle (`model.bundle`), complete once its manifest is there
      lineage/<version>.json     where the version comes from; outlives the bundle

ROOT is a folder or any address that fsspec knows (s3://bucket/prefix, gs://…, memory://…). One
small object, `champion.json`, holds both pointers and is replaced whole, so that a reader sees the
state before a change or the one after, never half of it.

Writers do not overwrite each other's changes unseen. A change of the champion states which
champion it replaces and fails with `ConflictError` when that is no longer the one: on folders under
a lock, on S3 by a conditional write (If-Match), on other object stores by comparing just before the
write, which leaves a gap of milliseconds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec
import fsspec.asyn
from fsspec import AbstractFileSystem

from model import bundle as bundles
from model.errors import BundleError, ConflictError, InputError, UnavailableError

CHAMPION, VERSIONS, LINEAGE, LOCK = "champion.json", "versions", "lineage", ".lock"
LOCK_SECONDS = 60.0
# An upload that was begun and never finished is cleared away after this time.
ABANDONED_SECONDS = 24 * 3600.0
CHUNK = 2**20
# Deadlines of every call: the driver's own would let an unreachable store hang for minutes.
S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 60,
        "retries": {"mode": "standard", "max_attempts": 2},
    }
}
# Raised by the drivers of object stores besides OSError.
DRIVERS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "asyncio"}
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Champion:
    """Contents of `champion.json`; `path` is relative to the store's root."""

    version: str
    path: str
    previous: str | None
    changed_at: str  # ISO 8601, UTC
    reason: str  # deploy, promote or rollback


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
    lineage: Lineage | None  # None: it was put there by other means
    problem: str = ""  # why this release cannot use it


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
        # Listings are asked anew each time: other machines write too.
        options = {} if "://" not in uri else {"use_listings_cache": False}
        if uri.startswith(("s3://", "s3a://")):
            options |= S3_OPTIONS
        try:
            fs, root = fsspec.url_to_fs(uri, **options)
        except (ValueError, ImportError) as error:
            raise InputError(f"model store {uri}: {error}") from None
        self._files: _Files = (
            _Folder(Path(root)) if "file" in _protocols(fs) else _Objects(fs, root.rstrip("/"))
        )

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
            bundles.verify(own)
            return own
        target = folder / version
        if target.exists():
            try:
                bundles.verify(target)
            except BundleError:
                shutil.rmtree(target)  # a damaged copy; the store has the whole one
            else:
                return target
        with self._errors("read"), _beside(target) as work:
            for name in (*manifest.files, bundles.MANIFEST):
                self._files.download(f"{VERSIONS}/{version}/{name}", work / name)
            bundles.verify(work)
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
        manifest = bundles.verify(bundle)
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
        self, version: str, *, replaces: str | None = "", reason: str = "promote"
    ) -> Champion:
        """Make a version the champion; the champion so far becomes `previous`.

        Args:
            replaces: the champion that the caller means to replace (None: there is none yet);
                left out: whichever it is.

        Raises:
            InputError: the store does not hold the version.
            BundleError: its bundle is damaged.
            ConflictError: another champion was set meanwhile; nothing is changed.
        """
        manifest = self._manifest(_checked(version))
        if manifest is None:
            raise InputError(f"the model store {self.uri} holds no version {version!r}")
        self._check_digests(version, manifest)

        def change(now: Champion | None) -> Champion:
            if now is not None and now.version == version:
                return now
            if replaces != "" and replaces != (now.version if now else None):
                raise ConflictError(
                    f"the champion of {self.uri} is {now.version if now else 'gone'}, not "
                    f"{replaces or 'unset'} as when this change was prepared: another run "
                    "deployed meanwhile. Nothing was changed; run again to compare with it"
                )
            before = now.version if now else None
            return self._pointer(version, before, reason)

        return self._change_champion(change)

    def rollback(self) -> Champion:
        """Make the previous version the champion again (twice: back to where it was).

        Raises:
            InputError: there is no previous version, or its bundle is no longer there.
        """

        def change(now: Champion | None) -> Champion:
            if now is None or now.previous is None:
                raise InputError(f"the model store {self.uri} has no previous model to go back to")
            manifest = self._manifest(now.previous)
            if manifest is None:
                raise InputError(
                    f"the previous model {now.previous} is no longer in {self.uri}; "
                    "`hrnn models promote VERSION` takes any other"
                )
            self._check_digests(now.previous, manifest)
            return self._pointer(now.previous, now.version, "rollback")

        return self._change_champion(change)

    def retain(self, keep: int) -> list[str]:
        """Remove all but the newest `keep` bundles; the champion and the one before always stay.

        Lineage records stay. Returns the removed versions.
        """
        if keep < 1:
            raise InputError(f"keep at least one version, not {keep}")
        removed = []
        for old in self.versions()[keep:]:
            # Asked anew each time: somebody may be going back to this version right now.
            champion = self.champion()
            if champion is not None and old.version in (champion.version, champion.previous):
                continue
            with self._errors("written"):
                self._files.remove(f"{VERSIONS}/{old.version}", first=bundles.MANIFEST)
            removed.append(old.version)
        with self._errors("written"):
            self._files.clear_abandoned(VERSIONS, ABANDONED_SECONDS)
        return removed

    # Inner parts

    def _pointer(self, version: str, previous: str | None, reason: str) -> Champion:
        moment = self._now().isoformat(timespec="seconds")
        return Champion(version, f"{VERSIONS}/{version}", previous, moment, reason)

    def _read_champion(self) -> tuple[Champion | None, str | None]:
        """The record and the tag of its state, for a conditional write."""
        with self._errors("read"):
            stored = self._files.read(CHAMPION)
        if stored is None:
            return None, None
        content, tag = stored
        try:
            raw = json.loads(content)
            champion = Champion(
                version=_checked(raw["version"]),
                path=raw["path"],
                previous=raw["previous"],
                changed_at=raw.get("changed_at", ""),
                reason=raw.get("reason", ""),
            )
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise UnavailableError(
                f"{self.uri}/{CHAMPION} cannot be used ({error!r}): it was edited by hand or cut"
                " off; delete it, then `hrnn models promote VERSION`"
            ) from None
        return champion, tag

    def _change_champion(self, change: Callable[[Champion | None], Champion]) -> Champion:
        """Read, decide, write on condition that nothing happened in between; else once more."""
        for _ in range(10):
            with self._errors("written"), self._files.exclusive():
                now, tag = self._read_champion()
                new = change(now)
                if new is now:
                    return new
                written = self._files.write_if(CHAMPION, _json(asdict(new)), tag)
            if written:
                # On an object store retention may have removed it between check and write.
                if self._manifest(new.version) is None:
                    raise BundleError(f"{new.version} was removed while it was being promoted")
                return new
        raise ConflictError(f"the champion of {self.uri} changes all the time; try again")

    def _version(self, version: str, champion: Champion | None) -> Version | None:
        manifest = self._manifest(version)
        if manifest is None:
            return None
        with self._errors("read"):
            stored = self._files.read(f"{LINEAGE}/{version}.json")
            size = self._files.size(f"{VERSIONS}/{version}")
        lineage = None
        if stored is not None:
            try:
                lineage = Lineage(**json.loads(stored[0]))
            except (ValueError, TypeError) as error:
                raise UnavailableError(
                    f"{self.uri}/{LINEAGE}/{version}.json is not a lineage record: {error}"
                ) from None
        return Version(version, manifest.created, size, _role(version, champion), lineage)

    def _manifest(self, version: str) -> bundles.Manifest | None:
        """The manifest of a version; None while it is not (completely) there."""
        with self._errors("read"):
            stored = self._files.read(f"{VERSIONS}/{version}/{bundles.MANIFEST}")
        if stored is None:
            return None
        return bundles.parse_manifest(stored[0], f"{self.uri}/{VERSIONS}/{version}")

    def _check_digests(self, version: str, manifest: bundles.Manifest) -> None:
        for name, digest in manifest.files.items():
            with self._errors("read"):
                found = self._files.digest(f"{VERSIONS}/{version}/{name}")
            if found != digest:
                state = "is missing" if found is None else "does not match its digest"
                raise BundleError(f"{self.uri}/{VERSIONS}/{version}/{name} {state}")

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Whatever a file system or its driver raises becomes one sentence."""
        try:
            yield
        except Exception as error:
            driver = type(error).__module__.split(".")[0] in DRIVERS
            if not isinstance(error, OSError) and not driver:
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnavailableError(
                f"the model store {self.uri} cannot be {done} ({reason}); the champion is unchanged"
            ) from error


class _Files(Protocol):
    """What the store needs of a place for files. Paths are relative to the root."""

    def read(self, path: str) -> tuple[bytes, str] | None:
        """Contents and a tag that changes with them; None if there is no such file."""
        ...

    def write(self, path: str, content: bytes) -> None: ...

    def write_if(self, path: str, content: bytes, tag: str | None) -> bool:
        """Write if the file still has this tag (None: still does not exist)."""
        ...

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Held while the champion is read and written."""
        ...

    def list(self, path: str) -> list[str]: ...
    def size(self, path: str) -> int: ...
    def digest(self, path: str) -> str | None: ...
    def upload(self, bundle: Path, manifest: bundles.Manifest, path: str) -> None: ...
    def download(self, path: str, target: Path) -> None: ...
    def local(self, path: str) -> Path | None: ...
    def remove(self, path: str, first: str) -> None: ...
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

    def size(self, path: str) -> int:
        return sum(f.stat().st_size for f in (self.root / path).iterdir())

    def digest(self, path: str) -> str | None:
        try:
            with (self.root / path).open("rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def upload(self, bundle: Path, manifest: bundles.Manifest, path: str) -> None:
        with _beside(self.root / path) as work:
            for name in (*manifest.files, bundles.MANIFEST):
                shutil.copyfile(bundle / name, work / name)
                _sync(work / name)
            bundles.verify(work)
            _rename(work, self.root / path)
        _sync((self.root / path).parent)

    def download(self, path: str, target: Path) -> None:
        shutil.copyfile(self.root / path, target)

    def local(self, path: str) -> Path | None:
        return self.root / path

    def remove(self, path: str, first: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / path / first).unlink()
            shutil.rmtree(self.root / path)

    def clear_abandoned(self, path: str, seconds: float) -> None:
        for work in (self.root / path).glob(".*-incoming-*"):
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
        self.fs.pipe_file(self._at(path), content)

    def write_if(self, path: str, content: bytes, tag: str | None) -> bool:
        if not self.conditional:
            now = self.read(path)
            if (now[1] if now else None) != tag:
                return False
            self.write(path, content)
            return True
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            self.fs.pipe_file(self._at(path), content, **condition)
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

    def size(self, path: str) -> int:
        return int(sum(self.fs.du(self._at(path), total=False).values()))

    def digest(self, path: str) -> str | None:
        hasher = hashlib.sha256()
        try:
            with self.fs.open(self._at(path), "rb", block_size=8 * CHUNK) as f:
                while block := f.read(CHUNK):
                    hasher.update(block)
        except FileNotFoundError:
            return None
        return hasher.hexdigest()

    def upload(self, bundle: Path, manifest: bundles.Manifest, path: str) -> None:
        # The manifest last: without it the version does not exist.
        for name in (*manifest.files, bundles.MANIFEST):
            self.fs.put_file(str(bundle / name), f"{self._at(path)}/{name}")

    def download(self, path: str, target: Path) -> None:
        self.fs.get_file(self._at(path), str(target))

    def local(self, path: str) -> Path | None:
        return None

    def remove(self, path: str, first: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self._at(path)}/{first}")
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


def _checked(version: str) -> str:
    if not isinstance(version, str) or not _VERSION.fullmatch(version) or ".." in version:
        raise InputError(f"{version!r} is not the name of a version")
    return version


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
        if not (target / bundles.MANIFEST).exists():  # half of one that was being removed
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
        bundles.verify(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
