"""Training by truncated BPTT over rolling histories, with early stopping on validation users.

Shapes: E events, N packed positions, M items, U users.
"""

import copy
import time
from collections.abc import Callable
from enum import StrEnum

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.catalogue import Catalogue
from model.errors import InputError
from model.evaluation import perplexity, squared_errors
from model.feedback import FeedbackSettings
from model.fields import FieldBags
from model.hrnn import TrainedHRNN, encode_batches
from model.inputs import InputEncodings
from model.network import HRNNMeta, NetworkSettings
from model.objective import EventTargets, Objective
from model.sampling import AliasSampler, frequency_sampler
from model.schema import Schema
from model.sequences import Histories
from model.settings import SettingsBase
from model.splits import Cases, SplitSettings
from model.ties import shuffled_ties, stored_order_matters
from model.transitions import Transitions
from model.trends import ResolvedTrend, TrendTable
from model.values import item_means, item_tastes

PATIENT_STEPS = 200  # an epoch of a small log is too few steps to judge by
FOLDS = 5  # of the users, for cross-fitted transition counts
SAMPLED_ABOVE = 100_000  # items; below, the dense softmax is no slower (§4.6)
LAMBDA_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


class Softmax(StrEnum):
    """How the softmax over the catalogue is computed in training."""

    AUTO = "auto"  # dense up to 100,000 items
    DENSE = "dense"
    SAMPLED = "sampled"  # importance sampling (§3.1)


class TrainSettings(SettingsBase):
    """How a model is trained; None means: derived from the data."""

    network: NetworkSettings = NetworkSettings()
    split: SplitSettings = SplitSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    session_gap_seconds: int | None = None
    trend_decomposition: bool = True
    softmax: Softmax = Softmax.AUTO
    negatives: int | None = None  # draws per gradient step, sampled softmax; None: √M, 512 or more
    max_epochs: int = 60
    patience: int = 2  # epochs without a better validation loss, and PATIENT_STEPS steps at least
    learning_rate: float = 0.002
    plateaus: int = 3  # after each but the last, the learning rate falls; the last ends training
    plateau_factor: float = 0.3  # by which it falls
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    averaging_epochs: float = 1.0  # memory of the moving average of the weights; 0: none
    shuffle_ties: bool | None = None  # simultaneous events anew each epoch; None: `model.ties`
    value_weight: float = 0.1  # of the value head's squared error beside the softmax
    bptt: int = 50  # positions of one user per gradient step
    batch_events: int = 1024  # positions per gradient step
    seed: int = 0
    threads: int | None = None


def fit(
    train: Histories,
    valid: Histories | Cases,
    catalogue: Catalogue,
    settings: TrainSettings,
    trend: ResolvedTrend | None,
    schema: Schema | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainedHRNN:
    """Train until the validation loss stops improving; the best epoch's weights are kept.

    Args:
        valid: users, or cases, that decide when to stop.
        trend: trend decomposition to train under, None to train without.
        schema: kinds of the user, item and context fields; None: the model reads none.
        progress: receives one line per epoch.

    Raises:
        InputError: nothing to train on, a setting needs what the log does not have, or the loss
            became NaN.
    """
    if train.num_events < 2 or len(catalogue) < 2:
        raise InputError(
            f"cannot train on {train.num_events} events of {len(catalogue)} items: "
            "give a larger log"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    trainer = _Trainer(train, catalogue, settings, trend, schema or Schema())
    model = trainer.model
    steps_per_epoch = max(1, train.num_events // settings.batch_events)
    patience = max(settings.patience, PATIENT_STEPS // steps_per_epoch)
    best_loss, best_weights = float("inf"), model.network.state_dict()
    waited = plateaus = 0
    for epoch in range(1, settings.max_epochs + 1):
        started = time.perf_counter()
        train_loss = trainer.epoch()
        if not np.isfinite(train_loss):
            raise InputError(
                f"training diverged in epoch {epoch} (loss {train_loss}): lower train.learning_rate"
            )
        valid_ppl = perplexity(model, valid, len(catalogue))
        # What is descended, measured on the validation users.
        valid_loss, rated = float(np.log(valid_ppl)), {}
        if model.network.values is not None and settings.value_weight:
            mse = float(np.nanmean(squared_errors(model, valid)))
            rated = {"valid_rmse": mse**0.5}
            valid_loss += settings.value_weight * mse / trainer.encodings.value_std**2
        seconds = time.perf_counter() - started
        rate = train.num_events / seconds
        model.curve.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "valid_loss": valid_loss,
                "valid_ppl": valid_ppl,
                **rated,
                "seconds": seconds,
                "events_per_second": rate,
            }
        )
        progress(
            f"epoch {epoch:3d}  train loss {train_loss:7.4f}  valid PPL {valid_ppl:8.1f}"
            + (f"  RMSE {rated['valid_rmse']:.4f}" if rated else "")
            + f"  {seconds:5.1f} s  {rate:,.0f} events/s"
        )
        if valid_loss < best_loss:
            best_loss, waited = valid_loss, 0
            best_weights = copy.deepcopy(model.network.state_dict())
        else:
            waited += 1
            if waited >= patience:
                plateaus, waited = plateaus + 1, 0
                if plateaus == settings.plateaus:
                    break
                trainer.lower_learning_rate()
    model.network.load_state_dict(best_weights)
    model.network.eval()
    if model.network.items.output_tower is not None:
        trainer.choose_lambda(valid)
    return model


class _Trainer:
    """The network in training, its optimiser, and the moving average that becomes the model."""

    def __init__(
        self,
        train: Histories,
        catalogue: Catalogue,
        settings: TrainSettings,
        trend: ResolvedTrend | None,
        schema: Schema,
    ) -> None:
        self.train, self.settings = train, settings
        self.rng = np.random.default_rng(settings.seed)
        self.shuffle_ties = settings.shuffle_ties
        if self.shuffle_ties is None:
            self.shuffle_ties = not stored_order_matters(train)
        num_items = len(catalogue)
        self.encodings = InputEncodings.fit(train, catalogue, schema, settings.session_gap_seconds)
        item_bags = FieldBags.encode(self.encodings.item_fields, catalogue.fields, num_items)
        self.network = HRNNMeta(
            settings.network, self.encodings, item_bags, with_trend=trend is not None
        )
        self.count_M = np.bincount(train.item_E, minlength=num_items)
        self.trend_table = None
        if trend is not None:
            self.trend_table = TrendTable.build(train.item_E, train.timestamp_E, num_items, trend)
        if self.network.values is not None:
            value_E = self.encodings.standardise(train.value_E, train.num_events)
            mean_M = torch.from_numpy(item_means(train.item_E, value_E.numpy(), num_items))
            self.network.values.mean_M = mean_M
            self.network.values.taste_MY = item_tastes(
                torch.from_numpy(train.item_E),
                torch.from_numpy(train.user_E),
                value_E,
                mean_M,
                len(train),
            )
        self.objective = self._objective(num_items)
        # Items that were never trained on are known by their fields alone; the others' λ is chosen
        # at the end, half and half until then.
        self._set_lambda(self.network, 0.5)
        self.optimiser = torch.optim.Adam(
            self.network.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.averaged: AveragedModel | None = None
        kept = self.network
        if settings.averaging_epochs:
            steps = settings.averaging_epochs * train.num_events / settings.batch_events
            decay = 1.0 - 1.0 / (1.0 + steps)
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(decay))
            kept = self.averaged.module  # type: ignore[assignment]
        self.model = TrainedHRNN(
            network=kept,
            encodings=self.encodings,
            trend=trend,
            transitions=None if kept.prior is None else Transitions.count(train, num_items),
            trend_log=train,
        )
        self.positions = self.network.positions(train, self.trend_table)
        self.targets = EventTargets.of(train, settings.feedback)

    def _objective(self, num_items: int) -> Objective:
        settings, network = self.settings, self.network
        p_M = torch.from_numpy((self.count_M + 1.0) / (self.count_M.sum() + num_items)).float()
        if self.trend_table is None:
            # Start at the popularity model: learning begins with what is left.
            network.items.bias.data = p_M.log()
        fold_U = self.rng.permutation(len(self.train)) % FOLDS
        transitions = None
        if network.prior is not None:
            network.prior.inverse_p_M = 1.0 / p_M
            transitions = Transitions.cross_fitted(self.train, num_items, fold_U, FOLDS)
        sampler: AliasSampler | None = None
        if settings.softmax is Softmax.SAMPLED or (
            settings.softmax is Softmax.AUTO and num_items > SAMPLED_ABOVE
        ):
            sampler = frequency_sampler(self.count_M)
        return Objective(
            network=network,
            value_weight=settings.value_weight,
            sampler=sampler,
            negatives=settings.negatives or max(512, int(num_items**0.5)),
            trend_table=self.trend_table,
            transitions=transitions,
            fold_U=fold_U,
            generator=torch.Generator().manual_seed(settings.seed),
        )

    def epoch(self) -> float:
        """One pass over the log; the mean loss (nats; of sampled items only, when sampled)."""
        settings, log = self.settings, self.train
        positions, targets = self.positions, self.targets
        if self.shuffle_ties:
            log = log.reordered(shuffled_ties(log, self.rng))
            positions = self.network.positions(log, self.trend_table)
            targets = EventTargets.of(log, settings.feedback)
        self.network.train()
        total = 0.0
        for batch, encoded in encode_batches(
            self.network,
            positions,
            log,
            bptt=settings.bptt,
            batch_events=settings.batch_events,
            rng=self.rng,
        ):
            event_N = torch.from_numpy(batch.event_N)
            loss, ranking = self.objective.loss(positions, targets, event_N, encoded)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
            self.optimiser.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.network)
            total += float(ranking) * len(event_N)
        return total / log.num_events

    def lower_learning_rate(self) -> None:
        """The loss has stopped falling: smaller steps settle nearer to its minimum."""
        for group in self.optimiser.param_groups:
            group["lr"] *= self.settings.plateau_factor

    def choose_lambda(self, valid: Histories | Cases) -> None:
        """The λ of items with interactions that gives the lowest validation PPL."""
        network = self.model.network

        def ppl(lambda_mix: float) -> float:
            self._set_lambda(network, lambda_mix)
            return perplexity(self.model, valid, network.num_items)

        self._set_lambda(network, min(LAMBDA_GRID, key=ppl))

    def _set_lambda(self, network: HRNNMeta, lambda_mix: float) -> None:
        lambda_M = np.where(self.count_M > 0, lambda_mix, 1.0)
        network.items.lambda_M = torch.from_numpy(lambda_M).float()
