"""Criteria that need a layer's inputs or outputs on calibration images. Where outputs are measured is the option's `at`."""

from __future__ import annotations

from torch import Tensor

from prune_cli.criteria.criterion import LayerView


def apoz(view: LayerView) -> Tensor:
    """1 - average percentage of zeros (Hu et al., arXiv:1607.03250, eq. 1), as a fraction in [0, 1]: (channels,).

    Outputs that a ReLU would make 0 count as zeros too, so `at: pre_norm` applies a ReLU to the layer's own outputs.
    """
    return 1 - view.statistics["not_positive"]


def mean_activation(view: LayerView) -> Tensor:
    """Mean output after a ReLU (Molchanov et al., arXiv:1611.06440, section 2.2): (channels,)."""
    return view.statistics["mean"]


def hrank(view: LayerView) -> Tensor:
    """Mean matrix rank of a channel's feature map (Lin et al., arXiv:2002.10179, eq. 6): (channels,)."""
    return view.statistics["rank"]


def wanda(view: LayerView) -> Tensor:
    """|w| times the L2 norm of the inputs that it meets (Sun et al., arXiv:2306.11695, eq. 1), like the weight.

    In a convolution every kernel position meets inputs of its own: the norm is that of a column of the unfolded patches.
    """
    return view.weight.abs() * view.statistics["input_norm"]
