"""Several processes that train as one: the same weights, every batch cut up between them.

All processes draw the same batches and negatives and each takes its share of the users; what they
add up is the gradient of the whole batch, so W processes do what one process with the same batch
would do (dropout apart). Dense gradients travel as one vector; of sparse ones, the rows.

Shapes: W processes, R rows with a gradient, D size of a row.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.errors import HrnnError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The group that trains together; one process alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # where the group's tensors travel from

    @classmethod
    def current(cls, device: torch.device | None = None) -> "Processes":
        """The process group that is open (`torchrun` and `init_process_group`), or one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the processes."""
        if self.size == 1:
            return values
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all; an error there is everybody's.

        Raises:
            HrnnError: raised by `make`.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except HrnnError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return here if self.size == 1 else bool(self.sum(torch.tensor([float(here)])) > 0)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        gathered = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def sum_gradients(self, parameters: Iterable[nn.Parameter], tables: Iterable[Tensor]) -> None:
        """Replace all gradients by their sums over the processes.

        Args:
            tables: those of the parameters whose gradients are sparse.
        """
        if self.size == 1:
            return
        tables = list(tables)
        by_rows = {id(table) for table in tables}
        dense = [p for p in parameters if id(p) not in by_rows]
        flat = torch.cat(
            [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in dense]
        )
        dist.all_reduce(flat)
        for parameter, part in zip(dense, flat.split([p.numel() for p in dense]), strict=True):
            parameter.grad = part.view_as(parameter)
        for table in tables:
            table.grad = self._sum_rows(table)

    def _sum_rows(self, table: Tensor) -> Tensor:
        grad = table.grad
        if grad is None:
            row_R = torch.empty(0, dtype=torch.int64, device=table.device)
            value_R = table.new_empty((0, *table.shape[1:]))
        else:
            grad = grad.coalesce()
            row_R, value_R = grad.indices()[0], grad.values()
        length = torch.tensor([len(row_R)], device=table.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        rows = self._gather_padded(row_R, longest)
        values = self._gather_padded(value_R, longest)
        row_G = torch.cat([r[: int(n)] for r, n in zip(rows, lengths, strict=True)])
        value_G = torch.cat([v[: int(n)] for v, n in zip(values, lengths, strict=True)])
        return torch.sparse_coo_tensor(
            row_G[None], value_G, tuple(table.shape), check_invariants=False
        ).coalesce()

    def _gather_padded(self, tensor: Tensor, length: int) -> list[Tensor]:
        padded = tensor.new_zeros((length, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return gathered


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did: NCCL between GPUs, or gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
