"""KFP wrapper of the features step."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def features(
    clean: dsl.Input[dsl.Dataset],
    feature_store: str,
    trend: dict,
    settings: dict,
    features: dsl.Output[dsl.Dataset],
) -> None:
    """Write the Feast sources, register them, load the online store."""
    from pathlib import Path

    from components.features import steps

    steps.run(Path(clean.path), feature_store, Path(features.path), trend=trend, settings=settings)
