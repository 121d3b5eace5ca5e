"""Criteria that need gradients: on calibration images, or of the synaptic flow, which needs none."""

from __future__ import annotations

from torch import Tensor

from prune_cli.criteria.criterion import LayerView


def taylor(view: LayerView) -> Tensor:
    """(g * w) ** 2, summed over batches: first-order change of the loss, squared (arXiv:1906.10771, eq. 8).

    Summed over a filter it is what NNI's TaylorFOWeight ranks by.
    """
    return view.statistics["taylor"]


def taylor_group(view: LayerView) -> Tensor:
    """(sum over the filter of g * w) ** 2, summed over batches (arXiv:1906.10771, eq. 7): (channels,).

    The change of the loss when the filter goes as a whole: its weights' contributions may cancel.
    """
    return view.statistics["taylor_filter"]


def taylor_gate(view: LayerView) -> Tensor:
    """(g_scale * scale + g_shift * shift) ** 2 of the norm that follows, summed over batches: (channels,).

    A gate behind the norm, at 1, has that gradient (arXiv:1906.10771, section 3.2, Taylor-FO-BN).
    """
    return view.statistics["taylor_gate"]


def obd(view: LayerView) -> Tensor:
    """w ** 2 * F / 2 with F the diagonal of the empirical Fisher matrix, image by image, for the Hessian's.

    LeCun et al., Optimal Brain Damage, eq. 5; summed over a filter it is C-OBD (Wang et al., arXiv:1905.05934).
    """
    return view.weight.square() * view.statistics["fisher"] / 2


def snip(view: LayerView) -> Tensor:
    """|g * w| with g the gradient of the mean loss over all calibration images (Lee et al., arXiv:1810.02340, eq. 4)."""
    return (view.statistics["gradient"] * view.weight).abs()


def slope(view: LayerView) -> Tensor:
    """|g| with g the gradient of the mean loss: what would move a weight that is zero (Evci et al., arXiv:1911.11134)."""
    return view.statistics["gradient"].abs()


def grasp(view: LayerView) -> Tensor:
    """w * H g, g the gradient of the mean loss and H its Hessian (Wang et al., arXiv:2002.07376, eq. 8, negated).

    To first order, twice it is how much the squared gradient norm falls when the weight goes: what keeps gradients flowing
    ranks highest, and weights that hold them back, with negative scores, go first.
    """
    return view.weight * view.statistics["hessian_gradient"]


def synflow(view: LayerView) -> Tensor:
    """Share of the network's synaptic flow that passes the weight (Tanaka et al., arXiv:2006.05467, eq. 3)."""
    return view.statistics["synaptic_flow"]
