"""What a criterion says of the weights of a network: asked, and checked for scores that can be ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion, LayerView, Norm
from prune_cli.errors import ConfigError, first_line
from prune_cli.structure import prunable


def score_of(
    model: nn.Module,
    name: str,
    criterion: Criterion,
    statistics: Mapping[str, Tensor],
    seed: int,
    *,
    norm: Norm | None = None,
    n_keep: int | None = None,
    axis: int | None = None,
) -> Tensor:
    """The scores of one weight, checked for shape and for numbers that cannot be ranked.

    Args:
        axis: along which its output channels lie, where that is not known by its layer.

    Raises:
        ConfigError: something that the criterion needs was not measured, or the scores cannot be ranked.
    """
    for need in criterion.entries:
        if need.is_statistic and need.name not in statistics:
            raise ConfigError(f"criterion: needs the statistic {need.name!r} of {name}, which was not measured")
    view = replace(view_of(model, name, seed), statistics=statistics, n_keep=n_keep, norm=norm)
    score = _scored(criterion, view if axis is None else replace(view, axis=axis))
    if score.amax().isnan():  # the largest of all is nan where any is
        raise ConfigError(f"criterion: scores of {name} contain nan")
    return score


def try_out(criterion: Criterion, model: nn.Module, name: str) -> None:
    """Asks a criterion of the user's own about one weight, before training; one that needs data cannot be asked yet.

    Raises:
        ConfigError: it fails, or its scores cannot be used.
    """
    if not criterion.needs and not _is_ours(criterion):
        _scored(criterion, view_of(model, name, 0))


def view_of(model: nn.Module, name: str, seed: int) -> LayerView:
    """A weight as criteria see it that need nothing else."""
    target = prunable.target(model, name)
    return LayerView(
        name,
        target.weight.detach(),
        None if target.bias is None else target.bias.detach(),
        torch.Generator().manual_seed(seed),
        axis=target.axis,
    )


def _scored(criterion: Criterion, view: LayerView) -> Tensor:
    """What the criterion says of one weight.

    Raises:
        ConfigError: a criterion of the user's own fails, or its scores are of another shape than its level needs.
    """
    try:
        score = criterion.score(view)
    except Exception as error:
        if _is_ours(criterion):
            raise
        reason = first_line(error)
        raise ConfigError(f"criterion: scoring {view.name} raised {type(error).__name__}: {reason}") from error
    if not isinstance(score, Tensor):
        raise ConfigError(f"criterion: scores of {view.name} are a {type(score).__name__}, not a tensor")
    expected = view.weight.shape if criterion.level == "element" else view.weight.shape[view.axis : view.axis + 1]
    if score.shape != expected:
        raise ConfigError(
            f"criterion: scores of {view.name} have shape {tuple(score.shape)}; level {criterion.level} needs "
            f"{tuple(expected)}"
        )
    return score.float()


def _is_ours(criterion: Criterion) -> bool:
    return str(getattr(criterion.score, "func", criterion.score).__module__).startswith("prune_cli.")
