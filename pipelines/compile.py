"""Compile the pipelines to KFP IR YAML."""

from pathlib import Path


def compile_all(folder: Path) -> list[Path]:
    """Write one YAML per pipeline into `folder` and return the paths."""
    from kfp import compiler

    from pipelines.batch_recommend import batch_recommend
    from pipelines.refresh_trends import refresh_trends
    from pipelines.train_and_deploy import train_and_deploy

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for pipeline in (train_and_deploy, refresh_trends, batch_recommend):
        paths.append(folder / f"{pipeline.name.replace('-', '_')}.yaml")
        compiler.Compiler().compile(pipeline, str(paths[-1]))
    return paths
