"""A GPU that is not there: every tensor remembers on which device it would be, and mixing them fails as it would there.

Tensors stay on the CPU and are computed there. Those sent to `cuda` (their storages, to be exact) are marked; what is
computed from marked tensors is marked; `tensor.device` tells. An operator on tensors of both kinds, numpy on a marked
one, or a generator of the other device are errors, with the exceptions that PyTorch makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # it looks at every function of torch.cuda: before some are replaced
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
ANYWHERE = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operators whose further tensors may be on the CPU: what is copied, and indices."""
FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip

_device = torch._C.TensorBase.device.__get__
_to = torch._C.TensorBase.to


class Labelling:
    """The storages that are on the pretended GPU; kept alive, so that no other storage takes their place."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def has(self, tensor: Tensor) -> bool:
        return _plain(tensor) and tensor.untyped_storage()._cdata in self._storages

    def add(self, tensor: Tensor) -> Tensor:
        if _plain(tensor):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage
        return tensor


def _plain(tensor: Tensor) -> bool:
    return _device(tensor).type == "cpu" and tensor.layout == torch.strided


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Operators(TorchDispatchMode):
    """Labelling what is computed from marked tensors, and refuses to compute with tensors of both devices."""

    def __init__(self, labelling: Labelling) -> None:
        super().__init__()
        self.labelling = labelling

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [tensor for tensor in _tensors((args, kwargs)) if _plain(tensor)]
        marked = [self.labelling.has(tensor) for tensor in given]
        name = func.overloadpacket.__name__
        if name in ANYWHERE:
            if any(marked) and not marked[0] and name != "copy_":
                raise RuntimeError(
                    f"{name}: indices should be either on cpu or on the same device as the indexed tensor (cpu)"
                )
        elif any(marked):
            for tensor, on_gpu in zip(given, marked, strict=True):
                if not on_gpu and tensor.dim():
                    raise RuntimeError(
                        f"{name}: expected all tensors on the same device, but one of {tuple(tensor.shape)} is on the CPU"
                    )
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type == "cpu":
                raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")
        out = func(*args, **kwargs)
        if marked and (marked[0] if name in ANYWHERE else any(marked)):
            known = {id(tensor) for tensor in given}
            for tensor in _tensors(out):
                if id(tensor) not in known:
                    self.labelling.add(tensor)
        return out


class _Sent(torch.autograd.Function):
    """A copy with a storage of its own, which no mode sees; gradients are sent back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, labelling: Labelling, device: torch.device) -> Tensor:
        ctx.labelling, ctx.back = labelling, GPU if labelling.has(tensor) else CPU
        with _disable_current_modes():
            out = tensor.clone()
        return labelling.add(out) if device.type == "cuda" else out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with _disable_current_modes():
            out = gradient.clone()
        return ctx.labelling.add(out) if ctx.back.type == "cuda" else out, None, None


def _named(value: Any) -> torch.device | None:
    """The device that an argument names, if any."""
    if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu", "meta"):
        return torch.device(value)
    return value if isinstance(value, torch.device) else None


def _methods(labelling: Labelling) -> dict[str, Any]:
    """What replaces methods of tensors."""

    def send(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor if labelling.has(tensor) == (device.type == "cuda") else _Sent.apply(tensor, labelling, device)

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        device = next((d for value in (*args, kwargs.get("device")) if (d := _named(value))), None)
        dtype = next((value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)), None)
        if other is not None:
            device, dtype = other.device, other.dtype
        if device is not None and device.type not in ("cpu", "cuda"):
            return _to(tensor, device, dtype or tensor.dtype)
        options = {"dtype": dtype, "memory_format": kwargs.get("memory_format")}
        options = {key: value for key, value in options.items() if value is not None}
        if kwargs.get("copy") or True in args[2:]:
            tensor = tensor.clone()
        moved = _to(tensor, **options) if options else tensor
        return moved if device is None else send(moved, device)

    def refuse(original: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if labelling.has(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        return original(tensor, *args, **kwargs)

    def partial(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(original, *args, **kwargs)

    return {
        "device": property(lambda tensor: GPU if labelling.has(tensor) else _device(tensor)),
        "is_cuda": property(lambda tensor: labelling.has(tensor)),
        "is_cpu": property(lambda tensor: _device(tensor).type == "cpu" and not labelling.has(tensor)),
        "to": to,
        "cuda": lambda tensor, *args, **kwargs: send(tensor, GPU),
        "cpu": lambda tensor, *args, **kwargs: send(tensor, CPU),
        "numpy": partial(refuse, torch._C.TensorBase.numpy),
        "__array__": partial(refuse, Tensor.__array__),
    }


def _made(labelling: Labelling, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory that can make marked tensors."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Tensor:
        device = _named(kwargs.get("device"))
        if device is None or device.type == "meta":
            return original(*args, **kwargs)
        generator = kwargs.get("generator")
        if device.type == "cuda" and generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        with _disable_current_modes():
            out = original(*args, **{**kwargs, "device": CPU})
        return out.to(device)

    return factory


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, `torch.device("cuda")` can be used as on a machine with one GPU."""
    labelling = Labelling()
    with monkeypatch.context() as patch, Operators(labelling):
        for name in FACTORIES:
            patch.setattr(torch, name, _made(labelling, getattr(torch, name)))
        for name, value in _methods(labelling).items():
            patch.setattr(Tensor, name, value, raising=False)
        facts = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0)}
        facts |= {"get_device_name": "pretended GPU", "is_bf16_supported": True}
        facts["get_device_properties"] = SimpleNamespace(name="pretended GPU", major=9, minor=0)
        for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
            facts[name] = None
        for name, value in facts.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        yield
