"""KFP wrapper of the exit handler."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report_outcome(
    pipeline: str,
    run_id: str,
    job: str,
    job_id: str,
    model_store: str,
    deploy: dict[str, Any],
    status: dsl.PipelineTaskFinalStatus,
    outcome: dsl.Output[dsl.Artifact],
) -> None:
    """Settle what the run left half done and say how it ended; runs whatever happened before.

    HRNN_NOTIFY_URL is a variable and no parameter: such addresses hold tokens, and parameters are
    shown and logged.
    """
    import os
    from pathlib import Path

    from components.outcome import steps

    def settle() -> Any:
        from components.deploy.settle import run

        return run(model_store, deploy, run_id or job_id, seconds=steps.SETTLE_SECONDS)

    steps.run(
        Path(outcome.path),
        pipeline=pipeline,
        run_id=run_id or job,
        state=status.state,
        step=status.pipeline_task_name or "",
        error=status.error_message or "",
        notify=os.environ.get("HRNN_NOTIFY_URL", ""),
        settle=settle,
    )
