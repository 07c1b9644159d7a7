"""KFP wrapper of the gate step."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(
    evaluation: dsl.Input[dsl.Artifact],
    override: str,
    code: str,
    settings: dict[str, Any],
    verdict: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
) -> bool:
    """Decide whether the candidate may be deployed."""
    from pathlib import Path

    from components.digests import check_code
    from components.gate import steps

    check_code(code)
    result = steps.run(
        Path(evaluation.path), Path(verdict.path), settings=settings, override=override
    )
    Path(summary.path).write_text(steps.markdown(result))
    return result["deploy"]
