"""Which feature store a command works on."""

import os
from pathlib import Path

from feature_repo.settings import FeatureStoreSettings


def in_use(workspace: Path) -> FeatureStoreSettings:
    """What commands that keep a store in use up to date work on, with an absolute root.

    The store that HRNN_FEATURE_ROOT and the like name, which servers elsewhere read, else the
    workspace's. Commands that fill a store from any data (`hrnn run`, `hrnn demo`) take the
    workspace's alone: a variable that was left set must not replace what is served.

    Raises:
        InputError: a variable does not fit.
    """
    if os.environ.get("HRNN_FEATURE_ROOT"):
        named = FeatureStoreSettings.from_env()
        return named.model_copy(update={"root": str(named.path)})
    return FeatureStoreSettings(root=str((workspace / "features").absolute()))
