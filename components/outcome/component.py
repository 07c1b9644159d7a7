"""KFP wrapper of the exit handler."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report_outcome(
    pipeline: str,
    run_id: str,
    job: str,
    status: dsl.PipelineTaskFinalStatus,
    outcome: dsl.Output[dsl.Artifact],
) -> None:
    """Say how the run ended; runs whatever happened before.

    HRNN_NOTIFY_URL is a variable and no parameter: such addresses hold tokens, and parameters are
    shown and logged.
    """
    import os
    from pathlib import Path

    from components.outcome import steps

    steps.run(
        Path(outcome.path),
        pipeline=pipeline,
        run_id=run_id or job,
        state=status.state,
        step=status.pipeline_task_name or "",
        error=status.error_message or "",
        notify=os.environ.get("HRNN_NOTIFY_URL", ""),
    )
