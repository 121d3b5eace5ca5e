"""Files of weights: reading foreign ones safely, fitting them to a network, writing ours deterministically.

Reads safetensors and torch files (``weights_only=True``: tensors, never code). Writes safetensors with
tensors only; what else belongs to a checkpoint is written beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from prune_cli.errors import CheckpointError, StorageError

log = logging.getLogger(__name__)

# where training scripts put the weights in their checkpoints, and what wrappers prepend to the names
_NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# counts the batches of a norm; older checkpoints lack it and inference does not need it
_BATCH_COUNTER = ".num_batches_tracked"
_SHOWN = 4


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors, torch or compressed file by name, dense and contiguous on the CPU.

    A mapping under ``state_dict``, ``model_state_dict``, ``model`` or ``net`` is taken, else the only one that holds
    tensors, and the prefixes of ``DistributedDataParallel`` and ``torch.compile`` are cut off. Which of the formats a
    file has is seen from its content. Tied tensors of a torch file stay tied. Zipped torch files carry checksums, which
    are compared; safetensors files carry none: whoever wrote one keeps its :func:`sha256_of`.

    Raises:
        CheckpointError: If there is no such file, it is damaged, or it holds other things than tensors and
            plain values (which could run code, so they are not opened).
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"can't read weights {file}: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"weights {file} are empty: the file has 0 bytes")
    if head.startswith(b"PRUNEDC1"):
        from prune_cli.compressed import read_compressed  # which needs this file

        return read_compressed(file)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _unwrapped(_read_safetensors(file))
    return _unwrapped(_state_in(_read_torch(file), file))


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
    if text.startswith("Weights only load failed"):
        # the cause stands amid advice to set weights_only=False, the one thing not to do
        cause = re.search(r"WeightsUnpickler error: (.*?) ?(Check the documentation|$)", text)
        text = cause.group(1) if cause else ""
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
    found = f"keys {_listed(keys)}" if keys else type(content).__name__
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
    """Loads the file into ``model`` in place; every tensor of the network has to be there with its size.

    Raises:
        CheckpointError: As in :func:`read_state_dict` and :func:`fit_weights`. The model is unchanged then.
    """
    fit_weights(model, read_state_dict(path), str(path))


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads ``state`` into ``model`` in place, keeping its device, dtype and memory format.

    Accepted beside an exact match: missing counters of batches, a tied tensor under one of its names only,
    and one module under another name (``fc`` for ``linear``) if only one renaming fits names and sizes;
    that is logged.

    Args:
        model: The network.
        state: Tensors by name.
        source: Where they come from, for the message.

    Raises:
        CheckpointError: One line that lists missing and unexpected names and wrong sizes. The model is
            unchanged.
    """
    own = model.state_dict()
    own = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    given = _with_ties(own, dict(state))
    unexpected = [name for name in given if name not in own]
    if unexpected:
        renamed = _renamed(own, given)
        if renamed is not None:
            old, new, given = renamed
            log.info("weights %s: %s of the file is %s of the network", source, old or "the top", new or "the top")
            given = _with_ties(own, given)
            unexpected = []
    missing = [name for name in own if name not in given and not name.endswith(_BATCH_COUNTER)]
    wrong = [name for name in own if name in given and not _fits(own[name], given[name])]
    problems = []
    if missing:
        problems.append(f"missing {len(missing)}: " + _listed([_sized(name, own[name]) for name in missing]))
    if unexpected:
        texts = [_sized(name, given[name]) for name in unexpected]
        problems.append(f"unexpected {len(unexpected)}: " + _listed(texts))
    if wrong:
        texts = [f"{_sized(name, given[name])} should be {_described(own[name])}" for name in wrong]
        problems.append(f"wrong size {len(wrong)}: " + _listed(texts))
    if problems:
        raise CheckpointError(f"weights {source} do not fit {type(model).__name__}; " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])


def _fits(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{list(tensor.shape)}{kind}"


def _sized(name: str, tensor: Tensor) -> str:
    return f"{name} {_described(tensor)}"


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _with_ties(own: Mapping[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the other names of tensors that the network ties and the file holds once."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in own.items():
        identity = _identity(tensor)
        if name in given and identity is not None:
            first.setdefault(identity, name)
    for name, tensor in own.items():
        identity = _identity(tensor)
        if name not in given and identity in first:
            given[name] = given[first[identity]]
    return given


def _identity(tensor: Tensor) -> tuple[Any, ...] | None:
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


def _renamed(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, str, dict[str, Tensor]] | None:
    """Finds the one renaming of a module prefix in the file that makes names and sizes fit.

    Returns:
        The prefix in the file, the prefix in the network ("" is the top) and the renamed tensors; None if no
        renaming fits, or if two different ones do.
    """
    unexpected = [name for name in given if name not in own]
    missing = [name for name in own if name not in given]
    required = [name for name in missing if not name.endswith(_BATCH_COUNTER)]
    if not required:
        return None
    found: dict[tuple[tuple[str, str], ...], tuple[str, str]] = {}
    for old, new in sorted(_prefix_pairs(required[0], unexpected)):
        if not all(_under(old, name) for name in unexpected):
            continue
        mapping = {name: _moved(name, old, new) for name in unexpected}
        fits = all(to in own and _fits(own[to], given[name]) for name, to in mapping.items())
        if fits and set(required) <= set(mapping.values()) <= set(missing):
            found.setdefault(tuple(sorted(mapping.items())), (old, new))
    if len(found) != 1:
        return None
    mapping_items, (old, new) = next(iter(found.items()))
    moves = dict(mapping_items)
    return old, new, {moves.get(name, name): tensor for name, tensor in given.items()}


def _prefix_pairs(wanted: str, names: list[str]) -> set[tuple[str, str]]:
    """Returns (prefix in the file, prefix in the network) that turn one of ``names`` into ``wanted``."""
    parts = wanted.split(".")
    pairs = set()
    for cut in range(len(parts)):
        suffix = ".".join(parts[cut:])
        for name in names:
            if name == suffix or name.endswith("." + suffix):
                pairs.add((name[: -len(suffix)].rstrip("."), ".".join(parts[:cut])))
    return pairs


def _under(prefix: str, name: str) -> bool:
    return not prefix or name.startswith(prefix + ".")


def _moved(name: str, old: str, new: str) -> str:
    rest = name[len(old) + 1 :] if old else name
    return f"{new}.{rest}" if new else rest


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of the bytes of a file, in hexadecimal.

    Raises:
        CheckpointError: If the file can't be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error


def distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors sorted by name, a tied one under the first of its names only."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name].detach()
        identity = _identity(tensor)
        if identity is None or identity not in seen:
            found[name] = tensor
        if identity is not None:
            seen.add(identity)
    return found


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


def write_weights(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes the tensors of a network or mapping as safetensors: same tensors, same bytes.

    Tensors become contiguous, tied ones are stored once (:func:`load_weights` ties them again), and there
    is no metadata. The file appears under its name only when it is complete and synced.

    Raises:
        StorageError: If the folder can't be written or the disk is full.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = {}
    for name, tensor in distinct({k: v for k, v in state.items() if isinstance(v, Tensor)}).items():
        dense = tensor.cpu().contiguous()
        # two names may still be different views of one memory, which safetensors refuses
        tensors[name] = dense.clone() if dense.untyped_storage().nbytes() != _nbytes(dense) else dense
    content = safetensors.torch.save(tensors)
    _write_atomically(content, Path(path))


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_atomically(content: bytes, file: Path) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself has to survive a crash
        finally:
            os.close(folder)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            log.debug("could not remove %s", temporary)
        raise StorageError(f"can't write {file}: {error.strerror or error}") from error
