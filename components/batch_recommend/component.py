"""KFP wrapper of the batch of recommendations."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def batch_recommend(
    clean: dsl.Input[dsl.Dataset],
    model_store: str,
    version: str,
    users: str,
    output: str,
    settings: dict,
    summary: dsl.Output[dsl.Artifact],
) -> None:
    """Recommend to all users, or to a list of them, into Parquet files."""
    from pathlib import Path

    from components.batch_recommend import steps

    record = steps.run(
        Path(clean.path),
        model_store,
        output,
        Path(summary.path),
        version=version,
        users=users,
        settings=settings,
    )
    summary.metadata["model_version"] = record["model_version"]
