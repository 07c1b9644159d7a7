"""The train step as a program, for one process or several: `torchrun -m components.train.job …`.

Each process trains its share of every batch (`model.distributed`); rank 0 writes the bundle. This
is what a Kubeflow TrainJob runs on every node (`k8s/training`). Exit code 2: the input is at fault.
"""

import argparse
import json
import sys
from pathlib import Path

from components.train import steps
from model.distributed import joined
from model.errors import HrnnError, InputError


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, join the other processes if there are any, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", type=Path, required=True, help="clean tables")
    parser.add_argument("--bundle", type=Path, required=True, help="folder to write the bundle to")
    parser.add_argument("--settings", type=json.loads, default={}, help="train settings, JSON")
    parser.add_argument("--trend", type=json.loads, default={}, help="trend settings, JSON")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that outlives this program, seen by all nodes"
    )
    parser.add_argument("--model-store", default="", help="where train.warm_start looks")
    parser.add_argument(
        "--start",
        help="version that train.warm_start means, so that a job created again goes on with the "
        "same; default: looked up now",
    )
    options = parser.parse_args(arguments)
    try:
        with joined():
            steps.run(
                options.clean,
                options.bundle,
                trend=options.trend,
                settings=options.settings,
                checkpoints=options.checkpoints,
                model_store=options.model_store,
                start=options.start,
            )
    except HrnnError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
