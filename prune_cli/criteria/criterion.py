"""What every criterion is given and what it must say of itself. The criteria are in the files beside this one.

A criterion names in `needs` what it reads besides the weights. Then it is known without running anything whether it
is legal, and `statistics.collect` measures exactly that:

    measured on calibration images
      not_positive     (channels,) share of a channel's outputs that a ReLU makes 0
      mean             (channels,) mean of a channel's outputs after a ReLU
      rank             (channels,) mean matrix rank of a channel's feature map
      input_norm       broadcasts to the weight: L2 norm of the inputs that a weight meets, over all images
      gradient         like the weight: gradient g of the mean loss over all images
      taylor           like the weight: sum over batches of (g * w) ** 2
      taylor_filter    (channels,) sum over batches of (sum over the filter of g * w) ** 2
      taylor_gate      (channels,) sum over batches of (g_scale * scale + g_shift * shift) ** 2, 0 without a norm
      fisher           like the weight: mean over images, one at a time, of g ** 2
    measured without images
      synaptic_flow    like the weight: share of the network's flow that passes the weight
    summed up while the prune stage trains
      movement         like the weight: sum over steps of -lr * g * w
    known from the network and the request
      norm             `LayerView.norm`
      n_keep           `LayerView.n_keep`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

At = Literal["post_act", "pre_norm"]
"""Where outputs are measured: where the channel's norm and activation end, or at the layer itself."""

Need = Literal[
    "not_positive", "mean", "rank", "input_norm", "gradient", "taylor", "taylor_filter", "taylor_gate", "fisher",
    "synaptic_flow", "movement", "norm", "n_keep",
]  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """The norm that normalises a layer's outputs: one scale and one shift per channel; detached, None where absent."""

    scale: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class LayerView:
    """One layer as a criterion sees it.

    Attributes:
        name: parameter name of the weight.
        weight: (out_channels, ...) or (out_features, in_features), transposed convolutions (in_channels,
            out_channels, ...); detached.
        bias: (out_channels,) or None.
        generator: source of randomness of this layer, on the CPU.
        statistics: what the criterion's `needs` collected, by name.
        n_keep: channels that will be kept, for criteria that need `n_keep`; else None.
        norm: for criteria that need `norm`: the norm that follows, None where there is none; else None.
        axis: axis of the weight along which its output channels lie.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    generator: torch.Generator
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    n_keep: int | None = None
    norm: Norm | None = None
    axis: int = 0

    @property
    def filters(self) -> Tensor:
        """The weight as one row per output channel: (channels, everything else)."""
        return self.weight.movedim(self.axis, 0).flatten(1)


@dataclass(frozen=True)
class Criterion:
    """A criterion option.

    Attributes:
        score: layerView -> scores, higher = keep; shaped like the weight for `element`, (channels,) for `channel`.
            Element scores pool to coarser units by summation.
        level: what one score stands for.
        needs: what `score` reads besides weight, bias and generator; see the top of this file.
        at: where outputs are measured, for the needs that are about outputs.
    """

    score: Callable[[LayerView], Tensor]
    level: Literal["element", "channel"] = "element"
    needs: tuple[Need, ...] = ()
    at: At = "post_act"
