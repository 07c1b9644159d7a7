"""KFP wrapper of the deploy step."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def deploy(
    bundle: dsl.Input[dsl.Model],
    verdict: dsl.Input[dsl.Artifact],
    model_store: str,
    settings: dict,
    deployment: dsl.Output[dsl.Artifact],
) -> None:
    """Publish the bundle to the model store and make it the champion."""
    from pathlib import Path

    from components.deploy import steps

    paths = (Path(bundle.path), Path(verdict.path), model_store, Path(deployment.path))
    steps.run(*paths, settings=settings)
