"""Markdown tables from the results that `experiments.accuracy` appended to a file.

    python -m experiments.tables experiments/results.jsonl

Figures are means over seeds; brackets hold the mean bounds of the user-clustered 95% interval.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
COLUMNS = {
    "user": [
        "ppl",
        "ndcg@10",
        "seen_removed_ppl",
        "seen_removed_ndcg@10",
        "coverage@10",
        "list_auc",
    ],
    "loo": ["ppl", "seen_removed_ppl", "seen_removed_hit@10", "seen_removed_ndcg@10"],
    "cold": ["mrr", "precision@5", "precision@25", "ndcg@5", "ndcg@25"],
    "values": ["rmse"],
    "trend": ["ppl", "ndcg@10", "seen_removed_ndcg@10"],
}
TITLES = {
    "user": "user split, every event after the first",
    "loo": "leave-one-out",
    "cold": "cold items",
    "values": "values of held-out users",
    "trend": "last 30% of the log",
}


def mean_figure(rows: Sequence[Row], name: str) -> str:
    """Mean over seeds, with the mean bounds of the intervals where there are any."""
    known = [row for row in rows if name in row]
    if not known:
        return ""
    digits = 1 if name.endswith("ppl") else 4
    text = f"{np.mean([row[name] for row in known]):.{digits}f}"
    bounds = [row[f"{name}_interval"] for row in known if f"{name}_interval" in row]
    if bounds:
        low, high = np.mean(bounds, axis=0)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def comparison(rows: Sequence[Row], name: str, reference: str) -> str:
    """Mean ratio of PPL, and in how many seeds its interval excludes 1; against which other model,
    where that is not the table's."""
    ratios = [row[name] for row in rows if name in row]
    if not ratios:
        return ""
    told_apart = sum(low > 1 or high < 1 for _, low, high in ratios)
    change = 100 * (np.mean([value for value, _, _ in ratios]) - 1)
    text = f"{change:+.1f}% ({told_apart} of {len(ratios)})"
    against = next((row["against"] for row in rows if "against" in row), reference)
    return text if against == reference else f"{text} against {against}"


def table(rows: Sequence[Row], protocol: str) -> str:
    """One Markdown table: a line per model, in the order of the file."""
    columns = [c for c in COLUMNS[protocol] if any(c in row for row in rows)]
    reference = next((row["against"] for row in rows if "against" in row), "")
    compared = {
        "ppl_ratio": f"PPL against {reference}",
        "current_over_frozen": "PPL, current over frozen trend",
    }
    compared = {k: v for k, v in compared.items() if any(k in row for row in rows)}
    header = ["model", "seeds", *(c.replace("_", " ") for c in columns), *compared.values()]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = [model, str(len(own)), *(mean_figure(own, c) for c in columns)]
        cells += [comparison(own, name, reference) for name in compared]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    rows: dict[tuple[str, str, str, int], Row] = {}
    for line in options.results.read_text().splitlines():
        row = json.loads(line)
        # A later run of the same thing replaces the earlier one.
        rows[row["data"], row["protocol"], row["model"], row["seed"]] = row
    for data, protocol in dict.fromkeys((r["data"], r["protocol"]) for r in rows.values()):
        own = [r for r in rows.values() if (r["data"], r["protocol"]) == (data, protocol)]
        print(f"### {data}, {TITLES[protocol]}\n\n{table(own, protocol)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
