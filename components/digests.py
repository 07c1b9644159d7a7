"""Digests of code and of data: parts of cache keys and of every model's lineage."""

import hashlib
import os
import sys
from functools import cache
from pathlib import Path

from model.errors import InputError

ROOT = Path(__file__).parents[1]
ROOMS = ("components", "feature_repo", "model")  # all that a step's outputs depend on
SUFFIXES = {".py", ".yaml", ".j2"}


@cache
def code_digest() -> str:
    """12 hexadecimal digits that change with any source file of the steps.

    An image computes its own from the files it holds. HRNN_CODE_DIGEST, if set, is taken instead:
    to submit runs for an image whose code is not here.
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


def check_code(expected: str) -> None:
    """Refuse to work for a run that was submitted for other code than this.

    Outputs are cached by the digest that the run names, so it has to be true; and the bodies of
    the steps travel with the run, while all they call is the image's.

    Raises:
        InputError: names both.
    """
    if (own := code_digest()) != expected:
        raise InputError(
            f"this run was started for the code {expected or '(none)'}, but this step would run "
            f"{own}. In a cluster: build and push the image from the code you submit with, or set "
            f"HRNN_CODE_DIGEST={own} to submit for this image. On a laptop: files were changed "
            "meanwhile, run it again"
        )


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


def main(arguments: list[str]) -> int:
    """Print the digest; 1 if another one was expected."""
    print(code_digest())
    if arguments and arguments != [code_digest()]:
        print(f"error: expected {arguments[0]}: are files missing here?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
