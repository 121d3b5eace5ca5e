"""Kernel patterns: every 3x3 kernel keeps its entries inside one pattern of a small library (PatDNN, arXiv:2001.00138)."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.weights import l2
from prune_cli.errors import ConfigError
from prune_cli.granularities import kernel
from prune_cli.granularities.spatial import with_such_units
from prune_cli.granularities.units import Constraint, Context, Group, Ratio, Units
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure.keep import removed
from prune_cli.structure.prunable import targets

log = logging.getLogger(__name__)

NEEDS = "a convolution with 3x3 kernels"
CENTRE, POSITIONS = 4, 9
# The library of DNN-Model-Prune: diagonal cross, plus, left and right bracket; row-major positions.
FIXED5 = ((0, 2, 4, 6, 8), (1, 3, 4, 5, 7), (0, 1, 4, 6, 7), (1, 2, 4, 5, 8))


@dataclass(frozen=True)
class _Rules:
    """A pattern set.

    Attributes:
        entries: weights per pattern.
        library: number of patterns.
        find: element scores of all layers -> the library, (patterns, 9) bool.
        whole: kernels are ranked by all their entries, not by those inside their pattern.
        least: a ratio below what patterns alone remove means just that.
    """

    entries: int
    library: int
    find: Callable[[Iterable[Tensor]], Tensor]
    whole: bool = False
    least: bool = False


@dataclass(frozen=True)
class Pattern(Units):
    """Every 3x3 kernel keeps `entries` weights, the centre among them, in one of the library's patterns; some go whole.

    The ratio is that of all weights: patterns alone remove 1 - entries / 9, and whole kernels the rest, so the ratio of
    kernels is q = (ratio - (1 - entries / 9)) / (entries / 9). Below what patterns alone remove a ratio is refused;
    only `pattern_set=fixed5` then realises 4/9, with a warning, as DNN-Model-Prune does. Kernels are ranked by what
    their pattern keeps, under `fixed5` by the whole kernel. Pooled scores are sums: criterion=l2 makes the choice the
    Euclidean projection. Layers without 3x3 kernels stay dense, or are refused where they were chosen by name.

    Attributes:
        pattern_set: `frequency` takes the most frequent natural patterns of the network, `fixed5` the four patterns
            of five entries of DNN-Model-Prune.
        entries: weights per pattern; 5 under `fixed5`, whatever is given.
        library: number of patterns under `frequency`, 4 to 12 in the paper.
        connectivity_ratio: fraction of kernels to remove, instead of the ratio of all weights; null = by the ratio.
    """

    name: ClassVar[str] = "pattern"

    pattern_set: Literal["frequency", "fixed5"] = "frequency"
    entries: Annotated[int, Field(ge=2, le=8)] = 4
    library: Annotated[int, Field(ge=1, le=12)] = 8
    connectivity_ratio: Ratio | None = None

    @property
    def rules(self) -> _Rules:
        """What the pattern set says."""
        if self.pattern_set == "fixed5":
            return _Rules(5, len(FIXED5), lambda scores: _table(FIXED5), whole=True, least=True)
        find = functools.partial(most_frequent, entries=self.entries, count=self.library)
        return _Rules(self.entries, self.library, find)

    @property
    def kept(self) -> Fraction:
        """Fraction of a kernel that its pattern keeps."""
        return Fraction(self.rules.entries, POSITIONS)

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Patterns need 3x3 kernels, and a ratio that patterns alone do not exceed."""
        for name, ratio in with_such_units(model, ratios, is_3x3, self.name, NEEDS).items():
            if ratio > 0 and self.goal(ratio) > Fraction(str(ratio)) and self.connectivity_ratio is None:
                log.warning(
                    "%s: ratio %g is less than the %.4f that patterns alone remove; that is what it will be",
                    name, ratio, float(1 - self.kept),
                )  # fmt: skip

    def goal(self, ratio: float) -> Fraction:
        """The fraction of a layer's weights that will be removed.

        Raises:
            ConfigError: the ratio is less than what patterns alone remove.
        """
        alone = 1 - self.kept
        if self.connectivity_ratio is not None:
            return alone + Fraction(str(self.connectivity_ratio)) * self.kept
        asked = Fraction(str(ratio))
        if asked >= alone:
            return asked
        if self.rules.least:
            return alone
        raise ConfigError(
            f"granularity=pattern: ratio {ratio:g} is less than the {float(alone):.4f} that patterns of "
            f"{self.entries} entries remove; choose a larger ratio, or more granularity.units.entries"
        )

    def groups(self, context: Context) -> list[Group]:
        """One group of single weights per convolution with 3x3 kernels, all with the same library."""
        return self.assigned(context, None)

    def assigned(self, context: Context, patterns: Tensor | None) -> list[Group]:
        """The groups for a library; None = that of the scores."""
        asked = with_such_units(context.model, context.ratios, is_3x3, Pattern.name, NEEDS)
        scores = {name: context.scores_of(name) for name, ratio in asked.items() if ratio > 0}
        table = self.patterns(scores.values()) if patterns is None else patterns
        return [self._group(context, name, values, asked[name], table) for name, values in scores.items()]

    def connectivity(self, ratio: float) -> Fraction:
        """The fraction of a layer's kernels that go as a whole."""
        return 1 - (1 - self.goal(ratio)) / self.kept if ratio > 0 else Fraction(0)

    def constraints(self, model: nn.Module, ratios: Mapping[str, float | str]) -> tuple[Units, tuple[Constraint, ...]]:
        """The two sets of section 4.3: every kernel in a pattern of the library, and so many kernels that are zero.

        The library is that of the network as it is. Patterns are assigned by squares, whatever the criterion, because
        only that is the projection onto the first set; kernels go by the criterion, which with l2 projects as well.
        """
        asked = with_such_units(model, ratios, is_3x3, Pattern.name, NEEDS)
        weights = [model.get_parameter(name).detach() for name, ratio in asked.items() if ratio > 0]
        library = self.patterns(weight.square().masked_fill(weight == 0, float("-inf")) for weight in weights)
        patterns = _OneLibrary(replace(self, connectivity_ratio=0.0), library)
        sets = Constraint("pattern", patterns, Criterion(l2)), Constraint("connectivity", _Connectivity(self))
        return _OneLibrary(self, library), sets

    def patterns(self, scores: Iterable[Tensor]) -> Tensor:
        """The library, (patterns, 9) bool.

        Args:
            scores: (out, in, 3, 3) element scores of all layers; removed entries are -inf.
        """
        return self.rules.find(scores)

    def _group(self, context: Context, name: str, scores: Tensor, ratio: float, patterns: Tensor) -> Group:
        goal = self.goal(ratio)
        held = context.masked.get(name)

        def mask(keep: Tensor) -> dict[str, Tensor]:
            return {name: keep.view(scores.shape)}

        def choose(fraction: Fraction) -> Tensor:
            keep = pattern_mask(scores, patterns, goal * fraction, whole=self.rules.whole)
            if held is not None:
                keep &= held.to(keep.device)
            return keep.flatten()

        return Group(name, scores.flatten(), float(goal), mask, choose)

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """The kept kernels' values, a pattern number each, one bit per kernel, and the library."""
        form = MaskFormat("pattern", {"entries": self.rules.entries, "library": self.rules.library})
        return {name: form for name, target in targets(model).items() if is_3x3(target.module)}


@dataclass(frozen=True)
class _OneLibrary(Units):
    """Patterns of a library that stays, whatever the scores."""

    units: Pattern
    patterns: Tensor

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        self.units.check(model, ratios, criterion)

    def groups(self, context: Context) -> list[Group]:
        return self.units.assigned(context, self.patterns)


@dataclass(frozen=True)
class _Connectivity(Units):
    """The whole kernels that go beside patterns, as units of their own."""

    units: Pattern

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        self.units.check(model, ratios, criterion)

    def groups(self, context: Context) -> list[Group]:
        asked = with_such_units(context.model, context.ratios, is_3x3, Pattern.name, NEEDS)
        return [kernel.group(context, name, self.units.connectivity(ratio)) for name, ratio in asked.items()]


def is_3x3(module: nn.Module) -> bool:
    """Whether a layer is a two-dimensional convolution with 3x3 kernels."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


def _table(patterns: Iterable[tuple[int, ...]]) -> Tensor:
    rows = list(patterns)
    table = torch.zeros(len(rows), POSITIONS, dtype=torch.bool)
    for row, positions in enumerate(rows):
        table[row, list(positions)] = True
    return table


@functools.cache
def candidates(entries: int) -> tuple[tuple[int, ...], ...]:
    """All patterns with the centre and `entries` - 1 of the other 8 positions: 56 of four entries."""
    others = [position for position in range(POSITIONS) if position != CENTRE]
    return tuple(tuple(sorted((CENTRE, *chosen))) for chosen in itertools.combinations(others, entries - 1))


def natural_patterns(scores: Tensor, entries: int) -> Tensor:
    """The number of each kernel's natural pattern among `candidates`: the centre and its highest other entries.

    Args:
        scores: (kernels, 9), of equal scores the later stay; -inf ranks lowest.
    """
    others = torch.tensor([position for position in range(POSITIONS) if position != CENTRE], device=scores.device)
    rank = torch.zeros(len(scores), POSITIONS - 1, dtype=torch.int8, device=scores.device)
    columns = scores[:, others].unbind(1)
    for i in range(POSITIONS - 1):
        for j in range(i):
            below = columns[j] <= columns[i]
            rank[:, i] += below
            rank[:, j] += ~below
    chosen = rank >= POSITIONS - entries
    codes = (chosen.long() << torch.arange(POSITIONS - 1, device=scores.device)).sum(1)
    numbers = torch.zeros(1 << (POSITIONS - 1), dtype=torch.long)
    others_list = others.tolist()
    for number, positions in enumerate(candidates(entries)):
        numbers[sum(1 << others_list.index(p) for p in positions if p != CENTRE)] = number
    return numbers.to(scores.device)[codes]


def most_frequent(scores: Iterable[Tensor], entries: int, count: int) -> Tensor:
    """The `count` most frequent natural patterns over all kernels that have anything left; ties by candidate number.

    Args:
        scores: (out, in, 3, 3) element scores per layer.

    Returns:
        (count, 9) bool.
    """
    histogram = torch.zeros(len(candidates(entries)), dtype=torch.long)
    for layer in scores:
        kernels = layer.flatten(2).flatten(0, 1)
        alive = kernels.isfinite().any(1)
        natural = natural_patterns(kernels, entries)[alive]
        histogram += torch.bincount(natural, minlength=len(histogram)).cpu()
    order = torch.sort(histogram, descending=True, stable=True).indices[:count]
    return _table(candidates(entries)[int(number)] for number in order)


def assign(scores: Tensor, patterns: Tensor) -> Tensor:
    """The pattern that keeps most of each kernel: argmax_k sum(w * P_k) (section 4.2), ties by number.

    Args:
        scores: (kernels, 9), finite.
        patterns: (P, 9) bool.

    Returns:
        Pattern numbers, (kernels,).
    """
    best = torch.full((len(scores),), float("-inf"), dtype=scores.dtype, device=scores.device)
    number = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    columns = scores.unbind(1)
    for index, pattern in enumerate(patterns.tolist()):
        value = torch.stack([column for column, inside in zip(columns, pattern, strict=True) if inside]).sum(0)
        better = value > best
        best = torch.where(better, value, best)
        number[better] = index
    return number


def pattern_mask(scores: Tensor, patterns: Tensor, goal: Fraction, *, whole: bool = False) -> Tensor:
    """Masks entries outside each kernel's best pattern, then the lowest kernels.

    Up to what patterns alone remove, exactly floor(goal * n) of the entries outside patterns go, lowest first; beyond,
    exactly floor(q * kernels) kernels go.

    Args:
        scores: (out, in, 3, 3), higher = keep; -inf for what is gone already.
        patterns: (P, 9) bool, each with the same number of entries.
        goal: fraction of all entries to remove.
        whole: rank kernels by all their entries, not by those inside their pattern.

    Returns:
        Keep mask shaped like `scores`.
    """
    kernels = scores.flatten(2).flatten(0, 1)
    gone = ~kernels.isfinite()
    finite = kernels.masked_fill(gone, 0.0)
    table = patterns.to(scores.device)
    inside = table[assign(finite, patterns)]
    entries = int(patterns[0].sum())
    alone = Fraction(POSITIONS - entries, POSITIONS)
    if goal < alone:
        outside = torch.nonzero(~inside.flatten()).flatten()
        order = torch.sort(kernels.flatten()[outside], stable=True).indices
        keep = torch.ones(kernels.numel(), dtype=torch.bool, device=scores.device)
        keep[outside[order[: removed(goal, kernels.numel())]]] = False
        return keep.view(scores.shape)
    count = removed((goal - alone) / (1 - alone), len(kernels))
    norms = (finite if whole else finite * inside).sum(1).masked_fill(gone.all(1), float("-inf"))
    keep = inside.clone()
    keep[torch.sort(norms, stable=True).indices[:count]] = False
    return keep.view(scores.shape)
