"""Warm start: which model training begins with, as a version, so that it can be told and cached.

"The champion" is another model tomorrow; its version is not. A step of its own, which always runs,
because training is not done again for the same inputs.
"""

from pathlib import Path

from model.errors import InputError
from model.manifest import MANIFEST, parse_manifest
from model.store import ModelStore

NONE, CHAMPION = "none", "champion"


def resolve(wanted: str, model_store: str) -> str:
    """The version of the model that `train.warm_start` means now; "" for a start at random.

    Args:
        wanted: none, champion, a version of the store, or a bundle's folder.
        model_store: folder or address; "": there is none.

    Raises:
        InputError: there is no such version, or no model store to look for it in.
        BundleError: the manifest of the folder is damaged.
        UnavailableError: the store cannot be read.
    """
    if wanted == NONE:
        return ""
    if (manifest := Path(wanted) / MANIFEST).exists():
        return parse_manifest(manifest.read_bytes(), wanted).model_version
    if not model_store:
        raise InputError(
            f"train.warm_start: {wanted!r} is no bundle's folder, and no model store is given"
        )
    store = ModelStore(model_store)
    if wanted == CHAMPION:
        champion = store.champion()
        return "" if champion is None else champion.version
    try:
        return store.version(wanted).version
    except InputError as error:
        raise InputError(f"train.warm_start: {error}") from None


def told(wanted: str, version: str) -> str:
    """What became of `train.warm_start`, for a person."""
    if version:
        return f"warm start: version {version}"
    if wanted == NONE:
        return "training starts at random"
    return "warm start: the model store has no champion yet, training starts at random"
