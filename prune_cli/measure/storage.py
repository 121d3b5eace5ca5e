"""What a pruned weight costs to store: bytes of values, indices, bitmaps and codebooks, by formula per format.

Every format takes a mask (True = keep, broadcastable to the weight's shape) and the bits of one value; each part is
rounded up to whole bytes. `stored` finds the bytes that a mask really needs, given the `MaskFormat` in which it was chosen.
`coding.py` writes real files with shared weights; these are the formats before that.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prune_cli.compression.gaps import fillers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storage:
    """Bytes of one stored weight tensor.

    Attributes:
        values: the numbers that stay.
        indices: where they are, one code per value or unit.
        bitmaps: where they are, one bit per position or unit.
        codebooks: tables that codes refer to.
    """

    values: int
    indices: int = 0
    bitmaps: int = 0
    codebooks: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.values + self.indices + self.bitmaps + self.codebooks


@dataclass(frozen=True)
class MaskFormat:
    """The form in which a mask was chosen, which later stages must know to count bytes; plain data.

    Attributes:
        format: name of a format in `FORMATS`, or the dotted name of a `Format` beside the granularity that needs it.
        numbers: what the format needs besides the mask, such as m and n.
    """

    format: str = "element"
    numbers: Mapping[str, int] = field(default_factory=dict)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _full(mask: Tensor, shape: Sequence[int]) -> Tensor:
    return mask.bool().expand(tuple(shape))


def code_bits(choices: int) -> int:
    """Bits of a code for one of `choices`; 0 where there is only one."""
    return max(0, math.ceil(math.log2(max(choices, 1))))


def dense(shape: Sequence[int], bits: int = 32) -> Storage:
    """Every value, without indices."""
    return Storage(_bytes(math.prod(shape) * bits))


def positions(count: int) -> Storage:
    """One bit for each of `count` positions or units, of which some are stored elsewhere."""
    return Storage(0, bitmaps=_bytes(count))


def element(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Single weights: values with a bitmap, or with gap codes of 4 or 8 bits (arXiv:1510.00149), whichever is less."""
    full = _full(mask, shape)
    kept = int(full.sum())
    options = [Storage(_bytes(kept * bits), bitmaps=_bytes(full.numel()))]
    for gap_bits in (4, 8):
        entries = kept + fillers(full, gap_bits)
        options.append(Storage(_bytes(entries * bits), indices=_bytes(entries * gap_bits)))
    return min(options, key=lambda option: option.total)


def filters(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Whole rows and columns: a smaller dense tensor, and one bit per output and input channel."""
    full = _full(mask, shape)
    kept = math.prod(shape[2:])
    for axis in range(min(full.dim(), 2)):
        kept *= int(full.movedim(axis, 0).reshape(shape[axis], -1).any(1).sum())
    return Storage(_bytes(kept * bits), bitmaps=_bytes(sum(shape[:2])))


def n_m(mask: Tensor, shape: Sequence[int], m: int, n: int, bits: int = 32, axis: int = 1) -> Storage:
    """N:M: n values and n codes of log2(m) bits per group of m along `axis`, also where some of the n are masked.

    The last group may be smaller than m and stores at most as many values as it has.
    """
    length = shape[axis]
    lines = math.prod(shape) // length
    whole, rest = divmod(length, m)
    kept = lines * (whole * n + min(rest, n))
    return Storage(_bytes(kept * bits), indices=_bytes(kept * code_bits(m)))


def stripe(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Stripes W[n, :, i, j]: C values per kept stripe and one bit per stripe."""
    full = _full(mask, shape)
    kept = int(full.any(1).sum())
    return Storage(_bytes(kept * shape[1] * bits), bitmaps=_bytes(math.prod(shape) // shape[1]))


def kernel(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Kernels W[n, c]: all their values and one bit per kernel."""
    full = _full(mask, shape)
    kept = int(full.flatten(2).any(2).sum())
    return Storage(_bytes(kept * math.prod(shape[2:]) * bits), bitmaps=_bytes(shape[0] * shape[1]))


def pattern(mask: Tensor, shape: Sequence[int], entries: int, library: int, bits: int = 32) -> Storage:
    """Patterned kernels (PatDNN): `entries` values and a pattern number per kept kernel, a bit per kernel, the library.

    Args:
        entries: values per pattern.
        library: number of patterns; its codebook is one bit per pattern and position.
    """
    full = _full(mask, shape)
    kept = int(full.flatten(2).any(2).sum())
    return Storage(
        _bytes(kept * entries * bits),
        indices=_bytes(kept * code_bits(library)),
        bitmaps=_bytes(shape[0] * shape[1]),
        codebooks=_bytes(library * math.prod(shape[2:])),
    )


def _has_groups(full: Tensor, m: int, n: int, axis: int = 1) -> bool:
    """Whether no group of m along the axis keeps more than n."""
    lines = full.movedim(axis, -1)
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[-1] % m))
    return bool((lines.unflatten(-1, (-1, m)).sum(-1) <= n).all())


def _has_patterns(full: Tensor, entries: int, library: int) -> bool:
    """Whether every kernel is inside one of at most `library` patterns of `entries` positions."""
    places = torch.arange(math.prod(full.shape[2:]), device=full.device)
    codes = torch.unique((full.flatten(2).long() << places).sum(2))
    kernels = (codes[:, None] >> places & 1).bool()
    counts = kernels.sum(1)
    patterns, parts = kernels[counts == entries], kernels[(counts < entries) & (counts > 0)]
    if len(patterns) > library or bool((counts > entries).any()):
        return False
    return all(bool((part <= patterns).all(1).any()) for part in parts)


# -------------------------------------------------------------------------------------------- which format it is


def _any_mask(full: Tensor, **numbers: int) -> bool:
    """The formats of whole units hold any mask, with zeros as values."""
    return True


@dataclass(frozen=True)
class Format:
    """One way to store a masked tensor.

    Attributes:
        name: in the tables.
        bytes_of: (mask, shape, bits=, and the numbers of a `MaskFormat`) -> bytes.
        holds: (mask of the tensor's shape, and those numbers) -> whether the format can hold the mask.
    """

    name: str
    bytes_of: Callable[..., Storage]
    holds: Callable[..., bool] = _any_mask


FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("element", element),
        Format("filters", filters),
        Format("n_m", n_m, _has_groups),
        Format("stripe", stripe),
        Format("kernel", kernel),
        Format("pattern", pattern, _has_patterns),
    )
}


def _found(name: str) -> Format:
    """The format of a name in `FORMATS`, or of a dotted name; nothing but this package is imported for a name in a file.

    A format that is not there, because the module of its granularity is not loaded, counts as single weights.
    """
    if name in FORMATS:
        return FORMATS[name]
    module, _, attribute = name.rpartition(".")
    if module.startswith("prune_cli."):
        importlib.import_module(module)
    found = getattr(sys.modules.get(module), attribute, None)
    if isinstance(found, Format):
        return found
    log.warning("the storage format %s is not loaded; its bytes are counted as those of single weights", name)
    return FORMATS["element"]


def stored(form: MaskFormat, mask: Tensor, shape: Sequence[int], bits: int = 32) -> tuple[str, Storage]:
    """The format of a masked tensor, and its bytes.

    That is the format of the mask's form while the mask still has it. Where later masks or surgery went across it, the
    format would hold zeros as values, or cannot hold the mask at all: then single weights, if they need less. Where so
    little is removed that indices cost more than it saves, the tensor is dense.

    Args:
        form: how the mask was chosen.
        bits: of one value.

    Returns:
        Name of the format, or `dense`; and what is stored.
    """
    full = _full(mask, shape)
    options = {}
    chosen = _found(form.format)
    if chosen.holds(full, **form.numbers):
        options[chosen.name] = chosen.bytes_of(full, shape, bits=bits, **form.numbers)
    if not options or options[chosen.name].values > _bytes(int(full.sum()) * bits):
        options["element"] = element(full, shape, bits)
    options["dense"] = dense(shape, bits)
    return min(options.items(), key=lambda option: option[1].total)
