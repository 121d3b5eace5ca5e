"""Penalties on whole units: everything that would be removed together, by the channel plan of the network.

A *slice* of unit k is what a parameter axis holds at the positions of k: rows of the producers, columns of the
consumers, entries of norms and biases. An entry that lies in slices of two units belongs to both.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.regularisers.penalty import Penalty
from prune_cli.structure import follow, keep
from prune_cli.structure.plan import Plan
from prune_cli.structure.slicing import channels_view

CHOSEN = "chosen"

Positive = Annotated[float, Field(gt=0)]


class Slices:
    """All slices of all units of a network, as pairs of a parameter and the unit id per position of one axis."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.size = plan.size
        self.entries: list[tuple[nn.Parameter, list[tuple[int, Tensor]]]] = []
        for name, parameter in model.named_parameters():
            axes = [(axis, torch.from_numpy(ids).to(parameter.device)) for axis, ids in plan.axes.get(name, {}).items()]
            if axes:
                self.entries.append((parameter, axes))

    def energies(self) -> Tensor:
        """||w[k]||^2 of every unit over all its slices, (size,); unit 0 stands for what is fixed."""
        total: Tensor | None = None
        for parameter, axes in self.entries:
            square = parameter.detach().square()
            for axis, ids in axes:
                others = [dim for dim in range(square.dim()) if dim != axis]
                line = square.sum(others) if others else square
                if total is None:
                    total = torch.zeros(self.size, dtype=line.dtype, device=line.device)
                total.index_add_(0, ids, line.to(total.dtype))
        return torch.zeros(self.size) if total is None else total

    def pull(self, factors: Tensor) -> None:
        """Adds factors[k] * w to the gradient of every entry, for each unit k in whose slices it lies."""
        for parameter, axes in self.entries:
            if parameter.grad is None:
                continue
            factor: Tensor | float = 0.0
            for axis, ids in axes:
                factor = factor + channels_view(factors[ids], axis, parameter.dim())
            parameter.grad.addcmul_(parameter, torch.as_tensor(factor).to(parameter.dtype))


def _plan(model: nn.Module, example_inputs: Tensor, name: str) -> Plan:
    plan = follow.analyse(model, example_inputs)
    if not plan.families:
        raise ConfigError(
            f"regulariser={name}: no channels of this network can be removed, so there is nothing to make sparse; "
            "leave the stage out (stages=[...]) or choose another model"
        )
    return plan


def group_lasso(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    strength: Annotated[float, Field(ge=0)],
    alpha: Annotated[float, Field(ge=0)] = 4.0,
) -> Penalty:
    """strength * sum_k gamma_k ||w[k]||^2 over the units of every family (DepGraph, arXiv:2301.12900, section 3.3).

    gamma_k = 2^(alpha (I_max - I_k) / (I_max - I_min)) with I_k = ||w[k]||^2, the extremes taken inside the family:
    from 1 for its strongest unit to 2^alpha for its weakest. gamma is computed from the present weights at every
    step and is a constant for the gradient, which is then 2 strength gamma_k w.

    Args:
        strength: weight of the penalty, usually 1e-5 to 1e-3.
        alpha: how much harder weak units are pushed than strong ones.
    """
    plan = _plan(model, example_inputs, "group_lasso")
    slices = Slices(model, plan)
    device = next(model.parameters()).device
    families = [torch.from_numpy(family.units).to(device) for family in plan.families]

    @torch.no_grad()
    def add(step: int, memory: dict[str, Tensor]) -> None:
        slices.pull(2 * strength * shrinkage(slices.energies(), families, alpha))

    return Penalty(add)


def shrinkage(energies: Tensor, families: list[Tensor], alpha: float) -> Tensor:
    """gamma by unit id, 0 for what is fixed; 1 throughout a family whose units are equally strong."""
    gamma = torch.zeros_like(energies)
    for units in families:
        energy = energies[units]
        low, high = energy.aminmax()
        gamma[units] = torch.exp2(alpha * (high - energy) / (high - low).clamp_min(torch.finfo(energy.dtype).tiny))
    return gamma


def growing(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    ratio: Annotated[float, Field(ge=0, lt=1)],
    delta: Positive,
    every: Annotated[int, Field(ge=1)],
    ceiling: Positive,
    choose_at: Annotated[float, Field(ge=0)] = 0.0,
) -> Penalty:
    """factor / 2 * ||w[k]||^2 on units that will be removed, with a factor that grows (GReg, arXiv:2012.09243).

    factor = min(ceiling, delta * floor(step / every)). GReg-1 chooses the units of least L1 norm before the first
    step (`choose_at` 0). GReg-2 lets the factor grow on all units, which spreads their norms, chooses when it has
    reached `choose_at`, and goes on with the chosen ones.

    Args:
        ratio: fraction of each family's units to choose; that of the pruning which follows.
        delta: increment of the factor.
        every: optimizer steps between increments.
        ceiling: largest factor (tau in the paper); the learning rate times it must stay well below 2.
        choose_at: factor at which units are chosen (tau'); 0 before the first step.

    Raises:
        ConfigError: the choice would never come.
    """
    if choose_at > ceiling:
        raise ConfigError(
            f"regulariser.choose_at={choose_at} is never reached, because regulariser.ceiling={ceiling}; choose_at "
            "must not be larger"
        )
    plan = _plan(model, example_inputs, "growing")
    slices = Slices(model, plan)

    @torch.no_grad()
    def add(step: int, memory: dict[str, Tensor]) -> None:
        factor = min(ceiling, delta * (step // every))
        if CHOSEN not in memory and factor >= choose_at:
            memory[CHOSEN] = ~torch.from_numpy(keep.lowest_units(plan, magnitudes(model, plan), ratio))
            memory[CHOSEN][0] = False
        device = next(model.parameters()).device
        pushed = memory[CHOSEN] if CHOSEN in memory else torch.from_numpy(plan.everything())
        slices.pull(pushed.to(device) * factor)

    return Penalty(add)


def magnitudes(model: nn.Module, plan: Plan) -> np.ndarray:
    """L1 norm of every unit over the rows that produce it, (size,)."""
    scores = np.zeros(plan.size)
    for family in plan.families:
        for name, axis in family.producers:
            line = model.get_parameter(name).detach().abs().movedim(axis, 0).flatten(1).sum(1)
            np.add.at(scores, plan.axes[name][axis], line.double().cpu().numpy())
    return scores
