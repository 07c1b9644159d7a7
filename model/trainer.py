"""The network in training: one epoch after another, resumable after any step.

Shapes: E events, N packed positions, M items, S segments, K numbers of state.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.averaging import WeightAverage
from model.catalogue import Catalogue
from model.checkpoint import Checkpoint
from model.device import choose_device, choose_dtype, keep_freed_memory, move, precision, send
from model.distributed import Processes
from model.fields import FieldBags
from model.hrnn import TrainedHRNN, encode_batch
from model.inputs import InputEncodings, Positions
from model.loader import Loader, sample_of, sample_users
from model.network import HRNNMeta
from model.novelty import new_item_share
from model.objective import KNOWN_LAMBDA, EventTargets, Objective, without_followers
from model.pages import in_huge_pages
from model.prior_start import (
    POPULARITY_CELLS,
    POPULARITY_EVENTS,
    Facts,
    Popularities,
    popularity_start,
    start_priors,
)
from model.rows import RowwiseAdagrad, StepRows, clip_gradients
from model.sampling import AliasSampler, frequency_sampler
from model.schema import Schema
from model.sequences import Batch, Histories, bptt_batches
from model.ties import stored_order_matters
from model.train_settings import Softmax, TrainSettings
from model.transitions import Transitions, again_share
from model.trend_table import TrendTable
from model.trends import ResolvedTrend
from model.values import item_means, item_tastes
from model.warm_start import Start, warm_start

FOLDS = 5  # of the users, for cross-fitted transition counts
RATED_EVENTS = 5_000_000  # of whole users at random: means and tastes of a longer log's items
START_SAMPLE = 20_000  # events, to see where the priors of transitions and repeats begin
# Items. Sampled steps are faster from 5,000 on (`benchmarks.train_throughput --crossover`), but may
# need more of them (docs/results.md): the dense softmax is kept until it takes six times as long.
SAMPLED_ABOVE = 20_000


@dataclass
class EpochState:
    """How far an epoch has come."""

    rng: dict[str, Any]  # state of the trainer's generator before the epoch
    part: int = 0  # of the log (`model.loader`)
    batches: int = 0  # of it that are done
    total: float = 0.0  # Σ loss over the positions done
    state_SK: Tensor | None = None  # left by the last batch


class Trainer:
    """The network in training, its optimisers, and the moving average that becomes the model."""

    def __init__(
        self,
        train: Histories,
        catalogue: Catalogue,
        settings: TrainSettings,
        trend: ResolvedTrend | None,
        schema: Schema,
        start: Start | None = None,
    ) -> None:
        keep_freed_memory()
        self.train, self.settings = train, settings
        self.device = choose_device(settings.device)
        self.processes = Processes.current(self.device)
        self.rng = np.random.default_rng(settings.seed)
        self.shuffle_ties = settings.shuffle_ties
        sample = sample_of(train, settings.part_events, np.random.default_rng(settings.seed))
        if self.shuffle_ties is None:
            self.shuffle_ties = not stored_order_matters(sample)
        num_items = len(catalogue)
        self.encodings = InputEncodings.fit(sample, catalogue, schema, settings.session_gap_seconds)
        item_bags = FieldBags.encode(self.encodings.item_fields, catalogue.fields, num_items)
        self.network = HRNNMeta(
            settings.network, self.encodings, item_bags, with_trend=trend is not None
        )
        self.count_M = train.item_counts(num_items)
        self.trend_table = None
        if trend is not None:
            self.trend_table = TrendTable.build(train.item_E, train.timestamp_E, num_items, trend)
        if self.network.values is not None:
            rated = sample_of(train, RATED_EVENTS, np.random.default_rng(settings.seed))
            value_E = self.encodings.standardise(rated.value_E, rated.num_events)
            mean_M = torch.from_numpy(item_means(rated.item_E, value_E.numpy(), num_items))
            self.network.values.mean_M = mean_M
            self.network.values.taste_MY = item_tastes(
                torch.from_numpy(rated.item_E),
                torch.from_numpy(rated.user_E),
                value_E,
                mean_M,
                len(rated),
            )
        self.objective = self._objective(num_items, sample)
        self.anew: list[str] = []  # weights that an older model could not give
        if start is not None:
            self.anew = warm_start(self.network.cpu(), catalogue, start)
            self.network.to(self.device)
        # Items that were never trained on are known by their fields alone; the others' λ is chosen
        # at the end, half and half until then.
        self.set_lambda(self.network, KNOWN_LAMBDA)
        self.parameters = list(self.network.parameters())
        self.tables: list[nn.Parameter] = []  # of which a step reads some rows
        self.rows = StepRows()
        self.none = torch.tensor([num_items], device=self.device)  # the row of "no previous item"
        if self.objective.sampler is not None:
            self.network.use_rows(self.rows)
            self.tables = self.network.row_tables()
        self.average: WeightAverage | None = None
        kept = self.network
        if settings.averaging_epochs:
            steps = settings.averaging_epochs * train.num_events / settings.batch_events
            decay = 1.0 - 1.0 / (1.0 + steps)
            kept = _copy(self.network)
            self.average = WeightAverage(self.network, kept, decay, self.tables)
        self.optimisers = self._optimisers()
        averages = [] if self.average is None else [ema for _, ema in self.average.tables]
        in_huge_pages([*self.tables, *averages])
        self.model = TrainedHRNN(
            network=kept,
            encodings=self.encodings,
            trend=trend,
            transitions=self.transitions,
            trend_log=train,
        )
        self.loader = Loader(
            train,
            self._read,
            part_events=settings.part_events,
            shuffle_ties=self.shuffle_ties,
        )
        self.reads_lists = train.shown is not None and settings.feedback.shown_weight > 0
        self.waiting = 0.0  # seconds of this epoch, or the last one, spent waiting for its data

    def _read(self, log: Histories, user_U: NDArray[np.int64]) -> tuple[Positions, EventTargets]:
        positions = self.network.positions(log, self.trend_table)
        fold_U = torch.from_numpy(self.fold_U[user_U])
        targets = EventTargets.of(log, self.settings.feedback, fold_U)
        return move(positions, self.device), move(targets, self.device)

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        settings, by_rows = self.settings, {id(table) for table in self.tables}
        dense = [p for p in self.network.parameters() if id(p) not in by_rows]
        optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(
                dense, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
        ]
        if self.tables:
            after = None if self.average is None else self.average.take_rows
            optimisers.append(
                RowwiseAdagrad(
                    self.tables, settings.row_learning_rate, settings.weight_decay, after=after
                )
            )
        return optimisers

    def _objective(self, num_items: int, sample: Histories) -> Objective:
        settings, network = self.settings, self.network
        p_M = torch.from_numpy((self.count_M + 1.0) / (self.count_M.sum() + num_items)).float()
        # Start at the popularity model: learning begins with what is left.
        share = 1.0
        if self.trend_table is not None:
            size = min(POPULARITY_EVENTS, max(1, POPULARITY_CELLS // num_items), len(sample.item_E))
            event_N = np.sort(self.rng.permutation(sample.num_events)[:size])
            weighed = Popularities.of(self.trend_table, sample, event_N, self.count_M)
            share, beta = popularity_start(weighed)
            network.start_trend(beta)
        network.items.bias.data = share * p_M.log()
        if network.items.field_bias is not None:
            known_M = torch.from_numpy(self.count_M > 0)
            network.items.field_bias.start_at(network.items.bags, share * p_M.log(), known_M)
        self.fold_U = self.rng.permutation(len(self.train)) % FOLDS
        self.transitions: Transitions | None = None  # of all users: for answers
        transitions = None
        if network.prior is not None:
            network.prior.inverse_p_M = 1.0 / p_M
            self.transitions, transitions = Transitions.fitted(
                self.train, num_items, self.fold_U, FOLDS, again=again_share(self.train)
            )
        fields_alone = settings.fields_alone
        if fields_alone is None:
            fields_alone = min(0.5, new_item_share(sample))
        if network.prior is not None or network.repeats is not None:
            user_S = sample_users(self.train, START_SAMPLE, self.rng)
            log = self.train if len(user_S) == len(self.train) else self.train.subset(user_S)
            event_N = np.sort(self.rng.permutation(log.num_events)[:START_SAMPLE])
            facts = Facts.of(log, event_N, p_M, network.prior, transitions, self.fold_U[user_S])
            without_counts = 0.0
            if network.items.output_tower is not None:
                without_counts = without_followers(fields_alone)
            start_priors(facts, network.prior, network.repeats, without_counts)
        # And the network adds nothing yet, so that training begins at the priors' own prediction.
        nn.init.zeros_(network.query.weight)
        nn.init.zeros_(network.query.bias)
        sampler: AliasSampler | None = None
        negatives = settings.draws(num_items)
        if settings.softmax is Softmax.SAMPLED or (
            settings.softmax is Softmax.AUTO and num_items > SAMPLED_ABOVE
        ):
            sampler = frequency_sampler(self.count_M)
        network.to(self.device)
        columns = num_items if sampler is None else negatives
        self.dtype = choose_dtype(settings.precision, self.device, columns)
        return Objective(
            network=network,
            value_weight=settings.value_weight,
            shown_weight=settings.feedback.shown_weight,
            sampler=move(sampler, self.device),
            negatives=negatives,
            trend_table=move(self.trend_table, self.device),
            transitions=move(transitions, self.device),
            generator=torch.Generator(self.device).manual_seed(settings.seed),
            fields_alone=fields_alone,
            dtype=self.dtype,
        )

    def start_epoch(self) -> EpochState:
        """An epoch of which nothing is done yet."""
        return EpochState(rng=dict(self.rng.bit_generator.state))

    def epoch(self, done: EpochState, after_step: Callable[[], None] = lambda: None) -> float:
        """What is left of one pass over the log; the mean loss (nats; sampled items only, if so).

        Args:
            done: where to begin; kept up to date.
            after_step: called between steps, when `checkpoint` may be.
        """
        settings = self.settings
        self.rng.bit_generator.state = done.rng
        self.network.train()
        waited, cutting, self.waiting = self.loader.waited, 0.0, 0.0
        for number, part in self.loader.parts(self.rng, done.part):
            if number > done.part:
                done.part, done.batches, done.state_SK = number, 0, None
            positions, targets = part.read
            batches = bptt_batches(
                part.log,
                bptt=settings.bptt,
                batch_events=settings.batch_events,
                rng=part.rng,
                share=(self.processes.rank, self.processes.size),
            )
            rest = islice(batches, done.batches, None)
            while True:
                started = time.perf_counter()
                batch = next(rest, None)
                cutting += time.perf_counter() - started
                self.waiting = self.loader.waited - waited + cutting
                if batch is None:
                    break
                loss, done.state_SK = self._step(positions, targets, batch, done.state_SK)
                done.total += loss
                done.batches += 1
                after_step()
        if self.average is not None:
            self.average.finish()
        total = self.processes.sum(torch.tensor(done.total, dtype=torch.float64))
        return float(total) / self.train.num_events

    def _step(
        self, positions: Positions, targets: EventTargets, batch: Batch, state_SK: Tensor | None
    ) -> tuple[float, Tensor]:
        """One gradient step; the summed loss of this process's positions, and the state left."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        event_N = send(batch.event_N, self.device)
        share = self.objective.shares(positions, targets, event_N, self.processes)
        draws = self.objective.draw()
        total = 0.0
        if len(batch.event_N):
            passed_over = targets.passed_over(batch.event_N, self.device)
            previous_N, target_N = positions.previous_item[event_N], positions.target[event_N]
            if draws.negative_S is not None:
                met = [draws.negative_S, previous_N, target_N, self.none]
                if passed_over is not None:
                    met.append(passed_over.item_R)
                self.rows.open(self.tables, met)
            with precision(self.device, self.dtype):
                encoded = encode_batch(self.network, positions, batch, state_SK, previous_N)
                loss, ranking = self.objective.loss(
                    positions, targets, event_N, target_N, encoded, draws, share, passed_over
                )
            loss.backward()
            self.rows.close()
            state_SK = encoded.state_SK.detach()
            total = float(ranking) * len(batch.event_N)
        else:  # nothing of this batch is ours
            state_SK = self.network.initial_state(0)
        self.processes.sum_gradients(self.parameters, self.tables)
        clip_gradients(self.parameters, self.settings.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        if self.average is not None:
            self.average.update()
        return total, state_SK

    def lower_learning_rate(self) -> None:
        """The loss has stopped falling: smaller steps settle nearer to its minimum."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] *= self.settings.plateau_factor

    def set_lambda(self, network: HRNNMeta, lambda_mix: float) -> None:
        """λ of the items with interactions; the others have 1."""
        lambda_M = np.where(self.count_M > 0, lambda_mix, 1.0)
        network.items.lambda_M = torch.from_numpy(lambda_M).float().to(self.device)

    def checkpoint(self, done: EpochState) -> Checkpoint:
        """Everything that later steps depend on, of all processes; for rank 0 to write."""
        tensors = {f"network/{n}": p.detach() for n, p in self.network.named_parameters()}
        state: dict[str, Any] = {
            "rng": done.rng,
            "part": done.part,
            "batches": done.batches,
            "learning_rates": [o.param_groups[0]["lr"] for o in self.optimisers],
        }
        if self.average is not None:
            state["averaged_steps"] = self.average.steps
            kept = self.model.network.named_parameters()
            tensors |= {f"average/{n}": p.detach() for n, p in kept}
            tensors |= {f"held/{i}": held_M for i, held_M in enumerate(self.average.held)}
        for i, optimiser in enumerate(self.optimisers):
            for key, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{i}/{key}/{name}": v for name, v in entry.items()}
        own = {
            "torch": torch.get_rng_state(),
            "generator": self.objective.generator.get_state(),
            "total": torch.tensor(done.total, dtype=torch.float64),
        }
        if done.state_SK is not None:
            own["state"] = done.state_SK.cpu()
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        for rank, parts in enumerate(self.processes.gather(own)):
            tensors |= {f"process/{rank}/{name}": part for name, part in parts.items()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        return Checkpoint(tensors, state)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> EpochState:
        """Inverse of `checkpoint`, on a trainer made from the same data and settings."""
        tensors, state = checkpoint.tensors, checkpoint.state
        for name, parameter in self.network.named_parameters():
            parameter.copy_(tensors[f"network/{name}"])
        if self.average is not None:
            for name, parameter in self.model.network.named_parameters():
                parameter.copy_(tensors[f"average/{name}"])
            for i, held_M in enumerate(self.average.held):
                held_M.copy_(tensors[f"held/{i}"])
            self.average.steps = state["averaged_steps"]
        for i, optimiser in enumerate(self.optimisers):
            entries: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimiser/{i}/"
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    key, field = name.removeprefix(prefix).split("/")
                    entries.setdefault(int(key), {})[field] = tensor
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": entries, "param_groups": groups})
            for group in optimiser.param_groups:
                group["lr"] = state["learning_rates"][i]
        own = f"process/{self.processes.rank}/"
        torch.set_rng_state(tensors[own + "torch"])
        self.objective.generator.set_state(tensors[own + "generator"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[own + "cuda"], self.device)
        state_SK = tensors.get(own + "state")
        return EpochState(
            rng=state["rng"],
            part=state["part"],
            batches=state["batches"],
            total=float(tensors[own + "total"]),
            state_SK=None if state_SK is None else state_SK.to(self.device),
        )


def _copy(network: HRNNMeta) -> HRNNMeta:
    """A copy with parameters of its own; what training does not change is shared."""
    shared = [*network.buffers(), network.encodings, network.items.bags]
    return copy.deepcopy(network, {id(part): part for part in shared})
