"""Runs one pipeline with kfp.local; started as a process of its own by `local_process`.

kfp.local swaps the root logger's handlers and `print` and cannot be stopped half-way; in a child
process neither matters.
"""

import json
import os
import signal
import sys
import threading
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: when it is gone, so is this process group.

    Whoever killed it may start the run again at once, and then two would write to the stores.
    """

    def wait() -> None:
        # Not through sys.stdin: its lock would be in the way when the interpreter ends.
        while os.read(0, 1024):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _wait_for_the_step() -> None:
    """SIGTERM goes to the whole process group: its step ends in its way, and none is begun after.

    Were this process gone first, the step could not even print while it takes things back.
    """
    stopped = threading.Event()

    def begin(event: str, _: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and stopped.is_set():
            raise RuntimeError("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # steps do not inherit a function
    sys.addaudithook(begin)


def for_this_machine(spec: Any, *, source_known: bool) -> None:
    """Adapt a pipeline's specification (in place): the DAG stays as it is.

    Retries are for nodes that go away and would only delay the user's error here. Ingest is cached
    when its source has a digest.
    """
    dags = [spec.root.dag, *(component.dag for component in spec.components.values())]
    for dag in dags:
        for name, task in dag.tasks.items():
            task.ClearField("retry_policy")
            if name == "ingest":
                task.caching_options.enable_cache = source_known


def main() -> int:
    """Run what the file named on the command line says.

    It holds `pipeline`, the name of a module in this package and of the pipeline in it,
    `arguments`, `run_id` for pipelines that record it, `root` for the artifacts, and `cache`, the
    folder of the cache's entries, null for none.
    """
    _end_with_parent()
    _wait_for_the_step()
    spec = json.loads(Path(sys.argv[1]).read_text())
    # Accelerators, retries' waits and the like have no meaning on a laptop; kfp warns of each.
    warnings.simplefilter("ignore")
    from kfp import local

    pipeline = getattr(import_module(f"pipelines.{spec['pipeline']}"), spec["pipeline"])
    arguments = spec["arguments"]
    if "run_id" in pipeline.component_spec.inputs:
        arguments["run_id"] = spec["run_id"]
    source_known = bool(arguments.get("source_digest"))
    for_this_machine(pipeline.pipeline_spec, source_known=source_known)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=spec["root"],
        raise_on_error=True,
        enable_caching=spec["cache"] is not None,
        cache_root=spec["cache"],
    )
    try:
        pipeline(**arguments)
    except RuntimeError as error:  # how kfp.local reports a failed step
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
