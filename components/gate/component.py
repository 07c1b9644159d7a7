"""KFP wrapper of the gate step."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    evaluation: dsl.Input[dsl.Artifact],
    settings: dict,
    verdict: dsl.Output[dsl.Artifact],
) -> bool:
    """Decide whether the candidate may be deployed."""
    from pathlib import Path

    from components.gate import steps

    return steps.run(Path(evaluation.path), Path(verdict.path), settings=settings)
