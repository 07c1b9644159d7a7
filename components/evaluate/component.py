"""KFP wrapper of the evaluate step."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    clean: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    settings: dict,
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Measure the candidate and the baselines on held-out users."""
    from pathlib import Path

    from components.evaluate import steps

    paths = (clean.path, bundle.path, evaluation.path, report.path)
    steps.run(*map(Path, paths), settings=settings)
