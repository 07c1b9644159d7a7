"""KFP wrapper of the evaluate step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    clean: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    model_store: str,
    code: str,
    settings: dict[str, Any],
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure the candidate, the champion and the baselines on held-out users."""
    from pathlib import Path

    from components.digests import check_code
    from components.evaluate import steps

    check_code(code)
    paths = (clean.path, bundle.path, evaluation.path, report.path)
    document = steps.run(
        *map(Path, paths),
        settings=settings,
        model_store=model_store,
        inputs={"clean": clean.uri, "bundle": bundle.uri},
    )
    for model, figures in document["models"].items():
        for metric, value in figures["every"].items():
            metrics.log_metric(f"{model} {metric}", value)
