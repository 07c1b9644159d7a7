"""KFP wrapper of the train step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    clean: dsl.Input[dsl.Dataset],
    data_digest: str,
    code: str,
    trend: dict[str, Any],
    settings: dict[str, Any],
    checkpoints: str,
    model_store: str,
    start: str,
    bundle: dsl.Output[dsl.Model],
) -> None:
    """Train HRNN on the clean tables and write a model bundle.

    `checkpoints`: a folder where an interrupted step finds what it had done; empty: none.
    `model_store`: where the older model of `start`, a version, is; empty: a start at random.
    `data_digest` is a part of the cache's key and nothing else.
    """
    from pathlib import Path

    from components.digests import check_code
    from components.train import steps

    check_code(code)
    manifest = steps.run(
        Path(clean.path),
        Path(bundle.path),
        trend=trend,
        settings=settings,
        checkpoints=Path(checkpoints) if checkpoints else None,
        model_store=model_store,
        start=start,
    )
    bundle.metadata["model_version"] = manifest.model_version
