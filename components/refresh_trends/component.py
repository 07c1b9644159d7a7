"""KFP wrapper of the trends' refresh."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def refresh_trends(
    interactions: str,
    feature_store: str,
    code: str,
    settings: dict[str, Any],
    trend: dsl.Output[dsl.Artifact],
) -> None:
    """Count the newest window of the log and put the snapshot in force."""
    from pathlib import Path

    from components.digests import check_code
    from components.refresh_trends import steps

    check_code(code)
    summary = steps.run(interactions, feature_store, settings, Path(trend.path))
    trend.metadata["trend_version"] = summary["trend_version"]
