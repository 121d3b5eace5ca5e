"""Movement: which weights training moves away from zero (Sanh et al., arXiv:2005.07683)."""

from __future__ import annotations

from torch import Tensor

from prune_cli.criteria.criterion import LayerView


def movement(view: LayerView) -> Tensor:
    """S, the sum of -lr * g * w over the training steps of the stage so far (section 3.1, eq. 4): higher moved away."""
    return view.statistics["movement"]
