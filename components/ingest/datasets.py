"""Datasets known by name, kept in a checksummed cache.

To add one: write a function that puts canonical Parquet tables into a folder and returns where
they came from, and list it in `DATASETS`.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from components.ingest.movielens import load_100k
from components.ingest.reader import sha256
from components.tables import ITEMS, TABLES, USERS, table_path
from model.errors import InputError, UnavailableError
from model.schema import FieldKind

_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class NamedDataset:
    """How to obtain a dataset, its terms, and the kinds of its fields."""

    load: Callable[[Path], str]
    licence: str
    fields: dict[str, dict[str, FieldKind]] = field(default_factory=dict)
    version: int = 1  # raise when `load` writes something else, so that caches are renewed


DATASETS: dict[str, NamedDataset] = {
    "movielens-100k": NamedDataset(
        load=load_100k,
        licence=(
            "GroupLens Research, University of Minnesota: research use with acknowledgement"
            " (Harper & Konstan 2015), no redistribution, no commercial use without permission;"
            " https://grouplens.org/datasets/movielens/100k/"
        ),
        fields={
            USERS: {
                "age": FieldKind.NUMERIC,
                "gender": FieldKind.CATEGORICAL,
                "occupation": FieldKind.CATEGORICAL,
            },
            ITEMS: {"year": FieldKind.NUMERIC, "genres": FieldKind.MULTI_CATEGORICAL},
        },
    ),
}


def find(name: str) -> NamedDataset:
    """Look a dataset up.

    Raises:
        InputError: no such name; lists the names there are.
    """
    if name not in DATASETS:
        raise InputError(
            f"no dataset is called {name!r} (known: {', '.join(sorted(DATASETS))}); for your own"
            " data give a CSV or Parquet file of interactions instead"
        )
    return DATASETS[name]


def obtain(name: str, cache: Path) -> tuple[Path, str]:
    """Folder with the dataset's tables, and where they came from; downloads at most once.

    A cached copy is used only if every checksum still holds. A new one appears in one rename, so
    a killed download leaves nothing half-finished under the dataset's name.
    """
    dataset = find(name)
    folder = cache / name
    origin = _verified(folder, dataset.version)
    if origin is not None:
        print(f"{name}: using the copy in {folder}")
        return folder, origin
    if folder.exists():
        print(f"{name}: the copy in {folder} is damaged or outdated; downloading again")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    except OSError as error:
        raise UnavailableError(f"the dataset cache {cache} cannot be written: {error}") from None
    try:
        origin = dataset.load(scratch)
        digests = {
            p.name: sha256(p) for p in (table_path(scratch, t) for t in TABLES) if p.exists()
        }
        record = {"version": dataset.version, "origin": origin, "sha256": digests}
        (scratch / _CHECKSUMS).write_text(json.dumps(record, indent=2) + "\n")
        scratch.chmod(0o755)  # mkdtemp's folders are private; a cache is shared
        _replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{name}: downloaded from {origin}")
    print(f"{name}: {dataset.licence}")
    return folder, origin


def _verified(folder: Path, version: int) -> str | None:
    """The origin recorded in a cached copy, or None when it cannot be trusted."""
    try:
        record = json.loads((folder / _CHECKSUMS).read_text())
        if record["version"] == version and all(
            sha256(folder / file) == digest for file, digest in record["sha256"].items()
        ):
            return str(record["origin"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def _replace(new: Path, target: Path) -> None:
    """Move a folder to its name, whatever was there before."""
    if target.exists():
        # A folder cannot be renamed onto a filled one; the old copy goes first.
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            target.replace(old / "copy")
        shutil.rmtree(old, ignore_errors=True)
    try:
        new.replace(target)
    except OSError:
        # Another process has just put its own, equally good copy there.
        if not target.exists():
            raise
