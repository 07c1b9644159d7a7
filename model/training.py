"""Training by truncated BPTT over rolling histories, with early stopping on validation users.

Shapes: M items.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.catalogue import Catalogue
from model.checkpoint import Checkpoint, CheckpointFile, digest_of
from model.distributed import Processes
from model.errors import InputError
from model.evaluation import perplexity, squared_errors
from model.feedback import event_worth
from model.hrnn import TrainedHRNN
from model.new_items import fit_new_items
from model.schema import Schema
from model.sequences import Histories
from model.splits import Cases, later_events
from model.train_settings import Device, Precision, Softmax, TrainSettings
from model.trainer import Trainer
from model.trends import ResolvedTrend
from model.values import shares_kept
from model.warm_start import Start

__all__ = ["Device", "Precision", "Softmax", "TrainSettings", "fit"]

PATIENT_STEPS = 200  # an epoch of a small log is too few steps to judge by
LAMBDA_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
VALID_CELLS = 2**34  # scores of one validation: 17,000 cases of a million items
# Settings that a run may be continued with another value of.
FREE_SETTINGS = {"max_epochs", "threads", "checkpoint_minutes", "warm_start"}


def fit(
    train: Histories,
    valid: Histories | Cases,
    catalogue: Catalogue,
    settings: TrainSettings,
    trend: ResolvedTrend | None,
    schema: Schema | None = None,
    progress: Callable[[str], None] = lambda line: None,
    checkpoints: Path | None = None,
    start: Start | None = None,
    trend_log: Histories | None = None,
) -> TrainedHRNN:
    """Train until the validation loss stops improving; the best epoch's weights are kept.

    Args:
        valid: users, or cases, that decide when to stop.
        trend: trend decomposition to train under, None to train without.
        schema: kinds of the user, item and context fields; None: the model reads none.
        progress: receives one line per epoch.
        checkpoints: a folder of this run's own; every few minutes what is needed to go on is
            written there, and a run that finds it goes on from it. It is removed at the end.
        start: an older model to begin with; None: at random.
        trend_log: what log q(t) is counted from in validation (before each event's period only);
            None: `train`, which says little of events later than all of it.

    Raises:
        InputError: nothing to train on, a setting needs what the log does not have, the loss
            became NaN, or the checkpoint is damaged or another run's.
        UnavailableError: the checkpoint cannot be written.
    """
    if train.num_events < 2 or len(catalogue) < 2:
        raise InputError(
            f"cannot train on {train.num_events} events of {len(catalogue)} items: "
            "give a larger log"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    schema = schema or Schema()
    file = None
    if checkpoints is not None:
        file = CheckpointFile(
            checkpoints, _fingerprint(train, valid, catalogue, settings, trend, schema, trend_log)
        )
    saved = None if file is None else file.read()  # before the long preparation
    torch.manual_seed(settings.seed)
    trainer = Trainer(train, catalogue, settings, trend, schema, start)
    if start is not None:
        known = int((start.catalogue.encode(catalogue.item_ids) >= 0).sum())
        anew = f"; new weights: {', '.join(trainer.anew)}" if trainer.anew else ""
        progress(f"starting from an older model: {known:,} of {len(catalogue):,} items{anew}")
    if trend_log is not None:
        trainer.model.trend_log = trend_log
    run = _Run(trainer, _few(valid, len(catalogue)), progress, file)
    if saved is not None:
        run.restore(saved)
    model = run.finish()
    if file is not None:
        trainer.processes.once(file.remove)
    return model


@dataclass
class _Progress:
    """Early stopping: how far it has come, as JSON."""

    epochs: int = 0  # finished
    best_loss: float | None = None
    waited: int = 0
    plateaus: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # in the epoch under way, before the last start


class _Run:
    """A training run: epochs until the validation loss stops falling, with checkpoints between."""

    def __init__(
        self,
        trainer: Trainer,
        valid: Cases,
        progress: Callable[[str], None],
        file: CheckpointFile | None,
    ) -> None:
        self.trainer, self.valid, self.progress, self.file = trainer, valid, progress, file
        self.settings = trainer.settings
        self.worth_E = event_worth(self.settings.feedback, valid.histories)
        if not self.worth_E[valid.event_N].any():
            self.worth_E = np.ones_like(self.worth_E)
        self.at = _Progress()
        self.best = _weights(trainer.model)
        self.done = trainer.start_epoch()
        self.started = self.written = time.perf_counter()

    def finish(self) -> TrainedHRNN:
        """Whatever is left to do; the model of the best epoch."""
        trainer, at, model = self.trainer, self.at, self.trainer.model
        log = trainer.train
        # What training begins with is kept unless an epoch is better. Where lists are descended on
        # too, the validation loss lacks a part of what is descended, and does not judge that.
        if at.best_loss is None and not trainer.reads_lists:
            begin = {"epoch": 0, **self._validate()}
            self.best = _weights(model)  # validating aligns new items with known ones
            at.best_loss = begin["valid_loss"]
            at.curve.append(begin | {"seconds": self._clock()})
            at.seconds, self.started = 0.0, time.perf_counter()
            self.progress(f"before training: valid PPL {begin['valid_ppl']:8.1f}")
        steps_per_epoch = max(1, log.num_events // self.settings.batch_events)
        patience = max(self.settings.patience, PATIENT_STEPS // steps_per_epoch)
        while at.epochs < self.settings.max_epochs and at.plateaus < self.settings.plateaus:
            train_loss = trainer.epoch(self.done, self._after_step)
            epoch = at.epochs + 1
            if not np.isfinite(train_loss):
                raise InputError(
                    f"training diverged in epoch {epoch} (loss {train_loss}): lower "
                    "train.learning_rate"
                )
            trained = self._clock()
            entry = {"epoch": epoch, "train_loss": train_loss, **self._validate()}
            seconds = self._clock()
            at.curve.append(
                entry
                | {
                    "seconds": seconds,
                    "events_per_second": log.num_events / seconds,
                    "train_events_per_second": log.num_events / trained,
                    "waiting_share": trainer.waiting / trained,
                }
            )
            rmse = f"  RMSE {entry['valid_rmse']:.4f}" if "valid_rmse" in entry else ""
            self.progress(
                f"epoch {epoch:3d}  train loss {train_loss:7.4f}  valid PPL "
                f"{entry['valid_ppl']:8.1f}{rmse}  {seconds:5.1f} s  "
                f"{log.num_events / seconds:,.0f} events/s"
            )
            # Where nothing can be validated (NaN), the last epoch is as good as any.
            if at.best_loss is None or np.isnan(at.best_loss) or entry["valid_loss"] < at.best_loss:
                at.best_loss, at.waited = entry["valid_loss"], 0
                self.best = _weights(model)
            else:
                at.waited += 1
                if at.waited >= patience:
                    at.plateaus, at.waited = at.plateaus + 1, 0
                    if at.plateaus < self.settings.plateaus:
                        trainer.lower_learning_rate()
            at.epochs, at.seconds, self.started = epoch, 0.0, time.perf_counter()
            self.done = trainer.start_epoch()
        model.curve = at.curve
        _set_weights(model, self.best)
        model.network.eval()
        if model.network.items.output_tower is not None:
            self._choose_lambda()
        self._keep_of_values()
        fit_new_items(model, self.valid, np.flatnonzero(trainer.count_M), self.settings.seed)
        return model

    def _clock(self) -> float:
        """Seconds in the epoch under way."""
        return self.at.seconds + time.perf_counter() - self.started

    def _validate(self) -> dict[str, float]:
        """What is descended, measured on the validation users: events count what they are worth."""
        model, settings = self.trainer.model, self.settings
        model.network.items.align(torch.from_numpy(self.trainer.count_M > 0))
        ppl = perplexity(model, self.valid, model.network.num_items, self.worth_E)
        measured = {"valid_loss": float(np.log(ppl)), "valid_ppl": ppl}
        if model.network.values is not None and settings.value_weight:
            error_E = squared_errors(model, self.valid)
            if not np.isnan(error_E).all():  # some validation event has a value
                mse = float(np.nanmean(error_E))
                measured["valid_rmse"] = mse**0.5
                measured["valid_loss"] += settings.value_weight * mse / model.encodings.value_std**2
        return measured

    def _choose_lambda(self) -> None:
        """The λ of items with interactions that gives the lowest validation PPL."""
        trainer, network = self.trainer, self.trainer.model.network

        def ppl(lambda_mix: float) -> float:
            trainer.set_lambda(network, lambda_mix)
            return perplexity(trainer.model, self.valid, network.num_items, self.worth_E)

        trainer.set_lambda(network, min(LAMBDA_GRID, key=ppl))

    def _keep_of_values(self) -> None:
        """Of what the value head learned, as much as validation bears out."""
        model, valid = self.trainer.model, self.valid
        head, encodings = model.network.values, model.encodings
        if head is None or not self.settings.value_weight or valid.histories.value_E is None:
            return
        standard_E = encodings.standardise(valid.histories.value_E, valid.histories.num_events)
        value_N = standard_E.double().numpy()[valid.event_N]
        part_NP1 = model.value_parts(valid.histories)[valid.event_N]
        known_N = ~np.isnan(value_N)
        head.keep(shares_kept(value_N[known_N], part_NP1[known_N]))

    def _after_step(self) -> None:
        if self.file is None:
            return
        due = time.perf_counter() - self.written >= 60.0 * self.settings.checkpoint_minutes
        if self.trainer.processes.any(due):
            self._write()

    def _write(self) -> None:
        trainer, file = self.trainer, self.file
        checkpoint = trainer.checkpoint(self.done)

        def write() -> None:
            if file is not None:
                state = {**asdict(self.at), "seconds": self._clock()}
                best = {f"best/{name}": tensor.cpu() for name, tensor in self.best.items()}
                parts = {"trainer": checkpoint.state, "progress": state}
                file.write(Checkpoint(checkpoint.tensors | best, parts))

        trainer.processes.once(write)
        self.written = time.perf_counter()

    def restore(self, saved: Checkpoint) -> None:
        """Go on where the checkpoint was written."""
        self.at = _Progress(**saved.state["progress"])
        self.done = self.trainer.restore(Checkpoint(saved.tensors, saved.state["trainer"]))
        self.best = {
            name.removeprefix("best/"): tensor.to(self.trainer.device)
            for name, tensor in saved.tensors.items()
            if name.startswith("best/")
        }
        self.progress(
            f"going on from a checkpoint: epoch {self.at.epochs + 1}, step {self.done.batches + 1}"
        )


def _weights(model: TrainedHRNN) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


@torch.no_grad()
def _set_weights(model: TrainedHRNN, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.network.named_parameters():
        parameter.copy_(weights[name])


def _few(valid: Histories | Cases, num_items: int) -> Cases:
    """The validation cases, or as many of them as may be scored per epoch, spread evenly."""
    valid = _cases(valid)
    most = max(1, VALID_CELLS // num_items)
    if len(valid) <= most:
        return valid
    return Cases(valid.histories, valid.event_N[np.linspace(0, len(valid) - 1, most).astype(int)])


def _cases(valid: Histories | Cases) -> Cases:
    """Of users, every event but the first; where nobody has a second one, those."""
    if isinstance(valid, Cases):
        return valid
    later_N = later_events(valid)
    return Cases(valid, later_N if len(later_N) else np.arange(valid.num_events))


def _fingerprint(
    train: Histories,
    valid: Histories | Cases,
    catalogue: Catalogue,
    settings: TrainSettings,
    trend: ResolvedTrend | None,
    schema: Schema,
    trend_log: Histories | None,
) -> dict[str, str]:
    """What a run is: whatever its weights depend on."""
    cases = _cases(valid)
    chosen = settings.model_dump(mode="json", exclude=FREE_SETTINGS)
    return {
        "settings": digest_of(chosen, None if trend is None else asdict(trend)),
        "number of processes": str(Processes.current().size),
        "catalogue": digest_of(list(catalogue.item_ids), catalogue.fields, schema.model_dump()),
        "training events": _digest_log(train),
        "validation events": digest_of(cases.event_N, _digest_log(cases.histories)),
    } | ({} if trend_log is None else {"events of the trend": _digest_log(trend_log)})


def _digest_log(log: Histories) -> str:
    parts: list[Any] = [list(log.user_ids), log.item_E, log.timestamp_E, log.offset_U1]
    parts += [log.event_type_E, log.value_E, log.user_fields]
    if log.shown is not None:
        parts += [log.shown.item_S, log.shown.offset_E1]
    return digest_of(*parts, *(log.context_fields[name] for name in sorted(log.context_fields)))
