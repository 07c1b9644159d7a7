"""Side by side with RecBole's GRU4Rec at its defaults, on MovieLens-100K: speed and accuracy.

    python -m venv recbole && recbole/bin/pip install recbole==1.2.1 "numpy<2" ray
    python -m benchmarks.peers --clean DIR --recbole recbole/bin/python
    python -m benchmarks.peers --clean DIR --recbole recbole/bin/python --equal-seconds 40 120

RecBole pins other versions of its dependencies, so it runs in an environment of its own, whose
interpreter is given. DIR holds clean tables of MovieLens-100K (`hrnn run` leaves them in its
workspace). Both train whole epochs on the same machine, one after the other, on the same
interactions: RecBole on its augmented prefixes (every prefix of a history is a row of its own),
which is its way to use an event; ours on rolling histories. An event is one interaction that is
predicted once per epoch. Hidden size and catalogue are the same for both; the epoch is whole:
preparing batches, steps, and nothing of the evaluation.

With `--equal-seconds` both train for as long (steps and their preparation; validation and making
ready do not count), as many whole epochs as fit, RecBole one at least, and each keeps the epoch
that its validation likes best. Split, ranking and measures are the same: every user's last event is
tested, the one before it validates, all items are ranked, none removed. The seconds that each took
are printed: ours never take longer than RecBole's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.evaluation import outcomes
from model.hrnn import TrainedHRNN
from model.network import NetworkSettings
from model.splits import SplitSettings, leave_one_out, split_users
from model.tables import Log
from model.train_settings import TrainSettings
from model.training import fit
from model.trends import TrendSettings, choose_trend

# Run by RecBole's interpreter: trains and prints one JSON line of the seconds of every epoch.
RECBOLE = """
import json, sys, time
import numpy as np
import scipy.sparse
if not hasattr(scipy.sparse.dok_matrix, "_update"):  # removed from SciPy; RecBole still calls it
    scipy.sparse.dok_matrix._update = lambda self, d: self._dict.update(d)
import torch
load = torch.load
torch.load = lambda *a, **k: load(*a, **{**k, "weights_only": False})
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import GRU4Rec
from recbole.trainer import Trainer
from recbole.utils import init_seed
folder, epochs, hidden, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
config = Config(model="GRU4Rec", dataset="log", config_dict={
    "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "train_neg_sample_args": None, "epochs": epochs, "hidden_size": hidden, "use_gpu": False,
    "show_progress": False, "state": "ERROR", "checkpoint_dir": folder,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}})
init_seed(config["seed"], True)
dataset = create_dataset(config)
train, valid, test = data_preparation(config, dataset)
model = GRU4Rec(config, train.dataset)
trainer = Trainer(config, model)
limit, curve, total = float(sys.argv[5]), [], 0.0
for epoch in range(epochs):
    started = time.perf_counter()
    trainer._train_epoch(train, epoch, show_progress=False)
    seconds = time.perf_counter() - started
    if curve and limit and total + seconds > limit:
        break
    total += seconds
    row = {"seconds": seconds, "total": total}
    for name, data in (("valid", valid), ("test", test)) if limit else ():
        found = trainer.evaluate(data, load_best_model=False, show_progress=False)
        row[name] = {"ndcg@10": found["ndcg@10"], "hit@10": found["hit@10"]}
    curve.append(row)
print(json.dumps({"curve": curve, "events": len(train.dataset)}))
"""


def recbole(
    interpreter: Path, interactions: pa.Table, epochs: int, hidden: int, limit: float = 0.0
) -> dict[str, Any]:
    """RecBole's epochs on these interactions: seconds, and with a limit of them accuracy too."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "log"
        folder.mkdir()
        columns = (interactions.column(c).to_pylist() for c in ("user_id", "item_id"))
        # The row's number as its time: RecBole reads it as float32, which would make minutes one,
        # and the events that are tested others than ours. The table is in order of user and time.
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        lines += [f"{u}\t{i}\t{t}" for t, (u, i) in enumerate(zip(*columns, strict=True))]
        (folder / "log.inter").write_text("\n".join(lines) + "\n")
        numbers = map(str, (epochs, hidden, torch.get_num_threads(), limit))
        done = subprocess.run(
            [interpreter, "-c", RECBOLE, folder.parent, *numbers],
            capture_output=True,
            text=True,
            cwd=name,
            check=False,
        )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def ours(clean: Path, epochs: int, network: NetworkSettings, trend: bool) -> dict[str, Any]:
    """Seconds of our epochs, steps and preparation of batches without the validation."""
    log = Log.read(clean)
    split = split_users(log.histories, SplitSettings())
    resolved = choose_trend(
        log.histories.item_E, log.histories.timestamp_E, len(log.catalogue), TrendSettings()
    )
    settings = TrainSettings(network=network, max_epochs=epochs)
    valid = split.valid
    model = fit(
        split.train, valid, log.catalogue, settings, resolved if trend else None, log.schema
    )
    speeds = [entry["train_events_per_second"] for entry in model.curve[1:]]
    return {"events_per_second": float(np.median(speeds)), "events": split.train.num_events}


def accurate(clean: Path, network: NetworkSettings, trend: bool, limit: float) -> dict[str, Any]:
    """Ours after as many epochs as `limit` seconds of training hold: accuracy on the last events.

    How many epochs those are, a run of two says.
    """
    log = Log.read(clean)
    split = leave_one_out(log.histories)
    train, valid, test = split.train, split.valid, split.test
    resolved = choose_trend(train.item_E, train.timestamp_E, len(log.catalogue), TrendSettings())

    def run(epochs: int) -> tuple[TrainedHRNN, float]:
        settings = TrainSettings(network=network, max_epochs=epochs)
        model = fit(train, valid, log.catalogue, settings, resolved if trend else None, log.schema)
        speeds = [entry["train_events_per_second"] for entry in model.curve[1:]]
        return model, sum(train.num_events / speed for speed in speeds)

    _, seconds = run(2)
    epochs = max(1, int(2 * limit / seconds))
    model, seconds = run(epochs)
    while seconds > limit and epochs > 1:  # it was slower than the first two epochs
        epochs = max(1, min(epochs - 1, int(epochs * limit / seconds)))
        model, seconds = run(epochs)
    rank_N = outcomes(model, test, len(log.catalogue), 10).rank_E[test.event_N]
    hit_N = rank_N <= 10
    return {
        "ndcg@10": float(np.where(hit_N, 1 / np.log2(1 + rank_N), 0.0).mean()),
        "hit@10": float(hit_N.mean()),
        "epochs": model.curve[-1]["epoch"],
        "total": seconds,
    }


def equal_time(options: argparse.Namespace, interactions: pa.Table, plain: NetworkSettings) -> int:
    """Accuracy of all after the same seconds of training."""
    limits = sorted(options.equal_seconds)
    theirs = recbole(options.recbole, interactions, 10_000, options.hidden, limits[-1])["curve"]
    print(
        "| training | asked for | trained | epochs | NDCG@10 | HR@10 |\n|---|---|---|---|---|---|"
    )
    for limit in limits:
        within = [row for row in theirs if row["total"] <= limit] or theirs[:1]
        best = max(within, key=lambda row: row["valid"]["ndcg@10"])
        limit = max(limit, within[-1]["total"])
        rows = {
            "RecBole GRU4Rec": {
                **best["test"],
                "epochs": len(within),
                "total": within[-1]["total"],
            },
            "ours, the plain network": accurate(options.clean, plain, False, limit),
            "ours, as it comes": accurate(options.clean, NetworkSettings(), True, limit),
        }
        for name, row in rows.items():
            print(
                f"| {name} | {limit:.0f} s | {row['total']:.0f} s | {row['epochs']} | "
                f"{row['ndcg@10']:.4f} | {row['hit@10']:.4f} |",
                flush=True,
            )
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--recbole", type=Path, required=True, help="RecBole's Python interpreter")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--equal-seconds", type=float, nargs="+", help="accuracy after as long")
    options = parser.parse_args(arguments)
    interactions = pq.read_table(options.clean / "interactions.parquet")
    plain = NetworkSettings(
        hidden=options.hidden,
        transitions=False,
        repeats=False,
        user_fields=False,
        item_fields=False,
        feedback=False,
        request_context=False,
        ratings=False,
    )
    if options.equal_seconds:
        return equal_time(options, interactions, plain)
    rows = {
        "ours, the plain network": ours(options.clean, options.epochs, plain, False),
        "ours, as it comes": ours(options.clean, options.epochs, NetworkSettings(), True),
    }
    theirs = recbole(options.recbole, interactions, 1, options.hidden)
    rows["RecBole GRU4Rec"] = {
        "events_per_second": theirs["events"] / min(row["seconds"] for row in theirs["curve"]),
        "events": theirs["events"],
    }
    base = rows["RecBole GRU4Rec"]["events_per_second"]
    print("| training | events | events/s | against RecBole |\n|---|---|---|---|")
    for name, row in rows.items():
        speed = row["events_per_second"]
        print(f"| {name} | {row['events']:,} | {speed:,.0f} | {speed / base:.1f} |")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
