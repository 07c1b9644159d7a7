"""KFP wrapper of the deploy step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(
    bundle: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    model_store: str,
    run_id: str,
    job: str,
    code: str,
    settings: dict[str, Any],
    deployment: dsl.Output[dsl.Artifact],
) -> None:
    """Publish the bundle to the model store and make it the champion."""
    from pathlib import Path

    from components.deploy import steps
    from components.digests import check_code

    check_code(code)
    record = steps.run(
        Path(bundle.path),
        Path(evaluation.path),
        Path(verdict.path),
        model_store,
        Path(deployment.path),
        settings=settings,
        run_id=run_id or job,
    )
    deployment.metadata["version"] = record["version"]
