"""KFP wrapper of the features step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def features(
    clean: dsl.Input[dsl.Dataset],
    feature_store: str,
    trend: dict[str, Any],
    code: str,
    settings: dict[str, Any],
    features: dsl.Output[dsl.Artifact],
) -> None:
    """Write the feature sources, register them and fill the online store."""
    from pathlib import Path

    from components.digests import check_code
    from components.features import steps

    check_code(code)
    summary = steps.run(
        Path(clean.path), feature_store, trend, settings, output_dir=Path(features.path)
    )
    features.metadata["trend_version"] = summary["trend_version"]
