"""Runs one pipeline with kfp.local; started as a process of its own by `local_runner`.

kfp.local swaps the root logger's handlers and `print` and cannot be stopped half-way; in a child
process neither matters.
"""

import json
import sys
import warnings
from importlib import import_module
from pathlib import Path


def main() -> int:
    """Read {"pipeline", "arguments", "root"} from the file named on the command line; run it.

    `pipeline` is the name of a module in this package and of the pipeline in it.
    """
    spec = json.loads(Path(sys.argv[1]).read_text())
    # Accelerators, retries' waits and the like have no meaning on a laptop; kfp warns of each.
    warnings.simplefilter("ignore")
    from kfp import local

    pipeline = getattr(import_module(f"pipelines.{spec['pipeline']}"), spec["pipeline"])
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=spec["root"],
        raise_on_error=True,
        enable_caching=False,
    )
    try:
        pipeline(**spec["arguments"])
    except RuntimeError as error:  # how kfp.local reports a failed step
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
