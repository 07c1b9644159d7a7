"""Fields of items, users and requests as weighted bags of tokens (§2.2, §2.3).

Every kind of field becomes the same thing, so that one embedding mechanism serves all:

- categorical: its value, weight 1;
- multi-categorical: its values, weights 1/√n;
- numeric: the two quantile knots around the value, weights by linear interpolation (a piecewise
  linear function of the value once embedded);
- text: its words, weights √count, scaled to unit length (the bag-of-words transform of §4.4).

Token 0 of a field stands for "missing or never seen". Shapes: R rows, T tokens in all.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.schema import FieldKind
from model.settings import SettingsBase

MISSING = 0
MAX_CATEGORIES = 10_000  # most frequent values kept
MAX_WORDS = 3000  # as in §4.4
MAX_KNOTS = 16
_WORD = re.compile(r"\w+")

_NOTHING = ([MISSING], [1.0])

Tokeniser = Callable[[Any], tuple[list[int], list[float]]]


class FieldEncoding(SettingsBase):
    """How one field's raw values become tokens; fitted once, kept in the bundle."""

    name: str
    kind: FieldKind
    vocabulary: tuple[str, ...] = ()  # token t is vocabulary[t − 1]
    knots: tuple[float, ...] = ()  # ascending; token t is knots[t − 1]

    @property
    def num_tokens(self) -> int:
        """Tokens including MISSING."""
        return 1 + (len(self.knots) if self.kind is FieldKind.NUMERIC else len(self.vocabulary))

    @cached_property
    def tokenise(self) -> Tokeniser:
        """The function raw value → (tokens, weights); raises ValueError or TypeError if it does
        not fit the kind."""
        if self.kind is FieldKind.NUMERIC:
            return self._numeric
        index = {value: t for t, value in enumerate(self.vocabulary, start=1)}
        if self.kind is FieldKind.CATEGORICAL:
            return lambda value: ([index.get(_as_text(value), MISSING)], [1.0])
        if self.kind is FieldKind.MULTI_CATEGORICAL:
            return lambda value: _bag(
                [index[str(v)] for v in _as_list(value) if str(v) in index], sqrt_counts=False
            )
        return lambda value: _bag(
            [index[w] for w in _words(_as_text(value)) if w in index], sqrt_counts=True
        )

    def _numeric(self, value: Any) -> tuple[list[int], list[float]]:
        x = float(value)
        if not np.isfinite(x) or not self.knots:
            return [MISSING], [1.0]
        right = int(np.searchsorted(self.knots, x))
        if right == 0:
            return [1], [1.0]
        if right == len(self.knots):
            return [right], [1.0]
        low, high = self.knots[right - 1], self.knots[right]
        share = (x - low) / (high - low)
        return [right, right + 1], [1.0 - share, share]


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        raise TypeError("one value expected, got several")
    return str(value)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | float | int) else list(value)


def _words(value: Any) -> list[str]:
    return _WORD.findall(str(value).lower())


def _bag(tokens: list[int], *, sqrt_counts: bool) -> tuple[list[int], list[float]]:
    if not tokens:
        return [MISSING], [1.0]
    counts = Counter(tokens)
    weight = np.sqrt([float(c) for c in counts.values()]) if sqrt_counts else np.ones(len(counts))
    weight = weight / np.linalg.norm(weight)
    return list(counts), weight.tolist()


def fit_encoding(name: str, kind: FieldKind, values: Iterable[Any]) -> FieldEncoding:
    """Collect a field's vocabulary or knots from its values (None = missing)."""
    present = [v for v in values if v is not None]
    if kind is FieldKind.NUMERIC:
        numbers = np.array([float(v) for v in present])
        numbers = numbers[np.isfinite(numbers)]
        quantiles = np.quantile(numbers, np.linspace(0, 1, MAX_KNOTS)) if len(numbers) else []
        return FieldEncoding(name=name, kind=kind, knots=tuple(np.unique(quantiles).tolist()))
    counts: Counter[str] = Counter()
    limit = MAX_CATEGORIES
    if kind is FieldKind.TEXT:
        limit = MAX_WORDS
        for value in present:
            counts.update(set(_words(value)))
    elif kind is FieldKind.MULTI_CATEGORICAL:
        for value in present:
            counts.update(str(v) for v in _as_list(value))
    else:
        counts.update(str(v) for v in present)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return FieldEncoding(name=name, kind=kind, vocabulary=tuple(v for v, _ in ranked))


@dataclass(frozen=True)
class FieldBags:
    """Encoded fields of R rows: one bag (CSR) per field.

    For each field: `token` int64 `[T]`, `weight` float32 `[T]`, `offset` int64 `[R + 1]`.
    """

    token: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    offset: tuple[Tensor, ...]
    num_rows: int

    @classmethod
    def encode(
        cls,
        encodings: Sequence[FieldEncoding],
        columns: Mapping[str, Sequence[Any] | NDArray[np.object_]],
        num_rows: int,
    ) -> "FieldBags":
        """Encode columns of raw values; an absent column is missing everywhere."""
        tokens, weights, offsets = [], [], []
        for encoding in encodings:
            column = columns.get(encoding.name)
            tokenise = encoding.tokenise
            token: list[int] = []
            weight: list[float] = []
            offset = np.zeros(num_rows + 1, dtype=np.int64)
            for r in range(num_rows):
                value = None if column is None else column[r]
                t, w = _NOTHING if value is None else tokenise(value)
                token += t
                weight += w
                offset[r + 1] = len(token)
            tokens.append(torch.tensor(token, dtype=torch.int64))
            weights.append(torch.tensor(weight, dtype=torch.float32))
            offsets.append(torch.from_numpy(offset))
        return cls(tuple(tokens), tuple(weights), tuple(offsets), num_rows)

    def followed_by(self, other: "FieldBags") -> "FieldBags":
        """The rows of both."""
        return FieldBags(
            tuple(torch.cat(pair) for pair in zip(self.token, other.token, strict=True)),
            tuple(torch.cat(pair) for pair in zip(self.weight, other.weight, strict=True)),
            tuple(
                torch.cat([mine, mine[-1] + others[1:]])
                for mine, others in zip(self.offset, other.offset, strict=True)
            ),
            self.num_rows + other.num_rows,
        )

    def on(self, device: torch.device) -> "FieldBags":
        """The same bags, with their tensors on the device."""
        columns = (
            (t.to(device) for t in column) for column in (self.token, self.weight, self.offset)
        )
        token, weight, offset = map(tuple, columns)
        return FieldBags(token, weight, offset, self.num_rows)

    def rows(self, row_N: Tensor) -> "FieldBags":
        """The bags of some rows, in that order, repeats allowed."""
        parts = [
            _gather(token, weight, offset, row_N)
            for token, weight, offset in zip(self.token, self.weight, self.offset, strict=True)
        ]
        token, weight, offset = zip(*parts, strict=True) if parts else ((), (), ())
        return FieldBags(token, weight, offset, len(row_N))


def _gather(
    token_T: Tensor, weight_T: Tensor, offset_R1: Tensor, row_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    start_N = offset_R1[row_N]
    length_N = offset_R1[row_N + 1] - start_N
    offset_N1 = torch.cat([length_N.new_zeros(1), length_N.cumsum(0)])
    shift_T = torch.repeat_interleave(start_N - offset_N1[:-1], length_N)
    source_T = shift_T + torch.arange(len(shift_T), device=shift_T.device)
    return token_T[source_T], weight_T[source_T], offset_N1


class FieldEmbedding(nn.Module):
    """One embedding per field, concatenated: bags of R rows → `[R, F·size]`."""

    def __init__(self, encodings: Sequence[FieldEncoding], size: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(e.num_tokens, size, mode="sum", include_last_offset=True)
            for e in encodings
        )
        for table in self.tables:
            nn.init.normal_(table.get_parameter("weight"), std=size**-0.5)
        self.output_size = size * len(encodings)

    def forward(self, bags: FieldBags) -> Tensor:
        if not self.tables:
            return torch.zeros(bags.num_rows, 0)
        return torch.cat(
            [
                table(token, offset, per_sample_weights=weight)
                for table, token, weight, offset in zip(
                    self.tables, bags.token, bags.weight, bags.offset, strict=True
                )
            ],
            dim=1,
        )
