"""L1 on the scales of norm layers: network slimming (Liu et al., arXiv:1708.06519)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.regularisers.penalty import Norms, Penalty
from prune_cli.structure.follow import analyse
from prune_cli.training.batch_norm import BATCH_NORMS


def norm_scales(
    model: nn.Module, example_inputs: Tensor, *, strength: Annotated[float, Field(ge=0)], norms: Norms = "all"
) -> Penalty:
    """strength * sum |gamma| over batch norms (eq. 1 of the paper), as its subgradient strength * sign(gamma).

    sign(0) = 0: a scale that has reached zero is left alone by the penalty.

    Args:
        strength: lambda in the paper, usually 1e-5 to 1e-3.
        norms: `all`, or `inner`: those whose channels one layer alone produces, as inside residual blocks. To prune
            coupled layers with `inner_only` goes with `inner`, everything else with `all`.

    Raises:
        ConfigError: there is no such norm.
    """
    every, inner = scales(model), inner_scales(model, example_inputs)
    chosen = every if norms == "all" else inner
    if not chosen:
        raise ConfigError(
            f"regulariser=norm_scales: this network has no batch norms (norms={norms}) whose scales could be made "
            "sparse; leave the stage out (stages=[...]), or choose another regulariser or model"
        )
    parameters = list(chosen.values())

    @torch.no_grad()
    def add(step: int, memory: dict[str, Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.sign(), alpha=strength)

    return Penalty(add, norms if len(inner) < len(every) else None)


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale of every batch norm by its parameter name, in the order of the module tree."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.affine
    }


def inner_scales(model: nn.Module, example_inputs: Tensor) -> dict[str, nn.Parameter]:
    """The scales whose channels all belong to families with a single producing layer."""
    plan = analyse(model, example_inputs)
    single = plan.everything()
    single[0] = False
    for family in plan.families:
        single[family.units] = len({name for name, _ in family.producers}) == 1
    return {
        name: parameter
        for name, parameter in scales(model).items()
        if name in plan.axes and single[plan.axes[name][0]].all()
    }
