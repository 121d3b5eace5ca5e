"""The loss of a student: labels and every term, mixed in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.data.dataset import Batches, Numbered
from prune_cli.distillation.distillation import Term, TermLoss
from prune_cli.distillation.features import Taps, looked_at, outputs, pairs
from prune_cli.distillation.lessons import Lesson, Lessons
from prune_cli.errors import ConfigError, PruneError, first_line


@dataclass(frozen=True)
class Taught:
    """A term that is ready to be computed.

    Attributes:
        loss: the function, or the module that was built.
        weight: factor of the term.
        teacher: frozen, in evaluation.
        names: student's module -> teacher's module, per feature.
        table: the teacher's logits by the places of `dataset.Views`; None: it looks at every batch.
    """

    loss: TermLoss
    weight: float
    teacher: nn.Module
    names: Mapping[str, str]
    table: Tensor | None = None


class Objective(nn.Module):
    """ce_weight CE(student, labels) + sum over terms of weight * term(student, teacher, labels).

    A context manager: features are taken inside `with` only. Its parameters are those of the terms that have some;
    teachers are not part of it. A network that teaches several terms runs once per batch.

    Args:
        student: the network that will be trained, without a wrapper.
        terms: at least one.
        ce_weight: factor of the cross entropy with the labels.
        label_smoothing: of the labels, in [0, 1).
    """

    def __init__(self, student: nn.Module, terms: Iterable[Taught], ce_weight: float, label_smoothing: float) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing
        self.trained = nn.ModuleList(term.loss for term in self.terms if isinstance(term.loss, nn.Module))
        self._student = Taps(student, [name for term in self.terms for name in term.names])
        names: dict[nn.Module, list[str]] = {term.teacher: [] for term in self.terms if term.table is None}
        for term in self.terms:
            if term.table is None:
                names[term.teacher] += term.names.values()
        self._tables = {term.teacher: term.table for term in self.terms if term.table is not None}
        self._teachers = tuple(Taps(teacher, taken) for teacher, taken in names.items())
        self._hooked = ExitStack()

    def __enter__(self) -> Objective:
        with ExitStack() as stack:
            for taps in (self._student, *self._teachers):
                stack.enter_context(taps)
            self._hooked = stack.pop_all()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._hooked.close()

    def batches(self, batches: Batches) -> Batches:
        """Training batches with what this loss looks up beside them."""
        if not self._tables:
            return batches
        assert isinstance(batches, Numbered), "a table is made of a dataset that lists its views"
        return Lessons(batches, self._tables)

    def forward(self, model: nn.Module, images: Tensor, given: Tensor | Lesson) -> Tensor:
        """The scalar to minimise.

        Args:
            model: the student, or a wrapper of it.
            images: (batch, channels, height, width).
            given: labels, (batch,), or what `batches` has in their place.
        """
        labels = given.labels if isinstance(given, Lesson) else given
        said = given.logits if isinstance(given, Lesson) else {}
        taught: dict[nn.Module, tuple[Tensor, dict[str, Any]]] = {teacher: (rows, {}) for teacher, rows in said.items()}
        with torch.no_grad():
            for taps in self._teachers:
                taught[taps.model] = taps(taps.model, images)
        logits, taken = self._student(model, images)
        total = None
        if self.ce_weight:
            total = self.ce_weight * F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for term in self.terms:
            student = outputs(logits, taken, {name: name for name in term.names})
            value = term.weight * term.loss(student, outputs(*taught[term.teacher], term.names), labels)
            total = value if total is None else total + value
        assert total is not None
        return total


def prepared(term: Term, student: nn.Module, teacher: nn.Module, images: Tensor, *, key: str, seed: int) -> Taught:
    """A term with its features paired and its own parameters drawn, tried on example images.

    Args:
        student, teacher: the networks as they are now; channels may be fewer than when the recipe was checked.
        images: two blank images.
        key: of the term in the recipe, for messages.
        seed: of the term's own parameters; the generator of the training is left alone.

    Raises:
        ConfigError: see `pairs`; the term refuses what it is given, or does not return a scalar.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)  # parameters are drawn on the CPU, the same for every device
        names = pairs(term.features, student, teacher, images, key)
        own = outputs(*looked_at(student, names, images), {name: name for name in names})
        hints = outputs(*looked_at(teacher, names.values(), images), names)
        try:
            loss = term.function(own, hints).to(images.device) if term.has_parameters else term.function
            value = loss(own, hints, torch.zeros(len(images), dtype=torch.long, device=images.device))
        except PruneError as error:
            raise type(error)(f"{key}: {error}") from error
        except Exception as error:  # a term of the user's own can raise anything
            reason = first_line(error)
            raise ConfigError(f"{key}.loss fails on two images: {type(error).__name__}: {reason}") from error
    if not isinstance(value, Tensor) or value.dim():
        found = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ConfigError(f"{key}.loss returns {found}; it must return a scalar tensor")
    return Taught(loss, term.weights[0], teacher, names)
