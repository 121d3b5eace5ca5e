"""One function per loss: (student, teacher, labels, label_smoothing) -> scalar."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs
from prune_cli.errors import ConfigError


def none(student: Outputs, teacher: Outputs | None, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross entropy with the labels; no teacher."""
    return F.cross_entropy(student.logits, labels, label_smoothing=label_smoothing)


def hinton(
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    label_smoothing: float,
    *,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
) -> Tensor:
    """alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y); Hinton et al., arXiv:1503.02531.

    T^2 keeps the size of the gradient while T changes. KL is a mean over images.

    Args:
        temperature: t > 0; 1 compares the plain probabilities.
        alpha: weight of the teacher in [0, 1]; 0 is plain cross entropy.

    Raises:
        ConfigError: there is no teacher.
    """
    if teacher is None:
        raise ConfigError("distillation=hinton learns from a teacher: give distillation.teacher=dense or a PATH")
    hard = F.cross_entropy(student.logits, labels, label_smoothing=label_smoothing)
    soft = F.kl_div(
        F.log_softmax(student.logits.float() / temperature, dim=1),
        F.log_softmax(teacher.logits.float() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * temperature**2 * soft + (1 - alpha) * hard
