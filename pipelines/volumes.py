"""The volumes that pods mount: claims and the folders where they are found."""

import os
import posixpath
from collections.abc import Mapping

from model.errors import InputError

DEFAULT = "hrnn-stores=/stores"  # the claim of k8s/base/storage.yaml
VARIABLE = "HRNN_VOLUMES"


def volumes() -> Mapping[str, str]:
    """Folder by claim, from HRNN_VOLUMES (`CLAIM=/FOLDER,…`; empty: none).

    Raises:
        InputError: it cannot be read.
    """
    given = os.environ.get(VARIABLE, DEFAULT)
    found = {}
    for part in filter(None, given.split(",")):
        claim, equals, folder = part.strip().partition("=")
        if not claim or not equals or not folder.startswith("/") or folder.strip("/") == "":
            raise InputError(f"{VARIABLE}={given!r}: expected CLAIM=/FOLDER, with commas between")
        found[claim] = folder.rstrip("/")
    return found


def is_mounted(path: str) -> bool:
    """Whether an absolute path lies below a mounted folder."""
    whole = posixpath.normpath(path)
    return any(whole.startswith(f"{folder}/") for folder in volumes().values())
