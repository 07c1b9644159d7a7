"""The manifest of a bundle: its version and the digest of every file (`model.bundle`).

Apart from what loads models, so that those who only move or check bundles need no PyTorch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from model.errors import BundleError

FORMAT = "hrnn-meta-bundle"
FORMAT_VERSION = 6
READ_VERSIONS = (5, 6)  # 5 knows nothing of what `model.new_items` fits
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`; `files` maps a file's name to its SHA-256."""

    format: str
    format_version: int
    model_version: str
    created: str
    files: dict[str, str]


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read a manifest's text and check format, version and file names.

    Raises:
        BundleError: says which check failed; `where` is the bundle it is of.
    """
    try:
        manifest = Manifest(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise BundleError(f"{where}/{MANIFEST} is not a bundle manifest: {error}") from None
    if manifest.format != FORMAT:
        raise BundleError(f"{where} holds a {manifest.format!r}, not a {FORMAT}")
    if manifest.format_version not in READ_VERSIONS:
        raise BundleError(
            f"{where} has bundle format {manifest.format_version}; this release reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: retrain, or serve it with the release that "
            "wrote it"
        )
    if not isinstance(manifest.files, dict):
        raise BundleError(f"{where}/{MANIFEST}: 'files' is not an object")
    for name in manifest.files:
        if Path(name).name != name:
            raise BundleError(f"{where}/{MANIFEST} names a file outside the bundle: {name!r}")
    return manifest


def verify(path: Path) -> Manifest:
    """Check format, version, file list and every digest, reading no file's contents otherwise.

    Raises:
        BundleError: says which check failed.
    """
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is not a model bundle: it has no {MANIFEST}") from None
    manifest = parse_manifest(content, str(path))
    for name, digest in manifest.files.items():
        if not (path / name).is_file():
            raise BundleError(f"{path} is incomplete: {name} is missing")
        if digest_of_file(path / name) != digest:
            raise BundleError(f"{path / name} does not match its digest: corrupt or changed")
    extra = {f.name for f in path.iterdir()} - manifest.files.keys() - {MANIFEST}
    if extra:
        raise BundleError(f"{path} holds files that its manifest does not list: {sorted(extra)}")
    return manifest


def digest_of_file(path: Path) -> str:
    """SHA-256, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
