"""Deep Compression after pruning: weight sharing, trained centroids, gap and Huffman codes (arXiv:1510.00149)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from prune_cli.compression import kmeans
from prune_cli.compression.codec import Sizes
from prune_cli.compression.container import CONV, LINEAR, Bits, Width, clusters, compress
from prune_cli.compression.kmeans import Clustered
from prune_cli.config.nodes import Flat
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.files import artifacts, pruned
from prune_cli.files.pruned import Record
from prune_cli.layers.replacing import kind_of
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import Outcome, State
from prune_cli.selection import targets
from prune_cli.selection.targets import LayerSelector
from prune_cli.session import learning, teaching
from prune_cli.structure import prunable
from prune_cli.structure.lineage import Lineage
from prune_cli.training import weight_sharing
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BitsRule(LayerSelector):
    """Other widths of codes for some layers.

    Attributes:
        value: bits of a value's code, those of the layer's type where absent.
        gap: bits of a gap's code, the same.
    """

    value: Width | None = None
    gap: Width | None = None


def check(
    state: State,
    *,
    conv: Bits = CONV,
    linear: Bits = LINEAR,
    rules: tuple[BitsRule, ...] = (),
    distillation: Distillation,
) -> None:
    """Refuses rules that leave nothing or match nothing, and weights that two layers have in common.

    Raises:
        ConfigError: says which key to change.
    """
    teaching.check(state, distillation)
    bits = widths(state.model, conv, linear, rules, state.stage)
    if not bits:
        raise ConfigError(f"{state.stage}: no layer is left to share weights in; exclude fewer in {state.stage}.rules")
    names: dict[int, str] = {}
    for name, parameter in state.model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name and {other, name} & set(bits):
            raise ConfigError(
                f"{state.stage}: {other} and {name} are one tensor; exclude both layers: "
                f"{state.stage}.rules=[{{names: [...], exclude: true}}]"
            )


@Stage(
    check=check,
    trains=own_epochs,
    final="would lose the shared weights; put {stage} after it ({stage} fine-tunes the shared values itself: {stage}.epochs)",
)
def share(
    state: State,
    *,
    conv: Bits = CONV,
    linear: Bits = LINEAR,
    rules: tuple[BitsRule, ...] = (),
    epochs: Epochs,
    training: Annotated[Training, Flat()],
    distillation: Distillation,
) -> State:
    """Lets the weights of each layer take at most 2 ** bits values, trains those, and leaves a compressed file.

    Weights that are zero stay zero; k-means on the others begins with centroids spaced evenly from the smallest to the
    largest. Biases, norms and excluded layers are trained along, and stored as they are.

    Args:
        conv: widths of the codes of convolutions, 8 bits in the paper.
        linear: of linear layers, 5 bits in the paper.
        rules: other widths, or exclusion, for some layers; the last match wins.
        epochs: passes over the training split to fine-tune centroids; 0 leaves those of k-means.
    """
    bits = widths(state.model, conv, linear, rules, state.stage)
    shared = _clustered(state, bits)
    weight_sharing.attach(state.model, shared)
    # What is shared keeps its zeros by itself, and its name is that of a codebook now.
    masks = {name: mask for name, mask in state.masks.items() if name not in shared}
    empty = {name: torch.zeros((), dtype=torch.bool) for name in bits if name not in shared}
    progress = learning.learn(
        state,
        teaching.objective(state, distillation, training, epochs),
        epochs=epochs,
        training=training,
        masks=masks | empty,
        progress=learning.resumed(state, training.optimizer),
    )
    weight_sharing.detach(state.model, shared)
    content, coded = _compressed(state, bits)
    outcome = Outcome(
        epochs=progress.epoch,
        select_on=training.fit.select_on,
        history=tuple(progress.history),
        files={artifacts.COMPRESSED: content},
        coded=coded,
    )
    _report(state, coded, len(content))
    return state.evolve(outcome=outcome)


def widths(model: nn.Module, conv: Bits, linear: Bits, rules: tuple[BitsRule, ...], stage: str) -> dict[str, Bits]:
    """Widths of the codes of every shared weight, by parameter name.

    Raises:
        ConfigError: a rule that matches nothing.
    """
    found = {name: module for name, module in model.named_modules() if _multiplies(module)}
    special = targets.last_matches(found, rules, f"{stage}.rules")
    chosen = {}
    for name, module in found.items():
        usual, rule = linear if isinstance(module, nn.Linear) else conv, special.get(name, BitsRule())
        if not rule.exclude:
            chosen[f"{name}.weight"] = Bits(rule.value or usual.value, rule.gap or usual.gap)
    return chosen


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer multiplies by a weight of its own, whose values may be shared."""
    kind = kind_of(module)
    return isinstance(module, prunable.PRUNABLE) if kind is None else kind.out_width(module) is not None


def _clustered(state: State, bits: dict[str, Bits]) -> dict[str, Clustered]:
    """The clustered weights, the same on every rank; those of which nothing is left are absent.

    They follow from the weights that entered the stage, so a resumed stage finds the same clusters.
    """
    own: dict[str, Tensor] = {}
    for name, widths in bits.items() if state.world.main else ():
        weight = state.model.get_parameter(name).detach()
        keep = weight != 0
        if name in state.masks:
            keep &= state.masks[name].to(keep.device)
        if keep.any():
            found = kmeans.cluster(weight, keep, clusters(keep, widths))
            own |= {f"codebook/{name}": found.codebook, f"assignment/{name}": found.assignment}
    both = {name: value.to(state.device) for name, value in state.world.broadcast_tensors(own).items()}
    names = [name for name in bits if f"codebook/{name}" in both]
    return {name: Clustered(both[f"codebook/{name}"], both[f"assignment/{name}"]) for name in names}


def _compressed(state: State, bits: dict[str, Bits]) -> tuple[bytes, dict[str, Sizes]]:
    """The compressed file of the network, which needs nothing else to be loaded, and what it holds."""
    record = Record(state.architecture.node, state.lineage or Lineage(), state.data.num_classes, state.data.shape)
    return compress(state.model.state_dict(), {}, bits, pruned.description(state.model, record))


def _report(state: State, coded: dict[str, Sizes], file: int) -> None:
    sums = {
        stage: sum(getattr(sizes, stage) for sizes in coded.values())
        for stage in ("dense", "pruned", "shared", "huffman", "entropy")
    }
    log.info(
        "%s: bytes of %d layers: dense %d, pruned %d, shared %d, Huffman %d (entropy %d); %s has %d with the rest",
        state.stage, len(coded), *sums.values(), artifacts.COMPRESSED, file,
    )  # fmt: skip
