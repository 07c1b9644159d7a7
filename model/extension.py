"""A trained model for another catalogue: new items from their metadata alone, gone ones left out.

An item that was not there in training has no id vector, no count and no followers; its fields say
where it stands (eq. 2 with λ = 1), and no training is needed. What the network learned of the
items it knows is untouched, so their affinities stay the same.

Shapes: M items of the new catalogue, J of the old one, Z stored transitions, D embedding.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.catalogue import Catalogue
from model.fields import FieldBags
from model.hrnn import TrainedHRNN
from model.network import HRNNMeta
from model.query import FieldValue
from model.transitions import Transitions

# What every item has a row of in the network's state, and what a new item's row holds; None: the
# mean of the others, where an item about which nothing is known stands.
NEW_ITEM = {
    "items.embedding.weight": None,  # has one row more: "no previous event"
    "items.untied.weight": None,
    "items.bias": None,
    "items.lambda_M": 1.0,  # fields only
    "prior.inverse_p_M": 1.0,  # read where an item followed another; a new one never did
    "values.mean_M": 0.0,  # the overall mean
    "values.taste_MY": 0.0,
    "values.item.weight": None,
    "values.bias.weight": None,
}


def with_catalogue(model: TrainedHRNN, old: Catalogue, new: Catalogue) -> TrainedHRNN:
    """The model with the items of `new`, in its order; those of `old` are found by id.

    New items are told apart by their fields; a model that reads none gives all of them the mean
    affinity of the others.
    """
    bags = FieldBags.encode(model.encodings.item_fields, new.fields, len(new))
    return _extended(model, old, new, bags)


def with_items(
    model: TrainedHRNN, old: Catalogue, items: Mapping[str, Mapping[str, FieldValue]]
) -> tuple[TrainedHRNN, Catalogue]:
    """The model with some items new or changed, all others as they are; ids ascending.

    Args:
        items: all fields by item id; those that the catalogue lacks are left out, those that are
            not given are missing.
    """
    item_ids = tuple(sorted({*old.item_ids, *items}))
    old_position_M = old.encode(item_ids)
    # Rows of the given items lie behind those of the old ones; the others keep theirs.
    given = {item: len(old) + i for i, item in enumerate(items)}
    row_M = np.array(
        [given.get(i, j) for i, j in zip(item_ids, old_position_M.tolist(), strict=True)], np.int64
    )
    columns = {name: [fields.get(name) for fields in items.values()] for name in old.fields}
    stacked = Catalogue(
        (*old.item_ids, *items),
        {name: [*old.fields[name], *columns[name]] for name in old.fields},
        old.title_field,
    )
    new = stacked.subset(row_M)
    encoded = FieldBags.encode(model.encodings.item_fields, columns, len(items))
    bags = model.network.items.bags.followed_by(encoded).rows(torch.from_numpy(row_M))
    return _extended(model, old, new, bags), new


def as_new(model: TrainedHRNN, item_J: NDArray[np.int64]) -> TrainedHRNN:
    """The model as if these items had come after training; the catalogue stays."""
    position_M = np.arange(model.network.num_items)
    position_M[item_J] = -1
    transitions = model.transitions
    if transitions is not None:
        transitions = transitions.without(torch.from_numpy(item_J))
    # Their popularity is known; the counts, which may be large, keep their order.
    alone = replace(model, transitions=None, trend_log=None)
    extended = _moved(alone, position_M, position_M, model.network.items.bags)
    return replace(extended, transitions=transitions, trend_log=model.trend_log)


def _extended(model: TrainedHRNN, old: Catalogue, new: Catalogue, bags: FieldBags) -> TrainedHRNN:
    """The model with the items of `new`, whose fields are encoded."""
    return _moved(model, old.encode(new.item_ids), new.encode(old.item_ids), bags)


def _moved(
    model: TrainedHRNN,
    old_position_M: NDArray[np.int64],
    new_position_J: NDArray[np.int64],
    bags: FieldBags,
) -> TrainedHRNN:
    """The model with its items where `new_position_J` says (−1: gone), the others new.

    Args:
        old_position_M: inverse of `new_position_J`; −1: a new item.
    """
    old_row_M = torch.from_numpy(old_position_M)
    encodings = model.encodings.model_copy(update={"num_items": len(old_position_M)})
    network = HRNNMeta(
        model.network.settings, encodings, bags, with_trend=model.network.log_beta is not None
    )
    state = model.network.state_dict()
    for name in NEW_ITEM.keys() & state.keys():
        state[name] = _rows(state[name], old_row_M, len(new_position_J), NEW_ITEM[name])
    network.load_state_dict(state)
    was_new_J = model.network.items.new_M.cpu()
    is_new_M = old_row_M < 0
    network.items.new_M = is_new_M | was_new_J[old_row_M.clamp(min=0)]
    network.to(model.network.device).eval()
    transitions = model.transitions
    if transitions is not None:
        transitions = _remapped(transitions, old_position_M, new_position_J)
    trend_log = model.trend_log
    if trend_log is not None:
        trend_log = trend_log.with_items(new_position_J)
    return replace(
        model, network=network, encodings=encodings, transitions=transitions, trend_log=trend_log
    )


def _rows(table: Tensor, old_position_M: Tensor, num_old: int, new_value: float | None) -> Tensor:
    """The table's rows in the new order; rows beyond the items stay last."""
    rows = table[old_position_M.clamp(min=0)].clone()
    if new_value is None:
        others_J = old_position_M[old_position_M >= 0]
        rows[old_position_M < 0] = table[others_J if len(others_J) else slice(num_old)].mean(dim=0)
    else:
        rows[old_position_M < 0] = new_value
    return torch.cat([rows, table[num_old:]])


def _remapped(
    transitions: Transitions,
    old_position_M: NDArray[np.int64],
    new_position_J: NDArray[np.int64],
) -> Transitions:
    """The same counts between the items that are left."""
    offset_J1, item_Z = transitions.offset_R1.numpy(), transitions.item_Z.numpy()
    row_Z = new_position_J[np.repeat(np.arange(len(new_position_J)), np.diff(offset_J1))]
    column_Z = new_position_J[item_Z]
    kept = np.flatnonzero((row_Z >= 0) & (column_Z >= 0))
    kept = kept[np.lexsort((column_Z[kept], row_Z[kept]))]
    offset_M1 = np.searchsorted(row_Z[kept], np.arange(len(old_position_M) + 1))
    return Transitions(
        len(old_position_M),
        torch.from_numpy(offset_M1.astype(np.int64)),
        torch.from_numpy(column_Z[kept]),
        transitions.probability_Z[torch.from_numpy(kept)],
    )
