"""Terms over logits: one function per loss, see `distillation.TermLoss`."""

from __future__ import annotations

import functools
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs, Weighted

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]

SMALL = 1e-7  # beside a standard deviation, as in the paper's code


def standardised(logits: Tensor) -> Tensor:
    """(z - mean) / standard deviation over the classes of each image (Sun et al., arXiv:2403.01427, eq. 11).

    Student and teacher then need to agree in the order and the relative distances of logits alone.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + SMALL)


def soft_targets(
    student: Outputs, teacher: Outputs, labels: Tensor, *, temperature: float, standardise: bool = False
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), a mean over images; Hinton et al., arXiv:1503.02531.

    T^2 keeps the size of the gradient while T changes.
    """
    own, taught = _logits(student, teacher, standardise)
    return temperature**2 * _divergence((taught / temperature).log_softmax(1), (own / temperature).log_softmax(1))


def hinton(
    *,
    temperature: Positive = 4.0,
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9,
    standardise: bool = False,
) -> Weighted:
    """alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y); Hinton et al., arXiv:1503.02531.

    Args:
        temperature: t > 0; 1 compares the plain probabilities.
        alpha: weight of the teacher in [0, 1]; 0 is plain cross entropy.
        standardise: compare standardised logits; the paper goes with temperature=2 and a weight of 9 beside 0.1 of the
            labels, which is alpha=0.989 at a learning rate 9.1 times as large.
    """
    term = functools.partial(soft_targets, temperature=temperature, standardise=standardise)
    return Weighted(term, weight=alpha, ce_weight=1 - alpha)


def dkd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    temperature: Positive = 4.0,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 (alpha KL of target against the rest + beta KL among the rest), a mean over images.

    Decoupled knowledge distillation (Zhao et al., arXiv:2203.08679, eq. 7): with alpha = 1 and beta = the teacher's
    probability of the rest it is `soft_targets`.

    Args:
        temperature: T > 0.
        alpha: weight of what the teacher says of the target class.
        beta: weight of what it says of all others; 8 for most pairs of CIFAR-100, 1 to 6 for ResNets that are much smaller.
        standardise: compare standardised logits.
    """
    own, taught = (logits / temperature for logits in _logits(student, teacher, standardise))
    target = F.one_hot(labels, own.shape[1]).bool()
    s, t = own.log_softmax(1), taught.log_softmax(1)
    binary = _divergence(_binary(t, target), _binary(s, target))
    others = [logits[~target].view(len(logits), -1).log_softmax(1) for logits in (taught, own)]
    return temperature**2 * (alpha * binary + beta * _divergence(*others))


def _logits(student: Outputs, teacher: Outputs, standardise: bool) -> tuple[Tensor, Tensor]:
    if standardise:
        return standardised(student.logits), standardised(teacher.logits)
    return student.logits, teacher.logits


def _binary(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Logarithms of the probability of the target class and of all others together, (batch, 2)."""
    own = log_probabilities[target]
    rest = log_probabilities.masked_fill(target, -torch.inf).logsumexp(1)
    return torch.stack([own, rest], 1)


def _divergence(taught: Tensor, own: Tensor) -> Tensor:
    """KL(teacher || student) of logarithms of probabilities, a mean over images."""
    return F.kl_div(own, taught, reduction="batchmean", log_target=True)
