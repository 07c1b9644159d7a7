"""Accuracy of HRNN-meta, its ablations and its baselines: one protocol, several seeds, intervals.

    python -m experiments.accuracy --clean DIR --protocol user --models hrnn no-time popularity

DIR holds clean tables (`hrnn run` leaves them in its workspace). Protocols: `user` (whole users
held out, every event read out), `loo` (leave-one-out), `cold` (half of the items held out),
`values` (ratings of held-out users), `trend` (the last 30% of the log, current against frozen
popularity). Every result is appended to `--results` as one JSON line; `experiments.tables` makes
the tables of docs/results.md from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from model.baselines.content import ContentProfile
from model.baselines.factors import BayesianPersonalisedRanking
from model.baselines.item_knn import ItemKNN
from model.baselines.next_item_fm import NextItemFactorizationMachine
from model.baselines.popularity import Popularity, RecentPopularity
from model.baselines.ratings import (
    DampedBias,
    FactorizationMachine,
    ItemAutoRec,
    RollingAverage,
)
from model.baselines.transition_counts import TransitionCounts
from model.bootstrap import UserSums, identity, intervals, paired_difference, paired_ratio
from model.evaluation import (
    NextItemModel,
    ValueModel,
    cold_item_metrics,
    outcomes,
    squared_errors,
)
from model.extension import with_catalogue
from model.hrnn import TrainedHRNN
from model.sequences import Histories
from model.splits import (
    Cases,
    SplitSettings,
    later_events,
    leave_one_out,
    split_cold_items,
    split_time,
    split_users,
)
from model.tables import Log
from model.training import TrainSettings, fit
from model.trend_table import TrendTable
from model.trends import ResolvedTrend, TrendSettings, choose_trend

# The paper's network alone: without the priors that this implementation adds to its scores.
NO_PRIORS = {"transitions": False, "repeats": False, "profile": False}
# What each ablation changes in the training settings.
VARIANTS: dict[str, dict[str, Any]] = {
    "hrnn": {},
    "no-time": {"network": {"time_input": False}},
    "no-item-fields": {"network": {"item_fields": False}},
    "no-user-fields": {"network": {"user_fields": False}},
    "no-feedback": {"network": {"feedback": False}},
    "no-transitions": {"network": {"transitions": False}},
    "no-profile": {"network": {"profile": False}},
    "no-repeats": {"network": {"repeats": False}},
    "no-trend": {"trend_decomposition": False},
    "no-priors": {"network": NO_PRIORS},
    "no-priors no-time": {"network": NO_PRIORS | {"time_input": False}},
    "no-priors no-item-fields": {"network": NO_PRIORS | {"item_fields": False}},
    "no-context": {
        "network": {
            "time_input": False,
            "user_fields": False,
            "item_fields": False,
            "feedback": False,
        },
        "trend_decomposition": False,
    },
    "no-averaging": {"averaging_epochs": 0.0},
    "no-tie-shuffling": {"shuffle_ties": False},
    "no-lists": {"feedback": {"shown_weight": 0.0}},
    "lists-1": {"feedback": {"shown_weight": 1.0}},
    "no-values": {"network": {"ratings": False}},
    "values": {"value_weight": 10.0},
    "values-no-feedback": {"value_weight": 10.0, "network": {"feedback": False}},
    "values-no-time": {"value_weight": 10.0, "network": {"time_input": False}},
    "untied": {"network": {"tied": False}},
    "sampled-512": {"softmax": "sampled", "negatives": 512},
    "lstm": {"network": {"encoder": "lstm"}},
    "transformer": {"network": {"encoder": "transformer"}},
    "hgru": {"network": {"encoder": "hgru"}},
    "multi-hot": {"network": {"encoder": "multi_hot"}},
}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` on top, section by section."""
    result = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """Training settings from `a.b=value` texts."""
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, value = assignment.split("=", 1)
        nested: Any = yaml.safe_load(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merged(overrides, nested)
    return overrides


@dataclass(frozen=True)
class Task:
    """One protocol on one log: what to fit on, and what to read out."""

    log: Log
    train: Histories
    valid: Histories | Cases
    test: Cases
    trend_log: Histories | None = None  # of validation, where it is later than training

    @property
    def num_items(self) -> int:
        return len(self.log.catalogue)


def user_task(log: Log, min_events: int) -> Task:
    """Whole users are held out; every event but the first is read out."""
    split = split_users(log.histories, SplitSettings(min_events=min_events))
    return Task(log, split.train, split.valid, Cases(split.test, later_events(split.test)))


def loo_task(log: Log, min_events: int) -> Task:
    """Leave-one-out: the last event of every user, validated on the one before."""
    split = leave_one_out(log.histories, min_events)
    return Task(log, split.train, split.valid, split.test)


def trend_task(log: Log, min_events: int) -> Task:
    """The first 70% of the log by time is trained on, its last tenth to validate."""
    split = split_time(log.histories)
    inner = split_time(split.train, 0.9)
    return Task(log, inner.train, inner.test, split.test, split.train)


def fit_variant(task: Task, name: str, overrides: dict[str, Any], seed: int) -> TrainedHRNN:
    """Train HRNN-meta with one ablation."""
    settings = TrainSettings.parse(merged(merged(overrides, VARIANTS[name]), {"seed": seed}))
    trend = None
    if settings.trend_decomposition:
        items, times = task.train.item_E, task.train.timestamp_E
        trend = choose_trend(items, times, task.num_items, TrendSettings())
    return fit(
        task.train,
        task.valid,
        task.log.catalogue,
        settings,
        trend,
        task.log.schema,
        progress=lambda line: print(f"  {name} seed {seed} {line}", file=sys.stderr, flush=True),
        trend_log=task.trend_log,
    )


def fit_with_new_items(
    task: Task, known_J: NDArray[np.int64], name: str, overrides: dict[str, Any], seed: int
) -> TrainedHRNN:
    """Train on a catalogue of the known items only; the others come afterwards, by their fields.

    Items that are in the catalogue but were never chosen are unpopular; those that were not there
    could not be chosen, and must not be learned from as if they could.
    """
    catalogue = task.log.catalogue.subset(known_J)
    position_M = np.full(task.num_items, -1, dtype=np.int64)
    position_M[known_J] = np.arange(len(known_J))
    log = Log(task.log.schema, catalogue, task.train.with_items(position_M))
    counted = None if task.trend_log is None else task.trend_log.with_items(position_M)
    known = Task(log, log.histories, task.valid.with_items(position_M), task.test, counted)
    return with_catalogue(fit_variant(known, name, overrides, seed), catalogue, task.log.catalogue)


Row = dict[str, Any]


def ranking(task: Task, model: NextItemModel) -> tuple[Row, dict[str, NDArray[np.float64]]]:
    """PPL and ranking with nothing removed and with seen items removed; −log p of every case."""
    row: Row = {"cases": len(task.test)}
    per_case = {}
    for removed in (False, True):
        prefix = "seen_removed_" if removed else ""
        result = outcomes(model, task.test, task.num_items, 10, remove_seen=removed)
        rank_N = result.rank_E[task.test.event_N]
        nll_N = result.nll_E[task.test.event_N]
        hit_N = rank_N <= 10
        ndcg_N = np.where(hit_N, 1 / np.log2(1 + rank_N), 0.0)
        row |= _figure(prefix + "ppl", nll_N, task.test, np.exp)
        row |= _figure(prefix + "hit@10", hit_N.astype(np.float64), task.test)
        row |= _figure(prefix + "ndcg@10", ndcg_N, task.test)
        row[prefix + "coverage@10"] = result.coverage[10]
        per_case |= {prefix + "nll": nll_N, prefix + "ndcg": ndcg_N}
    return row | on_lists(task, model), per_case


def on_lists(task: Task, model: NextItemModel) -> Row:
    """The chosen item among what was shown with it: AUC and MRR of the cases that have a list."""
    histories, shown = task.test.histories, task.test.histories.shown
    if shown is None:
        return {}
    case_N = task.test.event_N[
        shown.offset_E1[task.test.event_N + 1] > shown.offset_E1[task.test.event_N]
    ]
    if not len(case_N):
        return {}
    better_N, length_N = np.zeros(len(case_N)), np.zeros(len(case_N))
    for event_B, score_BM in model.iter_scores(histories, 256):
        for row in np.flatnonzero(np.isin(event_B, case_N)):
            event = int(event_B[row])
            others = score_BM[row, torch.from_numpy(shown.of(np.array([event]))[0])]
            chosen = score_BM[row, histories.item_E[event]]
            n = np.searchsorted(case_N, event)
            better_N[n] = float((others > chosen).sum() + 0.5 * (others == chosen).sum())
            length_N[n] = len(others)
    cases = Cases(histories, case_N)
    return {
        "lists": len(case_N),
        **_figure("list_auc", 1.0 - better_N / length_N, cases),
        **_figure("list_mrr", 1.0 / (1.0 + better_N), cases),
    }


def _figure(
    name: str,
    value_N: NDArray[np.float64],
    cases: Cases,
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] = identity,
) -> Row:
    """A mean over cases with its user-clustered 95% interval."""
    sums = UserSums.of([value_N], cases.user_N, len(cases.histories))
    [interval] = intervals(sums, transform)
    return {name: interval.value, f"{name}_interval": [interval.low, interval.high]}


def run_ranking(options: argparse.Namespace, log: Log, overrides: Row) -> None:
    """Protocols `user` and `loo`: every model on the same cases, compared with the first."""
    task = {"user": user_task, "loo": loo_task}[options.protocol](log, options.min_events)
    run_models(options, task, overrides)


def run_models(options: argparse.Namespace, task: Task, overrides: Row) -> None:
    """Every model on one task, compared case by case with the first."""
    reference: dict[int, dict[str, NDArray[np.float64]]] = {}
    for name in options.models:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            started = time.perf_counter()
            if name in VARIANTS:
                model: NextItemModel = fit_variant(task, name, overrides, seed)
            else:
                model = BASELINES[name](task)
            row, per_case = ranking(task, model)
            row |= _training_facts(model)
            row["seconds"] = time.perf_counter() - started
            if name != options.models[0]:
                other = reference.get(seed, reference[min(reference)])
                ratio = paired_ratio(per_case["nll"], other["nll"], task.test.user_N)
                row["ppl_ratio"] = [ratio.value, ratio.low, ratio.high]
                gain = paired_difference(per_case["ndcg"], other["ndcg"], task.test.user_N)
                row["ndcg_difference"] = [gain.value, gain.low, gain.high]
                row["against"] = options.models[0]
            else:
                reference[seed] = per_case
            report(options, name, seed, row, overrides)
            if name in BASELINES:
                break  # one seed: those that have one hardly depend on it


def _training_facts(model: NextItemModel) -> Row:
    if not isinstance(model, TrainedHRNN):
        return {}
    return {
        "epochs": len(model.curve),
        "beta": float(model.network.beta.detach()),
        "new_items": {
            "beta": float(model.network.new_beta),
            "share": float(model.network.new_share),
            "bias": float(model.network.items.new_bias),
        },
        "lambda": float(model.network.items.lambda_M.min()),
    }


def run_cold(options: argparse.Namespace, log: Log, overrides: Row) -> None:
    """Table 7: half of the items held out, ranked among themselves; a seed is an item split.

    Users are permuted in the order of their ids as text: the order in which random choice gets
    the figures that the comparison we measure against reports for it (.17, .065, .068).
    """
    users = split_users(log.histories, SplitSettings(min_events=options.min_events), as_text=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        split = split_cold_items(users, len(log.catalogue), seed=seed)
        task = Task(log, split.train, split.valid, split.cases)
        for name in options.models:
            model: NextItemModel | None = None
            if name == ContentProfile.name:
                model = ContentProfile(task.num_items, log.catalogue).fit(split.train, log.schema)
            elif name != "random":
                kept_J = np.setdiff1d(np.arange(task.num_items), split.item_J)
                model = fit_with_new_items(task, kept_J, name, overrides, seed)
            metrics = cold_item_metrics(model, split, task.num_items)
            row = {"cases": len(split.cases)}
            for metric, value_N in metrics.items():
                row |= _figure(metric, value_N, split.cases)
            report(options, name, seed, row, overrides)


def run_values(options: argparse.Namespace, log: Log, overrides: Row) -> None:
    """Table 4: RMSE of the values of held-out users' events, from the events before."""
    task = user_task(log, options.min_events)
    for name in options.models:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            if name in VARIANTS:
                model: ValueModel = fit_variant(task, name, overrides, seed)
            else:
                model = VALUE_BASELINES[name](task)
            error_N = squared_errors(model, task.test)[task.test.event_N]
            report(options, name, seed, _figure("rmse", error_N, task.test, np.sqrt), overrides)
            if name in VALUE_BASELINES:
                break


def run_trend(options: argparse.Namespace, log: Log, overrides: Row) -> None:
    """§4.5: one model, its log q(t) kept current or frozen at the end of training.

    A frozen q is the one in force when training ended; a current one counts all events, of any
    user, before each event's period.
    """
    split = split_time(log.histories)
    task = trend_task(log, options.min_events)
    recent = {"recent popularity (hour)": 3600, "recent popularity (day)": 86_400}
    for name, window in recent.items():
        table = TrendTable.build(
            log.histories.item_E,
            log.histories.timestamp_E,
            task.num_items,
            ResolvedTrend(min(window, 3600), window, 1.0),
            np.unique(split.test.histories.timestamp_E // 3600),
        )
        report(options, name, 0, ranking(task, _TrendAlone(table))[0], overrides)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.models:
            known_J = np.unique(task.train.item_E)
            model = fit_with_new_items(task, known_J, name, overrides, seed)
            assert model.trend is not None
            model.trend_log = log.histories
            current, per_case = ranking(task, model)
            current |= _training_facts(model)
            report(options, f"{name}, current trend", seed, current, overrides)
            period = split.cut // model.trend.period_seconds
            table = TrendTable.build(
                split.train.item_E,
                split.train.timestamp_E,
                task.num_items,
                model.trend,
                np.array([period]),
            )
            model.trend_log = None
            row = int(np.searchsorted(table.period_P, period))
            frozen_1M = torch.from_numpy(table.log_q_PM[row])[None]
            with torch.no_grad():
                bias_M = model.trend_weight(frozen_1M)[0] * frozen_1M[0]
            frozen, frozen_case = ranking(task, _Offset(model, bias_M))
            against = paired_ratio(per_case["nll"], frozen_case["nll"], task.test.user_N)
            frozen["current_over_frozen"] = [against.value, against.low, against.high]
            report(options, f"{name}, frozen trend", seed, frozen, overrides)


@dataclass
class _Offset:
    """A model's scores with the same bias added at every event."""

    model: NextItemModel
    bias_M: torch.Tensor

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        for event_N, score_NM in self.model.iter_scores(histories, block):
            yield event_N, score_NM + self.bias_M


@dataclass
class _TrendAlone:
    """log q(t) and nothing else."""

    table: TrendTable

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
        row_E = self.table.row_of(histories.timestamp_E)
        for start in range(0, histories.num_events, block):
            event_N = np.arange(start, min(start + block, histories.num_events))
            yield event_N, torch.from_numpy(self.table.log_q_PM[row_E[event_N]])


BASELINES: dict[str, Callable[[Task], NextItemModel]] = {
    "popularity": lambda task: Popularity(task.num_items).fit(task.train),
    "recent-popularity": lambda task: RecentPopularity(task.num_items).fit(task.train),
    "transition-counts": lambda task: TransitionCounts(task.num_items).fit(task.train),
    "item-knn": lambda task: ItemKNN(task.num_items).fit(task.train),
    "bpr": lambda task: BayesianPersonalisedRanking(task.num_items).fit(task.train),
    "factorization-machine": lambda task: NextItemFactorizationMachine(task.num_items).fit(
        task.train
    ),
}
VALUE_BASELINES: dict[str, Callable[[Task], ValueModel]] = {
    "rolling-average": lambda task: RollingAverage(task.num_items).fit(task.train),
    "damped-bias": lambda task: DampedBias(task.num_items).fit(task.train),
    "factorization-machine": lambda task: FactorizationMachine(task.num_items).fit(task.train),
    "i-autorec": lambda task: ItemAutoRec(task.num_items).fit(task.train),
}


def report(options: argparse.Namespace, name: str, seed: int, row: Row, overrides: Row) -> None:
    """Print one result and append it to the results file."""
    line = {
        "data": options.name or options.clean.name,
        "protocol": options.protocol,
        "model": name,
        "seed": seed,
        **({"settings": overrides} if overrides else {}),
        **row,
    }
    text = json.dumps(line)
    print(text, flush=True)
    if options.results:
        with options.results.open("a") as f:
            f.write(text + "\n")


PROTOCOLS = {
    "user": run_ranking,
    "loo": run_ranking,
    "cold": run_cold,
    "values": run_values,
    "trend": run_trend,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", type=Path, required=True, help="clean tables of a run")
    parser.add_argument("--name", default="", help="of the data, in the results")
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--models", nargs="+", default=["hrnn"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--min-events", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="train setting: a.b=value")
    parser.add_argument("--results", type=Path, help="file to append JSON lines to")
    options = parser.parse_args(arguments)
    overrides = assigned(options.set)
    lists = TrainSettings.parse(overrides).feedback.lists
    PROTOCOLS[options.protocol](options, Log.read(options.clean, shown=lists), overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
