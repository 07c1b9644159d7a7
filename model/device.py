"""Where training runs and in which precision, and how data gets there."""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.errors import InputError
from model.train_settings import Device, Precision

T = TypeVar("T")

HALF_COLUMNS = 1000  # scores per position from which bfloat16 pays on a CPU

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(wanted: Device) -> torch.device:
    """The device of this process; under `torchrun` each process takes the GPU of its local rank.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if wanted is Device.CPU or (wanted is Device.AUTO and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("train.device is cuda, but PyTorch sees no GPU: use auto or cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(wanted: Precision, device: torch.device, columns: int) -> torch.dtype:
    """What matrix products run in.

    Left to choose: bfloat16 where the hardware multiplies it and a product is large enough for
    that to save more than the conversions cost; as accurate as float32 (docs/results.md). It
    depends on machine and sizes alone, so that a run that is continued goes on as it began.

    Args:
        columns: how many scores a position gets.
    """
    if wanted is Precision.AUTO:
        if device.type == "cuda":
            half = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            half = columns >= HALF_COLUMNS and multiplies_bfloat16()
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if wanted is Precision.BFLOAT16 else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this processor does: then its products are two to four times float32's speed."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, up to 256 MiB.

    By default it returns memory above 128 KiB, or a few MiB of it, to the kernel, which hands out
    the same pages, zeroed one by one, in the next step. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most there is
        mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, matrix products run in this dtype, and new tensors are made on the device."""
    with ExitStack() as stack:
        if device.type != "cpu":
            stack.enter_context(device)
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        yield


def move(value: T, device: torch.device) -> T:
    """The same value with every tensor in it on the device; nothing is copied that is there."""
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return type(value)(move(v, device) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts: dict[str, Any] = {
            f.name: move(getattr(value, f.name), device) for f in fields(value) if f.init
        }
        return replace(value, **parts)
    return value


def send(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """Indices on the device; through pinned memory, without waiting, where it is a GPU."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
