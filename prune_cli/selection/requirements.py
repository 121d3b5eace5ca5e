"""What a criterion needs of the network, the data and the granularity, checked before anything is trained."""

from __future__ import annotations

from torch import Tensor, nn

from prune_cli.criteria import sites as finding
from prune_cli.criteria.criterion import Criterion
from prune_cli.data.dataset import Dataset
from prune_cli.errors import ConfigError
from prune_cli.selection.granularity import Granularity
from prune_cli.structure import modes, prunable
from prune_cli.structure.follow import analyse


def needs_images(criterion: Criterion) -> bool:
    """Whether calibration images must be there."""
    return any(need.from_images for need in criterion.entries)


def check(
    criterion: Criterion,
    granularity: Granularity,
    model: nn.Module,
    data: Dataset,
    example_inputs: Tensor,
    *,
    trained: bool = False,
) -> None:
    """Refuses what the criterion cannot score.

    Args:
        trained: whether the stage will have trained the network when it first scores.

    Raises:
        ConfigError: says why and what would be legal.
    """
    if criterion.reads("request") and (granularity.scope == "global" or granularity.budget):
        key = "budget" if granularity.budget else "scope=global"
        raise ConfigError(
            f"granularity.{key} finds out from the scores how many filters a layer keeps, but this criterion needs that "
            "number to score them; choose granularity.scope=layer with a ratio, or another criterion"
        )
    if criterion.reads("training") and not trained:
        raise ConfigError(
            "criterion: needs training before the first scores, as it sums up how weights move meanwhile; choose "
            "schedule=movement, schedule=iterative with schedule.start of at least 1, or another criterion"
        )
    if needs_images(criterion) and not data.sizes.get("train", 0):
        raise ConfigError(
            "criterion: needs calibration images, but the dataset has no training split; choose criterion=l1 or another "
            "that reads the weights"
        )
    asked = list(granularity.ratios(model))
    flows = [need.take for need in criterion.entries if need.source == "flow" and need.take]
    if flows and all(bool(prunable.target(model, name).weight.any()) for name in asked):
        # Weights that are 0 before training, as some classifiers', let nothing through yet and tell nothing.
        for flow in flows:
            flow(model, example_inputs, asked)
    of_norms = any(need.of_norm for need in criterion.entries)
    if not (of_norms or criterion.reads("outputs", "inputs")):
        return
    with modes.evaluating(model):
        found = finding.find(model, example_inputs)
    if criterion.reads("outputs", "inputs"):
        ran = {site.weight for site in found.sites}
        if silent := [name for name in asked if name not in ran]:
            raise ConfigError(
                f"criterion: needs the activations of {_some(silent)}, which cannot be seen when the network runs in eval "
                "mode; exclude such layers with granularity.rules or choose another criterion"
            )
    if of_norms:
        _check_norms(model, found, asked, example_inputs)


def _check_norms(model: nn.Module, found: finding.Sites, asked: list[str], example_inputs: Tensor) -> None:
    """Every family of filters that will be ranked has a norm with a scale behind one of its layers."""
    layers = prunable.targets(model)
    bare = []
    for family in analyse(model, example_inputs).families:
        names = [name for name, _ in family.producers if name in layers]
        scaled = any((norm := found.norm_of(name)) is not None and norm[0] is not None for name in names)
        if names and all(name in asked for name in names) and not scaled:
            bare.append(names[0])
    if bare:
        raise ConfigError(
            f"criterion: needs a norm behind every layer, but {_some(bare)} has none; exclude such layers with "
            "granularity.rules or choose another criterion"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
