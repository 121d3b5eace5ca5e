"""What a regulariser is. The regularisers are in the files beside this one.

A regulariser is a function `(model, example_inputs, *, its parameters) -> Penalty`. It is called once per stage, with
the network as it enters the stage, and does there whatever has to be done only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from prune_cli.training.fit import Regularise

Norms = Literal["all", "inner"]


@dataclass(frozen=True)
class Penalty:
    """A term of the loss, by its gradient.

    Attributes:
        add: adds the gradient of the term to the `.grad` of the parameters; see `fit.Regularise`.
        norms: which norms it made sparse, where a pruning that looks at others would make no sense; else None.
    """

    add: Regularise
    norms: Norms | None = None


Regulariser = Callable[[nn.Module, Tensor], Penalty]
