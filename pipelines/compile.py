"""Compile the pipelines to KFP IR YAML."""

from importlib import import_module
from pathlib import Path

PIPELINES = ("train_and_deploy", "refresh_trends", "batch_recommend")


def compile_all(folder: Path) -> list[Path]:
    """Write one YAML per pipeline into `folder` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [compile_one(pipeline, folder) for pipeline in PIPELINES]


def compile_one(pipeline: str, folder: Path) -> Path:
    """Write the pipeline's YAML, as of this code, into `folder`; the same text every time."""
    from kfp import compiler

    path = folder / f"{pipeline}.yaml"
    function = getattr(import_module(f"pipelines.{pipeline}"), pipeline)
    compiler.Compiler().compile(function, str(path))
    # KFP's comment at the head tells defaults in another order every time.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("#")))
    return path
