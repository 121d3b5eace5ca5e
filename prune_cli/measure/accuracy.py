"""Accuracy and loss on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import DataError
from prune_cli.progress import track
from prune_cli.structure.modes import evaluating


@dataclass(frozen=True)
class Metrics:
    """Counts of right answers (best guess, among the five best) of `total`; acc in percent, mean loss."""

    correct: int
    correct5: int
    total: int
    loss: float

    @property
    def acc1(self) -> float:
        """Percentage whose best guess is right."""
        return 100 * self.correct / self.total

    @property
    def acc5(self) -> float:
        """Percentage whose class is among the five best guesses (100 with at most five classes)."""
        return 100 * self.correct5 / self.total


# ------------------------------------------------------------------------------------------------ accuracy


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Metrics:
    """Counts right answers over all examples of `batches`, in eval mode and without gradients.

    Args:
        model: network from images to logits (N, classes), or to something with an attribute `logits`.
        batches: (images, classes) of any sizes; every example counts once.
        loss: function of logits and classes returning the mean over the batch; None for cross-entropy.
            Summed in float64, weighted by the size of the batch.

    Raises:
        DataError: if there is no example, or a class that the network does not have.
    """
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    correct = correct5 = total = 0
    loss_sum = 0.0
    with evaluating(model), torch.no_grad():
        for images, target in track(batches, "evaluating"):
            if len(target) == 0:
                continue
            target = target.to(device, non_blocking=True)
            output = model(images.to(device, non_blocking=True))
            logits = (output if isinstance(output, Tensor) else output.logits).float()
            if int(target.max()) >= logits.shape[1]:
                raise DataError(f"class {int(target.max())} in the data, the network has {logits.shape[1]} outputs")
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            correct += int((logits.argmax(1) == target).sum())
            correct5 += int(best.any(1).sum())
            total += len(target)
            if loss is None:
                losses = F.cross_entropy(logits, target, reduction="none")
                loss_sum += float(losses.cpu().double().sum())
            else:
                loss_sum += float(loss(logits, target)) * len(target)
    if total == 0:
        raise DataError("no examples to evaluate on")
    return Metrics(correct, correct5, total, loss_sum / total)
