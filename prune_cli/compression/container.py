"""Compressed files of weights: our own header, raw bytes and a checksum; nothing in them can run.

Layout: 8 bytes of magic, the length of the header (4 bytes, little endian), the header in JSON, the sections that it
lists end to end, and the sha256 of everything before. Numbers in sections are little endian. The header may describe
the network too, as `pruned.yaml` does: then the file alone is enough to load it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prune_cli.compression import codec, kmeans
from prune_cli.compression.codec import BITS_OF, Coded, Sizes
from prune_cli.compression.gaps import fillers
from prune_cli.compression.huffman import SEGMENT, Stream
from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.reading import mapping, opened, parse_json
from prune_cli.tensors import distinct

MAGIC = b"PRUNEDC1"
MOST = 1 << 34
"""Bytes that a file may decode to, unless the reader allows more."""

TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


Width = Annotated[int, Field(ge=1, le=8)]
"""Bits of a code, from 1 to 8."""


@dataclass(frozen=True)
class Bits:
    """Width of codes: values take one of 2 ** value, gaps one of 2 ** gap."""

    value: Width
    gap: Width


CONV, LINEAR = Bits(8, 8), Bits(5, 5)
"""The paper's choice (table 4)."""


def clusters(keep: Tensor, bits: Bits) -> int:
    """Centroids that codes of this width can number, beside the zero of fillers where there are any.

    Args:
        keep: bool, shaped like the tensor.
    """
    return (1 << bits.value) - (1 if fillers(keep, bits.gap) else 0)


def compress(
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    bits: Mapping[str, Bits],
    network: Mapping[str, Any] | None = None,
) -> tuple[bytes, dict[str, Sizes]]:
    """A state dict as a compressed file's content: some tensors shared and coded, all others as they are.

    A tensor that has few enough distinct values already, as after fine-tuning centroids, is coded bit by bit; any other
    is shared first by k-means, which changes it. One without zeros has no gaps to code.

    Args:
        state: tensors by name; tied ones are stored once.
        masks: bool tensors by name, True = keep, broadcastable; nothing is masked where absent.
        bits: width of codes, by name of the floating-point tensors to code.
        network: what the file says of the network, JSON data.

    Returns:
        The content, and bytes after each stage by name of the coded tensors.

    Raises:
        ConfigError: widths outside 1 to 8.
    """
    for widths in bits.values():
        if not (1 <= widths.value <= 8 and 1 <= widths.gap <= 8):
            raise ConfigError(f"codes of {widths.value} and {widths.gap} bits; both widths must be from 1 to 8")
    entries, sections, sizes = [], [], {}
    for name, tensor in distinct(state).items():
        if name in bits and tensor.is_floating_point() and tensor.numel():
            few = _few_values(tensor, masks.get(name, torch.ones((), dtype=torch.bool)), bits[name])
            coded = codec.encode(few, _gap(few, bits[name]))
            sizes[name] = codec.sizes(coded)
            parts = _parts(coded)
            entry = {"coding": "shared", "gap_bits": coded.gap_bits, "entries": coded.entries}
        else:
            parts, entry = [_raw(tensor)], {"coding": "raw"}
        entries.append(
            {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            | entry
            | {"sections": [len(part) for part in parts]}
        )
        sections += parts
    described = {"format": 1, "tensors": entries} | ({} if network is None else {"network": network})
    header = json.dumps(described, separators=(",", ":")).encode()
    content = b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *sections])
    return content + hashlib.sha256(content).digest(), sizes


def _gap(tensor: Tensor, bits: Bits) -> int:
    return bits.gap if (codec.pattern_of(tensor) == 0).any() else 0


def _few_values(tensor: Tensor, mask: Tensor, bits: Bits) -> Tensor:
    """The tensor with zeros where it is masked and at most as many other values as codes can number."""
    mask = mask.to(tensor.device)
    masked = torch.where(mask.expand(tensor.shape), tensor.detach(), 0)
    alive = torch.from_numpy(codec.pattern_of(masked) != 0).view(tensor.shape).to(tensor.device)
    most = clusters(alive, bits)
    if len(np.unique(codec.pattern_of(masked[alive]))) <= most:
        return masked
    return kmeans.cluster(tensor, alive, most).weight


def _raw(tensor: Tensor) -> bytes:
    if str(tensor.dtype).removeprefix("torch.") not in TYPES:
        raise CheckpointError(f"tensors of type {tensor.dtype} can't be written; convert to one of {', '.join(TYPES)}")
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _parts(coded: Coded) -> list[bytes]:
    parts = [_little(coded.codebook)]
    for stream in (coded.values, coded.gaps):
        parts += [stream.lengths.tobytes(), _little(stream.segments), stream.data]
    return parts


def _little(array: Any) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Content:
    """What a compressed file holds: tensors on the CPU by name, and the network's description where there is one."""

    state: dict[str, Tensor]
    network: Any


def is_compressed(path: Path) -> bool:
    """Whether a file begins as compressed files do; False for what cannot be read."""
    try:
        with opened(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except CheckpointError:
        return False


def read_compressed(path: str | os.PathLike[str], most: int = MOST) -> dict[str, Tensor]:
    """The state dict of a compressed file, on the CPU; see `open_compressed`."""
    return open_compressed(path, most).state


def open_compressed(path: str | os.PathLike[str], most: int = MOST) -> Content:
    """Reads and checks a compressed file.

    Args:
        most: bytes that the tensors may take together.

    Raises:
        CheckpointError: the file can't be read, is damaged, or claims what its bytes can't hold.
    """
    with opened(path) as file:
        content = file.read()
    try:
        return _read(content, most)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged ({type(error).__name__}: {error})") from error


def _read(content: bytes, most: int) -> Content:
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError("not a compressed file of ours; it would begin with PRUNEDC1")
    if len(content) < len(MAGIC) + 36 or hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise CheckpointError("the checksum does not match; the file is damaged or cut off")
    start = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    body = memoryview(content)[:-32]
    if start + length > len(body):
        raise CheckpointError("the header is longer than the file")
    header = mapping(parse_json(bytes(body[start : start + length]), "the header"), "the header")
    if header["format"] != 1:
        raise CheckpointError(f"format {header['format']!r} is unknown; this version reads 1")
    position, state, total = start + length, {}, 0
    for entry in header["tensors"]:
        name, dtype, shape = _described(entry)
        total += math.prod(shape) * dtype.itemsize
        if total > most:
            raise CheckpointError(f"the tensors would take more than {most} bytes")
        parts = []
        for size in entry["sections"]:
            if not _natural(size) or position + size > len(body):
                raise CheckpointError(f"{name}: a section reaches beyond the end of the file")
            parts.append(body[position : position + size])
            position += size
        if name in state:
            raise CheckpointError(f"{name} is there twice")
        state[name] = (
            _plain(name, parts, dtype, shape) if entry["coding"] == "raw" else _coded(name, entry, parts, dtype, shape)
        )
    if position != len(body):
        raise CheckpointError("there are bytes that belong to no tensor")
    return Content(state, header.get("network"))


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _described(entry: Any) -> tuple[str, torch.dtype, tuple[int, ...]]:
    name, kind, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or kind not in TYPES or not isinstance(shape, list) or len(shape) > 16:
        raise CheckpointError(f"a tensor is described wrongly: {str(entry)[:80]}")
    if not all(map(_natural, shape)):
        raise CheckpointError(f"{name}: the shape {str(shape)[:80]} is impossible")
    return name, TYPES[kind], tuple(shape)


def _plain(name: str, parts: list[memoryview], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if len(parts) != 1 or len(parts[0]) != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{name}: its section does not have the size of its shape {shape}")
    if not len(parts[0]):
        return torch.zeros(shape, dtype=dtype)
    values = np.frombuffer(parts[0], np.uint8).copy()
    if dtype is torch.bool and np.max(values) > 1:
        raise CheckpointError(f"{name}: values other than 0 and 1 in a tensor of type bool")
    return torch.from_numpy(values).view(dtype).view(shape)


def _coded(name: str, entry: Any, parts: list[memoryview], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if entry["coding"] != "shared" or dtype not in BITS_OF or len(parts) != 7:
        raise CheckpointError(
            f"{name}: coding {str(entry['coding'])[:20]!r} of {dtype} with {len(parts)} sections is unknown"
        )
    gap_bits, entries = entry["gap_bits"], entry["entries"]
    book, value_lengths, value_segments, value_data, gap_lengths, gap_segments, gap_data = parts
    numbers = len(book) // dtype.itemsize
    segments = 2 * -(-entries // SEGMENT) if _natural(entries) else -1
    fits = (
        _natural(gap_bits)
        and gap_bits <= 8
        and len(book) == numbers * dtype.itemsize
        and len(value_lengths) == numbers
        and len(gap_lengths) == (1 << gap_bits if gap_bits else 0)
        and len(value_segments) == segments
        and len(gap_segments) == (segments if gap_bits else 0)
        # Every code takes a bit at least, and covers 2 ** gap_bits positions at most.
        and entries <= 8 * (min(len(value_data), len(gap_data)) if gap_bits else len(value_data))
        and math.prod(shape) < (entries + 1) << gap_bits
    )
    if not fits:
        raise CheckpointError(f"{name}: the sizes of its sections contradict each other")
    little = np.dtype(BITS_OF[dtype]).newbyteorder("<")
    return codec.decode(
        Coded(
            shape,
            dtype,
            gap_bits,
            np.frombuffer(book, little).astype(BITS_OF[dtype]),
            entries,
            _stream(value_lengths, value_segments, value_data),
            _stream(gap_lengths, gap_segments, gap_data),
        )
    )


def _stream(lengths: memoryview, segments: memoryview, data: memoryview) -> Stream:
    return Stream(np.frombuffer(lengths, np.uint8), np.frombuffer(segments, "<u2").astype(np.uint16), bytes(data))
