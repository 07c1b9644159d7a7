"""Digests of code and of data: parts of cache keys and of every model's lineage."""

import hashlib
import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("components", "feature_repo", "model")  # all that a step's outputs depend on
SUFFIXES = {".py", ".yaml", ".j2"}


@cache
def code_digest() -> str:
    """12 hexadecimal digits that change with any source file of the steps.

    HRNN_CODE_DIGEST, if set, is taken instead: an image may bring the digest it was built with.
    """
    if given := os.environ.get("HRNN_CODE_DIGEST"):
        return given
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def tables_digest(folder: Path) -> str:
    """SHA-256 over the files of a tables directory, by name and content.

    `source.json` and reports stay out: they say where the same data came from, and when.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")):
        with path.open("rb") as f:
            content = hashlib.file_digest(f, "sha256").digest()
        digest.update(f"{path.name}\0".encode() + content)
    return digest.hexdigest()
