"""The offline sources in an object store, with a working copy under the root.

Feast reads Parquet in object storage by an extension that DuckDB downloads when it is first used,
which a cluster without a way out cannot. So steps `pull` what has changed before they read, and
`push` what they have changed. One step that writes at a time per store.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.connection import unavailable
from feature_repo.settings import FeatureStoreSettings

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

APPLIED = "applied.json"  # what `store.apply` was given; travels with the sources
_INDEX = ".sources.json"  # file → its remote and its local state when both were last equal

_Index = dict[str, dict[str, Any]]


def pull(settings: FeatureStoreSettings) -> int:
    """Make the working copy equal to the object store; returns the files fetched.

    An empty store (before the first run) leaves the copy as it is; so do sources that are not in
    an object store.

    Raises:
        UnavailableError: it cannot be read.
    """
    if settings.sources_uri is None:
        return 0
    with unavailable("fetch the feature sources"):
        fs, base = _open(settings.sources_uri)
        remote = _remote(fs, base)
        if not remote:
            return 0
        settings.path.mkdir(parents=True, exist_ok=True)  # a pod's own, empty at first
        index, fetched = _read_index(settings), 0
        for name in sorted(_local(settings).keys() - remote.keys()):
            _path(settings, name).unlink()
        for name, state in remote.items():
            path = _path(settings, name)
            known = index.get(name, {})
            if known.get("remote") != state or known.get("local") != _state(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".pull-", dir=settings.path) as scratch:
                    fs.get_file(f"{base}/{name}", str(Path(scratch) / "file"))
                    (Path(scratch) / "file").replace(path)
                fetched += 1
            index[name] = {"remote": state, "local": _state(path)}
        _write_index(settings, {name: index[name] for name in remote})
        return fetched


def push(settings: FeatureStoreSettings) -> int:
    """Make the object store equal to the working copy; returns the files sent.

    New content goes first, what is gone last: a reader in between finds too much, not too little.

    Raises:
        UnavailableError: it cannot be written.
    """
    if settings.sources_uri is None:
        return 0
    with unavailable("store the feature sources"):
        fs, base = _open(settings.sources_uri)
        index, local = _read_index(settings), _local(settings)
        remote = _remote(fs, base)
        changed = [
            name
            for name, state in local.items()
            if index.get(name) != {"remote": remote.get(name), "local": state}
        ]
        for name in changed:
            fs.put_file(str(_path(settings, name)), f"{base}/{name}")
        for name in sorted(remote.keys() - local.keys()):
            fs.rm_file(f"{base}/{name}")
        remote = _remote(fs, base)
        _write_index(settings, {n: {"remote": remote[n], "local": s} for n, s in local.items()})
        return len(changed)


def _open(uri: str) -> "tuple[AbstractFileSystem, str]":
    import fsspec

    fs, base = fsspec.url_to_fs(uri, use_listings_cache=False)
    return fs, base.rstrip("/")


def _remote(fs: "AbstractFileSystem", base: str) -> dict[str, Any]:
    """Name → what tells two contents apart."""
    try:
        found = fs.find(base, detail=True)
    except FileNotFoundError:
        return {}
    return {
        path.removeprefix(f"{base}/"): [info["size"], str(info.get("ETag") or info.get("created"))]
        for path, info in found.items()
        if path.startswith(f"{base}/")
    }


def _path(settings: FeatureStoreSettings, name: str) -> Path:
    return settings.path / name if name == APPLIED else settings.sources / name


def _local(settings: FeatureStoreSettings) -> dict[str, Any]:
    paths = [*settings.sources.rglob("*.parquet"), settings.path / APPLIED]
    names = {
        path.name if path.name == APPLIED else path.relative_to(settings.sources).as_posix(): path
        for path in paths
        if path.is_file() and not path.parent.name.startswith(".")
    }
    return {name: _state(path) for name, path in names.items()}


def _state(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _read_index(settings: FeatureStoreSettings) -> _Index:
    try:
        return json.loads((settings.path / _INDEX).read_text())
    except (OSError, ValueError):
        return {}  # everything is compared anew


def _write_index(settings: FeatureStoreSettings, index: _Index) -> None:
    handle, temporary = tempfile.mkstemp(dir=settings.path, prefix=_INDEX)
    with os.fdopen(handle, "w") as file:
        json.dump(index, file)
    Path(temporary).replace(settings.path / _INDEX)
