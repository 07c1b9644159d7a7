"""The planted-pattern log of the end-to-end tests, as a user's own file, and `hrnn run` on it."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

ITEMS = 20
HRNN_RUN = (sys.executable, "-m", "pipelines.cli", "run")
FAST = {
    "train.max_epochs": 12,
    "train.batch_events": 256,
    "train.learning_rate": 0.01,
    "train.network": "{embedding: 16, hidden: 32, control: 8, dropout: 0.0}",
}


def hrnn_run(workspace, *arguments, settings=FAST):
    assignments = [p for k, v in settings.items() for p in ("--set", f"{k}={v}")]
    return subprocess.run(
        [
            *HRNN_RUN,
            "--json",
            "--workspace",
            workspace,
            *map(str, arguments),
            *assignments,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def write_log(path: Path, log) -> Path:
    """A user's own file: other column names, ISO times, one bad row."""
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["customer", "product_id", "when", "event"])
        for u, user in enumerate(log.user_ids):
            for e in range(log.offset_U1[u], log.offset_U1[u + 1]):
                when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(log.timestamp_E[e]))
                writer.writerow([user, f"item {log.item_E[e]}", when, "view"])
        writer.writerow(["u1", "item 1", "yesterday", "view"])
    return path


def interruptible() -> None:
    """For `preexec_fn`: a test run in the background hands down an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
