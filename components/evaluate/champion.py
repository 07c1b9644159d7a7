"""The champion on the candidate's data: loaded, given the candidate's catalogue, compared fairly.

Shapes: E events of the candidate's test users.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model import bundle as bundles
from model.bundle import Bundle
from model.catalogue import Catalogue
from model.errors import BundleError, HrnnError, InputError
from model.extension import with_catalogue
from model.hrnn import TrainedHRNN
from model.sequences import Histories
from model.splits import split_users
from model.store import ModelStore
from model.tables import Log


@dataclass(frozen=True)
class Champion:
    """What serves now; `model` is None when it cannot be measured on this data."""

    version: str
    model: TrainedHRNN | None = None
    test: Histories | None = None  # the candidate's test users, with the fields this model reads
    comparable_E: NDArray[np.bool_] | None = None  # events that it was not trained on
    basis: str = ""  # why those
    problem: str = ""  # why it cannot be measured


def load_champion(
    model_store: str, clean: Path, candidate: Bundle, data_digest: str, work: Path
) -> Champion | None:
    """The champion of the store, None when nothing was deployed yet.

    Args:
        work: folder for a copy of its bundle.

    Raises:
        InputError, BundleError: `champion.json` names a bundle that is gone or damaged.
        UnavailableError: the store cannot be read.
    """
    if not model_store:
        return None
    store = ModelStore(model_store)
    pointer = store.champion()
    if pointer is None:
        return None
    try:
        loaded = bundles.load(store.fetch(pointer.version, work))
        lineage = store.version(pointer.version).lineage
    except (InputError, BundleError) as error:
        raise type(error)(
            f"the champion {pointer.version} cannot be compared with: {error}. `hrnn models "
            "promote` takes another version; without champion.json the next run counts as the first"
        ) from None
    try:
        catalogue = Catalogue.from_tables(clean, loaded.schema)
        log = Log.read(clean, loaded.schema, catalogue).histories
    except (HrnnError, KeyError, ValueError) as error:
        reason = f"its fields are not those of this data ({error})"
        return Champion(pointer.version, problem=reason)
    if catalogue.item_ids != candidate.catalogue.item_ids:
        raise InputError("the candidate's catalogue is not that of the tables it is measured on")
    model = loaded.model
    if catalogue != loaded.catalogue:
        model = with_catalogue(model, loaded.catalogue, catalogue)
    split = split_users(log, candidate.settings.split)
    model.trend_log = split.train
    same_data = lineage is not None and lineage.data_digest == data_digest
    comparable_E, basis = _comparable(loaded, candidate, split.test, same_data)
    return Champion(pointer.version, model, split.test, comparable_E, basis)


def _comparable(
    champion: Bundle, candidate: Bundle, test: Histories, same_data: bool
) -> tuple[NDArray[np.bool_], str]:
    """Test events that the champion cannot have been trained on; else it would know the answers."""
    old, new = champion.settings.split, candidate.settings.split
    everything_E = np.ones(test.num_events, dtype=bool)
    if old == new and new.assign == "hash":
        return everything_E, "all test events: users keep their side of the split (by hash)"
    if old == new and same_data:
        return everything_E, "all test events: both were trained on the same users of the same data"
    end = champion.trend.as_of
    return (
        test.timestamp_E >= end,
        f"test events from {end} (Unix seconds) on, the end of the champion's log: it was trained "
        "with another split, so it may know older ones",
    )
