"""The network learns what is there, and only that; states and seeds behave."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.context import infer_session_gap, time_bucket
from model.encoders import EncoderKind
from model.errors import InputError
from model.evaluation import SplitSettings, evaluate, split_users
from model.fields import FieldBags
from model.hrnn import encode_batches
from model.inputs import InputEncodings, Positions
from model.losses import softmax_cross_entropy
from model.network import HRNNMeta, NetworkSettings
from model.sequences import Histories
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend
from tests import synthetic

SMALL = NetworkSettings(embedding=16, hidden=32, control=8, dropout=0.0)


def _fit(log: Histories, num_items: int, trend: ResolvedTrend | None = None, **settings):
    split = split_users(log, SplitSettings())
    settings = {"network": SMALL, "batch_events": 256, "learning_rate": 0.01} | settings
    model = fit(
        split.train, split.valid, synthetic.catalogue(num_items), TrainSettings(**settings), trend
    )
    return model, evaluate(model, split.test, num_items)["every"]


def test_sequence_signal_is_learned_to_its_floor():
    log = synthetic.successor(300, 12, 20, seed=0)
    _, metrics = _fit(log, 20, max_epochs=30)
    # p(successor) = .9 + .1/20, the rest uniform.
    hit = 0.9 + 0.1 / 20
    floor = np.exp(-(hit * np.log(hit) + (1 - hit) * np.log((1 - hit) / 19)))
    assert metrics["ppl"] < 1.25 * floor


def test_noise_is_not_learned():
    log = synthetic.successor(200, 12, 20, seed=0, p=0.0)
    _, metrics = _fit(log, 20, max_epochs=10)
    assert metrics["ppl"] > 0.97 * 20


def test_what_training_begins_with_is_in_the_curve_and_kept_where_nothing_is_better():
    log = synthetic.successor(60, 12, 20, seed=0, p=0.0)
    split = split_users(log, SplitSettings())
    settings = TrainSettings(network=SMALL, batch_events=64, learning_rate=0.5, max_epochs=2)
    model = fit(split.train, split.valid, synthetic.catalogue(20), settings, None)
    assert [entry["epoch"] for entry in model.curve] == [0, 1, 2]
    assert "train_loss" not in model.curve[0] and "train_loss" in model.curve[1]
    assert min(model.curve, key=lambda entry: entry["valid_loss"])["epoch"] == 0
    assert not model.network.query.weight.any(), "the network still adds nothing"


@pytest.mark.parametrize("lacking", ["values", "events"])
def test_what_cannot_be_validated_is_trained_all_the_same(lacking):
    log = synthetic.successor(60, 12, 20, seed=0)
    rng = np.random.default_rng(0)
    log = replace(log, value_E=rng.integers(1, 6, log.num_events).astype(float))
    split = split_users(log, SplitSettings())
    valid = replace(split.valid, value_E=np.full(split.valid.num_events, np.nan))
    if lacking == "events":
        valid = split.valid.subset(np.array([], dtype=np.int64))
    settings = TrainSettings(network=SMALL, batch_events=64, learning_rate=0.01, max_epochs=3)
    model = fit(split.train, valid, synthetic.catalogue(20), settings, None)
    assert model.network.values is not None
    assert model.network.query.weight.abs().sum() > 0, "not what training began with"
    assert all("valid_rmse" not in entry for entry in model.curve) or lacking == "events"
    if lacking == "values":
        assert np.isfinite([entry["valid_loss"] for entry in model.curve]).all()


def test_time_delta_is_learned_by_the_control_input_and_by_nothing_else():
    log = synthetic.gap_decides(200, 12, 8, seed=0)
    _, with_time = _fit(log, 8, max_epochs=15)
    plain = SMALL.model_copy(update={"time_input": False})
    _, without = _fit(log, 8, max_epochs=15, network=plain)
    assert with_time["ppl"] < 1.1
    assert without["ppl"] > 0.9 * 8


def test_trend_is_followed_when_popularity_flips():
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(40), 8)[None, :].repeat(100, axis=0)
    # One of 20 items takes 80% of each day's events, another one every day.
    hot = (day * 7) % 20
    item = np.where(rng.random(day.shape) < 0.8, hot, rng.integers(0, 20, day.shape))
    time = day * 86_400 + 3600 * np.arange(day.shape[1])[None, :] % 86_400
    # The first hour of a day shows the new day's favourite: periods of an hour can follow it.
    log = synthetic.histories(item.tolist(), np.sort(time, axis=1).tolist())
    plain = SMALL.model_copy(update={"time_input": False, "hidden": 4, "embedding": 4})
    trend = ResolvedTrend(3600, 3600, 0.1)
    model, followed = _fit(log, 20, trend=trend, network=plain, max_epochs=3)
    model.trend_log = None
    split = split_users(log, SplitSettings())
    ignored = evaluate(model, split.test, 20)["every"]
    assert followed["ppl"] < 0.8 * ignored["ppl"]


def test_trend_sign_matters():
    phi = torch.zeros(1, 3)
    log_q = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    right = softmax_cross_entropy(phi, torch.tensor([0]), log_q)
    wrong = softmax_cross_entropy(phi, torch.tensor([0]), -log_q)
    assert float(right) == pytest.approx(-np.log(0.7), abs=1e-6)
    assert wrong > right


def test_state_carried_across_chunks_equals_one_long_chunk():
    log = synthetic.successor(7, 23, 20, seed=3)
    torch.manual_seed(0)
    encodings = InputEncodings(num_items=20, session_gap=1800)
    no_fields = FieldBags.encode((), {}, 20)
    network = HRNNMeta(SMALL, encodings, no_fields, with_trend=False).eval()
    positions = Positions.of(log, encodings, None)
    results = []
    for bptt, budget in ((4, 10), (1, 3), (100, 1000)):
        query_ED = torch.empty(log.num_events, SMALL.embedding)
        with torch.inference_mode():
            for batch, encoded in encode_batches(
                network, positions, log, bptt=bptt, batch_events=budget
            ):
                query_ED[batch.event_N] = encoded.query_ND
        results.append(query_ED)
    torch.testing.assert_close(results[0], results[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1], results[2], atol=1e-5, rtol=1e-5)


def test_same_seed_same_weights():
    log = synthetic.successor(60, 8, 10, seed=0)
    first, second, other = (
        _fit(log, 10, max_epochs=2, seed=seed)[0].network.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["items.bias"], other["items.bias"])


def test_positions_see_the_request_time_and_not_the_answer():
    log = synthetic.histories([[3, 1, 2]], [[100, 160, 5000]])
    positions = Positions.of(log, InputEncodings(num_items=9, session_gap=1800), None)
    assert positions.previous_item.tolist() == [9, 3, 1]
    assert positions.session_start.tolist() == [True, False, True]
    assert positions.bucket[0] == 0
    assert positions.bucket[2] > positions.bucket[1] > 0


def test_time_buckets_grow_with_the_gap_and_are_bounded():
    delta = np.array([0, 1, 60, 3600, 86_400, 10.0**18, -5.0])
    bucket = time_bucket(delta, np.ones(7, dtype=bool))
    assert (np.diff(bucket[:6]) > 0).all()
    assert bucket.max() == 63
    assert bucket[6] == bucket[0]


def test_session_gap_falls_between_the_two_modes():
    rng = np.random.default_rng(0)
    within = rng.lognormal(np.log(30), 0.7, 5000)
    between = rng.lognormal(np.log(2 * 86_400), 0.7, 1000)
    gap = infer_session_gap(np.concatenate([within, between]).astype(np.int64))
    assert 200 < gap < 40_000
    assert infer_session_gap(np.array([], np.int64)) == 1800
    assert infer_session_gap(np.full(50, 600)) == 600  # one mode: no gap ends a session


def test_too_little_data_is_refused():
    log = synthetic.histories([[0]], [[1]])
    with pytest.raises(InputError, match="cannot train"):
        fit(log, log, synthetic.catalogue(1), TrainSettings(), None)


def test_a_trend_of_weight_zero_is_no_trend():
    log = synthetic.successor(30, 8, 12, seed=0)
    model, _ = _fit(log, 12, trend=ResolvedTrend(3600, 0, 1.0), max_epochs=1)
    weighted, plain = (
        np.concatenate([score.numpy() for _, score in model.iter_scores(log, 64)])
        for model.trend_log in (log, None)
    )
    assert np.abs(weighted - plain).max() > 0.1
    model.trend_log = log
    with torch.no_grad():
        model.network.log_beta.fill_(-torch.inf)
    np.testing.assert_array_equal(
        np.concatenate([score.numpy() for _, score in model.iter_scores(log, 64)]), plain
    )


@pytest.mark.parametrize("encoder", ["gru", "lstm", "transformer", "hgru", "multi_hot"])
@pytest.mark.parametrize("softmax", ["dense", "sampled"])
def test_half_precision_trains_every_encoder(encoder, softmax):
    """What a catalogue of thousands gets by default where the processor multiplies bfloat16."""
    log = synthetic.successor(40, 8, 30, seed=0)
    network = SMALL.model_copy(update={"encoder": EncoderKind(encoder)})
    chosen = {"precision": "bfloat16", "softmax": softmax, "negatives": 20}
    model, result = _fit(log, 30, network=network, max_epochs=2, **chosen)
    assert np.isfinite(result["ppl"]) and np.isfinite(model.curve[-1]["train_loss"])
    assert all(p.dtype == torch.float32 for p in model.network.parameters())
