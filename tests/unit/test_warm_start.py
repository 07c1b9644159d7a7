"""Going on from an older model: what both know is kept, and training gets there sooner."""

import json

import numpy as np
import pytest
import torch

from components.train import steps
from components.warm_start.steps import resolve
from model import bundle as bundles
from model.catalogue import Catalogue
from model.errors import InputError
from model.fields import FieldEncoding
from model.schema import FieldKind, Schema
from model.sequences import Histories
from model.store import Lineage, ModelStore
from model.trainer import Trainer
from model.training import TrainSettings, fit
from model.trends import ResolvedTrend
from model.warm_start import Start, _copy_rows, _copy_tokens
from tests import synthetic
from tests.unit.test_store import make_bundle

M, GONE, NEW = 20, 4, 3
SCHEMA = Schema.parse({"items": {"genre": "categorical"}})
TREND = ResolvedTrend(86_400, 0, 1.0)


def _settings(**changed) -> TrainSettings:
    network = {"embedding": 16, "hidden": 16, "control": 4, "dropout": 0.1}
    network |= changed.pop("network", {})
    values = {"learning_rate": 0.01, "batch_events": 64, "max_epochs": 6, "network": network}
    return TrainSettings.parse(values | changed)


def _catalogue(numbers: range | list[int]) -> Catalogue:
    names = [f"i{j:03d}" for j in numbers]
    return Catalogue(tuple(names), {"genre": ["eo"[j % 2] for j in numbers]})


OLD, YOUNG = _catalogue(range(M)), _catalogue(range(GONE, M + NEW))


def _log(num_users: int, seed: int, first: int = 0, number: int = M) -> Histories:
    """One item mostly follows another; of M + NEW items there are some at a time."""
    log = synthetic.successor(num_users, 14, M + NEW, seed=seed)
    place_M = np.arange(M + NEW) - first
    return log.with_items(np.where(place_M < number, place_M, -1).clip(min=-1))


def _young_log(num_users: int, seed: int) -> Histories:
    return _log(num_users, seed, GONE, len(YOUNG))


@pytest.fixture(scope="module", params=[{}, {"tied": False}, {"item_fields": False}])
def older(request):
    settings = _settings(network=request.param, max_epochs=10)
    model = fit(_log(120, 0), _log(30, 1), OLD, settings, TREND, SCHEMA)
    return Start(model.network, OLD), settings


def test_before_the_first_step_shared_items_are_the_older_model_s(older):
    start, settings = older
    trainer = Trainer(_young_log(60, 2), YOUNG, settings, TREND, SCHEMA, start)
    assert trainer.anew == []
    old, new = start.network.eval(), trainer.network.eval()
    at_old, at_new = torch.arange(GONE, M), torch.arange(M - GONE)
    with torch.no_grad():
        for mix in (0.0, 0.3, 1.0):
            for a, b in zip(old.items.outputs(mix), new.items.outputs(mix), strict=True):
                torch.testing.assert_close(a[at_old], b[at_new], atol=0.0, rtol=0.0)
        torch.testing.assert_close(old.items.inputs(at_old), new.items.inputs(at_new))
        nobody = torch.tensor([M]), torch.tensor([len(YOUNG)])  # no previous item
        torch.testing.assert_close(old.items.inputs(nobody[0]), new.items.inputs(nobody[1]))
        if new.items.output_tower is not None:  # new ones: where their fields put them
            w_MD, _ = new.items.outputs(0.0)
            field_w_MD, _ = new.items.outputs(1.0)
            torch.testing.assert_close(w_MD[M - GONE :], field_w_MD[M - GONE :])
    weights = dict(new.named_parameters())
    for name, before in old.named_parameters():
        if name.startswith(("encoder", "query", "control", "log_beta", "repeats", "prior.log")):
            assert torch.equal(weights[name], before), name
    kept = dict(trainer.model.network.named_parameters())
    assert all(torch.equal(kept[n], p) for n, p in trainer.network.named_parameters())


def test_a_warm_start_needs_fewer_epochs(older):
    start, settings = older
    log, valid = _young_log(60, 2), _young_log(40, 3)
    curves = {}
    for name, given in (("cold", None), ("warm", start)):
        lines = []
        model = fit(log, valid, YOUNG, settings, TREND, SCHEMA, lines.append, start=given)
        curves[name] = [entry["valid_ppl"] for entry in model.curve]
        assert (f"{M - GONE} of {len(YOUNG)} items" in lines[0]) == (given is not None)
    assert curves["warm"][0] < min(curves["cold"][:3])


def test_values_are_found_by_name_and_numbers_by_reading_the_old_knots():
    old = FieldEncoding(name="f", kind=FieldKind.CATEGORICAL, vocabulary=("a", "b"))
    new = FieldEncoding(name="f", kind=FieldKind.CATEGORICAL, vocabulary=("b", "c"))
    before, table = torch.arange(3.0)[:, None], torch.full((3, 1), 9.0)
    _copy_tokens(table, new, before, old)
    assert table[:, 0].tolist() == [0.0, 2.0, 9.0]  # missing, b, c anew
    old = FieldEncoding(name="f", kind=FieldKind.NUMERIC, knots=(0.0, 10.0))
    new = FieldEncoding(name="f", kind=FieldKind.NUMERIC, knots=(5.0, 10.0, 20.0))
    before, table = torch.tensor([[7.0], [0.0], [1.0]]), torch.zeros(4, 1)
    _copy_tokens(table, new, before, old)
    torch.testing.assert_close(table[:, 0], torch.tensor([7.0, 0.5, 1.0, 1.0]))


def test_fields_that_came_or_went_start_anew(older):
    start, settings = older
    fields = {"genre": YOUNG.fields["genre"], "year": [2000 + j for j in range(len(YOUNG))]}
    schema = Schema.parse({"items": {"genre": "categorical", "year": "numeric"}})
    catalogue = Catalogue(YOUNG.item_ids, fields)
    trainer = Trainer(_young_log(60, 2), catalogue, settings, TREND, schema, start)
    if trainer.network.items.output_tower is None:
        assert trainer.anew == []
        return
    assert any(name.endswith("tables.1.weight") for name in trainer.anew)
    assert any(name.startswith("items.output_tower.mix") for name in trainer.anew)
    assert not any(name.endswith("tables.0.weight") for name in trainer.anew)
    trainer.epoch(trainer.start_epoch())


def test_other_sizes_are_refused(older):
    start, _ = older
    with pytest.raises(InputError, match=r"network\.hidden 16 instead of 8"):
        fit(_log(60, 2), _log(9, 3), OLD, _settings(network={"hidden": 8}), None, start=start)


def test_the_train_step_starts_from_the_champion(tmp_path, capsys, monkeypatch):
    clean = synthetic.clean_tables(tmp_path / "clean", _log(60, 0))
    settings = {"max_epochs": 2, "network": {"embedding": 8, "hidden": 8, "control": 4}}
    store = tmp_path / "models"
    warm = settings | {"warm_start": "champion"}

    def run(name, values, **more):
        where = {"model_store": str(store), **more}
        steps.run(clean, tmp_path / name, trend={}, settings=values, **where)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        return metrics["training"]["warm_start"], capsys.readouterr().out

    version, said = run("first", warm)
    assert version is None and "no champion yet" in said
    models = ModelStore(str(store))
    first = models.publish(tmp_path / "first", Lineage())
    models.promote(first, replaces=None)
    version, said = run("second", warm)
    assert version == first and f"warm start: version {first}" in said
    assert run("third", settings | {"warm_start": first})[0] == first
    assert run("fourth", settings | {"warm_start": str(tmp_path / "first")})[0] == first
    assert run("fifth", settings)[0] is None
    with pytest.raises(InputError, match="no version"):
        run("sixth", settings | {"warm_start": "20200101T000000Z-00000000"})
    assert bundles.load(tmp_path / "second").settings.warm_start == "champion"
    # What a run found at its beginning stays, whoever is promoted meanwhile.
    second = models.publish(tmp_path / "second", Lineage())
    models.promote(second)
    assert resolve("champion", str(store)) == second
    started = []
    monkeypatch.setattr(steps, "fit", lambda *a, **k: started.append(k) or fit(*a, **k))
    for start in (first, second, ""):
        run(f"from-{start}", warm, checkpoints=tmp_path / "checkpoints", start=start)
    assert len({k["checkpoints"] for k in started}) == 3
    assert [k["start"] is None for k in started] == [False, False, True]


def test_what_a_warm_start_means_is_told_as_a_version(tmp_path):
    store = str(tmp_path / "models")
    folder = tmp_path / "bundle"
    make_bundle(folder, "v1")
    assert resolve("none", "") == ""
    assert resolve("champion", store) == ""
    assert resolve(str(folder), "") == "v1"
    models = ModelStore(store)
    models.publish(folder, Lineage())
    assert resolve("champion", store) == ""
    models.promote("v1")
    assert resolve("champion", store) == resolve("v1", store) == "v1"
    with pytest.raises(InputError, match=r"train\.warm_start: .*no version 'v2'"):
        resolve("v2", store)
    with pytest.raises(InputError, match="no bundle's folder, and no model store"):
        resolve("v1", "")


def test_new_items_keep_their_own_popularity_and_go_where_the_shared_ones_went():
    table = torch.tensor([-1.0, -2.0, -7.0, -9.0])  # began at log popularity
    before = torch.tensor([-1.5, -7.5])  # of the first and the third
    _copy_rows(table, before, torch.tensor([0, -1, 1, -1]), 2)
    torch.testing.assert_close(table, torch.tensor([-1.5, -2.5, -7.5, -9.5]))
