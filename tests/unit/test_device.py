"""Half precision trains as well as single, for every encoder; devices are chosen and refused."""

import numpy as np
import pytest
import torch

from model.catalogue import Catalogue
from model.device import choose_device, choose_dtype, move
from model.encoders import EncoderKind
from model.errors import InputError
from model.network import NetworkSettings
from model.schema import FieldKind, Schema
from model.train_settings import Device, Precision, Softmax, TrainSettings
from model.trainer import Trainer
from model.training import fit
from model.trends import ResolvedTrend
from tests import synthetic


@pytest.mark.parametrize("softmax", [Softmax.DENSE, Softmax.SAMPLED])
def test_half_precision_learns_what_single_does(softmax):
    log = synthetic.successor(200, 12, 20, seed=0)
    split = log.subset(np.arange(160)), log.subset(np.arange(160, 200))
    best = {}
    for precision in Precision.FLOAT32, Precision.BFLOAT16:
        settings = TrainSettings(
            network=NetworkSettings(embedding=16, hidden=32, control=8, dropout=0.0),
            softmax=softmax,
            negatives=10,
            batch_events=256,
            learning_rate=0.01,
            max_epochs=8,
            precision=precision,
        )
        model = fit(*split, synthetic.catalogue(20), settings, ResolvedTrend(3600, 0, 1.0))
        best[precision] = min(entry["valid_ppl"] for entry in model.curve)
        assert all(p.dtype == torch.float32 for p in model.network.parameters())
    assert best[Precision.BFLOAT16] == pytest.approx(best[Precision.FLOAT32], rel=0.05)


@pytest.mark.parametrize("encoder", list(EncoderKind))
def test_every_encoder_trains_in_half_precision(encoder):
    log = synthetic.feedback_decides(20, 8, 8, seed=0)
    settings = TrainSettings(
        network=NetworkSettings(
            embedding=8, hidden=8, control=4, encoder=encoder, dropout=0.0, user_dropout=0.0
        ),
        batch_events=64,
        bptt=4,
        learning_rate=0.02,
        precision=Precision.BFLOAT16,
    )
    items = synthetic.catalogue(8)
    catalogue = Catalogue(items.item_ids, {"genre": list("abababab")})
    schema = Schema(items={"genre": FieldKind.CATEGORICAL})
    trainer = Trainer(log, catalogue, settings, None, schema)
    first = trainer.epoch(trainer.start_epoch())
    for _ in range(8):
        last = trainer.epoch(trainer.start_epoch())
    assert np.isfinite(first) and last < first


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(Device.AUTO).type == "cpu"
    with pytest.raises(InputError, match="sees no GPU"):
        choose_device(Device.CUDA)


def test_precision_follows_the_device(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(Precision.AUTO, gpu, 10) is torch.bfloat16
    for flag, columns, wanted in (
        ("avx512_bf16", 5000, torch.bfloat16),
        ("amx_bf16", 5000, torch.bfloat16),
        ("avx512_f", 5000, torch.float32),
        ("avx512_bf16", 20, torch.float32),  # small products gain nothing
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {flag: True})
        assert choose_dtype(Precision.AUTO, cpu, columns) is wanted
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype(Precision.AUTO, gpu, 5000) is torch.float32
    assert choose_dtype(Precision.BFLOAT16, cpu, 10) is torch.bfloat16
    assert choose_dtype(Precision.FLOAT32, cpu, 5000) is torch.float32


def test_everything_inside_is_moved():
    log = synthetic.feedback_decides(5, 4, 8, seed=0)
    trainer = Trainer(log, synthetic.catalogue(8), TrainSettings(), None, Schema())
    _, part = next(trainer.loader.parts(trainer.rng))
    positions, _ = part.read
    moved = move(positions, torch.device("meta"))
    assert moved.target.is_meta and moved.previous_item.is_meta and moved.taste.is_meta
    assert all(t.is_meta for t in moved.user_bags.offset + moved.context_bags.offset)
    assert not positions.target.is_meta
