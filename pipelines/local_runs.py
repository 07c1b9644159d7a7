"""What became of the runs of a workspace, read from what they left in their folders."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from model.errors import InputError
from pipelines.endpoint import Run, Step
from pipelines.local_process import is_under_way
from pipelines.local_runner import BATCH_STEPS, STEPS
from pipelines.run_log import LogReader

ORDER: Mapping[str, tuple[str, ...]] = {"train_and_deploy": STEPS, "batch_recommend": BATCH_STEPS}
# Kubeflow's words, so that both kinds of runs are told alike.
_STATES = {"done": "SUCCEEDED", "done before": "SKIPPED", "failed": "FAILED", "running": "RUNNING"}


def newest(workspace: Path, limit: int) -> list[Run]:
    """The newest runs, with their steps."""
    folders = sorted((workspace / "runs").glob("*/run.json"), reverse=True)[:limit]
    return [_read(folder.parent) for folder in folders]


def find(workspace: Path, run_id: str) -> Run:
    """One run.

    Raises:
        InputError: there is none of this id.
    """
    folder = workspace / "runs" / run_id
    if not (folder / "run.json").is_file():
        raise InputError(f"no run {run_id} in {workspace}: `hrnn status` lists them")
    return _read(folder)


def log_of(workspace: Path, run_id: str) -> Path:
    """The full log of a run."""
    return workspace / "runs" / run_id / "run.log"


def _read(folder: Path) -> Run:
    pipeline = str(json.loads((folder / "run.json").read_text())["pipeline"])
    result, error = folder / "result.json", folder / "error.txt"
    reader = LogReader(lambda _: None, ORDER.get(pipeline, ()), verbose=False)
    if (folder / "run.log").exists():
        with (folder / "run.log").open(errors="replace") as log:
            for line in log:
                reader.read(line)
    ended = next((path for path in (result, error) if path.exists()), None)
    state = "SUCCEEDED" if ended == result else "FAILED"
    if ended is None:
        running = is_under_way(folder.parents[1], pipeline, folder.name)
        state = "RUNNING" if running else "CANCELED"  # killed or interrupted: it left no word
    return Run(
        run_id=folder.name,
        name=pipeline,
        state=state,
        created_at=_moment((folder / "run.json").stat().st_mtime),
        finished_at=_moment(ended.stat().st_mtime) if ended else "",
        error=error.read_text().strip() if ended == error else "",
        steps=tuple(
            Step(name, "CANCELED" if state == "CANCELED" and s == "running" else _STATES[s], "")
            for name, s in reader.states.items()
        ),
        pipeline=pipeline.replace("_", "-"),
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
