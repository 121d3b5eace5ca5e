"""N:M: of every m consecutive input channels at one position, n stay (`m4n2`, `m4n1`, `m8n1`, ...).

2:4 (`m4n2`) is what sparse tensor cores compute (Mishra et al., arXiv:2104.08378).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Context, Group, Units
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure.keep import removed
from prune_cli.structure.prunable import target

PAIRWISE = 16  # up to this m, comparing all pairs is faster than sorting


@dataclass(frozen=True)
class NM(Units):
    """n of every m consecutive input channels stay, at every output channel and kernel position by itself.

    A ratio says how many of the m go: 0.5 is 2 of 4, 0.75 is 3 of 4. A ratio file may name a pattern for each weight
    instead: `m8n1` keeps 1 of 8; beside patterns its plain numbers are irregular ratios. A last group of fewer than
    m channels keeps min(n, its size). Groups of a grouped convolution do not mix, because its weight has only the
    input channels of one group; a depthwise one has a single input channel and stays dense.

    Attributes:
        m: size of a group, for ratios given as numbers.
    """

    name: ClassVar[str] = "n_m"
    takes_patterns: ClassVar[bool] = True

    m: Annotated[int, Field(ge=2)] = 4

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """N:M needs patterns with 1 <= n <= m, and ratios that are whole parts of m."""
        self.patterns(ratios)
        for name in ratios:
            input_axis(model, name)

    def patterns(self, ratios: Mapping[str, float | str]) -> dict[str, tuple[int, int]]:
        """(m, n) by parameter name; irregular and dense layers are absent.

        Raises:
            ConfigError: a pattern or ratio that is impossible.
        """
        mixed = any(isinstance(ratio, str) for ratio in ratios.values())
        found = {}
        for name, ratio in ratios.items():
            if isinstance(ratio, str):
                found[name] = parse(ratio, name)
            elif not mixed and ratio > 0:
                found[name] = self._whole(ratio)
        return found

    def _whole(self, ratio: float) -> tuple[int, int]:
        gone = Fraction(str(ratio)) * self.m
        if gone.denominator != 1:
            legal = ", ".join(f"{float(Fraction(k, self.m)):g}" for k in range(1, self.m))
            raise ConfigError(
                f"granularity=n_m: ratio {ratio:g} removes {float(gone):g} of m={self.m}; choose one of {legal}, or "
                "another granularity.units.m"
            )
        return self.m, self.m - int(gone)

    def groups(self, context: Context) -> list[Group]:
        """One group per weight tensor that has anything to remove."""
        patterns = self.patterns(context.ratios)
        found = []
        for name, ratio in context.ratios.items():
            scores = context.scores_of(name)
            mask = functools.partial(_mask, name, tuple(scores.shape))
            if name not in patterns:
                if not isinstance(ratio, str) and ratio > 0:
                    found.append(Group(name, scores.flatten(), ratio, mask))
                continue
            (m, n), axis = patterns[name], input_axis(context.model, name)
            count = surplus(scores.shape, m, n, axis)
            if count:
                choose = functools.partial(_choose, scores, m, n, axis)
                found.append(Group(name, scores.flatten(), count / scores.numel(), mask, choose))
        return found

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """n values and n codes of log2(m) bits per group; irregular layers as single weights."""
        return {
            name: MaskFormat("n_m", {"m": m, "n": n, "axis": input_axis(model, name)})
            for name, (m, n) in self.patterns(ratios).items()
        }


def parse(pattern: str, name: str) -> tuple[int, int]:
    """(m, n) of a pattern `mXnY`: Y kept of every X.

    Raises:
        ConfigError: another form, or not 1 <= n <= m.
    """
    match = re.fullmatch(r"m(\d+)n(\d+)", pattern)
    if not match:
        raise ConfigError(f"{name}: {pattern!r} is no N:M pattern; m4n2 keeps 2 of every 4")
    m, n = int(match[1]), int(match[2])
    if not 1 <= n <= m:
        raise ConfigError(f"{name}: {pattern!r} would keep {n} of every {m}; n must be from 1 to m, as in m4n2")
    return m, n


def input_axis(model: nn.Module, name: str) -> int:
    """The axis of a weight along which its input channels lie.

    Raises:
        ConfigError: a transposed convolution with groups, whose groups lie behind each other on that axis.
    """
    module = target(model, name).module
    if not isinstance(module, _ConvTransposeNd):
        return 1
    if module.groups > 1:
        raise ConfigError(f"{name}: granularity=n_m needs groups=1 of a transposed convolution; exclude this layer")
    return 0


def surplus(shape: Sequence[int], m: int, n: int, axis: int = 1) -> int:
    """How many entries of a weight an N:M pattern removes."""
    length = shape[axis]
    numel = 1
    for size in shape:
        numel *= size
    whole, rest = divmod(length, m)
    return numel // max(length, 1) * (whole * (m - n) + max(0, rest - n))


def _mask(name: str, shape: tuple[int, ...], keep: Tensor) -> dict[str, Tensor]:
    return {name: keep.view(shape)}


def ranks(scores: Tensor, m: int, axis: int = 1) -> Tensor:
    """How many of its group every entry exceeds (lower score, or the same at a lower index): shaped like `scores`.

    The last group is filled up with entries that exceed all others and are cut off again.
    """
    length = scores.shape[axis]
    count = -(-length // m)
    work = scores.movedim(axis, 1)
    if count * m != length:
        filler = work.new_full((work.shape[0], count * m - length, *work.shape[2:]), float("inf"))
        work = torch.cat([work, filler], dim=1)
    blocks = work.reshape(work.shape[0], count, m, *work.shape[2:])
    if m > PAIRWISE:
        rank = torch.sort(torch.sort(blocks, dim=2, stable=True).indices, dim=2).indices
    else:
        columns = blocks.unbind(2)
        sums = [torch.zeros(column.shape, dtype=torch.int8, device=scores.device) for column in columns]
        for i in range(m):
            for j in range(i):
                below = columns[j] <= columns[i]
                sums[i] += below
                sums[j] += ~below
        rank = torch.stack(sums, dim=2)
    return rank.reshape(work.shape)[:, :length].movedim(1, axis)


def nm_mask(scores: Tensor, m: int, n: int, axis: int = 1) -> Tensor:
    """Keeps the n highest of every m consecutive entries along `axis`; of equal ones the first go.

    Args:
        scores: (out, in, ...) or any shape with at least two axes; not nan.

    Returns:
        Bool tensor shaped like `scores`; a last group of fewer than m keeps min(n, its size).
    """
    length = scores.shape[axis]
    rank = ranks(scores, m, axis)
    limit = torch.full((length,), m - n, dtype=torch.int8 if m <= PAIRWISE else torch.int64, device=scores.device)
    rest = length % m
    if rest:
        limit[-rest:] = max(0, rest - n)
    size = [1] * scores.dim()
    size[axis] = length
    return rank >= limit.view(size)


def _choose(scores: Tensor, m: int, n: int, axis: int, fraction: Fraction) -> Tensor:
    """The whole pattern, or a fraction of what it removes: the lowest of each group first, then the second lowest."""
    keep = nm_mask(scores, m, n, axis)
    if fraction >= 1:
        return keep.flatten()
    gone = torch.nonzero(~keep.flatten()).flatten()
    by_score = gone[torch.sort(scores.flatten()[gone], stable=True).indices]
    by_rank = by_score[torch.sort(ranks(scores, m, axis).flatten()[by_score], stable=True).indices]
    result = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    result[by_rank[: removed(fraction, len(gone))]] = False
    return result
