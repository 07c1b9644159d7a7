"""Training by truncated BPTT over rolling histories, with early stopping on validation PPL.

Shapes: E events, N packed positions, S segments, M items, P trend periods.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.catalogue import Catalogue
from model.errors import InputError
from model.evaluation import NextItemModel, SplitSettings, later_events
from model.fields import FieldBags
from model.inputs import InputEncodings, Positions
from model.losses import softmax_cross_entropy
from model.metrics import negative_log_likelihood
from model.network import HRNNMeta, NetworkSettings, scores
from model.schema import Schema
from model.sequences import Batch, Histories, bptt_batches
from model.settings import SettingsBase
from model.trends import ResolvedTrend, TrendTable


class TrainSettings(SettingsBase):
    """How a model is trained; None means: derived from the data."""

    network: NetworkSettings = NetworkSettings()
    split: SplitSettings = SplitSettings()
    session_gap_seconds: int | None = None
    trend_decomposition: bool = True
    max_epochs: int = 60
    patience: int = 3  # epochs without a better validation PPL
    learning_rate: float = 0.004
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    bptt: int = 100  # positions of one user per gradient step
    batch_events: int = 1024  # positions per gradient step
    seed: int = 0
    threads: int | None = None


@dataclass
class TrainedHRNN:
    """A network with what it needs to read histories. Implements `NextItemModel`."""

    network: HRNNMeta
    encodings: InputEncodings
    trend: ResolvedTrend | None
    curve: list[dict[str, float]] = field(default_factory=list)  # one entry per epoch
    trend_table: TrendTable | None = None  # of the training log, for evaluation

    def iter_scores(
        self, histories: Histories, block: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Scores φ + β·log q(t) of every event given the ones before it."""
        positions = Positions.of(histories, self.encodings, self.trend_table)
        trend_PM = _trend_tensor(self.trend_table)
        self.network.eval()
        with torch.inference_mode():
            w_MD, b_M = self.network.items.outputs()
            for batch, query_ND in encode_batches(
                self.network, positions, histories, bptt=128, batch_events=4096, rng=None
            ):
                for start in range(0, len(batch.event_N), block):
                    event_B = batch.event_N[start : start + block]
                    score_BM = scores(query_ND[start : start + block], w_MD, b_M)
                    if trend_PM is not None and positions.trend_row is not None:
                        row_B = positions.trend_row[torch.from_numpy(event_B)]
                        score_BM = score_BM + self.network.beta * trend_PM[row_B]
                    yield event_B, score_BM


def _trend_tensor(table: TrendTable | None) -> Tensor | None:
    return None if table is None else torch.from_numpy(table.log_q_PM)


def encode_batches(
    network: HRNNMeta,
    positions: Positions,
    histories: Histories,
    *,
    bptt: int,
    batch_events: int,
    rng: np.random.Generator | None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Encode batch after batch, carrying each user's state across segments (detached)."""
    h_SH: Tensor | None = None
    for batch in bptt_batches(histories, bptt=bptt, batch_events=batch_events, rng=rng):
        event_N = torch.from_numpy(batch.event_N)
        previous_S = torch.from_numpy(batch.previous_S)
        h0_SH = network.initial_state(len(previous_S))
        if h_SH is not None:
            carried_S1 = (previous_S >= 0)[:, None]
            h0_SH = torch.where(carried_S1, h_SH[previous_S.clamp(min=0)], h0_SH)
        x_NI = network.inputs(positions, event_N)
        query_ND, h_SH = network.encode(x_NI, torch.from_numpy(batch.batch_size_T), h0_SH)
        yield batch, query_ND
        h_SH = h_SH.detach()


def fit(
    train: Histories,
    valid: Histories,
    catalogue: Catalogue,
    settings: TrainSettings,
    trend: ResolvedTrend | None,
    schema: Schema | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainedHRNN:
    """Train until validation PPL stops improving; the best epoch's weights are kept.

    Args:
        trend: trend decomposition to train under, None to train without.
        schema: kinds of the user and item fields; None: the model reads none.
        progress: receives one line per epoch.

    Raises:
        InputError: nothing to train on, or the loss became NaN.
    """
    num_items = len(catalogue)
    if train.num_events < 2 or num_items < 2:
        raise InputError(
            f"cannot train on {train.num_events} events of {num_items} items: give a larger log"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    encodings = InputEncodings.fit(
        train, catalogue, schema or Schema(), settings.session_gap_seconds
    )
    item_bags = FieldBags.encode(encodings.item_fields, catalogue.fields, num_items)
    model = TrainedHRNN(
        network=HRNNMeta(settings.network, encodings, item_bags, with_trend=trend is not None),
        encodings=encodings,
        trend=trend,
    )
    if trend is not None:
        periods = np.unique(np.r_[train.timestamp_E, valid.timestamp_E] // trend.period_seconds)
        model.trend_table = TrendTable.build(
            train.item_E, train.timestamp_E, num_items, trend, periods
        )
    network = model.network
    count_M = np.bincount(train.item_E, minlength=num_items)
    if trend is None:
        # Start at the popularity model: the bias is log p(a), learning begins with what is left.
        log_p_M = np.log((count_M + 1.0) / (count_M.sum() + num_items))
        network.items.bias.data = torch.from_numpy(log_p_M).float()
    positions = Positions.of(train, encodings, model.trend_table)
    trend_PM = _trend_tensor(model.trend_table)
    optimiser = torch.optim.Adam(
        network.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    # Items that were never trained on are known by their fields alone; the others' λ is chosen at
    # the end, half and half until then.
    _set_lambda(network, count_M, 0.5)
    best_ppl, best_weights, waited = float("inf"), copy.deepcopy(network.state_dict()), 0
    for epoch in range(1, settings.max_epochs + 1):
        started = time.perf_counter()
        network.train()
        total = 0.0
        for batch, query_ND in encode_batches(
            network,
            positions,
            train,
            bptt=settings.bptt,
            batch_events=settings.batch_events,
            rng=rng,
        ):
            event_N = torch.from_numpy(batch.event_N)
            trend_NM = None
            if trend_PM is not None and positions.trend_row is not None:
                trend_NM = network.beta * trend_PM[positions.trend_row[event_N]]
            # λ ~ U[0, 1] keeps ids and fields able to stand alone (§2.3).
            w_MD, b_M = network.items.outputs(torch.rand(()))
            loss = softmax_cross_entropy(
                scores(query_ND, w_MD, b_M), positions.target[event_N], trend_NM
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimiser.step()
            total += float(loss.detach()) * len(event_N)
        if not np.isfinite(total):
            raise InputError(
                f"training diverged in epoch {epoch} (loss {total}): lower train.learning_rate"
            )
        ppl = validation_ppl(model, valid)
        entry = {
            "epoch": epoch,
            "train_ppl": float(np.exp(total / train.num_events)),
            "valid_ppl": ppl,
            "seconds": time.perf_counter() - started,
            "events_per_second": train.num_events / (time.perf_counter() - started),
        }
        model.curve.append(entry)
        progress(
            f"epoch {epoch:3d}  train PPL {entry['train_ppl']:8.1f}  valid PPL {ppl:8.1f}"
            f"  {entry['seconds']:5.1f} s  {entry['events_per_second']:,.0f} events/s"
        )
        if ppl < best_ppl:
            best_ppl, best_weights, waited = ppl, copy.deepcopy(network.state_dict()), 0
        else:
            waited += 1
            if waited >= settings.patience:
                break
    network.load_state_dict(best_weights)
    network.eval()
    if network.items.output_tower is not None:
        _choose_lambda(model, valid, count_M)
    return model


LAMBDA_GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


def _set_lambda(network: HRNNMeta, count_M: NDArray[np.int64], lambda_mix: float) -> None:
    network.items.lambda_M = torch.from_numpy(np.where(count_M > 0, lambda_mix, 1.0)).float()


def _choose_lambda(model: TrainedHRNN, valid: Histories, count_M: NDArray[np.int64]) -> None:
    """The λ of items with interactions that gives the lowest validation PPL."""

    def ppl(lambda_mix: float) -> float:
        _set_lambda(model.network, count_M, lambda_mix)
        return validation_ppl(model, valid)

    _set_lambda(model.network, count_M, min(LAMBDA_GRID, key=ppl))


def validation_ppl(model: NextItemModel, histories: Histories) -> float:
    """PPL over all events but each user's first."""
    nll_E = np.zeros(histories.num_events)
    for event_N, score_NM in model.iter_scores(histories, 4096):
        target_N = torch.from_numpy(histories.item_E[event_N])
        nll_E[event_N] = negative_log_likelihood(score_NM, target_N)
    return float(np.exp(nll_E[later_events(histories)].mean()))
