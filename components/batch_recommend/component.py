"""KFP wrapper of the batch of recommendations."""

from typing import Any

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def batch_recommend(
    clean: dsl.Input[dsl.Dataset],
    model_store: str,
    version: str,
    users: str,
    output: str,
    run_id: str,
    job: str,
    code: str,
    settings: dict[str, Any],
    summary: dsl.Output[dsl.Artifact],
) -> None:
    """Recommend to all users, or to a list of them, into Parquet files."""
    from pathlib import Path

    from components.batch_recommend import steps
    from components.digests import check_code

    check_code(code)
    record = steps.run(
        Path(clean.path),
        model_store,
        output,
        Path(summary.path),
        version=version,
        users=users,
        run_id=run_id or job,
        settings=settings,
    )
    summary.metadata["model_version"] = record["model_version"]
