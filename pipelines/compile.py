"""Compile the pipelines to KFP IR YAML."""

from pathlib import Path


def compile_all(folder: Path) -> list[Path]:
    """Write one YAML per pipeline into `folder` and return the paths."""
    from kfp import compiler

    from pipelines.train_and_deploy import train_and_deploy

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train_and_deploy.yaml"
    compiler.Compiler().compile(train_and_deploy, str(path))
    return [path]
