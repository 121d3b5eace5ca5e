"""ADMM: weights are tied by a penalty to their own projections onto sets of sparse weights (arXiv:1804.03294).

For f(W) with W in sets S_1, S_2, ...: every set has a copy Z of the weights in it and a scaled dual U, and in turn

    W <- training on f(W) + sum over the sets of rho / 2 * ||W - Z + U||^2    (`Pull`)
    Z <- the projection of W + U onto the set                                 (`step`)
    U <- U + W - Z

One set is ADMM; two, for patterns and whole kernels, is PatDNN's extended form (arXiv:2001.00138, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.masks import Masks

Z, U = "z", "u"
ALL = "all"  # in the table of residuals: every weight together

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Projection:
    """What one set keeps of the weights that it concerns.

    Attributes:
        z: parameter name -> the nearest weights that lie in the set.
        u: parameter name -> scaled dual, the sum of what the weights deviated by; shaped like `z`.
    """

    z: Mapping[str, Tensor]
    u: Mapping[str, Tensor]


@dataclass(frozen=True)
class Residual:
    """How far the weights are from a set after a step; a line of the table.

    Attributes:
        iteration: trainings so far; 0 is the network that came.
        epoch: epochs so far.
        rho: weight of the penalty in the training before; None before the first.
        constraint: name of the set.
        parameter: name of the weight, or `all`.
        primal: ||W - Z|| / ||W||.
        dual: rho * ||Z - Z of the step before|| / ||W||; None in the first step.
    """

    iteration: int
    epoch: int
    rho: float | None
    constraint: str
    parameter: str
    primal: float
    dual: float | None


@torch.no_grad()
def step(weights: Weights, before: Projection | None, project: Callable[[Weights], Masks]) -> Projection:
    """Projects W + U and moves the dual by what is left: one step between two trainings.

    The first step begins with U = 0 and leaves it there. A set concerns the weights that its masks take something
    from, now or in an earlier step; all others stay free.

    Args:
        weights: all parameters by name; not kept.
        project: values that take the place of these weights, by name -> masks of their projection.
    """
    values = {name: weights[name] + u for name, u in before.u.items()} if before else {}
    masks = project(values)
    concerned = set(values) | {name for name, mask in masks.items() if not bool(mask.all())}
    names = [name for name in weights if name in concerned]  # in this order also when going on from a checkpoint
    z, u = {}, {}
    for name in names:
        value = values.get(name, weights[name])
        mask = masks.get(name)
        z[name] = value.detach().clone() if mask is None else value.detach() * mask.to(value.device)
        u[name] = value.detach() - z[name] if before else torch.zeros_like(z[name])
    return Projection(z, u)


def rescaled(one: Projection, factor: float) -> Projection:
    """The projection for a rho divided by `factor`: the dual itself is rho * U, and does not change with rho."""
    return one if factor == 1 else Projection(one.z, {name: u * factor for name, u in one.u.items()})


@dataclass(frozen=True)
class Splitting:
    """What a stage keeps from one projection to the next.

    Attributes:
        sets: name of a constraint set -> what it keeps of the weights; empty before the first and after the last.
        rho: weight of the penalty that ties the weights to the sets; None before the first.
        residuals: lines of the table so far.
    """

    sets: Mapping[str, Projection] = field(default_factory=dict)
    rho: float | None = None
    residuals: tuple[Residual, ...] = ()

    def renewed(
        self, weights: Weights, projects: Mapping[str, Callable[[Weights], Masks]], rho: float, epoch: int
    ) -> Splitting:
        """After one more projection onto every set, with the residuals of the training before.

        Args:
            weights: all parameters by name.
            projects: name of a set -> its projection, as in `step`.
            rho: weight of the penalty in the training that follows.
            epoch: epochs trained so far, for the table.
        """
        iteration = self.residuals[-1].iteration + 1 if self.residuals else 0
        sets, found = {}, list(self.residuals)
        for name, project in projects.items():
            before = self.sets.get(name)
            after = step(weights, before, project)
            found += residuals(
                weights, before, after, rho=self.rho, constraint=name, iteration=iteration, epoch=epoch
            )  # fmt: skip
            sets[name] = rescaled(after, (self.rho or rho) / rho)
        return Splitting(sets, rho, tuple(found))

    def ended(self) -> Splitting:
        """Without sets: what they keep of the weights ends, the table stays."""
        return Splitting({}, self.rho, self.residuals)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint."""
        return {
            f"{kind}/{name}/{parameter}": value
            for name, one in self.sets.items()
            for kind, values in ((Z, one.z), (U, one.u))
            for parameter, value in values.items()
        }

    def numbers(self) -> dict[str, Any]:
        """The rest of a checkpoint, JSON-serialisable."""
        return {"sets": list(self.sets), "rho": self.rho, "residuals": [asdict(row) for row in self.residuals]}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Splitting:
        """The inverse of `tensors` and `numbers`."""

        def those(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        sets = {name: Projection(those(f"{Z}/{name}/"), those(f"{U}/{name}/")) for name in numbers["sets"]}
        return Splitting(sets, numbers["rho"], tuple(Residual(**row) for row in numbers["residuals"]))


class Pull:
    """Adds the penalty's gradient, rho * (W - Z + U) for every set; for `fit(regularise=...)`.

    Args:
        model: whose gradients it adds to.
        sets: what each keeps of the weights.
        rho: weight of the penalty.
    """

    def __init__(self, model: nn.Module, sets: Sequence[Projection], rho: float) -> None:
        self._entries = []
        for name, parameter in model.named_parameters():
            targets = [one.z[name] - one.u[name] for one in sets if name in one.z]
            if targets:
                self._entries.append((parameter, len(targets), torch.stack(targets).sum(0)))
        self._rho = rho

    @torch.no_grad()
    def __call__(self, step: int, memory: dict[str, Tensor]) -> None:
        for parameter, count, target in self._entries:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=self._rho * count).sub_(target, alpha=self._rho)


@torch.no_grad()
def residuals(
    weights: Weights,
    before: Projection | None,
    after: Projection,
    *,
    rho: float | None,
    constraint: str,
    iteration: int,
    epoch: int,
) -> list[Residual]:
    """One line per weight of a set and one for all of them together; none where the set concerns no weight."""
    found, sums = [], torch.zeros(3, dtype=torch.double)
    for name, z in after.z.items():
        moved = torch.zeros(()) if before is None or name not in before.z else (z - before.z[name]).norm()
        norms = torch.stack(
            [value.double().cpu() for value in (weights[name].norm(), (weights[name] - z).norm(), moved)]
        )
        sums += norms.square()
        found.append((name, norms.tolist()))
    if found:
        found.append((ALL, sums.sqrt().tolist()))
    return [
        Residual(
            iteration, epoch, rho, constraint, name, off / max(size, 1e-30),
            None if rho is None else rho * moved / max(size, 1e-30),
        )
        for name, (size, off, moved) in found
    ]  # fmt: skip


@contextmanager
def substituted(model: nn.Module, values: Weights) -> Iterator[None]:
    """The model with these values in place of its parameters inside the block, and with its own tensors after it."""
    parameters = {name: model.get_parameter(name) for name in values}
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
