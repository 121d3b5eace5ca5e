"""A distillation option: terms that compare student and teacher, and what every term is given.

A term returns its own value only. `objective` mixes them, in one place, with the cross entropy of the labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn


@dataclass(frozen=True)
class Outputs:
    """What a network said of a batch, in float32 or wider.

    Attributes:
        logits: (batch, classes).
        features: what the modules that the recipe names gave, (batch, channels, height, width) behind a convolution;
            in the order of the recipe. A teacher's stand under the names of the student's modules that they are paired
            with.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


TermLoss = Callable[..., Any]
"""Either `(student: Outputs, teacher: Outputs, labels) -> scalar`, a mean over images; or, for a term with parameters
of its own, a class of module that is built from `(student: Outputs, teacher: Outputs)` of two blank images and then
called like the function. Its parameters are trained along, and are not in the stage's result."""

Weight = Annotated[float, Field(ge=0)]

Features = Literal["auto"] | tuple[str, ...] | Mapping[str, str]
"""Modules whose outputs a term compares: `auto` (see `features.stage_ends`), names that student and teacher both have,
or pairs of a student's and a teacher's name."""


@dataclass(frozen=True)
class Weighted:
    """A loss that knows how it is mixed with the labels, as where a paper has one alpha for both."""

    loss: TermLoss
    weight: float
    ce_weight: float


@dataclass(frozen=True)
class Term:
    """What one teacher teaches.

    Attributes:
        loss: see `TermLoss`; None teaches nothing.
        teacher: `dense`, the network that entered the first pruning stage, or a path of weights or of a stage folder.
        weight: factor of the term.
        ce_weight: factor of the labels' cross entropy; only that of the distillation itself counts, not those of its
            further terms.
        features: see `Features`; none are taken by default.
        cache: where the teacher's logits come from: `live`, it looks at every batch; `store`, from a table of its logits of
            every training image in every augmentation, which is kept in the store; `auto`, from a table where it is small and
            the stage looks at no fewer images. Features are always live.
    """

    loss: TermLoss | Weighted | None = None
    teacher: Literal["dense"] | Path | None = None
    weight: Weight = 1.0
    ce_weight: Weight = 1.0
    features: Features = ()
    cache: Literal["auto", "live", "store"] = "auto"

    @property
    def function(self) -> TermLoss:
        """The loss without its weights."""
        assert self.loss is not None
        return self.loss.loss if isinstance(self.loss, Weighted) else self.loss

    @property
    def weights(self) -> tuple[float, float]:
        """Factors of the term and of the labels' cross entropy."""
        own = (self.loss.weight, self.loss.ce_weight) if isinstance(self.loss, Weighted) else (1.0, 1.0)
        return self.weight * own[0], self.ce_weight * own[1]

    @property
    def has_parameters(self) -> bool:
        """Whether the loss is a class of module, which has to be built."""
        function = self.function
        function = function.func if isinstance(function, functools.partial) else function
        return isinstance(function, type) and issubclass(function, nn.Module)


@dataclass(frozen=True)
class Distillation(Term):
    """A distillation option: a term, and any number of further ones, each with its own teacher and weight.

    Attributes:
        terms: the further terms, by a name of the user's choice.
    """

    terms: Mapping[str, Term] = field(default_factory=dict)

    @property
    def all_terms(self) -> dict[str, Term]:
        """Every term that teaches something, by the key under which the recipe has it."""
        named = {"distillation": self, **{f"distillation.terms.{name}": term for name, term in self.terms.items()}}
        return {key: term for key, term in named.items() if term.loss is not None}
