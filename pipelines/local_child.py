"""Runs one pipeline with kfp.local; started as a process of its own by `local_runner`.

kfp.local swaps the root logger's handlers and `print` and cannot be stopped half-way; in a child
process neither matters.
"""

import json
import sys
import warnings
from pathlib import Path


def main() -> int:
    """Read {"arguments", "root"} from the file named on the command line and run it."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    # Accelerators, retries' waits and the like have no meaning on a laptop; kfp warns of each.
    warnings.simplefilter("ignore")
    from kfp import local

    from pipelines.train_and_deploy import train_and_deploy

    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=spec["root"],
        raise_on_error=True,
        enable_caching=False,
    )
    try:
        train_and_deploy(**spec["arguments"])
    except RuntimeError as error:  # how kfp.local reports a failed step
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
