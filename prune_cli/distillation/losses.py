"""Terms over logits: one function per loss, see `distillation.TermLoss`."""

from __future__ import annotations

import functools
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs, Weighted


def soft_targets(student: Outputs, teacher: Outputs, labels: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), a mean over images; Hinton et al., arXiv:1503.02531.

    T^2 keeps the size of the gradient while T changes.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student.logits / temperature, dim=1),
        F.log_softmax(teacher.logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def hinton(
    *, temperature: Annotated[float, Field(gt=0)] = 4.0, alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
) -> Weighted:
    """alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y); Hinton et al., arXiv:1503.02531.

    Args:
        temperature: t > 0; 1 compares the plain probabilities.
        alpha: weight of the teacher in [0, 1]; 0 is plain cross entropy.
    """
    return Weighted(functools.partial(soft_targets, temperature=temperature), weight=alpha, ce_weight=1 - alpha)
