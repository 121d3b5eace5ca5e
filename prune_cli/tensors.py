"""Which tensors of a state dict are one and the same, which hold no numbers, and a hash of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two names of one tensor share; None for tensors without memory, which share nothing."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors sorted by name, a tied one under the first of its names only."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name].detach()
        identity = memory_of(tensor)
        if identity is None or identity not in seen:
            found[name] = tensor
        if identity is not None:
            seen.add(identity)
    return found


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a copy for every further name of a tied one: where all names have to come back from a file."""
    first = distinct(state)
    return {name: tensor if name in first else tensor.detach().clone() for name, tensor in state.items()}


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of floating point tensors with a value that is infinite or no number."""
    return [
        name
        for name, value in state.items()
        if (value.is_floating_point() or value.is_complex())
        and value.device.type != "meta"
        and not bool(torch.isfinite(value.detach()).all())
    ]


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Returns a hash of names, types, sizes and values: the same whatever file format they were read from.

    Independent of order, device and memory format; tied tensors count once.
    """
    digest = hashlib.sha256()
    for name, tensor in distinct(state).items():
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
