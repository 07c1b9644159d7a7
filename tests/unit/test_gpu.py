"""Training and evaluation keep what belongs together on one device (see tests/pretended_gpu.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model import bundle as bundles
from model.catalogue import Catalogue
from model.encoders import EncoderKind
from model.evaluation import outcomes, squared_errors
from model.network import NetworkSettings
from model.recommender import Recommender
from model.schema import Schema
from model.sequences import Histories, Shown
from model.splits import Cases, later_events
from model.train_settings import Device, Precision, Softmax, TrainSettings
from model.training import fit
from model.trends import ResolvedTrend, snapshot_from_counts
from model.warm_start import Start
from tests import synthetic

pytest_plugins = ("tests.pretended_gpu",)
pytestmark = pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")

CATALOGUE = Catalogue(
    synthetic.catalogue(8).item_ids,
    {"genre": list("abababab"), "year": [float(j) for j in range(8)]},
)
SCHEMA = Schema.parse(
    {
        "items": {"genre": "categorical", "year": "numeric"},
        "users": {"group": "categorical"},
        "context": {"device": "categorical"},
    }
)


def log() -> Histories:
    """Event types, values, user and context fields, lists of what was shown."""
    log = synthetic.feedback_decides(60, 8, 8, seed=0)
    rng = np.random.default_rng(0)
    number = log.num_events
    shown = [rng.choice(8, 3, replace=False) for _ in range(number)]
    others = [s[s != item][:2] for s, item in zip(shown, log.item_E, strict=True)]
    return replace(
        log,
        user_fields={"group": np.array([f"g{u % 3}" for u in range(60)], dtype=object)},
        context_fields={"device": np.array([f"d{e % 2}" for e in range(number)], dtype=object)},
        shown=Shown(np.concatenate(others), np.r_[0, np.cumsum([len(o) for o in others])]),
    )


def settings(device, **more):
    network = NetworkSettings(embedding=8, hidden=8, control=4, **more.pop("network", {}))
    return TrainSettings(
        network=network,
        negatives=4,
        batch_events=64,
        bptt=4,
        max_epochs=2,
        device=device,
        precision=Precision.FLOAT32,
        **more,
    )


def trained(device, checkpoints=None, progress=lambda line: None, start=None, **more):
    parts = log().subset(np.arange(45)), log().subset(np.arange(45, 60))
    trend = ResolvedTrend(60, 0, 1.0)
    return fit(
        *parts, CATALOGUE, settings(device, **more), trend, SCHEMA, progress, checkpoints, start
    )


def test_the_pretended_gpu_refuses_what_a_gpu_would(pretended_gpu):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there.device.type, here.device.type) == ("cuda", "cpu")
    for wrong in (lambda: there + here, lambda: here[there.long()], lambda: torch.dot(here, there)):
        with pytest.raises(RuntimeError, match="one device"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there[1:] * 2 + here.to("cuda")[1:]).device.type == "cuda"
    assert (there.cpu() + here).device.type == "cpu"
    with torch.device("cuda"):
        assert torch.zeros(2).device.type == "cuda"


VARIANTS = {kind.value: {"network": {"encoder": kind}} for kind in EncoderKind} | {
    "sampled": {"softmax": Softmax.SAMPLED},
    "no averaging": {"averaging_epochs": 0.0},
    "untied, sampled": {"softmax": Softmax.SAMPLED, "network": {"tied": False}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_learns_what_a_cpu_does(pretended_gpu, variant):
    on_gpu = trained(Device.CUDA, **VARIANTS[variant])
    assert pretended_gpu.operations > 1000
    assert on_gpu.network.device.type == "cuda"
    on_cpu = trained(Device.CPU, **VARIANTS[variant])
    for gpu, cpu in zip(on_gpu.curve, on_cpu.curve, strict=True):
        for name in ("train_loss", "valid_loss"):
            assert gpu[name] == pytest.approx(cpu[name], rel=1e-5)
    held_out = log().subset(np.arange(45, 60))
    cases = Cases(held_out, later_events(held_out))
    found = [outcomes(model, cases, 8, 3) for model in (on_gpu, on_cpu)]
    np.testing.assert_allclose(found[0].nll_E, found[1].nll_E, rtol=1e-4)
    errors = [squared_errors(model, cases) for model in (on_gpu, on_cpu)]
    np.testing.assert_allclose(*errors, rtol=1e-3)


def test_an_older_model_is_gone_on_from(pretended_gpu):
    older = Start(trained(Device.CPU).network, CATALOGUE)
    on_gpu, on_cpu = (trained(device, start=older) for device in (Device.CUDA, Device.CPU))
    assert on_gpu.curve[-1]["valid_loss"] == pytest.approx(on_cpu.curve[-1]["valid_loss"], rel=1e-5)


def test_what_a_gpu_trained_is_served_by_a_cpu(pretended_gpu, tmp_path):
    model = trained(Device.CUDA)
    snapshot = snapshot_from_counts(
        list(CATALOGUE.item_ids), [1] * 8, num_items=8, smoothing=1.0, as_of=0, window_seconds=0
    )
    bundles.save(
        tmp_path / "bundle",
        model=model,
        catalogue=CATALOGUE,
        schema=SCHEMA,
        settings=settings(Device.CUDA),
        trend=snapshot,
        metrics={},
    )
    recommender = Recommender.load(tmp_path / "bundle")
    assert recommender._network.device.type == "cpu"


def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(pretended_gpu, tmp_path):
    def kill(line):
        if line.startswith("epoch"):
            raise KeyboardInterrupt

    whole = trained(Device.CUDA, checkpoint_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        trained(Device.CUDA, tmp_path, kill, checkpoint_minutes=1e-9)
    lines = []
    again = trained(Device.CUDA, tmp_path, lines.append, checkpoint_minutes=1e-9)
    assert lines[0].startswith("going on from a checkpoint")
    for name, parameter in whole.network.named_parameters():
        assert torch.equal(parameter, again.network.get_parameter(name)), name
