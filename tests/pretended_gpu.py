"""A GPU for machines without one: tensors "on" it are computed by the CPU, and told apart.

What a GPU would refuse is refused: operands on two devices, NumPy views of what is on the GPU.
What is "on the GPU" is remembered by storage, so views are too. The gradients that PyTorch's own
backward pass makes are taken as its: only code in Python is checked.
"""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
ANY_INDEX = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}  # a GPU takes indices of the CPU
ACROSS = {
    torch.Tensor.copy_,
    torch.Tensor.data.__set__,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type,
}
PACKED = {torch._VF.gru, torch._VF.lstm}  # take the lengths of sequences from the CPU
TO_HOST = {torch.Tensor.cpu}
NUMPY = {torch.Tensor.numpy, torch.Tensor.__array__}
UNCHECKED = {torch.Tensor.backward, torch.autograd.grad}


def _is_gpu(value: Any) -> bool:
    return value is not None and torch.device(value).type == "cuda"


class PretendedGpu(TorchFunctionMode):
    """Inside, `cuda` is a device."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}  # kept alive, so that no address is used again
        self.operations = 0  # on the GPU

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return tensor.layout is torch.strided and (
            tensor.untyped_storage()._cdata in self._storages
        )

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return GPU if self.holds(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return self.holds(args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func == torch.Tensor.grad.__get__:
            grad = func(*args)
            return self._take(grad) if grad is not None and self.holds(args[0]) else grad
        if func in NUMPY and self.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in TO_HOST:
            return func(*args).clone() if self.holds(args[0]) else func(*args)
        if func is torch.Tensor.to:
            return self._to(args, kwargs)
        if _is_gpu(kwargs.get("device")):
            made = func(*args, **kwargs | {"device": "cpu"})
            return tree_map_only(torch.Tensor, self._take, made)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        on_gpu = [self.holds(t) for t in tensors]
        if func in ANY_INDEX:
            checked = [t for t in tensors if self.holds(t) or t is args[0]]
        elif func in PACKED:
            checked = [t for t in tensors if t.is_floating_point()]
        else:
            checked = [t for t in tensors if t.dim() and t.layout is torch.strided]
        mixed = any(map(self.holds, checked)) and not all(map(self.holds, checked))
        if mixed and func not in ACROSS | UNCHECKED:
            shapes = [f"{tuple(t.shape)} on {'gpu' if self.holds(t) else 'cpu'}" for t in checked]
            raise RuntimeError(f"{func}: expected all tensors on one device, not {shapes}")
        result = func(*args, **kwargs)
        if any(on_gpu) and func not in ACROSS | UNCHECKED:
            self.operations += 1
            tree_map_only(torch.Tensor, self._take, result)
        return result

    def _to(self, args, kwargs):
        tensor, rest = args[0], list(args[1:])
        wanted = kwargs.pop("device", None)
        if rest and isinstance(rest[0], str | torch.device):
            wanted = rest.pop(0)
        elif rest and isinstance(rest[0], torch.Tensor):
            other = rest.pop(0)
            wanted, kwargs["dtype"] = GPU if self.holds(other) else "cpu", other.dtype
        gpu = self.holds(tensor) if wanted is None else _is_gpu(wanted)
        dtypes = [kwargs.get("dtype"), *rest]
        dtype = next((d for d in dtypes if isinstance(d, torch.dtype)), tensor.dtype)
        moved = tensor.to(dtype)
        if gpu == self.holds(tensor):
            return self._take(moved) if gpu else moved
        moved = moved.clone() if moved is tensor else moved
        return self._take(moved) if gpu else moved


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls)
        made.wanted = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.wanted


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A machine with one GPU."""
    mode = PretendedGpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state)
    )
    monkeypatch.setattr(torch, "Generator", _Generator)
    with mode:
        yield mode
