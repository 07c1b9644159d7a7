"""Content profile: items that are like the user's so far, and of a kind that is popular.

It needs no interaction of an item, so it is what cold items are measured against (Table 7).
Shapes: M items, V tokens of all fields together, N positions.
"""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.baselines.base import NextItemBaseline
from model.catalogue import Catalogue
from model.fields import MISSING, FieldBags, fit_encoding
from model.schema import Schema
from model.sequences import Histories

RIDGE = 1.0


class ContentProfile(NextItemBaseline):
    """cosine(fields of j, mean of the history's fields) + ridge regression of log(1 + count)."""

    name = "content-profile"

    def __init__(self, num_items: int, catalogue: Catalogue | None = None) -> None:
        super().__init__(num_items)
        self.catalogue = catalogue

    def fit(self, train: Histories, schema: Schema | None = None) -> Self:
        """Fit the regression on the items that the log has."""
        catalogue, kinds = self.catalogue, (schema or Schema()).items
        if catalogue is None:
            raise ValueError("a content profile is fitted on a catalogue with fields")
        columns = []
        for name, kind in kinds.items():
            encoding = fit_encoding(name, kind, catalogue.fields[name])
            bags = FieldBags.encode((encoding,), catalogue.fields, self.num_items)
            row_T = torch.repeat_interleave(bags.offset[0].diff())
            one_hot_MV = torch.zeros(self.num_items, encoding.num_tokens)
            one_hot_MV.index_put_((row_T, bags.token[0]), bags.weight[0], accumulate=True)
            one_hot_MV[:, MISSING] = 0.0
            columns.append(one_hot_MV)
        columns.append(torch.zeros(self.num_items, 0))
        fields_MV = torch.cat(columns, dim=1)
        count_M = torch.bincount(torch.from_numpy(train.item_E), minlength=self.num_items)
        known_M = count_M > 0
        x_MV = torch.cat([fields_MV, torch.ones(self.num_items, 1)], dim=1).double()
        x_KV, y_K = x_MV[known_M], count_M[known_M].double().log1p()
        gram_VV = x_KV.T @ x_KV + RIDGE * torch.eye(x_MV.shape[1], dtype=torch.float64)
        self.state = {
            "fields": torch.nn.functional.normalize(fields_MV, dim=1),
            "popularity": (x_MV @ torch.linalg.solve(gram_VV, x_KV.T @ y_K)).float(),
        }
        return self

    def scores(self, histories: Histories, event_N: NDArray[np.int64]) -> Tensor:
        fields_MV = self.state["fields"]
        sum_EV = fields_MV[torch.from_numpy(histories.item_E)].cumsum(0)
        before_E1V = torch.cat([sum_EV.new_zeros(1, sum_EV.shape[1]), sum_EV])
        first_N = histories.offset_U1[histories.user_E[event_N]]
        profile_NV = before_E1V[event_N] - before_E1V[first_N]
        return (
            torch.nn.functional.normalize(profile_NV, dim=1) @ fields_MV.T
            + self.state["popularity"]
        )
