"""What the control input is worth (§2.2): PPL with and without time, same data, several seeds.

python -m experiments.time_ablation --clean workspace/runs/<run>/…/clean --seeds 3
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from model.catalogue import Catalogue
from model.evaluation import evaluate, split_users
from model.schema import Schema
from model.sequences import Histories
from model.training import TrainSettings, fit


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", type=Path, required=True, help="clean tables of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=60)
    options = parser.parse_args(arguments)
    catalogue = Catalogue.from_tables(options.clean, Schema.load(options.clean / "schema.json"))
    histories = Histories.from_table(options.clean / "interactions.parquet", catalogue)
    base = TrainSettings(max_epochs=options.max_epochs)
    split = split_users(histories, base.split)
    rows = []
    for time_input in (False, True):
        ppl, ndcg = [], []
        for seed in range(options.seeds):
            network = base.network.model_copy(update={"time_input": time_input})
            settings = base.model_copy(update={"network": network, "seed": seed})
            model = fit(split.train, split.valid, catalogue, settings, None)
            metrics = evaluate(model, split.test, len(catalogue))["every"]
            ppl.append(metrics["ppl"])
            ndcg.append(metrics["ndcg@10"])
            print(f"time_input={time_input} seed={seed} PPL {ppl[-1]:.1f}", file=sys.stderr)
        rows.append({"time_input": time_input, "ppl": ppl, "ndcg@10": ndcg})
    print("| control input | PPL (mean ± sd) | NDCG@10 |\n|---|---|---|")
    for row in rows:
        name = "time delta + session start" if row["time_input"] else "none"
        print(
            f"| {name} | {np.mean(row['ppl']):.1f} ± {np.std(row['ppl']):.1f}"
            f" | {np.mean(row['ndcg@10']):.4f} |"
        )
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
