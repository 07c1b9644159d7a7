"""Training that goes on from an older model whose catalogue and vocabularies were others.

What both know is taken over: vectors and biases of shared items by id, embeddings of field values
by value (of numbers, by reading the old knots at the new ones), all other weights as they are. A
new item starts where its fields put it, like one the older model would be extended by
(`model.extension`); gone ones are forgotten. Counts, means and popularity are the new log's, and
the optimiser starts afresh.

Shapes: M items, R new ones, T tokens, D embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.catalogue import Catalogue
from model.errors import InputError
from model.fields import MISSING, FieldEncoding
from model.network import HRNNMeta
from model.schema import FieldKind

SIZES = ("encoder", "embedding", "hidden", "tied")  # settings that both must agree on

# Modules and weights that read a section's fields side by side: of other fields they mean
# something else.
READERS = {
    "items": ("items.output_tower.mix.", "items.input_tower.mix.", "profile.query."),
    "user": ("encoder.gru.weight_ih_l0",),
    "context": ("context.modulation.",),
}


@dataclass(frozen=True)
class Start:
    """An older model to go on from."""

    network: HRNNMeta
    catalogue: Catalogue


@torch.no_grad()
def warm_start(network: HRNNMeta, catalogue: Catalogue, start: Start) -> list[str]:
    """Take over what `start` has learned; the names of the weights that start anew.

    Raises:
        InputError: the older network has other sizes.
    """
    old = start.network
    ours, theirs = network.settings, old.settings
    differing = [n for n in SIZES if getattr(ours, n) != getattr(theirs, n)]
    if differing:
        found = ", ".join(
            f"network.{n} {getattr(theirs, n)} instead of {getattr(ours, n)}" for n in differing
        )
        raise InputError(
            f"train.warm_start: the older model has {found}: give the same, or warm_start none"
        )
    old_parameters = dict(old.named_parameters())
    position_M = torch.from_numpy(start.catalogue.encode(catalogue.item_ids))
    by_rows = {id(table) for table in network.row_tables()}
    tokens, old_tokens = _token_tables(network), _token_tables(old)
    by_token = {name: place for place, (name, _) in tokens.items()}
    others = _readers_of_other_fields(network, old)
    fresh = []
    for name, parameter in network.named_parameters():
        before = old_parameters.get(name)
        if name in by_token:
            place = by_token[name]
            if place not in old_tokens:
                fresh.append(name)
                continue
            old_name, old_encoding = old_tokens[place]
            _copy_tokens(parameter, tokens[place][1], old_parameters[old_name], old_encoding)
        elif before is None or name.startswith(others):
            fresh.append(name)
        elif id(parameter) in by_rows:
            _copy_rows(parameter, before, position_M, len(start.catalogue))
        elif before.shape == parameter.shape:
            parameter.copy_(before)
        else:
            fresh.append(name)
    if not any(name.startswith("items.output_tower") for name in fresh):
        _place_new_items(network, (position_M < 0).nonzero()[:, 0])
    return fresh


def _copy_rows(table: Tensor, before: Tensor, position_M: Tensor, num_old: int) -> None:
    """Rows of shared items by id; what comes after the items stays last.

    New items go with the shared ones from where both began: vectors stand around the mean, each
    where chance has put it (all in one place they would be slow to come apart), biases keep their
    own popularity.
    """
    num_items = len(position_M)
    table[num_items:] = before[num_old:]
    known_M = position_M >= 0
    rows = table[:num_items].clone()
    shared = before[position_M[known_M]]
    if len(shared):
        rows += (shared - rows[known_M]).mean(dim=0)
    rows[known_M] = shared
    table[:num_items] = rows


def _place_new_items(network: HRNNMeta, row_R: Tensor) -> None:
    """Ids of new items start as what their fields say (eq. 2: λ makes no difference yet)."""
    items = network.items
    if items.output_tower is None or items.field_bias is None or not len(row_R):
        return
    training = network.training
    network.eval()
    bags = items.bags.rows(row_R)
    items.output_embedding.weight[row_R] = items.output_tower(bags)
    items.bias[row_R] = items.field_bias(bags)
    network.train(training)


def _copy_tokens(
    table: Tensor, encoding: FieldEncoding, before: Tensor, old: FieldEncoding
) -> None:
    """Embeddings of values that the older model knew, and of those missing."""
    table[MISSING] = before[MISSING]
    if encoding.kind is not old.kind:
        return
    if encoding.kind is FieldKind.NUMERIC:
        for token, knot in enumerate(encoding.knots, start=1):
            old_tokens, weights = old.tokenise(knot)
            table[token] = torch.tensor(weights) @ before[old_tokens]
        return
    index = {value: token for token, value in enumerate(old.vocabulary, start=1)}
    shared = [
        (token, index[value])
        for token, value in enumerate(encoding.vocabulary, start=1)
        if value in index
    ]
    if shared:
        new_token_T, old_token_T = torch.tensor(shared).unbind(dim=1)
        table[new_token_T] = before[old_token_T]


def _token_tables(network: HRNNMeta) -> dict[tuple[str, str], tuple[str, FieldEncoding]]:
    """Embeddings of field values: (module, field) → name of the weight, and the field's tokens."""
    encodings, found = network.encodings, {}
    sections: Mapping[str, tuple[nn.Module | None, Sequence[FieldEncoding]]] = {
        "items.output_tower.embedding": (network.items.output_tower, encodings.item_fields),
        "items.field_bias.embedding": (network.items.field_bias, encodings.item_fields),
        "items.input_tower.embedding": (network.items.input_tower, encodings.item_fields),
        "profile.embedding": (network.profile, encodings.item_fields),
        "user": (network.user, encodings.user_fields),
        "context.embedding": (network.context, encodings.context_fields),
    }
    for module, (there, fields) in sections.items():
        if there is not None:
            for i, field in enumerate(fields):
                found[module, field.name] = f"{module}.tables.{i}.weight", field
    if encodings.event_type is not None and network.feedback is not None:
        name = "feedback.type_embedding"
        found[name, encodings.event_type.name] = f"{name}.weight", encodings.event_type
    return found


def _readers_of_other_fields(network: HRNNMeta, old: HRNNMeta) -> tuple[str, ...]:
    ours, theirs = network.encodings, old.encodings
    pairs = {
        "items": (ours.item_fields, theirs.item_fields),
        "user": (ours.user_fields, theirs.user_fields),
        "context": (ours.context_fields, theirs.context_fields),
    }
    return tuple(
        name
        for section, (new, before) in pairs.items()
        if [f.name for f in new] != [f.name for f in before]
        for name in READERS[section]
    )
