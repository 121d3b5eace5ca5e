"""Files of weights: reading foreign ones safely, fitting them to a network, writing ours deterministically.

Reads safetensors and torch files (`weights_only=True`: tensors, never code). Writes safetensors with
tensors only; what else belongs to a checkpoint is written beside it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_cli.compression.container import MAGIC, read_compressed
from prune_cli.errors import CheckpointError
from prune_cli.files.artifacts import new_file
from prune_cli.files.fitting import fit_weights, listed
from prune_cli.reading import opened
from prune_cli.tensors import distinct

log = logging.getLogger(__name__)

# where training scripts put the weights in their checkpoints, and what wrappers prepend to the names
_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Extent:
    """How many tensors a file of weights has, and how many numbers they hold."""

    tensors: int
    elements: int


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors, torch or compressed file by name, dense and contiguous on the CPU.

    A mapping under `state_dict`, `model_state_dict`, `model` or `net` is taken, else the only one that holds
    tensors, and the prefixes of `DistributedDataParallel` and `torch.compile` are cut off. Which of the formats a
    file has is seen from its content. Tied tensors of a torch file stay tied. Zipped torch files carry checksums, which
    are compared; safetensors files carry none: whoever wrote one keeps its :func:`file_sha256`.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it holds other things than tensors and
            plain values (which could run code, so they are not opened).
    """
    file = Path(path)
    with opened(file) as stream:
        head = stream.read(9)
    if not head:
        raise CheckpointError(f"weights {file} are empty: the file has 0 bytes")
    if head.startswith(MAGIC):
        return read_compressed(file)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _unwrapped(_read_safetensors(file))
    return _unwrapped(_state_in(_read_torch(file), file))


def extent_of(path: Path) -> Extent:
    """How much a safetensors or compressed file holds, without its numbers being read.

    Raises:
        CheckpointError: the file can't be read or is damaged.
    """
    with opened(path) as stream:
        head, size = stream.read(8), os.fstat(stream.fileno()).st_size
    if head == MAGIC:  # codes of less than a bit per number
        return Extent(size >> 6, size << 6)
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"weights {path} are damaged: {_one_line(error)}") from error
    return Extent(len(shapes), sum(map(math.prod, shapes)))


def extent_of_state(state: Mapping[str, Tensor]) -> Extent:
    """How much a state dict holds."""
    return Extent(len(state), sum(tensor.numel() for tensor in state.values()))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"weights {file} are damaged: {_one_line(error)}") from error


def _read_torch(file: Path) -> Any:
    try:
        if zipfile.is_zipfile(file):
            # PyTorch's own reader skips the checksums that its writer stores
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise CheckpointError(f"weights {file} are damaged: the checksum of {broken} does not match")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols, which damaged bytes may name
            # The options of the script that saved it: attributes, no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # the unpickler meets arbitrary bytes, which can raise anything
        text = str(error)
        if "TorchScript archive" in text:
            raise CheckpointError(
                f"weights {file} are a TorchScript archive, which is never opened because it holds code; save the "
                "state_dict alone"
            ) from error
        name = re.search(r"GLOBAL ([\w.]+)", text)
        if name is not None:
            raise CheckpointError(
                f"weights {file} hold Python objects ({name.group(1)}), which are never opened because they "
                "can run code; save the state_dict alone"
            ) from error
        raise CheckpointError(
            f"weights {file} are damaged or neither a safetensors nor a torch file of tensors: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "weights_only" in text:
        # the cause stands amid advice to set weights_only=False, the one thing not to do
        cause = re.search(r"WeightsUnpickler error: (.*?) ?(Check the documentation|$)", text)
        text = cause.group(1) if cause else "its bytes are of no format that torch.save writes today"
    return text[:160] or type(error).__name__


def _state_in(content: Any, file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, wherever a training script may have put them."""
    state = content
    for _ in range(2):  # {"model": {"state_dict": ...}} happens too
        for key in _NESTED_UNDER:
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
                break
        else:  # {"ema": {...}, "epoch": 3}: the only mapping of tensors
            holders = [value for value in state.values() if _has_tensors(value)] if isinstance(state, Mapping) else []
            if len(holders) == 1 and not _has_tensors(state):
                state = holders[0]
    if isinstance(state, Mapping):
        tensors = {
            str(name): value.detach().contiguous()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        }
        if tensors:
            return tensors
    keys = list(map(str, content)) if isinstance(content, Mapping) else []
    found = f"keys {listed(keys)}" if keys else type(content).__name__
    raise CheckpointError(
        f"weights {file} hold no state_dict of tensors, neither at the top nor under "
        f"{', '.join(_NESTED_UNDER)}: {found}"
    )


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        prefix = next((p for p in _WRAPPER_PREFIXES if state and all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads the file into `model` in place; every tensor of the network has to be there with its size.

    Raises:
        CheckpointError: as in :func:`read_state_dict` and :func:`fit_weights`. The model is unchanged then.
    """
    fit_weights(model, read_state_dict(path), str(path))


def write_weights(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes the tensors of a network or mapping as safetensors: same tensors, same bytes.

    Tensors become contiguous, tied ones are stored once (:func:`load_weights` ties them again), and there
    is no metadata. The file appears under its name only when it is complete and synced.

    Raises:
        StorageError: if the folder can't be written or the disk is full.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {}
    for name, tensor in distinct({k: v for k, v in state.items() if isinstance(v, Tensor)}).items():
        dense = tensor.cpu().contiguous()
        # two names may still be different views of one memory, which safetensors refuses
        tensors[name] = dense.clone() if dense.untyped_storage().nbytes() != _nbytes(dense) else dense
    content = safetensors.torch.save(tensors)
    with new_file(Path(path)) as temporary:
        temporary.write_bytes(content)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
